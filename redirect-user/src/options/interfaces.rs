//! Names of network interfaces, as iptables' `-i` and `-o` take them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::Entry;
use super::setting::entries;

pub(super) const INTERFACES: &str =
    "interface names of 1-15 characters, and prefixes of names such as eth+";

/// `IFNAMSIZ` without the closing NUL.
const MAX_BYTES: usize = 15;

/// An interface's name, or a prefix of names that ends in `+`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InterfacePattern(String);

impl InterfacePattern {
    /// Whether an interface of that name is meant. `+` alone means every interface.
    pub fn matches(&self, interface: &str) -> bool {
        match self.0.strip_suffix('+') {
            Some(prefix) => interface.starts_with(prefix),
            None => interface == self.0,
        }
    }
}

/// As it is written.
impl fmt::Display for InterfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A comma list of patterns, sorted, each once.
pub(super) fn interface_list(text: &str) -> Result<Vec<InterfacePattern>, Entry> {
    let mut patterns = entries(text).map(pattern).collect::<Result<Vec<_>, _>>()?;
    patterns.sort_unstable();
    patterns.dedup();
    Ok(patterns)
}

/// What the kernel allows in a name (`dev_valid_name` in net/core/dev.c), and neither of what means something else to people.
fn pattern(entry: &str) -> Result<InterfacePattern, Entry> {
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
    let problem = if entry.len() > MAX_BYTES {
        "is longer than 15 characters"
    } else if matches!(entry, "." | "..") || entry.contains(forbidden) {
        "is not a name that an interface can have"
    } else if entry.contains('*') {
        "has a *, where a + at the end means any ending"
    } else if entry.starts_with('!') {
        "has a !, but names cannot be negated"
    } else {
        return Ok(InterfacePattern(entry.to_owned()));
    };
    Err(Entry::new(entry, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> InterfacePattern {
        interface_list(text).expect(text).remove(0)
    }

    #[test]
    fn plus_at_the_end_means_any_ending() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth01", "eth0", false),
            ("eth+", "eth0", true),
            ("eth+", "eth", true),
            ("eth+", "veth0", false),
            ("+", "anything", true),
            ("a+b", "a+b", true),
            ("a+b", "axb", false),
            ("net1.100", "net1.100", true),
        ] {
            assert_eq!(one(pattern).matches(name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn lists_are_sets() {
        let list = interface_list(" net2, net1,,net2,eth+ ").expect("valid");
        let printed: Vec<_> = list.iter().map(ToString::to_string).collect();
        assert_eq!(printed, ["eth+", "net1", "net2"]);
        assert_eq!(interface_list(","), Ok(Vec::new()));
        assert!(interface_list("abcdefghijklmno").is_ok());
    }
}
