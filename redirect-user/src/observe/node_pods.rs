//! Where on this node a pod is: its cgroup by its uid, its network namespace by its processes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use super::cgroup::{self, Cgroup};
use super::netns::{self, NetworkNamespace};
use super::{pod_cgroup, proc};

/// Largest number of directories that are looked into.
const MAX_DIRECTORIES: usize = 65_536;

/// The cgroups of all pods below `mountpoint`, by uid, whatever their QoS class and the kubelet's driver, and however
/// deep below the root the kubelet has its own.
///
/// The same uid twice: the one nearer to the root. Nothing inside of a pod is looked at.
pub fn cgroups(mountpoint: &Path) -> HashMap<String, PathBuf> {
    let mut found = HashMap::new();
    let (mut pending, mut seen) = (VecDeque::from([mountpoint.to_owned()]), 0);
    while let Some(directory) = pending.pop_front() {
        seen += 1;
        if seen > MAX_DIRECTORIES {
            tracing::warn!(
                "more than {MAX_DIRECTORIES} cgroups below {}: not all are looked at",
                mountpoint.display()
            );
            break;
        }
        // One that has gone meanwhile has nothing in it.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match pod_cgroup::uid_of(&entry.file_name().to_string_lossy()) {
                Some(uid) => {
                    found.entry(uid).or_insert_with(|| entry.path());
                }
                None => pending.push_back(entry.path()),
            }
        }
    }
    found
}

/// The network namespace of the pod's processes; `None` while there is none but those of the container runtime, which
/// are in the host's.
///
/// A container may have made namespaces of its own: the oldest process tells, which is the sandbox's.
pub fn namespace(cgroup: &Cgroup) -> Result<Option<NetworkNamespace>, Error> {
    let mut processes: Vec<(u64, i32)> = cgroup
        .processes()?
        .into_iter()
        .filter_map(|pid| Some((proc::start_time(pid)?, pid)))
        .collect();
    processes.sort_unstable();
    let mut hosts = HashSet::new();
    for (_, pid) in processes {
        // Gone meanwhile.
        let Ok(netns) = NetworkNamespace::of_process(pid) else {
            continue;
        };
        if hosts.contains(&netns.inode()) {
            continue;
        }
        if !netns.is_host()? {
            return Ok(Some(netns));
        }
        hosts.insert(netns.inode());
    }
    Ok(None)
}

/// Why a pod's processes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its cgroup.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The namespace of one of them.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0a1b2c3d-4e5f-6789-abcd-ef0123456789";
    const B: &str = "1a1b2c3d-4e5f-6789-abcd-ef0123456789";
    const C: &str = "2a1b2c3d-4e5f-6789-abcd-ef0123456789";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    fn tree(paths: &[String]) -> (tempfile_dir::Directory, HashMap<String, PathBuf>) {
        let top = tempfile_dir::Directory::new();
        for path in paths {
            fs::create_dir_all(top.path().join(path)).expect("a temporary directory");
        }
        let found = cgroups(top.path());
        (top, found)
    }

    /// A directory below the system's temporary one, removed when dropped.
    mod tempfile_dir {
        use std::path::{Path, PathBuf};
        use std::sync::atomic::{AtomicU32, Ordering};

        pub(super) struct Directory(PathBuf);

        impl Directory {
            pub(super) fn new() -> Self {
                static NEXT: AtomicU32 = AtomicU32::new(0);
                let number = NEXT.fetch_add(1, Ordering::Relaxed);
                let name = format!("node-pods-{}-{number}", std::process::id());
                let path = std::env::temp_dir().join(name);
                std::fs::create_dir(&path).expect("a temporary directory");
                Self(path)
            }

            pub(super) fn path(&self) -> &Path {
                &self.0
            }
        }

        impl Drop for Directory {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    #[test]
    fn pods_of_both_drivers_of_all_classes_and_below_any_root_are_found() {
        let slice = |uid: &str| uid.replace('-', "_");
        for (root, a, b, c) in [
            (
                "",
                format!("kubepods/pod{A}"),
                format!("kubepods/burstable/pod{B}"),
                format!("kubepods/besteffort/pod{C}"),
            ),
            (
                "",
                format!("kubepods.slice/kubepods-pod{}.slice", slice(A)),
                format!(
                    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice",
                    slice(B)
                ),
                format!(
                    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice",
                    slice(C)
                ),
            ),
            (
                "kubelet.slice/",
                format!(
                    "kubelet-kubepods.slice/kubelet-kubepods-pod{}.slice",
                    slice(A)
                ),
                format!(
                    "kubelet-kubepods.slice/b/kubelet-kubepods-burstable-pod{}.slice",
                    slice(B)
                ),
                format!(
                    "kubelet-kubepods.slice/c/kubelet-kubepods-besteffort-pod{}.slice",
                    slice(C)
                ),
            ),
            (
                "docker/0123/kubelet/",
                format!("kubepods/pod{A}"),
                format!("kubepods/burstable/pod{B}"),
                format!("kubepods/besteffort/pod{C}"),
            ),
        ] {
            let below = |path: &str| format!("{root}{path}");
            let (top, found) = tree(&[
                below(&a) + "/container",
                below(&b) + "/container",
                below(&c),
                "system.slice/podman.service".to_owned(),
            ]);
            let expected: HashMap<_, _> = [(A, a), (B, b), (C, c)]
                .into_iter()
                .map(|(uid, path)| (uid.to_owned(), top.path().join(below(&path))))
                .collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn uid_of_a_static_pod_has_no_dashes() {
        let (top, found) = tree(&[format!("kubepods/burstable/pod{STATIC}")]);
        let expected = top.path().join(format!("kubepods/burstable/pod{STATIC}"));
        assert_eq!(found.get(STATIC), Some(&expected));
    }

    #[test]
    fn outer_pod_hides_what_is_in_it() {
        let (top, found) = tree(&[
            format!("kubepods/pod{A}/container/kubepods/pod{B}"),
            format!("z/z/z/pod{A}"),
        ]);
        let expected = HashMap::from([(A.to_owned(), top.path().join(format!("kubepods/pod{A}")))]);
        assert_eq!(found, expected);
    }

    #[test]
    fn missing_directory_has_no_pods() {
        assert!(cgroups(Path::new("/no/such/directory")).is_empty());
    }
}
