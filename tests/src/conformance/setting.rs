//! What is random about a pod: the options, and where and when its proxy listens.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
};

use proptest::{collection::vec, prelude::*, sample::select};

use super::place::{Place, address};
use crate::{
    options::{DNS_PROXY_PORT, Options, or},
    pod::Pod,
    protocol::{Identity, Listen},
    scene::wildcards,
};

/// One pod's options and proxy.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// The options.
    pub options: Options,
    /// Where the proxy listens.
    pub proxy: Proxy,
    /// Where the proxy's DNS agent listens.
    pub agent: Agent,
    /// Whether the proxy begins to listen only after attach.
    pub late: bool,
    /// Whether the pod was detached before, rather than having its options changed.
    pub fresh: bool,
}

/// Where the proxy listens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Proxy {
    /// On 0.0.0.0 and on `::`, with a socket each.
    Wildcards,
    /// On `::` for both families.
    DualStack,
    /// On four sockets that share 0.0.0.0, and four on `::`.
    ReusePort,
    /// On 127.0.0.1 and `::1`.
    Loopback,
    /// On the pod's own addresses.
    PodAddress,
    /// On 0.0.0.0 only.
    Ipv4Only,
    /// Nowhere.
    Nowhere,
}

impl Proxy {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Wildcards => "0.0.0.0 and ::",
            Self::DualStack => ":: for both families",
            Self::ReusePort => "four sockets on 0.0.0.0 and four on ::",
            Self::Loopback => "127.0.0.1 and ::1",
            Self::PodAddress => "the pod's own addresses",
            Self::Ipv4Only => "0.0.0.0 only",
            Self::Nowhere => "nothing",
        }
    }

    /// Its listeners on one port, named after that.
    pub fn listeners(self, pod: &Pod, port: u16) -> Vec<Listen> {
        let at = |places: [Place; 1]| {
            places
                .into_iter()
                .flat_map(|place| [true, false].map(|ipv4| address(pod, place, ipv4)))
                .map(|ip| SocketAddr::new(ip, port))
                .collect::<Vec<_>>()
        };
        let [any4, any6] = wildcards(port);
        let name = port.to_string();
        let listen = |at: SocketAddr| Listen::new(&name, at);
        match self {
            Self::Wildcards => [any4, any6].map(listen).to_vec(),
            Self::DualStack => vec![listen(any6).dual_stack()],
            Self::ReusePort => [any4, any6].map(|at| listen(at).reuseport(4)).to_vec(),
            Self::Loopback => at([Place::Localhost]).into_iter().map(listen).collect(),
            Self::PodAddress => at([Place::Own]).into_iter().map(listen).collect(),
            Self::Ipv4Only => vec![listen(any4)],
            Self::Nowhere => Vec::new(),
        }
    }
}

/// Where the proxy's DNS agent listens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Agent {
    /// On 127.0.0.1 and `::1`, as Istio's.
    Loopback,
    /// On 0.0.0.0 and on `::`.
    Wildcards,
    /// Nowhere.
    Nowhere,
}

impl Agent {
    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Loopback => "127.0.0.1 and ::1",
            Self::Wildcards => "0.0.0.0 and ::",
            Self::Nowhere => "nothing",
        }
    }

    /// Its listeners, TCP and UDP.
    pub fn listeners(self) -> Vec<Listen> {
        let at = match self {
            Self::Loopback => vec![
                (Ipv4Addr::LOCALHOST, DNS_PROXY_PORT).into(),
                (Ipv6Addr::LOCALHOST, DNS_PROXY_PORT).into(),
            ],
            Self::Wildcards => wildcards(DNS_PROXY_PORT).to_vec(),
            Self::Nowhere => Vec::new(),
        };
        let listen = |at| [Listen::new(AGENT, at), Listen::new(AGENT, at).udp()];
        at.into_iter().flat_map(listen).collect()
    }
}

/// The name of the agent's listeners.
pub const AGENT: &str = "dns";

/// Which queries are captured: `--redirect-dns`, `--capture-all-dns` and `--resolv-conf`.
const DNS: &[(bool, bool, &str)] = &[
    (false, false, ""),
    (true, false, SERVICE_RESOLVES),
    (true, true, ""),
    (
        true,
        false,
        concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/conformance/resolv/pod.conf"
        ),
    ),
    (
        true,
        false,
        concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/conformance/resolv/ipv4.conf"
        ),
    ),
    (true, true, SERVICE_RESOLVES),
    (false, true, ""),
];
const SERVICE_RESOLVES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/src/conformance/resolv/service.conf"
);
/// One that the pod has not is among them.
const INTERFACES: &[&str] = &["eth1", "eth0", "net1", "eth1,net1"];
/// What virtual machines are behind, by `-k`; there is one, behind the first.
const MACHINES: &[&str] = &["vm0", "vm0,net1", "net1", "vm+"];
const PROXY_PORTS: &[&str] = &["", "15101", "61001"];
const INBOUND_PORTS: &[&str] = &["", "15106", "15001"];
const TUNNEL_PORTS: &[&str] = &["", "15108", "80"];
const PORTS: &[&str] = &[
    "80",
    "53",
    "443",
    "8000:8010",
    "8080",
    "5000",
    "8005",
    "7999",
    "0:1023",
    "9000:",
    ":79",
    "15001",
    "15006",
    "15008",
    "15020",
    "15021",
    "15053",
    "15090",
    "15108",
    "61000:65534",
    "61000",
    "65535",
];
const IDS: &[&str] = &[
    "1337",
    "1337",
    "1337",
    "1000",
    "0",
    "3",
    "4",
    "2001",
    "3-4",
    "1000-1337",
];
const CIDRS: &[&str] = &[
    "203.0.113.0/24",
    "2001:db8:113::/48",
    "203.0.113.10/32",
    "198.51.100.0/24",
    "2001:db8:51::/64",
    "10.0.0.0/8",
    "fd00::/8",
    "10.18.52.2/32",
    "10.18.52.3/31",
    "fd00:13:35::2/128",
    "172.31.9.0/24",
    "192.0.2.0/24",
    "198.18.0.0/15",
    "203.0.113.77/25",
    "0.0.0.0/0",
    "::/0",
    "0.0.0.0/1",
    "2000::/3",
    "127.0.0.0/8",
    "127.1.2.3/32",
    "127.0.0.1/32",
    "::1/128",
];
const LOOPBACK_CIDRS: &[&str] = &[
    "",
    "127.0.0.0/8",
    "127.0.0.1/8",
    "127.0.0.4/30",
    "127.1.2.3/32",
];

/// Settings that both backends support.
///
/// A new option takes a strategy here; the rules it stands for are in [`crate::iptables::rules()`].
pub fn settings() -> impl Strategy<Value = Setting> {
    let ports = (
        mostly("", select(PROXY_PORTS)),
        mostly("", select(INBOUND_PORTS)),
        mostly("", select(TUNNEL_PORTS)),
    );
    let ids = (list(1..=3, IDS), sometimes(list(1..=3, IDS)));
    let inbound = (
        prop_oneof![2 => Just("*".to_owned()), 1 => list(0..=4, PORTS)],
        sometimes(list(1..=3, PORTS)),
    );
    let outbound = (
        prop_oneof![3 => Just("*".to_owned()), 2 => list(0..=5, CIDRS)],
        sometimes(list(1..=2, CIDRS)),
        sometimes(list(1..=3, PORTS)),
        sometimes(list(1..=2, PORTS)),
    );
    let groups = (
        prop_oneof![
            8 => Just(None),
            1 => Just(Some("*".to_owned())),
            2 => list(0..=3, IDS).prop_map(Some),
        ],
        prop_oneof![3 => Just(String::new()), 1 => list(1..=3, IDS)],
        mostly("", select(LOOPBACK_CIDRS)),
        prop_oneof![3 => Just(true), 1 => Just(false)],
    );
    let capture = (
        prop_oneof![2 => Just(DNS[0]), 3 => select(DNS)],
        prop::bool::weighted(0.25),
        prop_oneof![4 => Just(""), 1 => select(INTERFACES)],
        prop_oneof![4 => Just(""), 1 => select(MACHINES)],
    );
    let around = (
        prop_oneof![
            6 => Just(Proxy::Wildcards),
            2 => Just(Proxy::DualStack),
            1 => Just(Proxy::ReusePort),
            2 => Just(Proxy::Loopback),
            1 => Just(Proxy::PodAddress),
            1 => Just(Proxy::Ipv4Only),
            1 => Just(Proxy::Nowhere),
        ],
        prop_oneof![
            3 => Just(Agent::Loopback),
            3 => Just(Agent::Wildcards),
            1 => Just(Agent::Nowhere),
        ],
        prop::bool::weighted(0.3),
        any::<bool>(),
    );
    (ports, ids, inbound, outbound, groups, capture, around).prop_map(
        |(ports, ids, inbound, outbound, groups, capture, around)| Setting {
            options: Options {
                proxy_port: ports.0,
                inbound_port: ports.1,
                tunnel_port: ports.2,
                uids: kept(ids.0),
                gids: kept(ids.1),
                include_inbound: kept(inbound.0),
                exclude_inbound: kept(inbound.1),
                include_cidrs: kept(outbound.0),
                exclude_cidrs: kept(outbound.1),
                exclude_outbound: kept(outbound.2),
                include_outbound: kept(outbound.3),
                owner_groups: groups.0.map(kept),
                owner_groups_exclude: kept(groups.1),
                loopback_cidr: groups.2,
                ipv6: groups.3,
                redirect_dns: capture.0.0,
                capture_all_dns: capture.0.1,
                resolv_conf: capture.0.2,
                tproxy: capture.1,
                exclude_interfaces: capture.2,
                // Refused with TPROXY.
                virtual_interfaces: if capture.1 { "" } else { capture.3 },
                ..Options::BARE
            },
            proxy: around.0,
            agent: around.1,
            late: around.2,
            fresh: around.3,
        },
    )
}

/// Three times out of four the usual value, to which shrinking returns.
fn mostly<T: Clone + std::fmt::Debug + 'static>(
    usual: T,
    strategy: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = T> {
    prop_oneof![3 => Just(usual), 1 => strategy]
}

/// Two times out of five a list, else none.
fn sometimes(list: impl Strategy<Value = String> + 'static) -> impl Strategy<Value = String> {
    prop_oneof![3 => Just(String::new()), 2 => list]
}

fn list(
    length: std::ops::RangeInclusive<usize>,
    items: &'static [&'static str],
) -> impl Strategy<Value = String> {
    vec(select(items), length).prop_map(|items| items.join(","))
}

/// [`Options`] hold static text; there are few different ones, so each is kept for good, once.
fn kept(text: String) -> &'static str {
    static KEPT: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    match kept.get(text.as_str()) {
        Some(text) => text,
        None => {
            let text = &*text.leak();
            kept.insert(text);
            text
        }
    }
}

impl Setting {
    /// The ports on which the proxy listens, each once.
    pub fn proxy_ports(&self) -> BTreeSet<u16> {
        [
            self.options.outbound_listener(),
            self.options.inbound_listener(),
        ]
        .into()
    }

    /// Whether `-k` names the interface to the virtual machine.
    pub fn has_machine(&self) -> bool {
        self.options.virtual_interfaces.contains("vm")
    }

    /// Whether `-u` or `-g` names the agent's user or group.
    pub fn agent_has_proxy_id(&self) -> bool {
        let Identity { euid, egid, .. } = Identity::PROXY;
        let uids = or(self.options.uids, "1337");
        let gids = or(self.options.gids, uids);
        let names = |list: &str, id: u32| {
            list.split(',').any(|item| {
                let (first, last) = item.split_once('-').unwrap_or((item, item));
                let bound = |text: &str| text.parse::<u32>().unwrap();
                (bound(first)..=bound(last)).contains(&id)
            })
        };
        names(uids, euid) || names(gids, egid)
    }

    /// Every port that the options name, and those on both sides of a range's ends.
    pub fn ports_named(&self) -> BTreeSet<u16> {
        let options = &self.options;
        let lists = [
            options.include_inbound,
            options.exclude_inbound,
            options.include_outbound,
            options.exclude_outbound,
            options.tunnel_port,
            options.proxy_port,
            options.inbound_port,
        ];
        let mut named = BTreeSet::new();
        for entry in lists.iter().flat_map(|list| list.split(',')) {
            for port in entry.split(':').filter_map(|port| port.parse::<u16>().ok()) {
                named.insert(port);
                if entry.contains(':') {
                    named.extend([port.saturating_sub(1), port.saturating_add(1)]);
                }
            }
        }
        named.remove(&0);
        named
    }
}
