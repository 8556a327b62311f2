//! A random connection, and what it is in words.

use std::net::SocketAddr;

use proptest::{prelude::*, sample::select};

use super::{
    place::{Place, address},
    setting::Setting as PodSetting,
};
use crate::{
    options::{DNS_PROXY_PORT, SELF_MARK, TPROXY_MARK},
    pod::Pod,
    protocol::{Dial, Family, Identity, Setting, Transport, Way},
};

/// Longer than any handshake takes; a SYN that is dropped on the way costs this much, in milliseconds.
const HANDSHAKE_MS: u64 = 500;
/// Longer than any answer takes, in milliseconds.
const ANSWER_MS: u64 = 2000;
/// The same for a datagram, which may well be dropped.
const DATAGRAM_MS: u64 = 1000;

/// Ports that are tried whatever the options name. Nobody listens on the last two.
const PORTS: [u16; 17] = [
    80,
    53,
    443,
    5000,
    8005,
    8080,
    9090,
    15001,
    15006,
    15008,
    DNS_PROXY_PORT,
    15020,
    15090,
    61_000,
    65_534,
    81,
    65_535,
];
const MARKS: &[u32] = &[TPROXY_MARK, SELF_MARK, 42];
/// Buffers for `SO_ORIGINAL_DST`: exact for either family, larger, too small, and beyond a page.
const LENGTHS: &[usize] = &[16, 28, 64, 15, 2, 20, 128, 4096, 5000];

/// Where most connections go.
const USUAL: &[Place] = &[
    Place::Service,
    Place::Service,
    Place::Own,
    Place::Localhost,
    Place::Elsewhere,
];
/// Where few go.
const UNUSUAL: &[Place] = &[
    Place::Second,
    Place::Other,
    Place::Passthrough,
    Place::Loopback5,
    Place::Loopback123,
    Place::Any,
    Place::Peer,
    Place::OtherPeer,
];
/// Where none arrives, except at the proxy.
const NOWHERE: &[Place] = &[
    Place::Unreachable,
    Place::Prohibited,
    Place::Broadcast,
    Place::Multicast,
];
/// What the peer can reach of the pod.
const POD: &[Place] = &[Place::Own, Place::Own, Place::Second, Place::Other];
/// What a process of the pod may bind to; the last is not the pod's.
const SOURCES: &[Place] = &[
    Place::Any,
    Place::Own,
    Place::Second,
    Place::Other,
    Place::Passthrough,
    Place::Localhost,
    Place::Service,
];
/// Addresses that are not the pod's.
const FOREIGN: &[Place] = &[
    Place::Service,
    Place::Elsewhere,
    Place::Peer,
    Place::Unreachable,
];
/// Where a virtual machine connects to.
const MACHINE: &[Place] = &[
    Place::Service,
    Place::Service,
    Place::Own,
    Place::Elsewhere,
    Place::Second,
    Place::Other,
    Place::Gateway,
    Place::Peer,
    Place::OtherPeer,
    Place::Unreachable,
    Place::Prohibited,
];
/// What a process of the machine may bind to.
const MACHINE_SOURCES: &[Place] = &[Place::Any];
/// What a process of the peer may bind to.
const PEER_SOURCES: &[Place] = &[Place::Any, Place::Service];

/// Where a connection is made.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Origin {
    /// In the pod, by somebody.
    Pod(Identity),
    /// Outside.
    Peer,
    /// In a virtual machine behind an interface of the pod.
    Machine,
}

impl Origin {
    /// Whether it is a process of the pod's.
    pub const fn is_pod(&self) -> bool {
        matches!(self, Self::Pod(_))
    }
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Who dials.
    pub from: Origin,
    /// The protocol.
    pub transport: Transport,
    /// The kind of socket.
    pub family: Family,
    /// The destination.
    pub to: Place,
    /// Its port.
    pub port: u16,
    /// What to bind to; port 0 leaves that half to the kernel.
    pub source: Option<(Place, u16)>,
    /// `IP_FREEBIND` or `IP_TRANSPARENT`: the source need not be the pod's.
    pub liberty: Option<Setting>,
    /// `SO_MARK`, or 0.
    pub mark: u32,
    /// A buffer size for one more query of the server's `SO_ORIGINAL_DST`.
    pub length: Option<usize>,
    /// Made before attach, and looked at again after it.
    pub before: bool,
}

/// Connections for a setting: ports are drawn from those it names and others.
pub fn attempts(setting: &PodSetting) -> impl Strategy<Value = Attempt> + use<> {
    let named = setting.ports_named();
    let port = if named.is_empty() {
        select(PORTS.to_vec()).boxed()
    } else {
        let named: Vec<u16> = named.into_iter().collect();
        prop_oneof![2 => select(PORTS.to_vec()), 1 => select(named)].boxed()
    };
    // A query that is captured tells more than other datagrams.
    let dns = setting.options.redirect_dns;
    let before = if setting.fresh { 0.05 } else { 0.0 };
    let family = || {
        prop_oneof![
            2 => Just(Family::V4),
            2 => Just(Family::V6),
            1 => Just(Family::Mapped),
        ]
    };
    let to = prop_oneof![
        12 => select(USUAL),
        6 => select(UNUSUAL),
        1 => select(NOWHERE),
    ];
    // Without the option, what the pod forwards is another matter (docs/behaviour.md).
    let machines = if setting.has_machine() { 40 } else { 0 };
    let ends = prop_oneof![
        50 => (identities().prop_map(Origin::Pod), family(), to, sources(SOURCES)),
        20 => (Just(Origin::Peer), family(), select(POD), sources(PEER_SOURCES)),
        machines => (Just(Origin::Machine), family(), select(MACHINE), sources(MACHINE_SOURCES)),
    ];
    let udp = if dns { 7 } else { 1 };
    let transport = prop_oneof![
        10 => Just(Transport::Tcp),
        udp => Just(Transport::ConnectedUdp),
        udp => Just(Transport::Udp),
    ];
    let query = prop::bool::weighted(if dns { 0.5 } else { 0.0 });
    let marked = if setting.options.tproxy { 4 } else { 1 };
    let extras = (
        prop_oneof![9 => Just(0), marked => select(MARKS)],
        prop_oneof![4 => Just(None), 1 => select(LENGTHS).prop_map(Some)],
        prop::bool::weighted(before),
        prop_oneof![9 => Just(None), 1 => liberties().prop_map(Some)],
    );
    (ends, transport, (port, query), extras).prop_map(
        |((from, family, to, source), transport, (port, query), extras)| {
            let (mark, length, before, liberty) = extras;
            let tcp = transport == Transport::Tcp;
            let inside = from.is_pod();
            let port_bound = source.map_or(0, |(_, port)| port);
            Attempt {
                // Nobody answers a datagram sent to everybody.
                transport: if NOWHERE.contains(&to) {
                    Transport::Tcp
                } else {
                    transport
                },
                family,
                to,
                port: if query { 53 } else { port },
                // A process of the peer has its own address only.
                source: match &liberty {
                    Some((_, foreign)) if inside => {
                        foreign.map(|place| (place, port_bound)).or(source)
                    }
                    _ => source,
                },
                liberty: liberty.filter(|_| inside).map(|(liberty, _)| liberty),
                from,
                mark,
                // Datagrams have no connection to ask about or to look at again.
                length: length.filter(|_| tcp),
                before: before && tcp,
            }
        },
    )
}

fn identities() -> impl Strategy<Value = Identity> {
    let apart = vec![
        Identity::APP,
        Identity::APP,
        Identity::APP,
        Identity::APP,
        Identity::PROXY,
        Identity::ROOT,
        Identity::new(1000, 1337),
        Identity::new(1337, 1000),
        Identity::new(0, 1337),
        Identity::new(3, 3),
        Identity::new(4, 4),
        Identity::new(3, 1000),
        Identity::new(1000, 4),
        Identity::new(2001, 2001),
        Identity::new(1337, 1337).effective_user(1000),
        Identity::new(1000, 1000).effective_user(1337),
        Identity::new(1000, 1337).effective_group(1000),
        Identity::new(1000, 1000).effective_group(1337),
        Identity::new(1000, 1000).supplementary(1337),
    ];
    select(apart)
}

/// What lets a socket bind to any address, and often one that is not the pod's.
fn liberties() -> impl Strategy<Value = (Setting, Option<Place>)> {
    let settings = select(vec![Setting::Freebind, Setting::Transparent]);
    let places = prop_oneof![1 => Just(None), 2 => select(FOREIGN).prop_map(Some)];
    (settings, places)
}

fn sources(places: &'static [Place]) -> impl Strategy<Value = Option<(Place, u16)>> {
    // Below the ephemeral ports, so that a bound port is never taken by chance; one that comes again; and steered ones.
    let ports = prop_oneof![
        10 => Just(0),
        4 => 16_000u16..32_000,
        1 => Just(16_000),
        2 => 61_000u16..=65_535,
    ];
    prop_oneof![
        3 => Just(None),
        1 => (select(places), ports).prop_map(Some),
    ]
}

impl Attempt {
    /// A TCP connection of an unbound socket.
    pub const fn plain(from: Origin, family: Family, to: Place, port: u16) -> Self {
        Self {
            from,
            transport: Transport::Tcp,
            family,
            to,
            port,
            source: None,
            liberty: None,
            mark: 0,
            length: None,
            before: false,
        }
    }

    /// The destination in this pod.
    pub fn destination(&self, pod: &Pod) -> SocketAddr {
        SocketAddr::new(address(pod, self.to, self.family.is_ipv4()), self.port)
    }

    /// Whether it binds to an address that is not the pod's.
    pub fn has_foreign_source(&self) -> bool {
        self.source
            .is_some_and(|(place, _)| FOREIGN.contains(&place))
    }

    /// Whether the process needs `CAP_NET_ADMIN`.
    pub fn is_privileged(&self) -> bool {
        self.mark != 0 || self.liberty == Some(Setting::Transparent)
    }

    /// The address to bind to in this pod.
    pub fn binding(&self, pod: &Pod) -> Option<SocketAddr> {
        let (place, port) = self.source?;
        Some(SocketAddr::new(
            address(pod, place, self.family.is_ipv4()),
            port,
        ))
    }

    /// Whether the kernel chooses the source port.
    pub fn has_ephemeral_port(&self) -> bool {
        self.source.is_none_or(|(_, port)| port == 0)
    }

    /// As an order to an actor.
    pub fn dial(&self, pod: &Pod) -> Dial {
        Dial {
            transport: self.transport,
            bind: self.binding(pod),
            mark: self.mark,
            reset: self.transport == Transport::Tcp,
            way: Way::Nonblocking,
            connect_ms: HANDSHAKE_MS,
            timeout_ms: if self.transport == Transport::Tcp {
                ANSWER_MS
            } else {
                DATAGRAM_MS
            },
            settings: self.liberty.iter().cloned().collect(),
            probe_lengths: self.length.into_iter().collect(),
            ..Dial::new(self.family, self.destination(pod))
        }
    }

    /// In words, of this pod.
    pub fn words(&self, pod: &Pod) -> String {
        let mut words = Vec::new();
        if self.before {
            words.push("before attach:".to_owned());
        }
        words.push(match &self.from {
            Origin::Pod(identity) => format!("{} in the pod", who(identity)),
            Origin::Peer => "the peer".to_owned(),
            Origin::Machine => "the virtual machine".to_owned(),
        });
        words.push(
            match self.transport {
                Transport::Tcp => "connects by TCP",
                Transport::ConnectedUdp => "asks by UDP, connected,",
                Transport::Udp => "asks by UDP",
            }
            .to_owned(),
        );
        let socket = match self.family {
            Family::V4 => "an IPv4 socket",
            Family::V6 => "an IPv6 socket",
            Family::Mapped => "an IPv6 socket with an IPv4-mapped address",
        };
        words.push(format!(
            "on {socket} to {} ({})",
            self.destination(pod),
            self.to.words()
        ));
        match (self.source, self.binding(pod)) {
            (Some((place, _)), Some(address)) => {
                words.push(format!("from {address} ({})", place.words()));
                if let Some(liberty) = &self.liberty {
                    words.push(format!("by {liberty:?}"));
                }
            }
            _ => words.push("from an unbound socket".to_owned()),
        }
        if self.mark != 0 {
            words.push(format!("with mark {}", self.mark));
        }
        if let Some(length) = self.length {
            words.push(format!("and the server asks with {length} bytes"));
        }
        words.join(" ")
    }
}

fn who(identity: &Identity) -> String {
    let Identity {
        ruid,
        euid,
        rgid,
        egid,
        groups,
    } = identity;
    let id = |real: &u32, effective: &u32| {
        if real == effective {
            real.to_string()
        } else {
            format!("{real} (effective {effective})")
        }
    };
    let mut words = format!("uid {} gid {}", id(ruid, euid), id(rgid, egid));
    for group in groups {
        words.push_str(&format!(" and supplementary group {group}"));
    }
    words
}
