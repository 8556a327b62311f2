//! Other programs that choose sockets in a network namespace, as redirect's own does.

use std::os::fd::AsFd as _;

use anyhow::Result;
use aya_obj::generated::bpf_attach_type::BPF_SK_LOOKUP;

use super::owners::Names;
use super::{Finding, Level};
use crate::observe::netns::NetworkNamespace;
use crate::sys::bpf;

const WHAT: &str = "sk_lookup";

pub(super) fn findings(netns: Option<&NetworkNamespace>) -> Vec<Finding> {
    look(netns).unwrap_or_else(|error| {
        let detail = format!("cannot be listed: {error:#}");
        vec![Finding::new(WHAT, Level::Warning, detail)]
    })
}

fn look(netns: Option<&NetworkNamespace>) -> Result<Vec<Finding>> {
    let ids = match netns {
        Some(netns) => bpf::attached(netns.as_fd(), BPF_SK_LOOKUP)?,
        None => bpf::attached(NetworkNamespace::own()?.as_fd(), BPF_SK_LOOKUP)?,
    }
    .program_ids;
    let names = Names::read();
    let (before, after) = around(&ids, |id| names.is_own(id));
    Ok(judge(&names.others(before), &names.others(after)))
}

/// What runs before redirect's own programs, and what is among them or behind. Whatever is there before redirect runs before it.
fn around(ids: &[u32], is_own: impl Fn(u32) -> bool) -> (&[u32], &[u32]) {
    let first = ids.iter().position(|id| is_own(*id));
    ids.split_at(first.unwrap_or(ids.len()))
}

/// What it means for redirect, from how `BPF_PROG_SK_LOOKUP_RUN_ARRAY` treats several programs: the last choice counts, and
/// `bpf_sk_assign` refuses one where another program has chosen before, unless it is told to replace that.
fn judge(before: &[String], after: &[String]) -> Vec<Finding> {
    let meanings = [
        (
            before,
            Level::Warning,
            "runs before redirect's: a connection that it chooses a socket for does not reach the proxy",
        ),
        (
            after,
            Level::Note,
            "runs after redirect's: it has a say where redirect has chosen no socket, or replaces the one that redirect chose (BPF_SK_LOOKUP_F_REPLACE)",
        ),
    ];
    let found: Vec<Finding> = meanings
        .into_iter()
        .filter(|(names, ..)| !names.is_empty())
        .map(|(names, level, meaning)| {
            Finding::new(WHAT, level, format!("{}: {meaning}", names.join(", ")))
        })
        .collect();
    if found.is_empty() {
        let detail = "no other program chooses sockets in this network namespace";
        return vec![Finding::new(WHAT, Level::Ok, detail)];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_told_from_the_first_own_program() {
        const OWN: u32 = 7;
        let around = |ids: &[u32]| {
            let (before, after) = around(ids, |id| id == OWN);
            (before.to_vec(), after.to_vec())
        };
        assert_eq!(around(&[1, 2]), (vec![1, 2], vec![]));
        assert_eq!(around(&[1, OWN, 2]), (vec![1], vec![OWN, 2]));
        assert_eq!(around(&[]), (vec![], vec![]));
    }

    #[test]
    fn meaning_depends_on_the_order() {
        let other = ["mine".to_owned()];
        let levels = |before, after| -> Vec<Level> {
            let found = judge(before, after);
            found.iter().map(|finding| finding.level).collect()
        };
        assert_eq!(levels(&[], &[]), [Level::Ok]);
        assert_eq!(levels(&other, &[]), [Level::Warning]);
        assert_eq!(levels(&[], &other), [Level::Note]);
        assert_eq!(levels(&other, &other), [Level::Warning, Level::Note]);
    }
}
