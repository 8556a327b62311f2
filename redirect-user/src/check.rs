//! `redirect check`: whether this node can do what the other commands will ask of it, before a pod depends on it.
//!
//! Nothing is changed: the programs are loaded and attached where nobody sees them, and are gone when the check ends.

mod kernel;
mod leftovers;
mod lookups;
mod neighbours;
mod node;
mod owners;
mod rehearsal;

use serde::Serialize;

use crate::observe::cgroup::Cgroup;
use crate::observe::netns::NetworkNamespace;

/// How a finding bears on redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Something to know.
    Note,
    /// Works, with less than there could be, or could not be looked at.
    Warning,
    /// Has to be changed first.
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it bears on redirect.
    pub level: Level,
    /// What was found and, unless it is well, what to do.
    pub detail: String,
}

impl Finding {
    fn new(what: &str, level: Level, detail: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            level,
            detail: detail.into(),
        }
    }
}

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether nothing is [`Level::Bad`].
    pub ready: bool,
    /// In the order in which things depend on each other.
    pub findings: Vec<Finding>,
}

/// What to look at, beside the node itself.
#[derive(Debug, Default)]
pub struct Subject {
    /// A pod's cgroup, whose ancestors are looked at too.
    pub cgroup: Option<Cgroup>,
    /// A pod's network namespace; without, that of this process.
    pub netns: Option<NetworkNamespace>,
}

/// Looks at everything.
pub fn check(subject: &Subject) -> Report {
    let mut findings = kernel::findings();
    findings.extend(node::findings());
    findings.push(rehearsal::finding());
    findings.extend(neighbours::findings(subject.cgroup.as_ref()));
    findings.extend(lookups::findings(subject.netns.as_ref()));
    findings.extend(leftovers::findings(subject.netns.as_ref()));
    Report {
        ready: findings.iter().all(|finding| finding.level < Level::Bad),
        findings,
    }
}
