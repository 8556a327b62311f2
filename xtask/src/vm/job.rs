//! What the guest is to do, as it finds it in its initramfs; and the lines by which it tells how far it is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where the guest finds its job.
pub const PATH: &str = "/vm/job.json";
/// Where the guest finds its modules: files whose names sort in load order.
pub const MODULES: &str = "/vm/modules";
/// The second serial port: commands' input and output. The first one is the console.
pub const TERMINAL: &str = "/dev/ttyS1";

/// Commands, run one after the other, whatever becomes of each.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Job {
    pub commands: Vec<GuestCommand>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestCommand {
    /// What marks call it: no blanks.
    pub name: String,
    /// The program and its arguments.
    pub arguments: Vec<String>,
    /// Environment, beside PATH and HOME.
    pub environment: Vec<(String, String)>,
    /// What comes after it is run only if this succeeds.
    pub essential: bool,
}

impl GuestCommand {
    /// A command with no environment of its own, and nothing that depends on it.
    pub fn new(name: &str, arguments: &[String]) -> Self {
        Self {
            name: name.to_owned(),
            arguments: arguments.to_vec(),
            environment: Vec::new(),
            essential: false,
        }
    }
}

/// A line on the console that init writes. They go through the kernel's own log, which never mixes lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The job begins.
    Started,
    /// The command of this name begins.
    Begin(String),
    /// It has ended, with this status: as a shell would tell it.
    End(String, i32),
    /// The job is done.
    Done,
    /// Something in the guest that should not be.
    Trouble(String),
}

const SIGN: &str = "redirect-vm: ";

impl fmt::Display for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(SIGN)?;
        match self {
            Self::Started => formatter.write_str("started"),
            Self::Begin(name) => write!(formatter, "begin {name}"),
            Self::End(name, status) => write!(formatter, "end {name} {status}"),
            Self::Done => formatter.write_str("done"),
            Self::Trouble(text) => write!(formatter, "trouble {text}"),
        }
    }
}

impl Mark {
    /// Reads one out of a console line, which has the kernel's time before it.
    pub fn read(line: &str) -> Option<Self> {
        let (_, rest) = line.trim_end().split_once(SIGN)?;
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(match word {
            "started" => Self::Started,
            "done" => Self::Done,
            "begin" => Self::Begin(rest.to_owned()),
            "trouble" => Self::Trouble(rest.to_owned()),
            "end" => {
                let (name, status) = rest.rsplit_once(' ')?;
                Self::End(name.to_owned(), status.parse().ok()?)
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_were_written() {
        for mark in [
            Mark::Started,
            Mark::Begin("outbound".to_owned()),
            Mark::End("outbound".to_owned(), 101),
            Mark::Done,
            Mark::Trouble("mounting /proc: no such device".to_owned()),
        ] {
            assert_eq!(Mark::read(&format!("[    2.105] {mark}\r")), Some(mark));
        }
        assert_eq!(Mark::read("[    2.105] veth0: link becomes ready"), None);
        assert_eq!(Mark::read("redirect-vm: end outbound"), None);
    }
}
