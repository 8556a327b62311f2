//! The decision against the rules themselves: a small interpreter walks the chains that
//! istio-iptables writes for the same options.

mod cases;
mod options;
mod random;
mod rules;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use redirect_common::address::Address;
use redirect_common::decide::{self, Inbound, Outbound, Owner, Protocol};
use redirect_common::dns::DNS_AGENT_PORT;
use redirect_common::lists::{List, Lists};
use redirect_common::pod::{
    FLAG_DNS, FLAG_DNS_ALL, FLAG_GROUPS_INCLUDE, FLAG_INBOUND_ALL, FLAG_IPV6,
    FLAG_LOOPBACK_INCLUDED, FLAG_OUTBOUND_ALL, FLAG_PROXY_CONTAINER, FLAG_TPROXY, IdRange,
    PodConfig,
};
use redirect_common::verdict::{Action, Rule};

use options::*;
use random::*;
use rules::*;

const CONNECTIONS_PER_CASE: usize = 8;

fn by_the_rules_out(options: &Options, packet: &Packet) -> Rule {
    // An IPv4-mapped IPv6 socket sends IPv4 packets.
    let packet = Packet {
        source: packet.source.to_canonical(),
        destination: packet.destination.to_canonical(),
        ..*packet
    };
    let v6 = packet.destination.is_ipv6();
    let mangle = Table::mangle(options, v6);
    let mark = mangle.mark(&packet);
    let (port, name) = Table::nat(options, v6).walk("OUTPUT", &packet);
    let rule = match name {
        Some(rule) => rule,
        None if v6 && !options.ipv6 => Rule::Ipv6Off,
        None => Rule::NotIncluded,
    };
    assert_eq!(port, port_of(rule), "the interpreter contradicts itself");
    // What the nat table leaves alone comes in again through lo.
    let looped = Packet { mark, ..packet };
    if packet.interface == LO && port.is_none() && mangle.walk("PREROUTING", &looped).0.is_some() {
        return Rule::ProxyToSelfInPlace;
    }
    rule
}

fn by_the_rules_in(options: &Options, packet: &Packet) -> Rule {
    let destination = packet.destination.to_canonical();
    let v6 = destination.is_ipv6();
    let packet = Packet {
        destination,
        owner: None,
        ..*packet
    };
    let table = if options.tproxy_mark.is_some() {
        Table::mangle(options, v6)
    } else {
        Table::nat(options, v6)
    };
    let (port, name) = table.walk("PREROUTING", &packet);
    let to_loopback = options.loopback_of(v6).contains(destination);
    let rule = match (name, &options.inbound) {
        (Some(rule), _) => rule,
        (None, _) if packet.from_machine => Rule::MachineIpv6Off,
        (None, _) if v6 && !options.ipv6 => Rule::InboundIpv6Off,
        (None, All::These(ports)) if ports.is_empty() => Rule::InboundOff,
        (None, All::Star) => Rule::InboundLoopback,
        (None, All::These(ports))
            if to_loopback && ports.iter().any(|(a, b)| (*a..=*b).contains(&packet.port)) =>
        {
            Rule::InboundLoopback
        }
        (None, _) => Rule::InboundPortNotIncluded,
    };
    assert_eq!(port, port_of(rule), "the interpreter contradicts itself");
    rule
}

fn port_of(rule: Rule) -> Option<u16> {
    match rule.action() {
        Action::Pass => None,
        Action::CaptureOutbound => Some(OUTBOUND_PORT),
        Action::CaptureInbound | Action::CaptureInPlace => Some(INBOUND_PORT),
        Action::CaptureDns => Some(DNS_AGENT_PORT),
    }
}

fn decided_out(options: &Options, packet: &Packet) -> Rule {
    let connection = Outbound {
        protocol: packet.protocol,
        source: packet.source.into(),
        destination: packet.destination.into(),
        port: packet.port,
        local: packet.interface == LO,
        interface: packet.interface,
        mark: packet.mark,
        owner: packet.owner.map(|(uid, gid)| Owner { uid, gid }),
        in_proxy_container: options.by_container && packet.owner.is_some() && packet.in_container,
    };
    decide::outbound(&options.pod(), options, &connection)
}

fn decided_in(options: &Options, packet: &Packet) -> Rule {
    if packet.from_machine {
        return decide::machine(&options.pod(), options, &packet.destination.into());
    }
    let connection = Inbound {
        destination: packet.destination.into(),
        port: packet.port,
        interface: packet.interface,
    };
    decide::inbound(&options.pod(), options, &connection)
}

mod fuzz {
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn outbound_decides_as_the_rules_do(options in any_options(), packets in any_packets()) {
            for packet in &packets {
                let wanted = by_the_rules_out(&options, packet);
                prop_assert_eq!(decided_out(&options, packet), wanted, "{:?}", packet);
            }
        }

        #[test]
        fn inbound_decides_as_the_rules_do(options in any_options(), packets in any_packets()) {
            for packet in packets.iter().filter(|packet| packet.protocol == Protocol::Tcp) {
                // From outside: by another interface than lo, and without a mark. With TPROXY, `-k` is refused.
                let packet = &Packet {
                    interface: packet.interface.max(LO + 1),
                    mark: 0,
                    from_machine: packet.from_machine && options.tproxy_mark.is_none(),
                    ..*packet
                };
                let wanted = by_the_rules_in(&options, packet);
                prop_assert_eq!(decided_in(&options, packet), wanted, "{:?}", packet);
            }
        }
    }
}
