//! A pod: a network namespace and a cgroup, next to a peer namespace that plays the rest of the world.

use std::{
    fmt::Display,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use crate::{cgroup::Cgroup, namespace::Namespace, protocol::Family};

/// A service behind the peer, not on the pod's link.
pub const SERVICE4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The same over IPv6.
pub const SERVICE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10);

/// Another service, in another network.
pub const ELSEWHERE4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 20);
/// The same over IPv6.
pub const ELSEWHERE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0x20);

/// How a pod is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Distinguishes the addresses of pods; equal numbers give equal addresses.
    pub number: u16,
    /// Whether it has IPv6 addresses.
    pub ipv6: bool,
    /// Whether it has default routes.
    pub default_routes: bool,
    /// Whether it has a user namespace of its own, and where its ids begin outside; 0 means none.
    pub id_offset: u32,
}

/// A pod and its peer; all of it goes away with this value.
#[derive(Debug)]
pub struct Pod {
    /// Where the application and the proxy live.
    pub netns: Namespace,
    /// The other end of the pod's link.
    pub peer: Namespace,
    /// The pod's cgroup.
    pub cgroup: Cgroup,
    /// The cgroup above it, as kubelet's `kubepods`. After the pod's own, so that it is removed later.
    pub above: Cgroup,
    /// The pod's IPv4 address.
    pub ipv4: Ipv4Addr,
    /// The pod's IPv6 address.
    pub ipv6: Ipv6Addr,
    /// The peer's IPv4 address on the link.
    pub peer4: Ipv4Addr,
    /// The peer's IPv6 address on the link.
    pub peer6: Ipv6Addr,
    /// What to add to a user or group id of the pod to get ours.
    pub id_offset: u32,
}

static COUNTER: AtomicU32 = AtomicU32::new(1);

impl Pod {
    /// A dual-stack pod with default routes and addresses of its own.
    pub fn new() -> Self {
        Self::shaped(Self::shape())
    }

    /// The shape of an ordinary pod, to be altered.
    pub fn shape() -> Shape {
        let number = COUNTER.load(Ordering::Relaxed) + process::id() % 0x4000;
        Shape {
            number: u16::try_from(number % 0xff00).unwrap(),
            ipv6: true,
            default_routes: true,
            id_offset: 0,
        }
    }

    /// A pod of that shape.
    pub fn shaped(shape: Shape) -> Self {
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("rd-{}-{serial}", process::id());
        let [x, y] = shape.number.to_be_bytes();
        let (x6, y6) = (u16::from(x) + 1, u16::from(y) + 1);
        let above = Cgroup::new(&name);
        let pod = Self {
            netns: match shape.id_offset {
                0 => Namespace::new(&name),
                offset => Namespace::in_user_namespace(&name, offset),
            },
            peer: Namespace::new(&format!("{name}-peer")),
            cgroup: Cgroup::below(&above, &format!("pod{}", uid(serial))),
            above,
            ipv4: Ipv4Addr::new(10, x, y, 2),
            ipv6: Ipv6Addr::new(0xfd00, x6, y6, 0, 0, 0, 0, 2),
            peer4: Ipv4Addr::new(10, x, y, 1),
            peer6: Ipv6Addr::new(0xfd00, x6, y6, 0, 0, 0, 0, 1),
            id_offset: shape.id_offset,
        };
        let Self {
            ipv4,
            ipv6,
            peer4,
            peer6,
            netns,
            peer,
            ..
        } = &pod;
        // Otherwise link-local addresses appear seconds later, and routes change under a test.
        for namespace in [netns, peer] {
            namespace.sysctl(&[("ipv6/conf/default/accept_dad", "0")]);
        }
        pod.netns.ip(&format!(
            "link add eth0 type veth peer name eth0 netns {}\naddr add {ipv4}/24 dev eth0\nlink set eth0 up",
            peer.name()
        ));
        peer.ip(&format!("addr add {peer4}/24 dev eth0\naddr add {SERVICE4}/32 dev lo\naddr add {ELSEWHERE4}/32 dev lo\nlink set eth0 up"));
        if shape.ipv6 {
            pod.netns.ip(&format!("addr add {ipv6}/64 dev eth0 nodad"));
            peer.ip(&format!("addr add {peer6}/64 dev eth0 nodad\naddr add {SERVICE6}/128 dev lo nodad\naddr add {ELSEWHERE6}/128 dev lo nodad"));
        }
        if shape.default_routes {
            pod.netns.ip(&format!("route add default via {peer4}"));
            if shape.ipv6 {
                pod.netns.ip(&format!("route add default via {peer6}"));
            }
        }
        for namespace in [&pod.netns, &pod.peer] {
            namespace.sysctl(&[("ipv4/ip_unprivileged_port_start", "0")]);
        }
        pod
    }

    /// Renames its cgroup as kubelet's systemd driver does. Nothing may be in it yet.
    pub fn with_systemd_driver(mut self) -> Self {
        let name = self.cgroup.path().file_name().unwrap().to_string_lossy();
        let slice = format!(
            "kubelet-kubepods-burstable-{}.slice",
            name.replace('-', "_")
        );
        self.cgroup = Cgroup::below(&self.above, &slice);
        self
    }

    /// The pod's address in that family.
    pub fn own(&self, family: Family) -> IpAddr {
        if family.is_ipv4() {
            self.ipv4.into()
        } else {
            self.ipv6.into()
        }
    }

    /// Whether `address` is local to the pod as the harness made it.
    pub fn is_local(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback() || address == self.ipv4 || address == self.ipv6
    }
}

/// A uid as Kubernetes makes them, told apart by process and number.
fn uid(serial: u32) -> String {
    format!("{:08x}-0000-4000-8000-{serial:012x}", process::id())
}

impl Default for Pod {
    fn default() -> Self {
        Self::new()
    }
}

/// The address of the service in that family.
pub const fn service(family: Family) -> IpAddr {
    if family.is_ipv4() {
        IpAddr::V4(SERVICE4)
    } else {
        IpAddr::V6(SERVICE6)
    }
}

/// Clean-up errors: printed when dropped, and a panic unless there is one already.
pub struct Regrets {
    subject: String,
    errors: Vec<String>,
}

impl Regrets {
    /// None so far.
    pub fn new(subject: &str) -> Self {
        Self {
            subject: subject.to_owned(),
            errors: Vec::new(),
        }
    }

    /// One more.
    pub fn add(&mut self, error: impl Display) {
        self.errors.push(error.to_string());
    }
}

impl Drop for Regrets {
    fn drop(&mut self) {
        if self.errors.is_empty() {
            return;
        }
        let text = format!("cleaning up {}: {}", self.subject, self.errors.join("; "));
        if thread::panicking() {
            eprintln!("{text}");
        } else {
            panic!("{text}");
        }
    }
}
