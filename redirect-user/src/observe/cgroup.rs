//! A pod's cgroup: checked to be a cgroup2 directory, and asked which processes it holds.

mod error;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use self::error::Error;
use super::mounts::mountpoint;
use super::netns::NetworkNamespace;

/// Superblock magic of cgroup v2 (`include/uapi/linux/magic.h`).
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// Superblock magic of cgroup v1.
const CGROUP_SUPER_MAGIC: u64 = 0x0027_e0eb;
/// Where every distribution mounts cgroups; on v1 and hybrid machines it is a tmpfs.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Largest number of directories and of processes read from one tree.
const MAX_ENTRIES: usize = 65_536;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// An open cgroup2 directory, not the root.
#[derive(Debug)]
pub struct Cgroup {
    file: File,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens a cgroup by its directory. Symbolic links are resolved.
    pub fn open(path: &Path) -> Result<Self> {
        // Looked up only for an error: a node has many mounts.
        let refuse = |error: fn(PathBuf, PathBuf) -> Error| match mountpoint() {
            Ok(mountpoint) => error(path.to_owned(), mountpoint),
            Err(error) => error,
        };
        let open_error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => {
                refuse(|path, mountpoint| Error::Missing { path, mountpoint })
            }
            _ => Error::Open {
                path: path.to_owned(),
                source,
            },
        };
        let canonical = fs::canonicalize(path).map_err(open_error)?;
        if !fs::metadata(&canonical).map_err(open_error)?.is_dir() {
            return Err(refuse(|path, mountpoint| Error::NotADirectory {
                path,
                mountpoint,
            }));
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_DIRECTORY)
            .open(&canonical)
            .map_err(open_error)?;
        let magic = rustix::fs::fstatfs(&file)
            .map_err(|errno| open_error(errno.into()))?
            .f_type;
        let version1 = |path, mountpoint| Error::Version1 { path, mountpoint };
        match u64::try_from(magic) {
            Ok(CGROUP2_SUPER_MAGIC) => {}
            Ok(CGROUP_SUPER_MAGIC) => return Err(refuse(version1)),
            // The tmpfs that holds the v1 hierarchies.
            _ if canonical.starts_with(CGROUP_ROOT) => return Err(refuse(version1)),
            _ => {
                return Err(refuse(|path, mountpoint| Error::NotACgroup {
                    path,
                    mountpoint,
                }));
            }
        }
        // Only the root lacks cgroup.events; the mount point of a cgroup namespace is not the root.
        if !canonical.join("cgroup.events").exists() {
            return Err(Error::Root {
                path: path.to_owned(),
            });
        }
        let id = file.metadata().map_err(open_error)?.ino();
        Ok(Self {
            file,
            path: canonical,
            id,
        })
    }

    /// Opens the cgroup that a process is in.
    pub fn of_process(pid: i32) -> Result<Self> {
        let mountpoint = mountpoint()?;
        let lines = match fs::read_to_string(format!("/proc/{pid}/cgroup")) {
            Ok(lines) => lines,
            Err(_) => return Err(Error::NoProcess { pid }),
        };
        let cgroup = lines
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .ok_or(Error::NotMounted)?;
        // "/../x" is a cgroup outside our cgroup namespace; " (deleted)" one that was removed.
        if cgroup.split('/').any(|part| part == "..") || cgroup.ends_with(" (deleted)") {
            return Err(Error::Outside {
                pid,
                cgroup: cgroup.to_owned(),
                mountpoint,
            });
        }
        Self::open(&mountpoint.join(cgroup.trim_start_matches('/')))
    }

    /// The canonical path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's cgroup id, which is the directory's inode; what `bpf_get_current_cgroup_id` answers.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether any living process is in this cgroup or below it.
    pub fn is_populated(&self) -> Result<bool> {
        let path = self.path.join("cgroup.events");
        match fs::read_to_string(&path) {
            Ok(events) => Ok(events.lines().any(|line| line == "populated 1")),
            Err(source) if is_gone(&source) => Ok(false),
            Err(source) => Err(Error::Read { path, source }),
        }
    }

    /// The processes of this cgroup and of all below it, ascending. Those outside our pid namespace are left out.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut pids = BTreeSet::new();
        for directory in self.tree()? {
            let path = directory.join("cgroup.procs");
            match fs::read_to_string(&path) {
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse::<i32>().ok())
                        .filter(|&pid| pid > 0),
                ),
                // A threaded cgroup has no list of its own: its domain above shows the processes.
                Err(source)
                    if source.raw_os_error() == Some(libc::EOPNOTSUPP) || is_gone(&source) => {}
                Err(source) => return Err(Error::Read { path, source }),
            }
            if pids.len() > MAX_ENTRIES {
                return Err(self.too_large());
            }
        }
        Ok(pids.into_iter().collect())
    }

    /// Ids of the cgroups that this one is in, and of those in it, as far as they are visible here. Paths would not do: each
    /// container may see the same cgroup by another one.
    pub fn relatives(&self) -> Result<HashSet<u64>> {
        let above = self.path.ancestors().skip(1).map(Path::to_owned);
        let device = self.file.metadata().map(|metadata| metadata.dev()).ok();
        Ok(above
            .chain(self.tree()?)
            .filter_map(|path| fs::metadata(path).ok())
            .filter(|metadata| Some(metadata.dev()) == device)
            .map(|metadata| metadata.ino())
            .filter(|id| *id != self.id)
            .collect())
    }

    /// The directories of this cgroup and of all below it.
    fn tree(&self) -> Result<Vec<PathBuf>> {
        let (mut seen, mut pending) = (Vec::new(), vec![self.path.clone()]);
        while let Some(directory) = pending.pop() {
            match fs::read_dir(&directory) {
                Ok(entries) => pending.extend(
                    entries
                        .flatten()
                        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                        .map(|entry| entry.path()),
                ),
                Err(source) if is_gone(&source) => {}
                Err(source) => {
                    return Err(Error::Read {
                        path: directory,
                        source,
                    });
                }
            }
            seen.push(directory);
            if seen.len() + pending.len() > MAX_ENTRIES {
                return Err(self.too_large());
            }
        }
        Ok(seen)
    }

    fn too_large(&self) -> Error {
        Error::TooLarge {
            path: self.path.clone(),
        }
    }

    /// The processes of the tree that are in another network namespace than `ns`.
    pub fn outsiders(&self, ns: &NetworkNamespace) -> Result<Vec<i32>> {
        Ok(self
            .processes()?
            .into_iter()
            .filter(|&pid| ns.contains(pid) == Some(false))
            .collect())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(formatter)
    }
}

/// The cgroup was removed while it was read.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}
