//! Where cgroup2 is mounted.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::ancestors;
use super::cgroup::{Error, Result};

/// A mount of cgroup2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The cgroup it shows at its top, as seen from our cgroup namespace: `/..` leads out of that.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
}

impl Mount {
    /// Whether it shows the whole machine: only the root cgroup lacks `cgroup.events`.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.point.join("cgroup.events").exists()
    }
}

/// Every mount of cgroup2.
pub fn cgroup2() -> Result<Vec<Mount>> {
    let mounts = fs::read("/proc/self/mountinfo").map_err(Error::Mounts)?;
    Ok(mounts_in(&String::from_utf8_lossy(&mounts)))
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid machine.
pub fn mountpoint() -> Result<PathBuf> {
    choose_mountpoint(cgroup2()?).ok_or(Error::NotMounted)
}

/// Where the cgroups of a node are seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Top {
    /// Where it is mounted.
    pub point: PathBuf,
    /// How many cgroups are above what is seen there: none, unless the node is a container itself.
    pub level: usize,
}

/// The mount that shows the node, also from a container that has a cgroup namespace and, besides its own, the host's mount. On
/// a node that is a container (kind) nothing shows the whole machine: the mount that shows most of what this process is in.
pub fn node() -> Result<Top> {
    let mounts = cgroup2()?;
    if let Some(whole) = mounts.iter().find(|mount| mount.is_whole()) {
        let point = whole.point.clone();
        return Ok(Top { point, level: 0 });
    }
    let above = ancestors::ids().map_err(Error::Ancestors)?;
    let seen = mounts.iter().filter_map(|mount| {
        let id = fs::metadata(&mount.point).ok()?.ino();
        Some((mount.point.as_path(), id))
    });
    highest(seen, above).ok_or_else(|| Error::NotWhole {
        mountpoints: mounts.iter().map(|mount| mount.point.clone()).collect(),
    })
}

/// Of mount points and the ids of what they show, the one that is farthest above this process. `above` is as
/// [`ancestors::ids`] has it. None if no mount shows more than the process' own cgroup, as a container's own does.
fn highest<'a>(mounts: impl Iterator<Item = (&'a Path, u64)>, above: &[u32]) -> Option<Top> {
    let (_own, above) = above.split_last()?;
    let tops = mounts.filter_map(|(point, id)| {
        let level = above.iter().position(|above| *above == id as u32)?;
        let point = point.to_owned();
        Some(Top { point, level })
    });
    tops.min_by_key(|top| top.level)
}

/// The mount that shows the whole hierarchy, else the first one.
fn choose_mountpoint(mut mounts: Vec<Mount>) -> Option<PathBuf> {
    let whole = mounts.iter().position(|mount| mount.root == Path::new("/"));
    (!mounts.is_empty()).then(|| mounts.swap_remove(whole.unwrap_or(0)).point)
}

/// proc_pid_mountinfo(5): fields four and five, and the type behind the separator.
fn mounts_in(mountinfo: &str) -> Vec<Mount> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (file_system.split(' ').next()? == "cgroup2").then(|| Mount {
                root: unescape(root),
                point: unescape(point),
            })
        })
        .collect()
}

/// Undoes the kernel's `\040` for blank, tab, newline and backslash.
fn unescape(text: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = (byte == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountpoint_prefers_the_whole_hierarchy_and_unescapes() {
        let mountinfo = "30 20 0:26 /pod /mnt/part rw - cgroup2 none rw\n\
                         31 20 0:26 / /mnt/with\\040blank rw,nosuid shared:9 - cgroup2 cgroup2 rw\n\
                         32 20 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let point = |mountinfo: &str| choose_mountpoint(mounts_in(mountinfo));
        assert_eq!(point(mountinfo), Some(PathBuf::from("/mnt/with blank")));
        assert_eq!(point("32 20 0:27 / /x rw - cgroup cgroup rw\n"), None);
        let host = "40 20 0:26 /../../.. /host rw - cgroup2 cgroup2 rw\n";
        assert_eq!(point(host), Some(PathBuf::from("/host")));
        assert_eq!(mounts_in(host)[0].root, Path::new("/../../.."));
    }

    #[test]
    fn node_is_what_lies_farthest_above() {
        let mounts = [("/own", 9), ("/elsewhere", 5), ("/node", 3), ("/slice", 7)];
        let top = |above: &[u32]| {
            let mounts = mounts.iter().map(|(point, id)| (Path::new(*point), *id));
            highest(mounts, above).map(|top| (top.point.display().to_string(), top.level))
        };
        let node = |level| Some(("/node".to_owned(), level));
        assert_eq!(top(&[1, 2, 3, 7, 9]), node(2));
        assert_eq!(top(&[3, 9]), node(0));
        // Its own mount alone, or none that it is in.
        assert_eq!(top(&[1, 2, 9]), None);
        assert_eq!(top(&[1]), None);
        assert_eq!(top(&[]), None);
        // The upper half of an id tells generations apart.
        let later = [(Path::new("/node"), (2_u64 << 32) | 3)];
        assert!(highest(later.into_iter(), &[1, 3, 9]).is_some());
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, text};

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_mountinfo_is_read(text in prop_oneof![text(), "(([0-9/a\\\\]{1,4} ){0,6}- cgroup2? x\n){0,4}"]) {
            drop(choose_mountpoint(mounts_in(&text)));
        }

        #[test]
        fn any_path_is_unescaped_as_the_kernel_escapes_it(path in text()) {
            // seq_escape() in fs/proc_namespace.c: these four.
            let escaped: String = path
                .chars()
                .map(|c| match c {
                    ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
                    c => c.to_string(),
                })
                .collect();
            prop_assert_eq!(unescape(&escaped), PathBuf::from(path));
        }
    }
}
