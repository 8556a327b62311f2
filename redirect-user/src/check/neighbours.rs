//! Other programs on the hooks that redirect uses, from the root of the cgroups down to the pod's.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::owners::Names;
use super::{Finding, Level};
use crate::observe::cgroup::Cgroup;
use crate::observe::mounts;
use crate::programs::{HOOKS, Hook};
use crate::sys::bpf::{self, Attached};

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
    points().map(|point| point.name).collect()
}

/// The hooks, but for those whose attach point has a later one: that one's name is the kernel's.
fn points() -> impl Iterator<Item = &'static Hook> {
    HOOKS.iter().enumerate().filter_map(|(at, hook)| {
        let mut later = HOOKS[at + 1..].iter();
        (!later.any(|later| later.attach_type == hook.attach_type)).then_some(hook)
    })
}

fn look(cgroup: Option<&Cgroup>) -> Result<Vec<Finding>> {
    let root = mounts::mountpoint()?;
    let programs = Names::read();
    let mut findings = Vec::new();
    for place in places(&root, cgroup.map(Cgroup::path)) {
        let directory = File::open(&place).with_context(|| place.display().to_string())?;
        for point in points() {
            let attached = bpf::attached(directory.as_fd(), point.attach_type)
                .with_context(|| format!("{} at {}", point.name, place.display()))?;
            let names = programs.others(&attached.program_ids);
            if !names.is_empty() {
                let what = format!("{} at {}", point.name, place.display());
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
fn judge(what: &str, names: &[String], attached: &Attached, pods_own: bool) -> Finding {
    let whose = names.join(", ");
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
            judge("connect4", &["mine".to_owned()], &attached, pods_own).level
        };
        assert_eq!(level(0, false), Level::Bad);
        assert_eq!(level(0, true), Level::Bad);
        assert_eq!(level(Attached::OVERRIDE, false), Level::Warning);
        assert_eq!(level(Attached::OVERRIDE, true), Level::Bad);
        assert_eq!(level(Attached::MULTI, false), Level::Note);
        assert_eq!(level(Attached::MULTI, true), Level::Note);
    }

    #[test]
    fn attach_point_of_two_hooks_is_looked_at_once() {
        let names = names();
        for once in ["connect4", "connect6", "sendmsg4", "sendmsg6"] {
            assert!(names.contains(&once), "{names:?}");
        }
        for (at, point) in points().enumerate() {
            let mut others = points().skip(at + 1);
            assert!(others.all(|other| other.attach_type != point.attach_type));
        }
        let looked_at = |hook: &Hook| points().any(|point| point.attach_type == hook.attach_type);
        assert!(HOOKS.iter().all(looked_at));
    }
}
