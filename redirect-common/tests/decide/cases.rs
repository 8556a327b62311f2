//! Cases that are easily got wrong, one by one.

use super::*;

const APP: (u32, u32) = (1000, 1000);
const PROXY: (u32, u32) = (1337, 1337);
const POD_IP: &str = "10.0.0.5";
const ELSEWHERE: &str = "203.0.113.10";

fn leaves_by(destination: IpAddr) -> u32 {
    if destination.is_loopback() || destination == ip(POD_IP) {
        LO
    } else {
        2
    }
}

/// TCP without a mark, by somebody in the pod from its own address.
fn from_pod(owner: (u32, u32), destination: &str, port: u16) -> Packet {
    let destination = ip(destination);
    Packet {
        protocol: Protocol::Tcp,
        source: ip(POD_IP),
        destination,
        port,
        interface: leaves_by(destination),
        mark: 0,
        owner: Some(owner),
        in_container: false,
        from_machine: false,
    }
}

#[test]
fn cases_that_people_trip_over() {
    let injected = Options::injected;
    let wide_loopback = Options {
        loopback: cidr("127.0.0.1", 8),
        ..injected()
    };
    let two_uids = Options {
        uids: vec![(3, 3), (4, 4)],
        gids: vec![(3, 3), (4, 4)],
        ..injected()
    };
    let loopback_included = Options {
        outbound: All::These(vec![cidr("127.1.2.3", 32)]),
        ..injected()
    };
    let pod_and_loopback_included = Options {
        outbound: All::These(vec![cidr("127.1.2.3", 32), cidr("10.0.0.0", 24)]),
        ..injected()
    };
    let no_groups = Options {
        groups: All::These(vec![]),
        ..injected()
    };
    let port_excluded = Options {
        exclude_outbound_ports: vec![(53, 53)],
        ..injected()
    };
    let (out, back) = (Some(OUTBOUND_PORT), Some(INBOUND_PORT));
    let rows = [
        ("app, elsewhere", injected(), APP, ELSEWHERE, 80, out),
        ("app, own pod", injected(), APP, POD_IP, 8080, None),
        ("app, 127.0.0.1", injected(), APP, "127.0.0.1", 80, None),
        ("app, 127.0.0.5", injected(), APP, "127.0.0.5", 80, None),
        ("app, ::1", injected(), APP, "::1", 80, None),
        ("proxy, own pod", injected(), PROXY, POD_IP, 8080, back),
        ("proxy, 127.0.0.1", injected(), PROXY, "127.0.0.1", 80, None),
        ("proxy, 127.0.0.5", injected(), PROXY, "127.0.0.5", 80, back),
        (
            "the same, L=/8",
            wide_loopback,
            PROXY,
            "127.0.0.5",
            80,
            None,
        ),
        ("proxy, tunnel", injected(), PROXY, POD_IP, 15008, None),
        ("proxy, elsewhere", injected(), PROXY, ELSEWHERE, 80, None),
        (
            "gid, elsewhere",
            injected(),
            (1000, 1337),
            ELSEWHERE,
            80,
            None,
        ),
        ("gid, own pod", injected(), (1000, 1337), POD_IP, 8080, None),
        ("0:1337, own pod", injected(), (0, 1337), POD_IP, 8080, None),
        (
            "first of two",
            two_uids.clone(),
            (3, 1000),
            POD_IP,
            80,
            back,
        ),
        ("second of two", two_uids, (4, 1000), POD_IP, 80, None),
        (
            "in -i",
            loopback_included.clone(),
            APP,
            "127.1.2.3",
            80,
            out,
        ),
        ("not in -i", loopback_included, APP, POD_IP, 80, None),
        (
            "both in -i",
            pod_and_loopback_included,
            APP,
            POD_IP,
            80,
            out,
        ),
        ("no groups", no_groups.clone(), APP, ELSEWHERE, 80, None),
        ("-o", port_excluded, APP, ELSEWHERE, 53, None),
        ("app, :15001", injected(), APP, "9.9.9.9", 15001, out),
    ];
    for (name, options, owner, destination, port, wanted) in rows {
        let packet = from_pod(owner, destination, port);
        let rule = decided_out(&options, &packet);
        assert_eq!(port_of(rule), wanted, "{name}: {rule:?}");
        assert_eq!(by_the_rules_out(&options, &packet), rule, "{name}");
    }
}

#[test]
fn hop_from_the_proxy_to_its_application_passes() {
    for (source, destination) in [("127.0.0.6", POD_IP), ("::6", "fd00::5")] {
        let packet = Packet {
            protocol: Protocol::Tcp,
            source: ip(source),
            destination: ip(destination),
            port: 8080,
            interface: LO,
            mark: 0,
            owner: Some(PROXY),
            in_container: false,
            from_machine: false,
        };
        let rule = decided_out(&Options::injected(), &packet);
        assert_eq!(rule, Rule::ProxyPassthrough);
    }
}

#[test]
fn inbound_to_the_proxys_own_ports_is_captured_and_to_the_tunnel_is_not() {
    let rows = [
        (8080, Some(INBOUND_PORT)),
        (OUTBOUND_PORT, Some(INBOUND_PORT)),
        (INBOUND_PORT, Some(INBOUND_PORT)),
        (15008, None),
        (15020, None),
        (15021, None),
        (15090, None),
    ];
    for (port, wanted) in rows {
        let connection = Inbound {
            destination: ip(POD_IP).into(),
            port,
            interface: 2,
        };
        let options = Options::injected();
        let rule = decide::inbound(&options.pod(), &options, &connection);
        assert_eq!(port_of(rule), wanted, "port {port}: {rule:?}");
    }
}

#[test]
fn machines_are_captured_by_destination_alone() {
    let listed = Options {
        outbound: All::These(vec![cidr(ELSEWHERE, 24)]),
        exclude_outbound: vec![cidr("0.0.0.0", 0)],
        exclude_outbound_ports: vec![(0, 65535)],
        groups: All::These(vec![]),
        ..Options::injected()
    };
    let without_ipv6 = Options {
        ipv6: false,
        ..Options::injected()
    };
    for (options, destination, wanted) in [
        (&Options::injected(), ELSEWHERE, Rule::MachineCaptured),
        (&Options::injected(), POD_IP, Rule::MachineCaptured),
        (&listed, ELSEWHERE, Rule::MachineCaptured),
        (&listed, POD_IP, Rule::MachineNotIncluded),
        (&listed, "fd00::5", Rule::MachineNotIncluded),
        (&without_ipv6, "fd00::5", Rule::MachineIpv6Off),
    ] {
        let packet = Packet {
            protocol: Protocol::Tcp,
            source: ip("172.30.1.2"),
            destination: ip(destination),
            port: 15008,
            interface: 2,
            mark: 0,
            owner: None,
            in_container: false,
            from_machine: true,
        };
        assert_eq!(decided_in(options, &packet), wanted, "{destination}");
        assert_eq!(by_the_rules_in(options, &packet), wanted, "{destination}");
    }
}

#[test]
fn tproxy_takes_what_the_nat_table_leaves() {
    let injected = || Options {
        tproxy_mark: Some(1337),
        ..Options::injected()
    };
    let by_root = (0, 1337);
    let rows = [
        (
            "root's gid",
            by_root,
            0,
            POD_IP,
            8080,
            Rule::ProxyToSelfInPlace,
        ),
        (
            "tunnel",
            by_root,
            0,
            POD_IP,
            15008,
            Rule::ProxyToSelfInPlace,
        ),
        ("excluded", by_root, 0, POD_IP, 15020, Rule::PodLocal),
        ("marked", by_root, 1337, POD_IP, 8080, Rule::PodLocal),
        ("nat first", PROXY, 0, POD_IP, 8080, Rule::ProxyToSelf),
        (
            "nat first, marked",
            PROXY,
            1337,
            POD_IP,
            8080,
            Rule::ProxyToSelf,
        ),
        (
            "nat's exception",
            PROXY,
            0,
            POD_IP,
            15008,
            Rule::ProxyToSelfInPlace,
        ),
        ("loopback", by_root, 0, "127.0.0.1", 8080, Rule::PodLocal),
        (
            "not L",
            by_root,
            0,
            "127.0.0.5",
            8080,
            Rule::ProxyToSelfInPlace,
        ),
        ("application", APP, 0, POD_IP, 8080, Rule::PodLocal),
        (
            "its mark",
            APP,
            SELF_MARK,
            POD_IP,
            8080,
            Rule::ProxyToSelfInPlace,
        ),
    ];
    for (name, owner, mark, destination, port, wanted) in rows {
        let packet = Packet {
            interface: LO,
            mark,
            ..from_pod(owner, destination, port)
        };
        assert_eq!(decided_out(&injected(), &packet), wanted, "{name}");
        assert_eq!(by_the_rules_out(&injected(), &packet), wanted, "{name}");
    }
}

#[test]
fn dns_cases_that_people_trip_over() {
    use Protocol::{Tcp, Udp};
    const SERVER: &str = "10.96.0.10";
    let with = |servers| Options {
        dns: Some(servers),
        ..Options::injected()
    };
    let all = || with(All::Star);
    let one = || with(All::These(vec![ip(SERVER)]));
    let port_excluded = Options {
        exclude_outbound_ports: vec![(53, 53)],
        ..all()
    };
    let wide_loopback = Options {
        loopback: cidr("127.0.0.1", 8),
        ..all()
    };
    let server_excluded = Options {
        exclude_outbound: vec![cidr(SERVER, 32)],
        ..one()
    };
    let no_groups = Options {
        groups: All::These(vec![]),
        ..all()
    };
    let agent = Some(DNS_AGENT_PORT);
    let (out, back) = (Some(OUTBOUND_PORT), Some(INBOUND_PORT));
    let gid = (1000, 1337);
    let own = POD_IP;
    let both = &[Tcp, Udp][..];
    let rows = [
        ("app, any server", all(), APP, ELSEWHERE, both, agent),
        ("app, the server", one(), APP, SERVER, both, agent),
        ("app, another server", one(), APP, ELSEWHERE, &[Tcp], out),
        ("app, another server", one(), APP, ELSEWHERE, &[Udp], None),
        (
            "IPv6, no server of it",
            one(),
            APP,
            "fd00::53",
            &[Udp],
            None,
        ),
        ("IPv6, any server", all(), APP, "fd00::53", both, agent),
        ("-o 53", port_excluded, APP, SERVER, both, None),
        ("the agent's own", all(), PROXY, SERVER, both, None),
        ("group of the agent", all(), gid, SERVER, both, None),
        ("proxy, own pod", all(), PROXY, own, both, None),
        ("group, own pod", all(), gid, own, &[Tcp], back),
        ("group, own pod", all(), gid, own, &[Udp], None),
        ("app, own pod", all(), APP, own, both, agent),
        ("app, loopback", all(), APP, "127.0.0.1", both, agent),
        (
            "the same, L=/8",
            wide_loopback,
            APP,
            "127.0.0.53",
            both,
            agent,
        ),
        ("app, own pod, no server", one(), APP, own, &[Tcp], out),
        ("app, own pod, no server", one(), APP, own, &[Udp], None),
        (
            "app, 127.0.0.5, no server",
            one(),
            APP,
            "127.0.0.5",
            &[Tcp],
            out,
        ),
        (
            "app, 127.0.0.1, no server",
            one(),
            APP,
            "127.0.0.1",
            both,
            None,
        ),
        ("-x comes later", server_excluded, APP, SERVER, both, agent),
        ("groups come first", no_groups, APP, SERVER, both, None),
        ("DNS off", Options::injected(), APP, SERVER, &[Tcp], out),
        ("DNS off", Options::injected(), APP, SERVER, &[Udp], None),
    ];
    for (name, options, owner, destination, protocols, wanted) in rows {
        for &protocol in protocols {
            let packet = Packet {
                protocol,
                ..from_pod(owner, destination, 53)
            };
            let rule = decided_out(&options, &packet);
            assert_eq!(port_of(rule), wanted, "{name} {protocol:?}: {rule:?}");
            assert_eq!(by_the_rules_out(&options, &packet), rule, "{name}");
        }
    }
}

#[test]
fn tproxy_takes_tcp_that_is_no_captured_query() {
    use Protocol::{Tcp, Udp};
    let options = || Options {
        tproxy_mark: Some(1337),
        dns: Some(All::Star),
        ..Options::injected()
    };
    let by_root = (0, 1337);
    let rows = [
        ("proxy", PROXY, 0, Tcp, Rule::ProxyToSelfInPlace),
        ("proxy, UDP", PROXY, 0, Udp, Rule::Proxy),
        ("root's gid", by_root, 0, Tcp, Rule::ProxyToSelf),
        ("root's gid, UDP", by_root, 0, Udp, Rule::Proxy),
        ("application", APP, 0, Tcp, Rule::Dns),
        ("application, UDP", APP, 0, Udp, Rule::Dns),
        ("its mark", APP, SELF_MARK, Tcp, Rule::Dns),
    ];
    for (name, owner, mark, protocol, wanted) in rows {
        let packet = Packet {
            protocol,
            mark,
            ..from_pod(owner, POD_IP, 53)
        };
        assert_eq!(decided_out(&options(), &packet), wanted, "{name}");
        assert_eq!(by_the_rules_out(&options(), &packet), wanted, "{name}");
    }
}

#[test]
fn container_tells_the_proxy_whatever_its_ids() {
    let by_container = || Options {
        by_container: true,
        ..Options::injected()
    };
    let tproxy = || Options {
        tproxy_mark: Some(1337),
        ..by_container()
    };
    let dns = || Options {
        dns: Some(All::Star),
        ..by_container()
    };
    let root = (0, 0);
    let rows = [
        // An application as 1337, which the rules for ids let go.
        (
            by_container(),
            PROXY,
            false,
            ELSEWHERE,
            80,
            Rule::IncludedCidr,
        ),
        (by_container(), PROXY, false, POD_IP, 8080, Rule::PodLocal),
        (
            by_container(),
            root,
            false,
            ELSEWHERE,
            80,
            Rule::IncludedCidr,
        ),
        (dns(), PROXY, false, ELSEWHERE, 53, Rule::Dns),
        (tproxy(), PROXY, false, POD_IP, 8080, Rule::PodLocal),
        // Istio's test of the capture.
        (
            by_container(),
            PROXY,
            false,
            "127.0.0.6",
            15002,
            Rule::ProxyToSelf,
        ),
        (
            tproxy(),
            PROXY,
            false,
            "127.0.0.6",
            15002,
            Rule::ProxyToSelf,
        ),
        (
            by_container(),
            PROXY,
            false,
            "127.0.0.5",
            15002,
            Rule::PodLocal,
        ),
        // The proxy as root, which they would capture.
        (by_container(), root, true, ELSEWHERE, 80, Rule::Proxy),
        (by_container(), root, true, POD_IP, 8080, Rule::ProxyToSelf),
        (by_container(), root, true, POD_IP, 15008, Rule::Proxy),
        (by_container(), root, true, "127.0.0.1", 8080, Rule::Proxy),
        (dns(), root, true, ELSEWHERE, 53, Rule::Proxy),
        (tproxy(), root, true, ELSEWHERE, 80, Rule::Proxy),
        (
            tproxy(),
            PROXY,
            true,
            POD_IP,
            8080,
            Rule::ProxyToSelfInPlace,
        ),
        (tproxy(), PROXY, true, POD_IP, 15020, Rule::Proxy),
    ];
    for (options, owner, in_container, destination, port, wanted) in rows {
        let packet = Packet {
            in_container,
            ..from_pod(owner, destination, port)
        };
        assert_eq!(decided_out(&options, &packet), wanted, "{packet:?}");
        assert_eq!(by_the_rules_out(&options, &packet), wanted, "{packet:?}");
    }
}
