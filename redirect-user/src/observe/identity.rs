//! Translates user and group ids of a pod to the ids that the kernel compares.
//!
//! iptables' owner match reads ids in the user namespace that owns the network namespace; eBPF sees kernel ids. They
//! differ for pods with a user namespace (`hostUsers: false`).

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use super::netns::NetworkNamespace;
use super::proc;
use crate::sys::nsfs;

/// Inode of the initial user namespace, the same on every machine (`PROC_USER_INIT_INO`, `include/linux/proc_ns.h`).
pub const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why ids could not be translated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel does not tell the owner.
    #[error("cannot find the user namespace that owns network namespace {name}: {source}")]
    Owner {
        /// Display name of the network namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its maps are only readable through a process in it.
    #[error(
        "no process is in user namespace {inode}, which owns network namespace {name}: its id maps cannot be read"
    )]
    NoProcess {
        /// Inode of the user namespace.
        inode: u64,
        /// Display name of the network namespace.
        name: String,
    },
    /// A map line is not three numbers.
    #[error(
        "{kind} map of user namespace {inode} has an unreadable line {line:?}: three numbers are expected"
    )]
    Malformed {
        /// Users or groups.
        kind: Kind,
        /// Inode of the user namespace.
        inode: u64,
        /// The line.
        line: String,
    },
    /// The range ends before it begins.
    #[error("{kind} range {first}-{last} ends before it begins")]
    Backwards {
        /// Users or groups.
        kind: Kind,
        /// First id asked for.
        first: u32,
        /// Last id asked for.
        last: u32,
    },
    /// The first id has no counterpart.
    #[error("{kind} {id} is not mapped in the pod's user namespace {inode}: it maps {allowed}")]
    Unmapped {
        /// Users or groups.
        kind: Kind,
        /// The first id without a counterpart.
        id: u32,
        /// Inode of the user namespace.
        inode: u64,
        /// The ids it maps, e.g. `0-65535`.
        allowed: String,
    },
    /// The range begins in one extent and ends beyond it.
    #[error(
        "{kind} range {first}-{last} is not mapped in one piece in the pod's user namespace {inode}: it maps {allowed}"
    )]
    Split {
        /// Users or groups.
        kind: Kind,
        /// First id asked for.
        first: u32,
        /// Last id asked for.
        last: u32,
        /// Inode of the user namespace.
        inode: u64,
        /// The ids it maps, e.g. `0-999, 1000-65535`.
        allowed: String,
    },
}

/// Users or groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// User ids.
    Uid,
    /// Group ids.
    Gid,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Uid => "uid",
            Self::Gid => "gid",
        })
    }
}

/// A user namespace, held open.
#[derive(Debug)]
pub struct UserNamespace {
    // Keeps the namespace, and so its inode number, from being reused.
    _file: File,
    inode: u64,
    network: String,
}

impl UserNamespace {
    /// The user namespace that owns a network namespace.
    pub fn owning(ns: &NetworkNamespace) -> Result<Self> {
        let owner_error = |source| Error::Owner {
            name: ns.to_string(),
            source,
        };
        let file = File::from(nsfs::owning_user_namespace(ns).map_err(owner_error)?);
        let inode = file.metadata().map_err(owner_error)?.ino();
        Ok(Self {
            _file: file,
            inode,
            network: ns.to_string(),
        })
    }

    /// The nsfs inode.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Whether ids are the same inside and outside: the initial user namespace, or the one this process is in.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.inode == INITIAL_USER_NAMESPACE
            || fs::metadata("/proc/self/ns/user").is_ok_and(|metadata| metadata.ino() == self.inode)
    }

    /// How its ids translate to the ids of this process's user namespace, which is the initial one on a node.
    pub fn id_map(&self) -> Result<IdMap> {
        if self.is_ours() {
            return Ok(IdMap::identity(self.inode));
        }
        // A process may vanish between being found and being read: go on to the next one.
        for pid in proc::pids() {
            if proc::namespace_inode(pid, "user") != Some(self.inode) {
                continue;
            }
            let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
            let (Ok(uids), Ok(gids)) = (read("uid_map"), read("gid_map")) else {
                continue;
            };
            if proc::namespace_inode(pid, "user") == Some(self.inode) {
                return IdMap::parse(self.inode, &uids, &gids);
            }
        }
        Err(Error::NoProcess {
            inode: self.inode,
            name: self.network.clone(),
        })
    }
}

/// One line of `/proc/PID/uid_map`: `count` ids from `inside` are the ids from `outside`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

impl Extent {
    const ALL: Self = Self {
        inside: 0,
        outside: 0,
        count: u32::MAX,
    };

    fn last(self) -> u32 {
        self.inside.saturating_add(self.count - 1)
    }
}

/// Both id maps of a user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap {
    inode: u64,
    uids: Vec<Extent>,
    gids: Vec<Extent>,
}

impl IdMap {
    fn identity(inode: u64) -> Self {
        Self {
            inode,
            uids: vec![Extent::ALL],
            gids: vec![Extent::ALL],
        }
    }

    fn parse(inode: u64, uids: &str, gids: &str) -> Result<Self> {
        Ok(Self {
            inode,
            uids: parse_extents(Kind::Uid, inode, uids)?,
            gids: parse_extents(Kind::Gid, inode, gids)?,
        })
    }

    /// The kernel ids of the pod's users `first..=last`.
    pub fn uids(&self, first: u32, last: u32) -> Result<(u32, u32)> {
        self.translate(Kind::Uid, first, last)
    }

    /// The kernel ids of the pod's groups `first..=last`.
    pub fn gids(&self, first: u32, last: u32) -> Result<(u32, u32)> {
        self.translate(Kind::Gid, first, last)
    }

    fn translate(&self, kind: Kind, first: u32, last: u32) -> Result<(u32, u32)> {
        let extents = match kind {
            Kind::Uid => &self.uids,
            Kind::Gid => &self.gids,
        };
        if first > last {
            return Err(Error::Backwards { kind, first, last });
        }
        let allowed = || match extents.as_slice() {
            [] => "none".to_owned(),
            extents => extents
                .iter()
                .map(|extent| format!("{}-{}", extent.inside, extent.last()))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let holds = |id: u32| {
            extents
                .iter()
                .find(|extent| (extent.inside..=extent.last()).contains(&id))
        };
        let extent = holds(first).ok_or_else(|| Error::Unmapped {
            kind,
            id: first,
            inode: self.inode,
            allowed: allowed(),
        })?;
        if last > extent.last() {
            return Err(match holds(last) {
                Some(_) => Error::Split {
                    kind,
                    first,
                    last,
                    inode: self.inode,
                    allowed: allowed(),
                },
                None => Error::Unmapped {
                    kind,
                    id: last,
                    inode: self.inode,
                    allowed: allowed(),
                },
            });
        }
        let outside = |id: u32| id - extent.inside + extent.outside;
        Ok((outside(first), outside(last)))
    }
}

fn parse_extents(kind: Kind, inode: u64, text: &str) -> Result<Vec<Extent>> {
    text.lines()
        .map(|line| {
            let numbers: Vec<u32> = line
                .split_whitespace()
                .map_while(|word| word.parse().ok())
                .collect();
            match numbers[..] {
                // The kernel never shows an empty extent or one that runs past the last id.
                [inside, outside, count]
                    if count > 0 && outside.checked_add(count - 1).is_some() =>
                {
                    Ok(Extent {
                        inside,
                        outside,
                        count,
                    })
                }
                _ => Err(Error::Malformed {
                    kind,
                    inode,
                    line: line.to_owned(),
                }),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::observe::testing::TestNamespace;

    /// A process alone in new user and network namespaces; killed on drop.
    struct Stranger(Child);

    impl Stranger {
        fn new(uid_map: &str, gid_map: &str) -> Self {
            let child = Command::new("unshare")
                .args(["--user", "--net", "sleep", "60"])
                .stdin(Stdio::null())
                .spawn()
                .expect("util-linux is installed");
            let stranger = Self(child);
            // The last that unshare(2) changes.
            let ours = fs::metadata("/proc/self/ns/user").unwrap().ino();
            let start = Instant::now();
            while proc::namespace_inode(stranger.pid(), "user").is_none_or(|inode| inode == ours) {
                assert!(
                    start.elapsed() < Duration::from_secs(10),
                    "unshare made no namespaces"
                );
                std::thread::sleep(Duration::from_millis(5));
            }
            fs::write(format!("/proc/{}/uid_map", stranger.pid()), uid_map)
                .expect("root may write a uid_map");
            fs::write(format!("/proc/{}/gid_map", stranger.pid()), gid_map)
                .expect("root may write a gid_map");
            stranger
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Stranger {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn owning_plain_namespace_maps_every_id_to_itself() {
        let pod = TestNamespace::new();
        let map = UserNamespace::owning(&pod.open())
            .unwrap()
            .id_map()
            .unwrap();
        assert_eq!(map.uids, [Extent::ALL]);
        assert_eq!(map.gids, [Extent::ALL]);
        assert_eq!(map.uids(1337, 1337).unwrap(), (1337, 1337));
        assert_eq!(map.gids(0, u32::MAX - 1).unwrap(), (0, u32::MAX - 1));
    }

    #[test]
    fn owning_user_namespaced_pod_translates_through_its_maps() {
        let pod = Stranger::new("0 100000 1000\n1000 300000 64536\n", "0 200000 65536\n");
        let ns = NetworkNamespace::of_process(pod.pid()).unwrap();
        let owner = UserNamespace::owning(&ns).unwrap();
        assert!(!owner.is_ours());
        let map = owner.id_map().unwrap();
        assert_eq!(map.uids(0, 999).unwrap(), (100_000, 100_999));
        assert_eq!(map.uids(1337, 1337).unwrap(), (300_337, 300_337));
        assert_eq!(map.gids(1337, 1340).unwrap(), (201_337, 201_340));
        let unmapped = map.uids(70_000, 70_000).unwrap_err();
        assert!(
            unmapped.to_string().starts_with("uid 70000 is not mapped"),
            "{unmapped}"
        );
        assert!(
            unmapped.to_string().ends_with("0-999, 1000-65535"),
            "{unmapped}"
        );
        assert!(matches!(map.uids(900, 1100), Err(Error::Split { .. })));
        assert!(matches!(
            map.gids(65_000, 66_000),
            Err(Error::Unmapped { id: 66_000, .. })
        ));
    }

    #[test]
    fn owning_namespace_without_processes_says_so() {
        let ns = {
            let pod = Stranger::new("0 100000 10\n", "0 100000 10\n");
            NetworkNamespace::of_process(pod.pid()).unwrap()
        };
        let error = UserNamespace::owning(&ns).unwrap().id_map().unwrap_err();
        assert!(matches!(error, Error::NoProcess { .. }), "{error}");
    }

    #[test]
    fn range_backwards_is_refused() {
        assert!(matches!(
            IdMap::identity(0).uids(2, 1),
            Err(Error::Backwards { .. })
        ));
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
        fn any_map_translates_one_to_one_or_refuses(text in prop_oneof![text(), "(([0-9]{1,3}|4294967[0-9]{3}) ([0-9]{1,3}|42949672[0-9]{2}) ([0-9]{1,3}|4294967295)\n){0,4}"], a: u32, b in prop_oneof![any::<u32>(), 0..9_u32]) {
            let Ok(map) = IdMap::parse(1, &text, &text) else { return Ok(()) };
            for (first, last) in [(a.min(b), a.max(b)), (b, b.saturating_add(3)), (a, a), (b, a)] {
                match map.uids(first, last) {
                    Ok((from, to)) => {
                        prop_assert_eq!(to.wrapping_sub(from), last - first);
                        prop_assert!(from <= to);
                    }
                    Err(error) => prop_assert!(!error.to_string().is_empty()),
                }
            }
        }
    }
}
