//! The cgroup of the pod that this process runs in: kubelet's, above the one of the container.
//!
//! A container usually has a cgroup namespace: `/proc/self/cgroup` says `0::/`, and its own `/sys/fs/cgroup` shows nothing above
//! itself. What is above is seen through a mount of the host's tree only. There, `cgroup.procs` names this process in exactly one
//! directory: process ids are translated for whoever reads them, and processes of other containers show as 0.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::cgroup;
use super::mounts::{self, Mount};

/// Largest number of directories that are searched for this process.
const MAX_DIRECTORIES: usize = 65_536;
/// Shortest uid: a hash (static pods) or a UUID without its dashes.
const UID_DIGITS: usize = 32;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the pod's cgroup was not found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What is mounted cannot be read.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// `/proc/self/cgroup` is unreadable.
    #[error("cannot read /proc/self/cgroup: {0}")]
    Own(io::Error),
    /// What is mounted, if anything, ends below the pod's cgroup.
    #[error(
        "the cgroup above this container is not visible: mount the host's /sys/fs/cgroup at /sys/fs/cgroup (hostPath); mounted are {}",
        list(mountpoints)
    )]
    Hidden {
        /// Where cgroup2 is mounted.
        mountpoints: Vec<PathBuf>,
    },
    /// All is visible, and there is no pod.
    #[error(
        "this process is not in a pod: no cgroup above {cgroup:?} is named like kubelet's (pod<uid>, or kubepods-…-pod<uid>.slice)"
    )]
    NotInAPod {
        /// The process' own cgroup.
        cgroup: PathBuf,
    },
}

/// The directory of the pod's cgroup.
pub fn find() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").map_err(Error::Own)?;
    find_in(&own, &mounts::cgroup2()?, std::process::id())
}

/// `own` is the text of `/proc/self/cgroup`.
fn find_in(own: &str, mounts: &[Mount], pid: u32) -> Result<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::"));
    let mut whole = None;
    for mount in mounts {
        let Some(container) = locate(own, mount, pid) else {
            continue;
        };
        let above = container.strip_prefix(&mount.point).unwrap_or(&container);
        // The mount point's own name says nothing: it is the mounter's choice.
        let pod = above.ancestors().find(|path| {
            path.file_name()
                .is_some_and(|name| uid_of(&name.to_string_lossy()).is_some())
        });
        match pod {
            Some(pod) => return Ok(mount.point.join(pod)),
            None if mount.is_whole() => whole = Some(container),
            None => {}
        }
    }
    Err(match whole {
        Some(cgroup) => Error::NotInAPod { cgroup },
        None => Error::Hidden {
            mountpoints: mounts.iter().map(|mount| mount.point.clone()).collect(),
        },
    })
}

/// This process' cgroup below a mount: where `/proc/self/cgroup` says, else wherever it is listed.
fn locate(own: Option<&str>, mount: &Mount, pid: u32) -> Option<PathBuf> {
    let told = own
        .and_then(|own| Path::new(own).strip_prefix(&mount.root).ok())
        .filter(|path| !path.components().any(|part| part == Component::ParentDir))
        .map(|path| mount.point.join(path));
    told.filter(|path| lists(path, pid))
        .or_else(|| search(&mount.point, pid))
}

fn search(top: &Path, pid: u32) -> Option<PathBuf> {
    let (mut pending, mut seen) = (vec![top.to_owned()], 0);
    while let Some(directory) = pending.pop() {
        if lists(&directory, pid) {
            return Some(directory);
        }
        seen += 1;
        if seen > MAX_DIRECTORIES {
            return None;
        }
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        pending.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    None
}

fn lists(directory: &Path, pid: u32) -> bool {
    fs::read_to_string(directory.join("cgroup.procs"))
        .is_ok_and(|pids| pids.lines().any(|line| line.parse() == Ok(pid)))
}

/// The uid of the pod whose cgroup kubelet gives that name: `pod<uid>` with the cgroupfs driver; with the systemd driver
/// `-pod<uid>.slice` behind the names of the slices above, the uid's dashes written as underscores.
pub(super) fn uid_of(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit('-').next()?.strip_prefix("pod")?,
        None => name.strip_prefix("pod")?,
    };
    let is_uid = uid
        .chars()
        .all(|c| c.is_ascii_hexdigit() || matches!(c, '-' | '_'))
        && uid.chars().filter(char::is_ascii_hexdigit).count() >= UID_DIGITS;
    is_uid.then(|| uid.replace('_', "-"))
}

fn list(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "none".to_owned();
    }
    let paths: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const UID: &str = "0a1b2c3d-4e5f-6789-abcd-ef0123456789";
    const UID_: &str = "0a1b2c3d_4e5f_6789_abcd_ef0123456789";
    const PID: u32 = 4711;

    /// Directories that look like a cgroup mount: a process listed in one of them, another one everywhere.
    struct Tree(PathBuf);

    impl Tree {
        /// `container` holds the process. The root has `cgroup.events` unless it shows the whole machine.
        fn new(container: &str, whole: bool) -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let top =
                std::env::temp_dir().join(format!("pod-cgroup-{}-{number}", std::process::id()));
            let tree = Self(top);
            for path in ["", "system.slice/sshd.service", "kubepods/podx/other"] {
                tree.cgroup(path, "1\n0\n");
            }
            let steps: Vec<_> = Path::new(container).ancestors().collect();
            for path in steps.iter().rev() {
                tree.cgroup(&path.to_string_lossy(), "47110\n");
            }
            tree.cgroup(container, "12\n4711\n");
            if whole {
                fs::remove_file(tree.0.join("cgroup.events")).expect("just made");
            }
            tree
        }

        fn cgroup(&self, path: &str, pids: &str) {
            let directory = self.0.join(path.trim_start_matches('/'));
            fs::create_dir_all(&directory).expect("a temporary directory");
            fs::write(directory.join("cgroup.procs"), pids).expect("a file in it");
            fs::write(directory.join("cgroup.events"), "").expect("a file in it");
        }

        fn mounted(&self, root: &str) -> Mount {
            Mount {
                root: root.into(),
                point: self.0.clone(),
            }
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn pod_is_found_above_the_container() {
        let systemd = |class: &str| {
            format!("/kubepods.slice/kubepods{class}.slice/kubepods{class}-pod{UID_}.slice")
        };
        let kind = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice";
        for (pod, below) in [
            (systemd("-burstable"), "cri-containerd-0123.scope"),
            (systemd("-besteffort"), "crio-0123.scope/container"),
            (systemd(""), "cri-containerd-0123.scope"),
            (
                format!("{kind}/kubelet-kubepods-burstable-pod{UID_}.slice"),
                "cri-containerd-0123.scope",
            ),
            (format!("/kubepods/burstable/pod{UID}"), "0123456789abcdef"),
            (format!("/kubepods/pod{UID}"), "0123456789abcdef"),
            (
                "/kubepods/pod0123456789abcdef0123456789abcdef".to_owned(),
                "c",
            ),
            (format!("/docker/0123/kubelet/kubepods/pod{UID}"), "c"),
            // The inner one of two pods, as on a node that is a pod itself.
            (
                format!("/kubepods/pod{UID}/c/kubepods/pod{}", UID.replace('0', "f")),
                "c",
            ),
        ] {
            let container = format!("{pod}/{below}");
            let tree = Tree::new(&container, true);
            let expected = tree.0.join(&pod[1..]);
            let named = format!("12:pids:/x\n0::{container}\n");
            for (own, root) in [
                (named.as_str(), "/"),
                // A cgroup namespace, and the host's tree mounted beside what the container has.
                ("0::/\n", "/../../../.."),
                ("0::/../other\n", "/"),
                // A hybrid machine's line is missing or stale: the process is found all the same.
                ("1:name=systemd:/\n", "/"),
                ("0::/gone (deleted)\n", "/"),
            ] {
                let found = find_in(own, &[tree.mounted(root)], PID);
                assert_eq!(found.expect(own), expected, "{own:?} {root:?}");
            }
        }
    }

    #[test]
    fn bind_mount_of_a_part_is_enough_if_the_pod_is_below_it() {
        let tree = Tree::new(&format!("pod{UID}/c"), false);
        let own = format!("0::/kubepods/pod{UID}/c\n");
        let found = find_in(&own, &[tree.mounted("/kubepods")], PID);
        assert_eq!(found.expect("found"), tree.0.join(format!("pod{UID}")));
    }

    #[test]
    fn every_mount_is_looked_at() {
        let (own, host) = (
            Tree::new("", false),
            Tree::new(&format!("kubepods/pod{UID}/c"), true),
        );
        let mounts = [own.mounted("/"), host.mounted("/../../..")];
        let found = find_in("0::/\n", &mounts, PID).expect("found");
        assert_eq!(found, host.0.join(format!("kubepods/pod{UID}")));
        let error = find_in("0::/\n", &mounts[..1], PID).expect_err("only its own");
        assert!(matches!(error, Error::Hidden { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains("mount the host's /sys/fs/cgroup")
        );
    }

    #[test]
    fn outside_of_a_pod_is_an_error_that_names_the_cgroup() {
        for container in [
            "/system.slice/app.service",
            "/kubepods/podinfo/c",
            "/kubepods.slice/kubepods-burstable.slice",
            "/user.slice/pod.slice",
            "/machine/libpod-0123456789abcdef0123456789abcdef0123456789abcdef.scope",
            "",
        ] {
            let tree = Tree::new(container, true);
            let own = format!("0::{container}\n");
            let error = find_in(&own, &[tree.mounted("/")], PID).expect_err(container);
            assert!(
                matches!(&error, Error::NotInAPod { cgroup } if *cgroup == tree.0.join(container.trim_start_matches('/'))),
                "{error}"
            );
        }
    }

    #[test]
    fn process_that_is_nowhere_or_no_mount_is_an_error() {
        let tree = Tree::new("/a", true);
        let error = find_in("0::/a\n", &[tree.mounted("/")], 1234).expect_err("not listed");
        assert!(matches!(error, Error::Hidden { .. }), "{error}");
        let error = find_in("0::/a\n", &[], PID).expect_err("no mount");
        assert!(error.to_string().ends_with("mounted are none"), "{error}");
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, edits, text};

    const UID: &str = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}";

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_uid_is_read_from_the_names_that_kubelet_gives(uid in UID, class in "(-burstable|-besteffort)?", edits in edits()) {
            let slice = format!("kubepods{class}-pod{}.slice", uid.replace('-', "_"));
            for name in [format!("pod{uid}"), slice] {
                prop_assert_eq!(uid_of(&name), Some(uid.clone()));
                let edited = uid_of(&edits.of(&name));
                prop_assert!(edited.is_none_or(|uid| !uid.contains(['/', '_', '\n'])));
            }
        }

        #[test]
        fn any_text_is_no_cgroup_of_a_pod_without_a_mount(own in prop_oneof![text(), "(0::/[a-z/.]{0,9}\n){0,2}"]) {
            prop_assert!(find_in(&own, &[], 1).is_err());
        }
    }
}
