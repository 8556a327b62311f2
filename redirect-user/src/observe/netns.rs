//! A network namespace: opened by path or process, told apart by inode, entered only by throwaway threads.

use std::collections::HashSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::option::NetnsCookie;
use crate::sys::nsfs;

/// Superblock magic of nsfs (`include/uapi/linux/magic.h`).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A setting of the whole machine: the kernel shows it in the initial network namespace only
/// (`net/core/sysctl_net_core.c`, `net_core_table`).
const INITIAL_ONLY_SYSCTL: &str = "/proc/sys/net/core/netdev_max_backlog";

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a network namespace could not be opened, entered or identified.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not exist.
    #[error(
        "network namespace {path:?} does not exist: give a path such as /run/netns/NAME or /proc/PID/ns/net"
    )]
    Missing {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path exists but cannot be opened.
    #[error("cannot open network namespace {path:?}: {source}")]
    Open {
        /// The path asked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path is an ordinary file, a directory, or a leftover mount point of `ip netns`.
    #[error(
        "{path:?} is not a namespace: a network namespace such as /run/netns/NAME or /proc/PID/ns/net is needed"
    )]
    NotANamespace {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path is a namespace of another kind.
    #[error("{path:?} is a {found} namespace: a network namespace (net) is needed")]
    OtherKind {
        /// The path asked for.
        path: PathBuf,
        /// What it is, as `/proc/PID/ns` names it, e.g. `mnt`.
        found: &'static str,
    },
    /// No such process.
    #[error("process {pid} does not exist: its network namespace cannot be opened")]
    NoProcess {
        /// The process id asked for.
        pid: i32,
    },
    /// `setns` or starting the thread for it failed.
    #[error("cannot enter network namespace {name}: {source} (CAP_SYS_ADMIN is needed)")]
    Enter {
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not tell the cookie.
    #[error(
        "cannot read the cookie of network namespace {name}: {source} (SO_NETNS_COOKIE needs Linux 5.14)"
    )]
    Cookie {
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An open network namespace. Holding it keeps the namespace alive.
#[derive(Debug)]
pub struct NetworkNamespace {
    file: File,
    inode: u64,
    name: String,
}

impl NetworkNamespace {
    /// Opens a namespace by path: `/run/netns/NAME`, `/proc/PID/ns/net`, or any bind mount of one.
    pub fn open(path: &Path) -> Result<Self> {
        let open_error = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        // O_NONBLOCK: a FIFO given by mistake must not hang the loader.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => Error::Missing {
                    path: path.to_owned(),
                },
                _ => open_error(source),
            })?;
        let magic = rustix::fs::fstatfs(&file)
            .map_err(|errno| open_error(errno.into()))?
            .f_type;
        if u64::try_from(magic) != Ok(NSFS_MAGIC) {
            return Err(Error::NotANamespace {
                path: path.to_owned(),
            });
        }
        // Asked of the kernel: a bind mount below /run/netns does not show as net:[…].
        let kind = nsfs::namespace_kind(&file).map_err(open_error)?;
        if kind != libc::CLONE_NEWNET {
            return Err(Error::OtherKind {
                path: path.to_owned(),
                found: kind_name(kind),
            });
        }
        let inode = file.metadata().map_err(open_error)?.ino();
        Ok(Self {
            file,
            inode,
            name: path.display().to_string(),
        })
    }

    /// Opens the namespace that a process is in.
    pub fn of_process(pid: i32) -> Result<Self> {
        match Self::open(&PathBuf::from(format!("/proc/{pid}/ns/net"))) {
            Err(Error::Missing { .. }) => Err(Error::NoProcess { pid }),
            result => result,
        }
    }

    /// The namespace with this cookie: by the path it had, or else that of a process in it.
    #[must_use]
    pub fn find(cookie: u64, path: &Path) -> Option<Self> {
        let is_it = |netns: &Self| netns.cookie().is_ok_and(|found| found == cookie);
        if let Ok(netns) = Self::open(path)
            && is_it(&netns)
        {
            return Some(netns);
        }
        let mut seen = HashSet::new();
        super::proc::pids()
            .into_iter()
            .filter_map(|pid| Self::of_process(pid).ok())
            .filter(|netns| seen.insert(netns.inode()))
            .find(is_it)
    }

    /// Opens the namespace of this process. Named by its inode: the path means another one to every other process.
    pub fn own() -> Result<Self> {
        let own = Self::open(Path::new("/proc/self/ns/net"))?;
        Ok(Self {
            name: format!("net:[{}]", own.inode),
            ..own
        })
    }

    /// The nsfs inode: equal for two handles exactly when they are the same namespace.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The path it was opened by, or what stands for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is the host's namespace: the machine's initial one, or that of process 1 (which differs where
    /// the node itself is a container). Without permission to look at process 1 the former alone decides.
    pub fn is_host(&self) -> Result<bool> {
        if super::proc::namespace_inode(1, "net") == Some(self.inode) {
            return Ok(true);
        }
        self.is_initial()
    }

    /// Whether this is the machine's initial namespace. For a process in a container, whose process 1 is the container's own.
    pub fn is_initial(&self) -> Result<bool> {
        self.run_inside(|| Path::new(INITIAL_ONLY_SYSCTL).exists())
    }

    /// Whether a process is in this namespace; `None` when the process is gone or hidden.
    #[must_use]
    pub fn contains(&self, pid: i32) -> Option<bool> {
        super::proc::namespace_inode(pid, "net").map(|inode| inode == self.inode)
    }

    /// The number that `bpf_get_netns_cookie` answers for sockets of this namespace. Never reused while the
    /// machine is up.
    pub fn cookie(&self) -> Result<u64> {
        self.run_inside(|| {
            let socket = socket(
                AddressFamily::Inet,
                SockType::Datagram,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            getsockopt(&socket, NetnsCookie)
        })?
        .map_err(|errno| Error::Cookie {
            name: self.name.clone(),
            source: errno.into(),
        })
    }

    /// Runs `work` on a fresh thread inside this namespace and gives back what it returned.
    ///
    /// The thread ends with the work, so the caller's own namespace never changes. A panic of `work` is passed on.
    /// Needs no privilege where the caller is in this namespace already.
    pub fn run_inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let enter_error = |source| Error::Enter {
            name: self.name.clone(),
            source,
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, || {
                    if own_inode() != Some(self.inode) {
                        move_into_link_name_space(
                            self.file.as_fd(),
                            Some(LinkNameSpaceType::Network),
                        )?;
                    }
                    Ok(work())
                })
                .map_err(enter_error)?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                .map_err(|errno: rustix::io::Errno| enter_error(errno.into()))
        })
    }
}

impl AsFd for NetworkNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Display for NetworkNamespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.name)
    }
}

/// The calling thread's namespace.
fn own_inode() -> Option<u64> {
    let metadata = std::fs::metadata("/proc/thread-self/ns/net").ok()?;
    Some(metadata.ino())
}

/// The kind as `/proc/PID/ns` names it.
fn kind_name(kind: i32) -> &'static str {
    match kind {
        libc::CLONE_NEWCGROUP => "cgroup",
        libc::CLONE_NEWIPC => "ipc",
        libc::CLONE_NEWNS => "mnt",
        libc::CLONE_NEWPID => "pid",
        libc::CLONE_NEWUSER => "user",
        libc::CLONE_NEWUTS => "uts",
        _ => "unknown",
    }
}

mod option {
    use nix::{getsockopt_impl, sockopt_impl};

    // Linux 5.14; nix has no name for it, its macro makes the typed getter.
    sockopt_impl!(
        /// `SO_NETNS_COOKIE`.
        NetnsCookie,
        GetOnly,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        u64
    );
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::observe::testing::TestNamespace;

    #[test]
    fn open_missing_path_names_it() {
        let error = NetworkNamespace::open(Path::new("/run/netns/no-such-namespace")).unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        assert!(error.to_string().contains("/run/netns/no-such-namespace"));
    }

    #[test]
    fn open_ordinary_file_is_refused() {
        let error = NetworkNamespace::open(Path::new("/etc/passwd")).unwrap_err();
        assert!(matches!(error, Error::NotANamespace { .. }), "{error}");
    }

    #[test]
    fn open_other_kind_is_refused() {
        let error = NetworkNamespace::open(Path::new("/proc/self/ns/mnt")).unwrap_err();
        assert!(error.to_string().contains("is a mnt namespace"), "{error}");
    }

    #[test]
    fn of_process_that_is_gone_says_so() {
        let error = NetworkNamespace::of_process(i32::MAX).unwrap_err();
        assert!(
            matches!(error, Error::NoProcess { pid: i32::MAX }),
            "{error}"
        );
    }

    #[test]
    fn is_host_is_false_for_a_pod() {
        let pod = TestNamespace::new();
        assert!(!pod.open().is_host().unwrap());
    }

    #[test]
    fn is_host_is_true_for_the_initial_namespace() {
        if !Path::new(INITIAL_ONLY_SYSCTL).exists() {
            println!(
                "skipped: {INITIAL_ONLY_SYSCTL} is not there, so the tests do not run in the initial namespace"
            );
            return;
        }
        let own = NetworkNamespace::open(Path::new("/proc/self/ns/net")).unwrap();
        assert!(own.is_host().unwrap());
    }

    #[test]
    fn run_inside_leaves_the_caller_where_it_was() {
        let pod = TestNamespace::new();
        let namespace = pod.open();
        let inode = || fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        let before = inode();
        assert_eq!(namespace.run_inside(inode).unwrap(), namespace.inode());
        assert_eq!(inode(), before);
        assert_ne!(before, namespace.inode());
    }

    #[test]
    fn find_goes_by_the_cookie_whatever_became_of_the_path() {
        let (pod, other) = (TestNamespace::new(), TestNamespace::new());
        let cookie = pod.open().cookie().unwrap();
        let path = |namespace: &TestNamespace| Path::new("/run/netns").join(&namespace.name);
        let found = |path: &Path| NetworkNamespace::find(cookie, path).map(|netns| netns.inode());
        let inode = Some(pod.open().inode());
        assert_eq!(found(&path(&pod)), inode);
        assert_eq!(found(&path(&other)), None, "nobody is in it");
        let mut inhabitant = std::process::Command::new("ip")
            .args(["netns", "exec", &pod.name, "sleep", "60"])
            .spawn()
            .unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while found(&path(&other)).is_none() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let by_process = found(&path(&other));
        inhabitant.kill().unwrap();
        inhabitant.wait().unwrap();
        assert_eq!(by_process, inode);
    }

    #[test]
    fn cookie_is_stable_and_differs_between_namespaces() {
        let (first, second) = (TestNamespace::new(), TestNamespace::new());
        let cookie = first.open().cookie().unwrap();
        assert_eq!(first.open().cookie().unwrap(), cookie);
        assert_ne!(second.open().cookie().unwrap(), cookie);
    }
}
