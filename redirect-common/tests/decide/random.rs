//! Options and packets at random, likely to have to do with each other.

use super::*;

/// Few values, close to each other: they must meet in lists and connections.
pub const PORTS: [u16; 16] = [
    0, 1, 53, 79, 80, 81, 443, 8080, 8081, 15001, 15006, 15007, 15008, 15009, 15020, 65535,
];
pub const IDS: [u32; 12] = [
    0,
    1,
    3,
    4,
    5,
    1000,
    1336,
    1337,
    1338,
    65534,
    u32::MAX - 1,
    u32::MAX,
];
pub const ADDRESSES: [&str; 26] = [
    "127.0.0.0",
    "127.0.0.1",
    "127.0.0.2",
    "127.0.0.5",
    "127.0.0.6",
    "127.0.0.7",
    "127.1.2.3",
    "127.255.255.255",
    "126.255.255.255",
    "128.0.0.0",
    "0.0.0.0",
    "10.0.0.5",
    "10.0.0.6",
    "10.255.0.1",
    "203.0.113.10",
    "255.255.255.255",
    "::",
    "::1",
    "::6",
    "::7",
    "::ffff:127.0.0.1",
    "::ffff:127.0.0.6",
    "::ffff:10.0.0.5",
    "::fffe:7f00:1",
    "fd00::5",
    "2001:db8::10",
];

pub fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        8 => select(&ADDRESSES[..]).prop_map(ip),
        1 => any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        1 => any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ]
}

pub fn any_cidr() -> impl Strategy<Value = Cidr> {
    (any_address(), 0..=128_u8, any::<bool>()).prop_map(|(address, bits, whole)| {
        let address = address.to_canonical();
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = if whole { width } else { bits % (width + 1) };
        Cidr { address, bits }
    })
}

pub fn any_loopback() -> impl Strategy<Value = Cidr> {
    let addresses = select(&["127.0.0.1", "127.0.0.6", "127.1.2.3", "127.0.0.0"][..]);
    prop_oneof![
        2 => Just(cidr("127.0.0.1", 32)),
        3 => (addresses, 8..=32_u8).prop_map(|(address, bits)| cidr(address, bits)),
    ]
}

pub fn any_ports() -> impl Strategy<Value = Vec<Ports>> {
    let range = |(a, b): Ports, single: bool| if single { (a, a) } else { (a.min(b), a.max(b)) };
    let ports = (select(&PORTS[..]), select(&PORTS[..]));
    let entry = (ports, prop::bool::weighted(0.8));
    vec(
        entry.prop_map(move |(ports, single)| range(ports, single)),
        0..4,
    )
}

pub fn any_ids(longest: usize) -> impl Strategy<Value = Vec<Ids>> {
    let range = |(a, b): Ids, single: bool| if single { (a, a) } else { (a.min(b), a.max(b)) };
    let ids = (select(&IDS[..]), select(&IDS[..]));
    let entry = || (ids.clone(), prop::bool::weighted(0.8));
    prop_oneof![
        9 => vec(entry().prop_map(move |(ids, single)| range(ids, single)), 0..4),
        1 => vec(entry().prop_map(move |(ids, single)| range(ids, single)), longest..=longest),
    ]
}

pub fn all_or<T: std::fmt::Debug + Clone>(
    list: impl Strategy<Value = T>,
) -> impl Strategy<Value = All<T>> {
    (any::<bool>(), list).prop_map(|(all, list)| if all { All::Star } else { All::These(list) })
}

pub fn any_options() -> impl Strategy<Value = Options> {
    // gids as uids is what the injector writes, and where their order matters most.
    let ids = (any_ids(16), any_ids(16), any::<bool>());
    let inbound = (all_or(any_ports()), any_ports());
    let outbound = (all_or(vec(any_cidr(), 0..4)), vec(any_cidr(), 0..3));
    let ports = (any_ports(), any_ports(), select(&[15008_u16, 80][..]));
    let groups = (all_or(any_ids(64)), any_ids(64));
    // The last mark is one that the rules themselves set.
    let mark = prop::option::of(select(&[1337_u32, 1337, 7, SELF_MARK][..]));
    let interfaces = vec(1..6_u32, 0..3);
    let servers = vec(any_address().prop_map(|server| server.to_canonical()), 1..4);
    let dns = prop::option::of(all_or(servers));
    let ipv6 = prop::bool::weighted(0.8);
    let by_container = prop::bool::weighted(0.3);
    let rest = (any_loopback(), ipv6, mark, interfaces, dns, by_container);
    (ids, inbound, outbound, ports, groups, rest).prop_map(
        |(ids, inbound, outbound, ports, groups, rest)| Options {
            tunnel_port: ports.2,
            gids: if ids.2 { ids.0.clone() } else { ids.1 },
            uids: ids.0,
            inbound: inbound.0,
            exclude_inbound: inbound.1,
            outbound: outbound.0,
            exclude_outbound: outbound.1,
            outbound_ports: ports.0,
            exclude_outbound_ports: ports.1,
            groups: groups.0,
            exclude_groups: groups.1,
            loopback: rest.0,
            ipv6: rest.1,
            tproxy_mark: rest.2,
            exclude_interfaces: rest.3,
            dns: rest.4,
            by_container: rest.5,
        },
    )
}

pub fn any_packet() -> impl Strategy<Value = Packet> {
    let port = prop_oneof![3 => Just(53), 6 => select(&PORTS[..]), 1 => any::<u16>()];
    let protocol = select(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp][..]);
    let id = || prop_oneof![9 => select(&IDS[..]), 1 => any::<u32>()];
    let owner = prop::option::weighted(0.9, (id(), id()));
    let interface = prop_oneof![Just(LO), 2..6_u32];
    let mark = select(&[0_u32, 0, 7, 1337, SELF_MARK][..]);
    (
        any_address(),
        any_address(),
        protocol,
        port,
        interface,
        mark,
        owner,
        any::<(bool, bool)>(),
    )
        .prop_map(
            |(source, destination, protocol, port, interface, mark, owner, of)| Packet {
                protocol,
                source: as_family_of(destination, source),
                destination,
                port,
                interface,
                mark,
                owner,
                in_container: of.0,
                from_machine: of.1,
            },
        )
}

/// No packet has addresses of two families: the last byte is kept, as in 127.0.0.6 and ::6.
pub fn as_family_of(destination: IpAddr, source: IpAddr) -> IpAddr {
    let last = |octets: &[u8]| octets.last().copied().unwrap_or_default();
    match (destination.to_canonical(), source.to_canonical()) {
        (IpAddr::V4(_), IpAddr::V6(v6)) => Ipv4Addr::new(127, 0, 0, last(&v6.octets())).into(),
        (IpAddr::V6(_), IpAddr::V4(v4)) => Ipv6Addr::from_bits(last(&v4.octets()).into()).into(),
        _ => source,
    }
}

pub fn any_packets() -> impl Strategy<Value = Vec<Packet>> {
    vec(any_packet(), CONNECTIONS_PER_CASE)
}
