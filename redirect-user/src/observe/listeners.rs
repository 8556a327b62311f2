//! TCP listeners that were there before attach, and who holds them.
//!
//! A listener that starts after attach is seen by the sockops hook (`TCP_LISTEN`); one that was there already has no
//! such event, so the loader finds it by sock_diag and takes its descriptor with `pidfd_getfd`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use redirect_common::decide::Owner;
use rustix::fs::{Stat, fstat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::cgroup::Cgroup;
use super::netlink::Netlink;
use super::netns::{self, NetworkNamespace};
use super::proc;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the listeners of a namespace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    /// sock_diag did not answer.
    #[error(
        "cannot list the TCP listeners of network namespace {name}: {source} (the kernel needs CONFIG_INET_DIAG)"
    )]
    SockDiag {
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A listening TCP socket, and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where it listens. A dual-stack socket shows as `[::]`.
    pub address: SocketAddr,
    /// Inode of the socket in sockfs.
    pub inode: u64,
    /// Who created it, in the kernel's ids.
    pub owner: Owner,
    /// Descriptors of it, one at least.
    pub holders: Vec<Holder>,
}

/// A descriptor of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: i32,
    /// The descriptor's number.
    number: i32,
}

impl Listener {
    /// A duplicate of a holder's descriptor: the same open socket. None if all have closed theirs, an error if it may not be had.
    /// Close it soon: while it is open, the address stays taken when the proxy closes its own.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        let mut refused = Ok(None);
        for holder in &self.holders {
            match holder.duplicate() {
                // Pid and descriptor number may both have been reused since /proc was read. The owner too is looked at again: the
                // process may have shown somebody else's file for a moment.
                Ok(fd) if self.is(&fstat(&fd)?) => return Ok(Some(fd)),
                Ok(_) | Err(Errno::SRCH | Errno::BADF) => {}
                Err(error) => refused = Err(error.into()),
            }
        }
        refused
    }

    fn is(&self, socket: &Stat) -> bool {
        (socket.st_ino, socket.st_uid, socket.st_gid)
            == (self.inode, self.owner.uid, self.owner.gid)
    }
}

impl Holder {
    fn duplicate(self) -> rustix::io::Result<OwnedFd> {
        let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        pidfd_getfd(process, self.number, PidfdGetfdFlags::empty())
    }
}

/// A listening TCP socket that no visible process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// Where it listens.
    pub address: SocketAddr,
    /// Inode of the socket in sockfs.
    pub inode: u64,
}

/// What listens on the ports asked for.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Ordered by address, then inode; every member of a `SO_REUSEPORT` group is there.
    pub found: Vec<Listener>,
    /// The caller should warn: inbound capture to these does not work until they are opened again.
    pub unreachable: Vec<Unreachable>,
}

/// Whose descriptors are looked through for those that listen.
#[derive(Clone, Copy, Debug)]
pub enum Among<'a> {
    /// The processes in this cgroup, and then those in the namespace, until each listener has a holder. To find the latter, all
    /// processes of the node have to be looked at.
    Pod(&'a Cgroup),
    /// All in the namespace, and all others of the node if need be, which takes long.
    All,
}

/// The TCP listeners (both families) of the namespace on any of `ports`.
pub fn listeners(ns: &NetworkNamespace, ports: &[u16], among: Among<'_>) -> Result<Listeners> {
    let list = || {
        ns.run_inside(|| listening_sockets(ports))?
            .map_err(|source| Error::SockDiag {
                name: ns.to_string(),
                source,
            })
    };
    let mut wanted = list()?;
    if wanted.is_empty() {
        return Ok(Listeners::default());
    }

    let mut found = HashMap::new();
    if let Among::Pod(cgroup) = among {
        // It may have gone.
        let processes = cgroup.processes().unwrap_or_default();
        take_until_complete(processes, &wanted, &mut found);
    }
    if found.len() < wanted.len() {
        // A listener is nearly always held by a process of its own namespace.
        let (inside, outside): (Vec<_>, Vec<_>) = proc::pids()
            .into_iter()
            .partition(|&pid| ns.contains(pid) == Some(true));
        match among {
            Among::Pod(_) => take_until_complete(inside, &wanted, &mut found),
            Among::All => {
                for pid in inside {
                    take_from(pid, &wanted, &mut found);
                }
                take_until_complete(outside, &wanted, &mut found);
            }
        }
    }
    wanted.retain(|inode, _| !found.contains_key(inode));
    if !wanted.is_empty() {
        // One that was closed while its process was looked for is no cause for a warning.
        let still = list()?;
        wanted.retain(|inode, _| still.contains_key(inode));
    }
    let mut listeners = Listeners {
        found: found.into_values().collect(),
        unreachable: wanted.into_values().collect(),
    };
    listeners
        .found
        .sort_by_key(|listener| (listener.address, listener.inode));
    listeners
        .unreachable
        .sort_by_key(|listener| (listener.address, listener.inode));
    Ok(listeners)
}

/// Listening sockets of the calling thread's namespace, by inode.
fn listening_sockets(ports: &[u16]) -> io::Result<HashMap<u64, Unreachable>> {
    let netlink = Netlink::open(NETLINK_SOCK_DIAG)?;
    let mut sockets = HashMap::new();
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id,
        });
        // Of a pod that has a million others, these alone are kept.
        sockets.extend(netlink.dump(&request, |found: &mut Vec<_>, answer| {
            let socket = socket_of(&answer).filter(|it| ports.contains(&it.address.port()));
            found.extend(socket.map(|socket| (socket.inode, socket)));
        })?);
    }
    Ok(sockets)
}

fn socket_of(answer: &SockDiagMessage) -> Option<Unreachable> {
    let SockDiagMessage::InetResponse(response) = answer else {
        return None;
    };
    let id = &response.header.socket_id;
    Some(Unreachable {
        address: SocketAddr::new(id.source_address, id.source_port),
        inode: response.header.inode.into(),
    })
}

/// Adds what these processes hold of what is wanted, until each has a holder.
fn take_until_complete(
    pids: Vec<i32>,
    wanted: &HashMap<u64, Unreachable>,
    found: &mut HashMap<u64, Listener>,
) {
    for pid in pids {
        if found.len() == wanted.len() {
            return;
        }
        take_from(pid, wanted, found);
    }
}

/// Adds what this process holds of what is wanted. A process that vanishes or refuses is passed over.
fn take_from(pid: i32, wanted: &HashMap<u64, Unreachable>, found: &mut HashMap<u64, Listener>) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return;
    };
    for entry in entries.flatten() {
        let Some((inode, number)) = socket_inode(&entry) else {
            continue;
        };
        let Some(socket) = wanted.get(&inode) else {
            continue;
        };
        let holder = Holder { pid, number };
        if let Some(listener) = found.get_mut(&inode) {
            listener.holders.push(holder);
            continue;
        }
        // A socket's inode has the ids of whoever created it.
        let metadata = fs::metadata(entry.path());
        let Some(metadata) = metadata.ok().filter(|it| it.ino() == inode) else {
            continue;
        };
        let listener = Listener {
            address: socket.address,
            inode,
            owner: Owner {
                uid: metadata.uid(),
                gid: metadata.gid(),
            },
            holders: vec![holder],
        };
        found.insert(inode, listener);
    }
}

/// Inode and descriptor number of a `/proc/PID/fd` entry that is a socket.
fn socket_inode(entry: &fs::DirEntry) -> Option<(u64, i32)> {
    let link = fs::read_link(entry.path()).ok()?;
    let inode = link
        .to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()?;
    Some((inode, entry.file_name().to_str()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
    use std::process::{Command, Stdio};

    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt};
    use nix::sys::socket::{bind, getsockopt, listen, setsockopt, socket};

    use super::*;
    use crate::observe::testing::TestNamespace;

    fn reuseport_listener(address: SocketAddr) -> OwnedFd {
        let family = if address.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
        bind(
            std::os::fd::AsRawFd::as_raw_fd(&fd),
            &SockaddrStorage::from(address),
        )
        .unwrap();
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
        fd
    }

    fn inode(fd: &impl std::os::fd::AsFd) -> u64 {
        fstat(fd).unwrap().st_ino
    }

    /// A listener on port 15006 of the namespace.
    fn open_listener(ns: &NetworkNamespace) -> OwnedFd {
        ns.run_inside(|| reuseport_listener((Ipv4Addr::UNSPECIFIED, 15006).into()))
            .unwrap()
    }

    /// The only one that is found there.
    fn only_listener(ns: &NetworkNamespace) -> Listener {
        let found = listeners(ns, &[15006], Among::All).unwrap().found;
        let [listener] = <[Listener; 1]>::try_from(found).unwrap();
        listener
    }

    fn pids(listener: &Listener) -> Vec<i32> {
        listener.holders.iter().map(|holder| holder.pid).collect()
    }

    #[test]
    fn listeners_both_families_and_whole_reuseport_group_are_found() {
        let pod = TestNamespace::new();
        let ns = pod.open();
        let open = ns
            .run_inside(|| {
                [
                    reuseport_listener((Ipv4Addr::UNSPECIFIED, 15006).into()),
                    reuseport_listener((Ipv4Addr::UNSPECIFIED, 15006).into()),
                    reuseport_listener((Ipv6Addr::LOCALHOST, 15001).into()),
                    reuseport_listener((Ipv4Addr::LOCALHOST, 8080).into()),
                ]
            })
            .unwrap();
        let listeners = listeners(&ns, &[15001, 15006], Among::All).unwrap();
        assert_eq!(listeners.unreachable, []);
        let mut expected: Vec<u64> = open[..3].iter().map(inode).collect();
        let mut found: Vec<u64> = listeners
            .found
            .iter()
            .map(|listener| listener.inode)
            .collect();
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected);
        for listener in &listeners.found {
            let fd = listener.duplicate().unwrap().unwrap();
            assert_eq!(inode(&fd), listener.inode);
            assert_eq!(pids(listener), [i32::try_from(std::process::id()).unwrap()]);
            assert!(getsockopt(&fd, sockopt::AcceptConn).unwrap());
        }
        assert_eq!(listeners.found[2].address, "[::1]:15001".parse().unwrap());
    }

    #[test]
    fn listeners_held_by_another_process_outlive_it_through_our_descriptor() {
        let pod = TestNamespace::new();
        let ns = pod.open();
        let open = open_listener(&ns);
        let wanted = inode(&open);
        // The child stays in our namespace and holds the pod's socket as its standard input.
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(open))
            .spawn()
            .unwrap();
        let listener = only_listener(&ns);
        let fd = listener.duplicate().unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(pids(&listener), [i32::try_from(child.id()).unwrap()]);
        assert_eq!(inode(&fd), wanted);
        assert!(getsockopt(&fd, sockopt::AcceptConn).unwrap());
        // Negative control.
        assert!(listener.duplicate().unwrap().is_none());
    }

    #[test]
    fn listener_is_had_from_whoever_still_holds_it_and_only_if_it_is_its_creators() {
        let pod = TestNamespace::new();
        let ns = pod.open();
        let open = open_listener(&ns);
        let second = open.try_clone().unwrap();
        let listener = only_listener(&ns);
        assert_eq!(listener.holders.len(), 2);
        drop(open);
        assert!(listener.duplicate().unwrap().is_some());
        let mut forged = listener.clone();
        forged.owner.uid += 1;
        assert!(forged.duplicate().unwrap().is_none());
        drop(second);
        assert!(listener.duplicate().unwrap().is_none());
    }

    #[test]
    fn listeners_of_another_namespace_are_not_seen() {
        let (pod, other) = (TestNamespace::new(), TestNamespace::new());
        let _open = other
            .open()
            .run_inside(|| TcpListener::bind("0.0.0.0:15006").unwrap())
            .unwrap();
        assert!(
            listeners(&pod.open(), &[15006], Among::All)
                .unwrap()
                .found
                .is_empty()
        );
    }
}
