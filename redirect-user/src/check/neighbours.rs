//! Other programs on the hooks that redirect uses, from the root of the cgroups down to the pod's.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Finding, Level};
use crate::observe::cgroup::Cgroup;
use crate::observe::mounts;
use crate::programs::HOOKS;
use crate::sys::bpf::{self, Attached};

/// How the names of well-known programs begin, and whose they are. Names have 15 letters.
const OWNERS: &[(&str, &str)] = &[
    ("cil_", "Cilium"),
    ("calico_", "Calico"),
    ("cali_", "Calico"),
    ("sd_", "systemd"),
];
const OWN: &str = "redirect_";

pub(super) fn findings(cgroup: Option<&Cgroup>) -> Vec<Finding> {
    const WHAT: &str = "other programs";
    match look(cgroup) {
        Ok(findings) if findings.is_empty() => {
            let detail = format!("none on these hooks: {}", names().join(", "));
            vec![Finding::new(WHAT, Level::Ok, detail)]
        }
        Ok(findings) => findings,
        Err(error) => {
            let detail = format!("cannot be listed: {error:#}");
            vec![Finding::new(WHAT, Level::Warning, detail)]
        }
    }
}

fn names() -> Vec<&'static str> {
    HOOKS.iter().map(|hook| hook.name).collect()
}

fn look(cgroup: Option<&Cgroup>) -> Result<Vec<Finding>> {
    let root = mounts::mountpoint()?;
    let programs: HashMap<u32, String> = aya::programs::loaded_programs()
        .flatten()
        .map(|program| {
            let name = program.name_as_str().filter(|name| !name.is_empty());
            let nameless = || format!("program {}", program.id());
            (program.id(), name.map_or_else(nameless, str::to_owned))
        })
        .collect();
    let mut findings = Vec::new();
    for place in places(&root, cgroup.map(Cgroup::path)) {
        let directory = File::open(&place).with_context(|| place.display().to_string())?;
        for hook in HOOKS {
            let attached = bpf::attached(directory.as_fd(), hook.attach_type)
                .with_context(|| format!("{} at {}", hook.name, place.display()))?;
            let names: Vec<&str> = attached
                .program_ids
                .iter()
                .filter_map(|id| programs.get(id).map(String::as_str))
                .filter(|name| !name.starts_with(OWN))
                .collect();
            if !names.is_empty() {
                let what = format!("{} at {}", hook.name, place.display());
                let pods_own = cgroup.is_some_and(|cgroup| cgroup.path() == place);
                findings.push(judge(&what, &names, &attached, pods_own));
            }
        }
    }
    Ok(findings)
}

/// The root and, from there, every cgroup down to this one.
fn places(root: &Path, cgroup: Option<&Path>) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = cgroup
        .into_iter()
        .flat_map(Path::ancestors)
        .filter(|path| path.starts_with(root) && *path != root)
        .map(Path::to_owned)
        .collect();
    places.push(root.to_owned());
    places.reverse();
    places
}

/// What it means for redirect, from how `kernel/bpf/cgroup.c` treats programs of several cgroups.
fn judge(what: &str, names: &[&str], attached: &Attached, pods_own: bool) -> Finding {
    let whose: Vec<String> = names.iter().map(|name| describe(name)).collect();
    let whose = whose.join(", ");
    let (level, meaning) = if attached.is_exclusive() && !pods_own {
        (
            Level::Bad,
            "attached so that nothing may be attached below it: its owner has to attach it with BPF_F_ALLOW_MULTI",
        )
    } else if attached.is_exclusive() || (attached.is_overridable() && pods_own) {
        (
            Level::Bad,
            "attached as the only one of its cgroup: its owner has to attach it with BPF_F_ALLOW_MULTI",
        )
    } else if attached.is_overridable() {
        (
            Level::Warning,
            "attached so that a pod's own programs take its place: it will not run for captured pods",
        )
    } else if pods_own {
        (
            Level::Note,
            "runs before redirect's, in the order of attachment, and may change the destination that redirect sees",
        )
    } else {
        (
            Level::Note,
            "runs after redirect's, and sees captured connections with the destination that redirect gave them",
        )
    };
    Finding::new(what, level, format!("{whose}: {meaning}"))
}

fn describe(name: &str) -> String {
    OWNERS
        .iter()
        .find(|(start, _)| name.starts_with(start))
        .map_or_else(|| name.to_owned(), |(_, owner)| format!("{name} ({owner})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_looked_at_from_the_root_down() {
        let root = Path::new("/sys/fs/cgroup");
        let pod = Path::new("/sys/fs/cgroup/kubepods/pod1");
        let paths = places(root, Some(pod));
        assert_eq!(paths, [root, Path::new("/sys/fs/cgroup/kubepods"), pod]);
        assert_eq!(places(root, None), [root]);
    }

    #[test]
    fn meaning_depends_on_how_and_where_it_is_attached() {
        let level = |flags, pods_own| {
            let attached = Attached {
                program_ids: vec![1],
                flags,
            };
            judge("connect4", &["cil_sock4_conn"], &attached, pods_own).level
        };
        assert_eq!(level(0, false), Level::Bad);
        assert_eq!(level(0, true), Level::Bad);
        assert_eq!(level(Attached::OVERRIDE, false), Level::Warning);
        assert_eq!(level(Attached::OVERRIDE, true), Level::Bad);
        assert_eq!(level(Attached::MULTI, false), Level::Note);
        assert_eq!(level(Attached::MULTI, true), Level::Note);
    }

    #[test]
    fn well_known_programs_are_told_by_name() {
        assert_eq!(describe("cil_sock4_conne"), "cil_sock4_conne (Cilium)");
        assert_eq!(describe("calico_connect_"), "calico_connect_ (Calico)");
        assert_eq!(describe("mine"), "mine");
    }
}
