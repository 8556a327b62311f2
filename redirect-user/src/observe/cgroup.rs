//! A pod's cgroup: checked to be a cgroup2 directory, and asked which processes it holds.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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

/// Why a cgroup is refused or could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cgroup2 file system is mounted.
    #[error(
        "no cgroup2 file system is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`"
    )]
    NotMounted,
    /// `/proc/self/mountinfo` is unreadable.
    #[error("cannot read /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// The path does not exist.
    #[error("cgroup {path:?} does not exist: give a directory below {mountpoint:?}")]
    Missing {
        /// The path asked for.
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mountpoint: PathBuf,
    },
    /// The path exists but cannot be opened.
    #[error("cannot open cgroup {path:?}: {source}")]
    Open {
        /// The path asked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path is a file.
    #[error("{path:?} is not a directory: give a cgroup's directory below {mountpoint:?}")]
    NotADirectory {
        /// The path asked for.
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mountpoint: PathBuf,
    },
    /// The path is in a cgroup v1 hierarchy.
    #[error("{path:?} is a cgroup v1 path: eBPF needs cgroup2, which is mounted at {mountpoint:?}")]
    Version1 {
        /// The path asked for.
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mountpoint: PathBuf,
    },
    /// The path is on another file system.
    #[error(
        "{path:?} is not a cgroup: give a directory below {mountpoint:?}, where cgroup2 is mounted"
    )]
    NotACgroup {
        /// The path asked for.
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mountpoint: PathBuf,
    },
    /// The path is the root cgroup.
    #[error(
        "{path:?} is the root cgroup, which holds the whole machine: give the pod's own cgroup below it"
    )]
    Root {
        /// The path asked for.
        path: PathBuf,
    },
    /// No such process.
    #[error("process {pid} does not exist: its cgroup cannot be found")]
    NoProcess {
        /// The process id asked for.
        pid: i32,
    },
    /// The process's cgroup cannot be reached from here.
    #[error("cgroup {cgroup:?} of process {pid} is outside what is mounted at {mountpoint:?}")]
    Outside {
        /// The process id asked for.
        pid: i32,
        /// The cgroup as `/proc/PID/cgroup` shows it.
        cgroup: String,
        /// Where cgroup2 is mounted.
        mountpoint: PathBuf,
    },
    /// A file of the cgroup cannot be read.
    #[error("cannot read {path:?}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The tree is too large for a pod.
    #[error(
        "cgroup {path:?} holds more than {MAX_ENTRIES} processes or directories: give the cgroup of one pod"
    )]
    TooLarge {
        /// The cgroup.
        path: PathBuf,
    },
}

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
        let mountpoint = mountpoint()?;
        let open_error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => Error::Missing {
                path: path.to_owned(),
                mountpoint: mountpoint.clone(),
            },
            _ => Error::Open {
                path: path.to_owned(),
                source,
            },
        };
        let canonical = fs::canonicalize(path).map_err(open_error)?;
        if !fs::metadata(&canonical).map_err(open_error)?.is_dir() {
            return Err(Error::NotADirectory {
                path: path.to_owned(),
                mountpoint,
            });
        }
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_DIRECTORY)
            .open(&canonical)
            .map_err(open_error)?;
        let magic = rustix::fs::fstatfs(&file)
            .map_err(|errno| open_error(errno.into()))?
            .f_type;
        match u64::try_from(magic) {
            Ok(CGROUP2_SUPER_MAGIC) => {}
            Ok(CGROUP_SUPER_MAGIC) => {
                return Err(Error::Version1 {
                    path: path.to_owned(),
                    mountpoint,
                });
            }
            // The tmpfs that holds the v1 hierarchies.
            _ if canonical.starts_with(CGROUP_ROOT) => {
                return Err(Error::Version1 {
                    path: path.to_owned(),
                    mountpoint,
                });
            }
            _ => {
                return Err(Error::NotACgroup {
                    path: path.to_owned(),
                    mountpoint,
                });
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

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::observe::testing::TestNamespace;

    /// A cgroup with a child cgroup, removed on drop after its processes are killed.
    struct TestCgroup {
        path: PathBuf,
        children: Vec<Child>,
    }

    impl TestCgroup {
        fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            assert!(
                rustix::process::geteuid().is_root(),
                "this test makes cgroups: run it as root"
            );
            let name = format!(
                "observe-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            let path = mountpoint().unwrap().join(name);
            fs::create_dir_all(path.join("inner")).unwrap();
            Self {
                path,
                children: Vec::new(),
            }
        }

        fn start(&mut self, mut command: Command) -> i32 {
            let child = command.spawn().unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            self.children.push(child);
            fs::write(self.path.join("inner/cgroup.procs"), pid.to_string()).unwrap();
            pid
        }
    }

    impl Drop for TestCgroup {
        fn drop(&mut self) {
            for child in &mut self.children {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = fs::remove_dir(self.path.join("inner"));
            let _ = fs::remove_dir(&self.path);
        }
    }

    #[test]
    fn open_knows_id_and_population() {
        let mut test = TestCgroup::new();
        let cgroup = Cgroup::open(&test.path.join("inner/..")).unwrap();
        assert_eq!(cgroup.path(), test.path);
        assert_eq!(cgroup.id(), fs::metadata(&test.path).unwrap().ino());
        assert!(!cgroup.is_populated().unwrap());
        assert!(cgroup.processes().unwrap().is_empty());
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let pid = test.start(sleep);
        assert!(cgroup.is_populated().unwrap());
        assert_eq!(cgroup.processes().unwrap(), [pid]);
        assert_eq!(
            Cgroup::of_process(pid).unwrap().path(),
            test.path.join("inner")
        );
    }

    #[test]
    fn relatives_are_those_above_and_below() {
        let (test, other) = (TestCgroup::new(), TestCgroup::new());
        let id = |path: &Path| Cgroup::open(path).unwrap().id();
        let (outer, inner) = (id(&test.path), id(&test.path.join("inner")));
        let relatives = |path: &Path| Cgroup::open(path).unwrap().relatives().unwrap();
        assert!(relatives(&test.path).contains(&inner));
        assert!(relatives(&test.path.join("inner")).contains(&outer));
        assert!(!relatives(&test.path).contains(&outer));
        assert!(!relatives(&test.path).contains(&id(&other.path)));
    }

    #[test]
    fn outsiders_are_processes_of_other_namespaces() {
        let (mut test, pod) = (TestCgroup::new(), TestNamespace::new());
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &pod.name, "sleep", "60"]);
        let inside = test.start(inside);
        let mut outside = Command::new("sleep");
        outside.arg("60");
        let outside = test.start(outside);
        let ns = pod.open();
        let start = std::time::Instant::now();
        while ns.contains(inside) != Some(true) {
            assert!(
                start.elapsed().as_secs() < 10,
                "ip netns exec did not enter the namespace"
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(
            Cgroup::open(&test.path).unwrap().outsiders(&ns).unwrap(),
            [outside]
        );
    }

    #[test]
    fn open_refuses_what_is_no_pod_cgroup() {
        let mountpoint = mountpoint().unwrap();
        let refused = |path: &Path| Cgroup::open(path).unwrap_err();
        assert!(matches!(
            refused(&mountpoint.join("no-such")),
            Error::Missing { .. }
        ));
        assert!(matches!(
            refused(Path::new("/tmp")),
            Error::NotACgroup { .. }
        ));
        assert!(matches!(
            refused(Path::new("/etc/passwd")),
            Error::NotADirectory { .. }
        ));
        let root = refused(&mountpoint);
        assert!(matches!(root, Error::Root { .. }), "{root}");
    }

    #[test]
    fn open_version_1_path_names_the_cgroup2_mount() {
        let path = Path::new("/sys/fs/cgroup/memory");
        if !path.is_dir() {
            println!(
                "skipped: {} is not there, this machine has no cgroup v1",
                path.display()
            );
            return;
        }
        let error = Cgroup::open(path).unwrap_err();
        assert!(matches!(error, Error::Version1 { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains(mountpoint().unwrap().to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn of_process_that_is_gone_says_so() {
        assert!(matches!(
            Cgroup::of_process(i32::MAX),
            Err(Error::NoProcess { .. })
        ));
    }
}
