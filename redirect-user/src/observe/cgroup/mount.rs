//! Where cgroup2 is mounted.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::{Error, Result};

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid machine.
pub fn mountpoint() -> Result<PathBuf> {
    let mounts = fs::read("/proc/self/mountinfo").map_err(Error::Mounts)?;
    find_mountpoint(&String::from_utf8_lossy(&mounts)).ok_or(Error::NotMounted)
}

/// The cgroup2 mount that shows the whole hierarchy, else the first one (proc_pid_mountinfo(5)).
pub(super) fn find_mountpoint(mountinfo: &str) -> Option<PathBuf> {
    let mounts: Vec<(&str, &str)> = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            (file_system.split(' ').next()? == "cgroup2")
                .then_some((fields.next()?, fields.next()?))
        })
        .collect();
    let (_, point) = mounts
        .iter()
        .find(|(root, _)| *root == "/")
        .or(mounts.first())?;
    Some(unescape(point))
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
