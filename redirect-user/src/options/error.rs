//! What is wrong with an option, in one line.

use std::fmt;

use super::istio_iptables::DURATION;
use super::switches::BOOLEAN;

/// Longest piece of a value an error repeats, in characters.
const QUOTED_MAX: usize = 160;

/// A refused option. Its `Display` is one line: origin (flag or environment variable), value, what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// The value is not one of those allowed.
    #[error("{origin}: {fault}: allowed are {allowed}")]
    NotAllowed {
        /// `--flag`, or the environment variable the value came from.
        origin: String,
        /// The value, and its bad entry.
        fault: Fault,
        /// What is allowed instead.
        allowed: &'static str,
    },
    /// A list is longer than a pod's settings hold.
    #[error(
        "{origin}: {}: allowed are at most {max} entries, got {got}",
        quote(value)
    )]
    TooMany {
        /// `--flag`, or the environment variable the value came from.
        origin: String,
        /// The whole value.
        value: String,
        /// How many entries there may be.
        max: usize,
        /// How many there are.
        got: usize,
    },
    /// Istio's own limit, in Istio's words.
    #[error(
        "{origin}: number of owner groups whose outgoing traffic should be redirected to Envoy cannot exceed {max}, got {got}: {}",
        quote(value)
    )]
    TooManyOwnerGroups {
        /// `--flag`, or the environment variable the value came from.
        origin: String,
        /// The whole value.
        value: String,
        /// How many entries there may be.
        max: usize,
        /// How many there are.
        got: usize,
    },
    /// A file that an option names cannot be read.
    #[error("{origin}: {} {reason}", quote(path))]
    File {
        /// `--flag` that names the file, or whose default it is.
        origin: String,
        /// The file.
        path: String,
        /// Continues a sentence that begins with the file's name.
        reason: String,
    },
    /// Two options that exclude each other.
    #[error("{origin}: {} cannot be combined with {why}", quote(value))]
    NotWith {
        /// `--flag`, or the environment variable the value came from.
        origin: String,
        /// The whole value.
        value: String,
        /// The other option, and what would happen.
        why: &'static str,
    },
}

impl OptionError {
    /// Where the value came from: `--flag`, or an environment variable.
    #[must_use]
    pub fn origin(&self) -> &str {
        match self {
            Self::NotAllowed { origin, .. }
            | Self::TooMany { origin, .. }
            | Self::TooManyOwnerGroups { origin, .. }
            | Self::File { origin, .. }
            | Self::NotWith { origin, .. } => origin,
        }
    }

    /// The same about a value that was given elsewhere, in these words.
    #[must_use]
    pub fn given_as(mut self, place: &str, text: &str) -> Self {
        match &mut self {
            Self::NotAllowed { origin, fault, .. } => {
                place.clone_into(origin);
                text.clone_into(&mut fault.value);
            }
            Self::TooMany { origin, value, .. }
            | Self::TooManyOwnerGroups { origin, value, .. }
            | Self::NotWith { origin, value, .. } => {
                place.clone_into(origin);
                text.clone_into(value);
            }
            Self::File { origin, .. } => place.clone_into(origin),
        }
        self
    }

    /// Whether istio-iptables' own flag parser would have stopped at it: a boolean or a duration on the command line that is none.
    /// Every other bad value is found later there.
    #[must_use]
    pub fn is_unparsable_flag(&self) -> bool {
        matches!(self, Self::NotAllowed { origin, allowed, .. }
            if origin.starts_with("--") && ([BOOLEAN, DURATION].contains(allowed) || origin == "--iptables-probe-port"))
    }
}

/// A value and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The whole value, as given.
    pub value: String,
    /// The entry of the value that is wrong.
    pub entry: Entry,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value != self.entry.text {
            write!(f, "{}: ", quote(&self.value))?;
        }
        write!(f, "{} {}", quote(&self.entry.text), self.entry.problem)
    }
}

/// A bad entry of a value: what parsers return, before it is known where the value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The entry, trimmed.
    pub text: String,
    /// Continues a sentence that begins with the entry: "is not a port".
    pub problem: String,
}

impl Entry {
    pub(super) fn new(text: &str, problem: impl Into<String>) -> Self {
        Self {
            text: text.to_owned(),
            problem: problem.into(),
        }
    }
}

/// In quotes, escaped so that it stays on one line, and cut if it is long.
fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}
