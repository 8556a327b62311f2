//! Which source address the kernel would choose for every destination of a pod, and which destinations are its own.
//!
//! Addresses and tables are dumped, then the kernel itself is asked (`RTM_GETROUTE`) about one address of every cell
//! between two prefixes: rules, tables and source selection are not rebuilt here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;
use super::netns::{self, NetworkNamespace};

/// How long to wait for duplicate address detection: it takes one to two seconds, but never ends without a carrier.
const TENTATIVE_WAIT: Duration = Duration::from_millis(2500);
const TENTATIVE_POLL: Duration = Duration::from_millis(50);

/// IPv6 prefixes with a label of their own in the kernel's default policy table (`net/ipv6/addrlabel.c`): a
/// destination in one of them may get another source address than its neighbours (RFC 6724 rule 6).
const IPV6_LABELS: [&str; 8] = [
    "::/96",
    "::ffff:0:0/96",
    "2001::/32",
    "2001:10::/28",
    "2002::/16",
    "3ffe::/16",
    "fc00::/7",
    "fec0::/10",
];

/// Multicast and limited broadcast: TCP cannot connect there, whatever the tables say.
const NEVER_UNICAST: [&str; 3] = ["224.0.0.0/4", "255.255.255.255/32", "ff00::/8"];

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why routes or addresses could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    /// The kernel did not answer.
    #[error("cannot read the {what} of network namespace {name}: {source}")]
    Netlink {
        /// `routes` or `addresses`.
        what: &'static str,
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Istio's words when there is no address but loopback and link-local ones.
    #[error("no valid local IP address found")]
    NoAddress,
}

/// What the kernel does with a set of destinations, by longest prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The destinations.
    pub prefix: IpNet,
    /// The source address that an unbound socket would get.
    pub source: IpAddr,
    /// Whether the destinations are this pod itself (route type `local`).
    pub local: bool,
    /// Index of the outgoing interface; lo's for local destinations. One of several for a multipath route.
    pub interface: u32,
}

/// Every destination of a namespace, by longest prefix over both lists together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingTable {
    /// Destinations that can be connected to, ordered by prefix.
    pub routes: Vec<Route>,
    /// Destinations inside a wider route that cannot: blackhole, unreachable, prohibit, broadcast, multicast,
    /// anycast or without a source address. `connect` fails there or never leaves, so nothing is to be captured.
    pub holes: Vec<IpNet>,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The reachable destinations of the namespace: [`routing_table`] without its holes.
pub fn routes(ns: &NetworkNamespace) -> Result<Vec<Route>> {
    Ok(routing_table(ns)?.routes)
}

/// What the kernel does with every destination, in both families. Takes up to 2.5 s while a global IPv6 address is
/// still tentative.
pub fn routing_table(ns: &NetworkNamespace) -> Result<RoutingTable> {
    ns.run_inside(read_table)?.map_err(|source| Error::Netlink {
        what: "routes",
        name: ns.to_string(),
        source,
    })
}

/// Istio's rule for `--ipv6 auto` (semantics.md 1.4): the family of the first address that is neither loopback nor
/// link-local, in the kernel's order, which is all of IPv4 before IPv6. With `dual_stack`, IPv6 when there is any.
pub fn first_global_family(ns: &NetworkNamespace, dual_stack: bool) -> Result<Family> {
    choose_family(&local_addresses(ns)?, dual_stack).ok_or(Error::NoAddress)
}

/// Every address of the namespace in the kernel's order, loopback and link-local ones included.
pub fn local_addresses(ns: &NetworkNamespace) -> Result<Vec<IpAddr>> {
    let addresses = ns
        .run_inside(|| read_addresses(&Netlink::open(NETLINK_ROUTE)?))?
        .map_err(|source| Error::Netlink {
            what: "addresses",
            name: ns.to_string(),
            source,
        })?;
    Ok(addresses
        .into_iter()
        .map(|address| address.address)
        .collect())
}

fn choose_family(addresses: &[IpAddr], dual_stack: bool) -> Option<Family> {
    let mut families = addresses
        .iter()
        .filter_map(|address| match address.to_canonical() {
            IpAddr::V4(v4) if is_global(IpAddr::V4(v4)) => Some(Family::V4),
            IpAddr::V6(v6) if is_global(IpAddr::V6(v6)) => Some(Family::V6),
            _ => None,
        });
    let first = families.next()?;
    Some(
        if dual_stack && families.any(|family| family == Family::V6) {
            Family::V6
        } else {
            first
        },
    )
}

/// Neither loopback, link-local, multicast nor unspecified (Istio's `getLocalIP`).
fn is_global(address: IpAddr) -> bool {
    !address.is_loopback()
        && !address.is_multicast()
        && !address.is_unspecified()
        && match address {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
}

#[derive(Clone, Copy, Debug)]
struct Address {
    address: IpAddr,
    interface: u32,
    /// Duplicate address detection is under way; the kernel does not choose such an address as a source yet.
    tentative: bool,
}

fn read_addresses(netlink: &Netlink) -> io::Result<Vec<Address>> {
    let answers = netlink.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => address_of(&message),
            _ => None,
        })
        .collect())
}

fn address_of(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut peer) = (None, None);
    // The header has the low eight flags, the attribute all of them.
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags |= *all,
            _ => {}
        }
    }
    Some(Address {
        // On a point-to-point interface IFA_ADDRESS is the other end.
        address: local.or(peer)?,
        interface: message.header.index,
        tentative: flags.contains(AddressFlags::Tentative)
            && !flags.intersects(AddressFlags::Dadfailed | AddressFlags::Optimistic),
    })
}

/// Runs on a thread inside the namespace.
fn read_table() -> io::Result<RoutingTable> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let start = Instant::now();
    let mut addresses = read_addresses(&netlink)?;
    while addresses
        .iter()
        .any(|address| address.tentative && is_global(address.address))
        && start.elapsed() < TENTATIVE_WAIT
    {
        std::thread::sleep(TENTATIVE_POLL);
        addresses = read_addresses(&netlink)?;
    }

    let cells = cells(read_prefixes(&netlink)?, &addresses);
    let prefixes: BTreeSet<IpNet> = cells.keys().copied().collect();
    let mut answers = BTreeMap::new();
    // Wider prefixes first: a cell that only refines is dropped when its parent answers the same.
    let mut order: Vec<(IpNet, Cell)> = cells.into_iter().collect();
    order.sort_by_key(|(prefix, _)| prefix.prefix_len());
    for (prefix, cell) in order {
        let answer = if is_never_unicast(prefix) {
            None
        } else {
            let Some(destination) = representative(prefix, &prefixes) else {
                continue;
            };
            ask(&netlink, destination, &addresses)?
        };
        let parent = parent(prefix, &answers).copied().flatten();
        let redundant = match answer {
            // A hole where nothing is reachable around it says nothing.
            None => parent.is_none(),
            answer => cell == Cell::Refinement && parent == answer,
        };
        if !redundant {
            answers.insert(prefix, answer);
        }
    }

    let mut table = RoutingTable::default();
    for (prefix, answer) in answers {
        match answer {
            Some(Answer {
                source,
                local,
                interface,
            }) => {
                table.routes.push(Route {
                    prefix,
                    source,
                    local,
                    interface,
                });
            }
            None => table.holes.push(prefix),
        }
    }
    Ok(table)
}

/// Why a prefix is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    /// A route or rule names it.
    Named,
    /// Source selection may change at its border.
    Refinement,
}

fn cells(named: BTreeSet<IpNet>, addresses: &[Address]) -> BTreeMap<IpNet, Cell> {
    let never = NEVER_UNICAST
        .iter()
        .filter_map(|prefix| prefix.parse::<IpNet>().ok());
    let own: Vec<Ipv6Addr> = addresses
        .iter()
        .filter_map(|address| match address.address {
            IpAddr::V6(v6) if !v6.is_loopback() => Some(v6),
            _ => None,
        })
        .collect();
    let mut cells = BTreeMap::new();
    // With one IPv6 address there is nothing to choose from. IPv4 chooses by route alone.
    if own.len() > 1 {
        let labels = IPV6_LABELS
            .iter()
            .filter_map(|prefix| prefix.parse::<IpNet>().ok());
        // RFC 6724 rule 8, the longest matching prefix: what tells two addresses apart is the first bit they
        // differ in.
        let splits = own.iter().flat_map(|one| {
            own.iter()
                .filter(move |other| *other != one)
                .filter_map(move |other| {
                    let common = (u128::from(*one) ^ u128::from(*other)).leading_zeros();
                    Some(IpNet::V6(
                        Ipv6Net::new(*one, u8::try_from(common + 1).ok()?)
                            .ok()?
                            .trunc(),
                    ))
                })
        });
        cells.extend(
            labels
                .chain(splits)
                .map(|prefix| (prefix, Cell::Refinement)),
        );
    }
    cells.extend(
        named
            .into_iter()
            .filter(|prefix| !is_multicast(*prefix))
            .map(|prefix| (prefix, Cell::Named)),
    );
    cells.extend(never.map(|prefix| (prefix, Cell::Named)));
    cells
}

fn is_never_unicast(prefix: IpNet) -> bool {
    NEVER_UNICAST
        .iter()
        .any(|never| never.parse() == Ok(prefix))
}

/// Whether multicast addresses are all there is in a prefix.
fn is_multicast(prefix: IpNet) -> bool {
    prefix.network().is_multicast() && prefix.broadcast().is_multicast()
}

/// Every destination prefix of every table and rule, whatever its type.
fn read_prefixes(netlink: &Netlink) -> io::Result<BTreeSet<IpNet>> {
    let mut prefixes = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut routes = RouteMessage::default();
        routes.header.address_family = family;
        let mut rules = RuleMessage::default();
        rules.header.family = family;
        let requests = [
            RouteNetlinkMessage::GetRoute(routes),
            RouteNetlinkMessage::GetRule(rules),
        ];
        for request in requests {
            let answers = match netlink.dump(&request) {
                // A kernel without IPv6, or without policy routing.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
                    ) =>
                {
                    continue;
                }
                answers => answers?,
            };
            prefixes.extend(answers.iter().filter_map(prefix_of));
        }
    }
    Ok(prefixes)
}

fn prefix_of(message: &RouteNetlinkMessage) -> Option<IpNet> {
    let (family, length, address) = match message {
        // Cloned routes are cache entries of single destinations (path MTU, redirects).
        RouteNetlinkMessage::NewRoute(route)
            if !route.header.flags.contains(RouteFlags::Cloned) =>
        {
            let address = route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
                    RouteAttribute::Destination(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
                    _ => None,
                });
            (
                route.header.address_family,
                route.header.destination_prefix_length,
                address,
            )
        }
        RouteNetlinkMessage::NewRule(rule) => {
            // A rule without destination is about all of them.
            let address = rule
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RuleAttribute::Destination(address) => Some(*address),
                    _ => None,
                })?;
            (rule.header.family, rule.header.dst_len, Some(address))
        }
        _ => return None,
    };
    let address = match (address, family) {
        (Some(address), _) => address,
        (None, AddressFamily::Inet) => Ipv4Addr::UNSPECIFIED.into(),
        (None, AddressFamily::Inet6) => Ipv6Addr::UNSPECIFIED.into(),
        (None, _) => return None,
    };
    Some(IpNet::new(address, length).ok()?.trunc())
}

/// What the kernel answered for a destination that it would send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    source: IpAddr,
    local: bool,
    interface: u32,
}

/// Asks the kernel; `None` when the destination is not unicast or not reachable.
fn ask(
    netlink: &Netlink,
    destination: IpAddr,
    addresses: &[Address],
) -> io::Result<Option<Answer>> {
    let mut request = RouteMessage::default();
    (
        request.header.address_family,
        request.header.destination_prefix_length,
    ) = match destination {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    request
        .attributes
        .push(RouteAttribute::Destination(destination.into()));
    let answer = match netlink.ask(&RouteNetlinkMessage::GetRoute(request)) {
        Ok(RouteNetlinkMessage::NewRoute(answer)) => answer,
        Ok(_) => return Ok(None),
        // unreachable, no route, prohibit, blackhole: what connect(2) would say.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(
                    libc::EHOSTUNREACH
                        | libc::ENETUNREACH
                        | libc::EACCES
                        | libc::EINVAL
                        | libc::ENODEV
                        | libc::EAGAIN
                        | libc::ENETDOWN
                )
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let local = match answer.header.kind {
        RouteType::Local => true,
        RouteType::Unicast => false,
        _ => return Ok(None),
    };
    let (mut source, mut interface) = (None, 0);
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => source = Some(IpAddr::V4(*v4)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => source = Some(IpAddr::V6(*v6)),
            RouteAttribute::Oif(index) => interface = *index,
            _ => {}
        }
    }
    let source = source
        .filter(|source| !source.is_unspecified())
        // The kernel has no source to offer while its only candidates are tentative: they soon will be usable.
        .or_else(|| tentative_source(destination, interface, addresses))
        .or(local.then_some(destination));
    Ok(source.map(|source| Answer {
        source,
        local,
        interface,
    }))
}

/// The tentative address that the kernel would choose once it may: same scope, longest match, own interface first.
fn tentative_source(destination: IpAddr, interface: u32, addresses: &[Address]) -> Option<IpAddr> {
    let IpAddr::V6(destination) = destination else {
        return None;
    };
    addresses
        .iter()
        .filter(|address| address.tentative)
        .filter_map(|address| match address.address {
            IpAddr::V6(v6) if v6.is_unicast_link_local() == destination.is_unicast_link_local() => {
                let matching = (u128::from(v6) ^ u128::from(destination)).leading_zeros();
                Some(((address.interface == interface, matching), IpAddr::V6(v6)))
            }
            _ => None,
        })
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, address)| address)
}

/// The answer of the longest prefix around this one.
fn parent<T>(prefix: IpNet, answers: &BTreeMap<IpNet, T>) -> Option<&T> {
    (0..prefix.prefix_len()).rev().find_map(|length| {
        let wider = IpNet::new(prefix.addr(), length).ok()?.trunc();
        answers.get(&wider)
    })
}

/// An address of `prefix` that belongs to no more specific one of `prefixes`; `None` when they cover it whole.
fn representative(prefix: IpNet, prefixes: &BTreeSet<IpNet>) -> Option<IpAddr> {
    let mut inside: Vec<IpNet> = prefixes
        .iter()
        .filter(|other| prefix != **other && prefix.contains(*other))
        .copied()
        .collect();
    // Never answer for a wide prefix with an address that is special by itself.
    let special = [
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/3",
        "::/8",
        "fe80::/10",
        "ff00::/8",
    ];
    let special = special.iter().filter_map(|text| text.parse::<IpNet>().ok());
    inside.extend(special.filter(|other| prefix != *other && prefix.contains(other)));
    // Documentation addresses: ordinary to the kernel, and seldom routed apart.
    let preferred = [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    ];
    preferred
        .into_iter()
        .find(|address| {
            prefix.contains(address) && !inside.iter().any(|other| other.contains(address))
        })
        .or_else(|| gap(prefix, &inside))
}

/// The first address of the first part of `prefix` that none of `inside` (all within `prefix`) covers. Each step
/// halves the prefix, so the depth is at most the length of an address.
fn gap(prefix: IpNet, inside: &[IpNet]) -> Option<IpAddr> {
    if inside.contains(&prefix) {
        return None;
    }
    if inside.is_empty() {
        // Not the network address: it may be a broadcast or an anycast address.
        return Some(match prefix {
            IpNet::V4(net) if net.prefix_len() < 31 => {
                IpAddr::V4(Ipv4Addr::from(u32::from(net.network()) + 1))
            }
            IpNet::V6(net) if net.prefix_len() < 127 => {
                IpAddr::V6(Ipv6Addr::from(u128::from(net.network()) + 1))
            }
            narrow => narrow.network(),
        });
    }
    halves(prefix)?.into_iter().find_map(|half| {
        let inside: Vec<IpNet> = inside
            .iter()
            .filter(|other| half.contains(*other))
            .copied()
            .collect();
        gap(half, &inside)
    })
}

fn halves(prefix: IpNet) -> Option<[IpNet; 2]> {
    let length = prefix.prefix_len() + 1;
    Some(match prefix {
        IpNet::V4(net) => [net.network(), net.broadcast()]
            .map(|address| Ipv4Net::new(address, length).map(IpNet::V4)),
        IpNet::V6(net) => [net.network(), net.broadcast()]
            .map(|address| Ipv6Net::new(address, length).map(IpNet::V6)),
    })
    .and_then(|[low, high]| Some([low.ok()?.trunc(), high.ok()?.trunc()]))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};

    use super::*;
    use crate::observe::testing::TestNamespace;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A pod with a default route over eth0 and a second interface, duplicate address detection off.
    fn pod() -> TestNamespace {
        let pod = TestNamespace::new();
        for (name, peer, v4, v6) in [
            ("eth0", "peer0", "10.244.1.5/24", "2001:db8:1::5/64"),
            ("net1", "peer1", "192.168.7.2/24", "fd00:7::2/64"),
        ] {
            pod.ip(&format!("link add {name} type veth peer name {peer}"));
            pod.ip(&format!("link set {peer} up"));
            pod.ip(&format!("link set {name} up"));
            pod.ip(&format!("addr add {v4} dev {name}"));
            pod.ip(&format!("addr add {v6} dev {name} nodad"));
        }
        pod.ip("route add default via 10.244.1.1");
        pod.ip("route add default via 2001:db8:1::1");
        pod
    }

    fn find(table: &RoutingTable, destination: &str) -> Option<Route> {
        let destination = ip(destination);
        let route = table
            .routes
            .iter()
            .filter(|route| route.prefix.contains(&destination))
            .max_by_key(|route| route.prefix.prefix_len())?;
        let hole = table
            .holes
            .iter()
            .filter(|hole| hole.contains(&destination))
            .map(IpNet::prefix_len)
            .max();
        (hole.is_none_or(|hole| hole < route.prefix.prefix_len())).then_some(*route)
    }

    /// What an unbound socket really gets: no packet leaves.
    fn source_by_socket(ns: &NetworkNamespace, destination: &str) -> Option<IpAddr> {
        let destination = ip(destination);
        ns.run_inside(|| {
            let any: IpAddr = if destination.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
            socket.connect(SocketAddr::new(destination, 9)).ok()?;
            Some(socket.local_addr().unwrap().ip())
        })
        .unwrap()
    }

    #[test]
    fn routing_table_agrees_with_sockets() {
        let pod = pod();
        pod.ip("addr add 2001:db8:ffff::9/64 dev eth0 nodad");
        pod.ip("route add 172.20.0.0/16 via 192.168.7.1");
        pod.ip("route add 172.21.0.0/16 via 10.244.1.1 src 10.244.1.5");
        pod.ip("route add unreachable 172.22.0.0/16");
        pod.ip("route add blackhole 172.23.0.0/16");
        pod.ip("route add prohibit 172.24.0.0/16");
        pod.ip("-6 route add unreachable 2001:db8:dead::/48");
        pod.ip("rule add to 172.25.0.0/16 lookup 100");
        pod.ip("route add default via 192.168.7.1 table 100");
        let ns = pod.open();
        let table = routing_table(&ns).unwrap();
        for destination in [
            "127.0.0.1",
            "127.0.0.6",
            "127.9.9.9",
            "10.244.1.5",
            "10.244.1.77",
            "192.168.7.2",
            "192.168.7.200",
            "8.8.8.8",
            "172.20.1.1",
            "172.21.1.1",
            "172.22.1.1",
            "172.23.1.1",
            "172.24.1.1",
            "172.25.1.1",
            "1.1.1.1",
            "::1",
            "2001:db8:1::5",
            "2001:db8:1::99",
            "fd00:7::2",
            "fd00:7::99",
            "fd00:9::1",
            "2001:db8:dead::1",
            "2001:db8:ffff::9",
            "2001:db8:ffff::10",
            "2001:db8:8000::1",
            "2001:db8:2::1",
            "2600::1",
            "3000::1",
            "2001::1",
            "2002::1",
            "fc00::1",
        ] {
            let expected = source_by_socket(&ns, destination);
            assert_eq!(
                find(&table, destination).map(|route| route.source),
                expected,
                "{destination}: {table:#?}"
            );
        }
    }

    #[test]
    fn routes_local_destinations_are_marked() {
        let pod = pod();
        let ns = pod.open();
        let table = routing_table(&ns).unwrap();
        for (destination, source) in [
            ("127.0.0.6", "127.0.0.1"),
            ("10.244.1.5", "10.244.1.5"),
            ("2001:db8:1::5", "2001:db8:1::5"),
            ("::1", "::1"),
        ] {
            let route = find(&table, destination).unwrap();
            assert!(route.local, "{route:?}");
            assert_eq!(route.source, ip(source), "{route:?}");
        }
        for (destination, source) in [
            ("8.8.8.8", "10.244.1.5"),
            ("192.168.7.9", "192.168.7.2"),
            ("2600::1", "2001:db8:1::5"),
        ] {
            let route = find(&table, destination).unwrap();
            assert!(!route.local, "{route:?}");
            assert_eq!(route.source, ip(source), "{route:?}");
        }
        assert_ne!(
            find(&table, "8.8.8.8").unwrap().interface,
            find(&table, "192.168.7.9").unwrap().interface
        );
        assert_eq!(find(&table, "10.244.1.255"), None, "broadcast");
        assert_eq!(find(&table, "ff02::1"), None, "multicast");
        assert_eq!(routes(&ns).unwrap(), table.routes);
    }

    #[test]
    fn routes_added_lo_address_is_its_own_source() {
        let pod = TestNamespace::new();
        pod.ip("addr add ::6/128 dev lo");
        let route = find(&routing_table(&pod.open()).unwrap(), "::6").unwrap();
        assert_eq!((route.source, route.local), (ip("::6"), true));
    }

    #[test]
    fn routes_tentative_address_is_waited_for() {
        let pod = TestNamespace::new();
        pod.ip("link add eth0 type veth peer name peer0");
        pod.ip("link set peer0 up");
        pod.ip("link set eth0 up");
        pod.ip("addr add 2001:db8:1::5/64 dev eth0");
        let table = routing_table(&pod.open()).unwrap();
        assert_eq!(
            find(&table, "2001:db8:1::9").map(|route| route.source),
            Some(ip("2001:db8:1::5"))
        );
    }

    #[test]
    fn routes_without_any_interface_is_loopback_only() {
        let pod = TestNamespace::new();
        let table = routing_table(&pod.open()).unwrap();
        assert!(table.routes.iter().all(|route| route.local), "{table:?}");
        assert_eq!(find(&table, "8.8.8.8"), None);
    }

    #[test]
    fn first_global_family_is_istios() {
        let pod = pod();
        assert_eq!(first_global_family(&pod.open(), false).unwrap(), Family::V4);
        assert_eq!(first_global_family(&pod.open(), true).unwrap(), Family::V6);
        let bare = TestNamespace::new();
        let error = first_global_family(&bare.open(), false).unwrap_err();
        assert_eq!(error.to_string(), "no valid local IP address found");
        assert_eq!(
            choose_family(&[ip("fe80::1"), ip("2001:db8::1"), ip("10.0.0.1")], false),
            Some(Family::V6)
        );
        assert_eq!(
            choose_family(&[ip("169.254.1.1"), ip("::ffff:10.0.0.1")], true),
            Some(Family::V4)
        );
    }

    #[test]
    fn local_addresses_lists_every_interface() {
        let addresses = local_addresses(&pod().open()).unwrap();
        for address in [
            "127.0.0.1",
            "10.244.1.5",
            "192.168.7.2",
            "::1",
            "2001:db8:1::5",
            "fd00:7::2",
        ] {
            assert!(addresses.contains(&ip(address)), "{address}: {addresses:?}");
        }
    }

    #[test]
    fn representative_avoids_more_specific_prefixes() {
        let prefixes = |texts: &[&str]| texts.iter().map(|text| net(text)).collect::<BTreeSet<_>>();
        let chosen = |prefix: &str, texts: &[&str]| representative(net(prefix), &prefixes(texts));
        assert_eq!(chosen("0.0.0.0/0", &[]), Some(ip("192.0.2.1")));
        assert_eq!(chosen("0.0.0.0/0", &["128.0.0.0/1"]), Some(ip("1.0.0.1")));
        assert_eq!(
            chosen("10.0.0.0/30", &["10.0.0.0/31", "10.0.0.2/32"]),
            Some(ip("10.0.0.3"))
        );
        assert_eq!(chosen("10.0.0.0/30", &["10.0.0.0/31", "10.0.0.2/31"]), None);
        assert_eq!(chosen("10.0.0.7/32", &["10.0.0.0/8"]), Some(ip("10.0.0.7")));
        assert_eq!(chosen("::/0", &["2000::/3"]), Some(ip("100::1")));
        assert_eq!(
            chosen("127.0.0.0/8", &["127.0.0.1/32"]).map(|address| address.is_loopback()),
            Some(true)
        );
    }
}
