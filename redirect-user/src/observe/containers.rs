//! Where in a pod's cgroup the runtime has put a container.

use std::fs;
use std::path::{Path, PathBuf};

/// The id behind the runtime's name, as in `containerd://ID`. None if it is none.
pub fn bare_id(told: &str) -> Option<&str> {
    let (_runtime, id) = told.split_once("://")?;
    let is_id = !id.is_empty() && id.chars().all(|c| c.is_ascii_alphanumeric());
    is_id.then_some(id)
}

/// The cgroup of the container with that id, directly below the pod's: a container may be able to make
/// cgroups below its own, with whatever names.
///
/// `ID` with the cgroupfs driver, `RUNTIME-ID.scope` with the systemd driver; CRI-O writes `crio-` before the id
/// with either. None if there is no such cgroup.
pub fn find(pod: &Path, id: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(pod).ok()?.flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .find(|entry| is_of(&entry.file_name().to_string_lossy(), id))
        .map(|entry| entry.path())
}

fn is_of(name: &str, id: &str) -> bool {
    let stem = name.strip_suffix(".scope").unwrap_or(name);
    match stem.strip_suffix(id) {
        Some("") => true,
        // CRI-O's monitor of the container has a scope of its own beside it.
        Some(prefix) => prefix.ends_with('-') && !prefix.ends_with("-conmon-"),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn id_stands_behind_the_runtimes_name() {
        for runtime in ["containerd", "cri-o", "docker"] {
            assert_eq!(bare_id(&format!("{runtime}://{ID}")), Some(ID));
        }
        for other in ["", ID, "containerd://", "containerd://../x", "cri-o://a/b"] {
            assert_eq!(bare_id(other), None, "{other:?}");
        }
    }

    #[test]
    fn container_is_told_by_its_whole_id() {
        for name in [
            ID.to_owned(),
            format!("crio-{ID}"),
            format!("cri-containerd-{ID}.scope"),
            format!("crio-{ID}.scope"),
            format!("docker-{ID}.scope"),
        ] {
            assert!(is_of(&name, ID), "{name}");
        }
        for name in [
            format!("crio-conmon-{ID}.scope"),
            format!("0{ID}"),
            format!("{ID}0"),
            format!("cri-containerd-{ID}.service"),
            ID[1..].to_owned(),
            "cri-containerd-.scope".to_owned(),
        ] {
            assert!(!is_of(&name, ID), "{name}");
        }
    }

    #[test]
    fn only_directories_directly_below_the_pod_count() {
        let top = std::env::temp_dir().join(format!("containers-{}", std::process::id()));
        let made = |path: &str| fs::create_dir_all(top.join(path)).expect("a temporary directory");
        made(&format!("app/{ID}"));
        fs::write(top.join(ID), "").expect("a file");
        let without = find(&top, ID);
        made(&format!("cri-containerd-{ID}.scope"));
        let with = find(&top, ID);
        fs::remove_dir_all(&top).expect("just made");
        assert_eq!(without, None);
        assert_eq!(with, Some(top.join(format!("cri-containerd-{ID}.scope"))));
    }
}
