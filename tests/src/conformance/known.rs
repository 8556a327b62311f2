//! Where redirect differs from iptables on purpose. docs/behaviour.md has the same list, and a test compares the two.

use super::{attempt::Attempt, observe::Line, setting::Setting};

/// One deliberate difference.
pub struct Known {
    /// The first words of its line in the documentation.
    pub name: &'static str,
    /// The rest of that line.
    pub why: &'static str,
    /// Whether it accounts for a line in which the pods disagree.
    applies: fn(&Setting, &Attempt, &Line) -> bool,
}

/// All of them.
pub const KNOWN: &[Known] = &[];

/// The difference that accounts for a line, if one does.
pub fn known(setting: &Setting, attempt: &Attempt, line: &Line) -> Option<&'static Known> {
    KNOWN
        .iter()
        .find(|known| (known.applies)(setting, attempt, line))
}
