//! Against real namespaces, and the arithmetic on prefixes.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

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
        .filter(|hole| hole.prefix.contains(&destination))
        .map(|hole| hole.prefix.prefix_len())
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

#[test]
fn addresses_part_where_any_two_of_them_do() {
    let own = [
        "2001:db8::5",
        "2001:db8::7",
        "2001:db8:1::5",
        "fd00::1",
        "fe80::1",
    ]
    .map(ip);
    let addresses = own.map(|address| addresses::Address {
        address,
        interface: 1,
        tentative: false,
    });
    let cells = cells(std::iter::empty(), &addresses);
    let bits = |address: IpAddr| match address {
        IpAddr::V6(v6) => u128::from(v6),
        IpAddr::V4(_) => unreachable!("all are IPv6"),
    };
    for one in own {
        for other in own.into_iter().filter(|other| *other != one) {
            let common = (bits(one) ^ bits(other)).leading_zeros();
            let parting = IpNet::new(one, u8::try_from(common).unwrap() + 1).unwrap();
            assert!(cells.contains_key(&parting.trunc()), "{one} and {other}");
        }
    }
}

#[test]
fn the_longest_route_is_found() {
    let pod = pod();
    pod.ip("route add 172.20.0.0/16 via 192.168.7.1");
    let table = routing_table(&pod.open()).unwrap();
    let to = |address| table.route_to(ip(address)).map(|route| route.prefix);
    assert_eq!(to("172.20.1.1"), Some(net("172.20.0.0/16")));
    assert_eq!(to("172.21.1.1"), Some(net("0.0.0.0/0")));
    assert_eq!(to("10.244.1.5"), Some(net("10.244.1.5/32")));
    assert_eq!(to("2001:db8:1::5"), Some(net("2001:db8:1::5/128")));
}
