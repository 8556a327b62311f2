//! The addresses that a pod of the differential test knows, by what they are to it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::machine::{Link, Machine};
use crate::pod::{ELSEWHERE4, ELSEWHERE6, Pod, SERVICE4, SERVICE6, Shape};

/// Both pods get their addresses from this number: 10.18.52.2 and fd00:13:35::2.
const NUMBER: u16 = 0x1234;

const SECOND4: Ipv4Addr = Ipv4Addr::new(10, 18, 52, 3);
const SECOND6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x13, 0x35, 0, 0, 0, 0, 3);
const OTHER4: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 2);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0xfd01, 9, 0, 0, 0, 0, 0, 2);
const OTHER_PEER4: Ipv4Addr = Ipv4Addr::new(172, 31, 9, 1);
const OTHER_PEER6: Ipv6Addr = Ipv6Addr::new(0xfd01, 9, 0, 0, 0, 0, 0, 1);
const UNREACHABLE4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const UNREACHABLE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x192, 0, 0, 0, 0, 9);
const PROHIBITED4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 209);
const PROHIBITED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x193, 0, 0, 0, 0, 9);
const MULTICAST6: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 1);

/// The pod's interface to the virtual machine.
pub const MACHINE_INTERFACE: &str = "vm0";
/// Tells the machine from others of the pod: it has 172.30.1.2, and the pod 172.30.1.1.
const MACHINE_NUMBER: u8 = 1;
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(172, 30, 1, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd30, 0x101, 0, 0, 0, 0, 0, 1);

/// An address, by what it is to the pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// A service behind the peer.
    Service,
    /// Another, in another network.
    Elsewhere,
    /// The pod's first address.
    Own,
    /// A second address on the same interface.
    Second,
    /// The address of its other interface.
    Other,
    /// 127.0.0.1 or `::1`.
    Localhost,
    /// 127.0.0.5; in IPv6 as [`Self::Localhost`].
    Loopback5,
    /// 127.0.0.6 or `::6`: where the proxy's own hop to the application comes from.
    Passthrough,
    /// 127.1.2.3; in IPv6 as [`Self::Localhost`].
    Loopback123,
    /// 0.0.0.0 or `::`.
    Any,
    /// The peer, on the pod's link.
    Peer,
    /// The peer, on the pod's other link.
    OtherPeer,
    /// The pod itself, by its address on the link to the virtual machine.
    Gateway,
    /// A network that the pod's own routes call unreachable.
    Unreachable,
    /// A network that the pod's own routes prohibit.
    Prohibited,
    /// The broadcast address of the pod's network; in IPv6 as [`Self::Multicast`].
    Broadcast,
    /// A multicast group.
    Multicast,
}

impl Place {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Service => "a service outside",
            Self::Elsewhere => "another service outside",
            Self::Own => "the pod itself",
            Self::Second => "the pod itself, by its second address",
            Self::Other => "the pod itself, by its other interface's address",
            Self::Localhost => "localhost",
            Self::Loopback5 | Self::Loopback123 => "loopback",
            Self::Passthrough => "the passthrough address",
            Self::Any => "the unspecified address",
            Self::Peer => "the peer",
            Self::OtherPeer => "the peer on the other link",
            Self::Gateway => "the pod itself, by its address on the machine's link",
            Self::Unreachable => "a network with an unreachable route",
            Self::Prohibited => "a network with a prohibit route",
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
        }
    }
}

/// The address of a place in one family.
pub fn address(pod: &Pod, place: Place, ipv4: bool) -> IpAddr {
    let (four, six) = match place {
        Place::Service => (SERVICE4, SERVICE6),
        Place::Elsewhere => (ELSEWHERE4, ELSEWHERE6),
        Place::Own => (pod.ipv4, pod.ipv6),
        Place::Second => (SECOND4, SECOND6),
        Place::Other => (OTHER4, OTHER6),
        Place::Localhost => (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
        Place::Loopback5 => (Ipv4Addr::new(127, 0, 0, 5), Ipv6Addr::LOCALHOST),
        Place::Passthrough => (
            Ipv4Addr::new(127, 0, 0, 6),
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6),
        ),
        Place::Loopback123 => (Ipv4Addr::new(127, 1, 2, 3), Ipv6Addr::LOCALHOST),
        Place::Any => (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED),
        Place::Peer => (pod.peer4, pod.peer6),
        Place::OtherPeer => (OTHER_PEER4, OTHER_PEER6),
        Place::Gateway => (GATEWAY4, GATEWAY6),
        Place::Unreachable => (UNREACHABLE4, UNREACHABLE6),
        Place::Prohibited => (PROHIBITED4, PROHIBITED6),
        Place::Broadcast => (Ipv4Addr::new(10, 18, 52, 255), MULTICAST6),
        Place::Multicast => (Ipv4Addr::new(224, 0, 0, 99), MULTICAST6),
    };
    if ipv4 { four.into() } else { six.into() }
}

/// The virtual machine of such a pod.
pub fn machine(pod: &Pod) -> Machine {
    Machine::new(pod, MACHINE_INTERFACE, MACHINE_NUMBER, Link::Plain)
}

/// A pod with all of these places.
pub fn pod() -> Pod {
    let pod = Pod::shaped(Shape {
        number: NUMBER,
        ..Pod::shape()
    });
    pod.netns.ip(&format!(
        "\
addr add {SECOND4}/24 dev eth0
addr add {SECOND6}/64 dev eth0 nodad
addr add ::6/128 dev lo nodad
link add eth1 type veth peer name eth1 netns {peer}
addr add {OTHER4}/24 dev eth1
addr add {OTHER6}/64 dev eth1 nodad
link set eth1 up
route add unreachable 192.0.2.0/25
route add prohibit 192.0.2.128/25
route add unreachable 2001:db8:192::/48
route add prohibit 2001:db8:193::/48",
        peer = pod.peer.name()
    ));
    pod.peer.ip(&format!(
        "\
addr add {OTHER_PEER4}/24 dev eth1
addr add {OTHER_PEER6}/64 dev eth1 nodad
link set eth1 up"
    ));
    pod
}
