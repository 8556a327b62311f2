//! Why a cgroup is refused.

use std::io;
use std::path::PathBuf;

use super::MAX_ENTRIES;

/// Why a cgroup is refused or could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No cgroup2 file system is mounted.
    #[error(
        "no cgroup2 file system is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`"
    )]
    NotMounted,
    /// No mount of cgroup2 shows the node.
    #[error(
        "no mount of cgroup2 shows more than this process' own cgroup: mount the host's /sys/fs/cgroup at /sys/fs/cgroup (hostPath); mounted are {mountpoints:?}"
    )]
    NotWhole {
        /// Where cgroup2 is mounted.
        mountpoints: Vec<PathBuf>,
    },
    /// The kernel does not tell which cgroups this process is in.
    #[error("cannot tell which cgroups this process is in: {0}")]
    Ancestors(io::Error),
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
