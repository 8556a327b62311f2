//! The decision against the rules themselves: a small interpreter walks the chains that
//! istio-iptables writes for the same options.

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

const CONNECTIONS_PER_CASE: usize = 8;

const OUTBOUND_PORT: u16 = 15001;
const INBOUND_PORT: u16 = 15006;
/// Index of `lo`.
const LO: u32 = 1;
const SELF_MARK: u32 = 1338;

type Ids = (u32, u32);
type Ports = (u16, u16);

/// istio-iptables' flags.
#[derive(Clone, Debug)]
struct Options {
    tunnel_port: u16,
    uids: Vec<Ids>,
    gids: Vec<Ids>,
    inbound: All<Vec<Ports>>,
    exclude_inbound: Vec<Ports>,
    outbound: All<Vec<Cidr>>,
    exclude_outbound: Vec<Cidr>,
    outbound_ports: Vec<Ports>,
    exclude_outbound_ports: Vec<Ports>,
    groups: All<Vec<Ids>>,
    exclude_groups: Vec<Ids>,
    loopback: Cidr,
    ipv6: bool,
    /// `-m TPROXY` and its `-t`.
    tproxy_mark: Option<u32>,
    /// Indexes in place of `-c`'s names.
    exclude_interfaces: Vec<u32>,
    /// The servers whose queries are captured; None without DNS capture.
    dns: Option<All<Vec<IpAddr>>>,
    /// The proxy is known by its container: its uids and gids say nothing.
    by_container: bool,
}

/// `*`, or a list.
#[derive(Clone, Debug)]
enum All<T> {
    Star,
    These(T),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Cidr {
    address: IpAddr,
    bits: u8,
}

impl Cidr {
    fn contains(&self, address: IpAddr) -> bool {
        let (ours, theirs, width) = match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let host_bits = width - u32::from(self.bits);
        ours.checked_shr(host_bits).unwrap_or(0) == theirs.checked_shr(host_bits).unwrap_or(0)
    }
}

/// The first packet of a TCP connection, or a datagram.
#[derive(Clone, Copy, Debug)]
struct Packet {
    protocol: Protocol,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    /// Where it leaves by, or comes by.
    interface: u32,
    mark: u32,
    owner: Option<(u32, u32)>,
    /// The owner is in the proxy's container.
    in_container: bool,
    /// It came in by an interface of `-k`.
    from_machine: bool,
}

/// What a rule asks of a packet; `NotX` is iptables' `! X`.
#[derive(Clone, Copy, Debug)]
enum Match {
    FromMachine,
    Is(Protocol),
    /// `-i` or `-o`, as the chain has it.
    Interface(u32),
    Mark(u32),
    NotMark(u32),
    /// Conntrack's, of a first packet.
    Established,
    From(IpAddr),
    To(Cidr),
    NotTo(Cidr),
    Port(Ports),
    NotPort(u16),
    Uid(Ids),
    NotUid(Ids),
    Gid(Ids),
    NotGid(Ids),
    /// As `-m cgroup`, of the proxy's container.
    InContainer,
    NotInContainer,
}

impl Match {
    fn holds(&self, packet: &Packet) -> bool {
        let within = |ids: &Ids, id: u32| ids.0 <= id && id <= ids.1;
        // xt_owner: no socket, no owner: only negated conditions hold.
        let uid = |ids| packet.owner.is_some_and(|(uid, _)| within(ids, uid));
        let gid = |ids| packet.owner.is_some_and(|(_, gid)| within(ids, gid));
        match self {
            Self::FromMachine => packet.from_machine,
            Self::Is(protocol) => packet.protocol == *protocol,
            Self::Interface(index) => packet.interface == *index,
            Self::Mark(mark) => packet.mark == *mark,
            Self::NotMark(mark) => packet.mark != *mark,
            Self::Established => false,
            Self::From(address) => packet.source == *address,
            Self::To(cidr) => cidr.contains(packet.destination),
            Self::NotTo(cidr) => !cidr.contains(packet.destination),
            Self::Port((first, last)) => (*first..=*last).contains(&packet.port),
            Self::NotPort(port) => packet.port != *port,
            Self::Uid(ids) => uid(ids),
            Self::NotUid(ids) => !uid(ids),
            Self::Gid(ids) => gid(ids),
            Self::NotGid(ids) => !gid(ids),
            Self::InContainer => packet.owner.is_some() && packet.in_container,
            Self::NotInContainer => packet.owner.is_none() || !packet.in_container,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Target {
    Return,
    Jump(&'static str),
    Redirect(u16),
    Tproxy(u16),
    SetMark(u32),
}

/// One line of the rules text. `name` is what this project calls a connection that it decides.
#[derive(Clone, Debug)]
struct Line {
    chain: &'static str,
    matches: Vec<Match>,
    target: Target,
    name: Option<Rule>,
}

/// A table of one family.
#[derive(Debug, Default)]
struct Table {
    lines: Vec<Line>,
}

impl Table {
    fn add(&mut self, chain: &'static str, matches: &[Match], target: Target, name: Option<Rule>) {
        self.lines.push(Line {
            chain,
            matches: matches.to_vec(),
            target,
            name,
        });
    }

    /// `-I CHAIN 1`
    fn insert(&mut self, matches: &[Match], target: Target, name: Rule) {
        self.add("PREROUTING", matches, target, Some(name));
        self.lines.rotate_right(1);
    }

    /// The nat table.
    fn nat(options: &Options, v6: bool) -> Self {
        use Match::{
            FromMachine, Gid, InContainer, Interface, Is, NotGid, NotInContainer, NotPort, NotTo,
            NotUid, Port, To, Uid,
        };
        use Protocol::{Tcp, Udp};
        use Target::{Jump, Redirect, Return};
        let mut table = Self::default();
        if v6 && !options.ipv6 {
            return table;
        }
        let (loopback, own6) = (options.loopback_of(v6), own6(v6));
        let of_family = |cidrs: &[Cidr]| -> Vec<Cidr> {
            let ours = cidrs.iter().filter(|c| c.address.is_ipv6() == v6);
            ours.copied().collect()
        };
        let tunnel = (options.tunnel_port, options.tunnel_port);

        // 1
        for index in &options.exclude_interfaces {
            let name = Some(Rule::InboundInterfaceExcluded);
            table.add("PREROUTING", &[Interface(*index)], Return, name);
            let name = Some(Rule::ExcludedInterface);
            table.add("OUTPUT", &[Interface(*index)], Return, name);
        }
        // 2
        table.insert(&[FromMachine], Return, Rule::MachineNotIncluded);
        // 4 and 5
        let name = Some(Rule::TunnelPort);
        let tcp = Is(Tcp);
        table.add("ISTIO_INBOUND", &[tcp, Port(tunnel)], Return, name);
        table.add("ISTIO_REDIRECT", &[tcp], Redirect(OUTBOUND_PORT), None);
        table.add("ISTIO_IN_REDIRECT", &[tcp], Redirect(INBOUND_PORT), None);
        // 6
        let capture = Jump("ISTIO_IN_REDIRECT");
        let captured = Some(Rule::InboundCaptured);
        match &options.inbound {
            All::These(ports) if ports.is_empty() => {}
            _ if options.tproxy_mark.is_some() => {}
            All::These(ports) => {
                table.add("PREROUTING", &[tcp], Jump("ISTIO_INBOUND"), None);
                for ports in ports {
                    table.add("ISTIO_INBOUND", &[tcp, Port(*ports)], capture, captured);
                }
            }
            All::Star => {
                table.add("PREROUTING", &[tcp], Jump("ISTIO_INBOUND"), None);
                for ports in &options.exclude_inbound {
                    let name = Some(Rule::InboundPortExcluded);
                    table.add("ISTIO_INBOUND", &[tcp, Port(*ports)], Return, name);
                }
                table.add("ISTIO_INBOUND", &[tcp], capture, captured);
            }
        }
        // 7
        table.add("OUTPUT", &[], Jump("ISTIO_OUTPUT"), None);
        let mut output = |matches: &[Match], target, name| {
            table.add("ISTIO_OUTPUT", matches, target, Some(name));
        };
        // 8 and 9
        for ports in &options.exclude_outbound_ports {
            output(&[tcp, Port(*ports)], Return, Rule::ExcludedPort);
            output(&[Is(Udp), Port(*ports)], Return, Rule::ExcludedPort);
        }
        output(
            &[Interface(LO), Match::From(own6)],
            Return,
            Rule::ProxyPassthrough,
        );
        // 10 and 11
        let loopback_included = options.loopback_included();
        let dns = options.dns.is_some();
        let owners: Vec<(Match, Match)> = if options.by_container {
            vec![(InContainer, NotInContainer)]
        } else {
            let uids = options.uids.iter().map(|uid| (Uid(*uid), NotUid(*uid)));
            let gids = options.gids.iter().map(|gid| (Gid(*gid), NotGid(*gid)));
            uids.chain(gids).collect()
        };
        for (owner, others) in owners {
            let tunnel = NotPort(options.tunnel_port);
            let mut to_self = vec![Interface(LO), NotTo(loopback), tcp, tunnel, owner];
            if dns && matches!(owner, Uid(_) | InContainer) {
                to_self.push(NotPort(53));
            }
            // With TPROXY a container is let through to the mangle table, as Istio's proxy is, which runs as root then.
            if options.tproxy_mark.is_none() || !options.by_container {
                output(&to_self, capture, Rule::ProxyToSelf);
            }
            // Istio's test of the capture, by whoever makes it.
            if let NotInContainer = others {
                let mut probe = vec![Interface(LO), To(host(own6)), NotTo(loopback), tcp, tunnel];
                probe.push(others);
                if dns {
                    probe.push(NotPort(53));
                }
                output(&probe, capture, Rule::ProxyToSelf);
            }
            if !loopback_included && dns {
                let matches = [Interface(LO), tcp, NotPort(53), others];
                output(&matches, Return, Rule::PodLocal);
            } else if !loopback_included {
                output(&[Interface(LO), others], Return, Rule::PodLocal);
            }
            output(&[owner], Return, Rule::Proxy);
        }
        // 12
        match &options.groups {
            All::Star => {
                for gid in &options.exclude_groups {
                    output(&[Gid(*gid)], Return, Rule::OwnerGroup);
                }
            }
            All::These(groups) => {
                let none_of: Vec<_> = groups.iter().map(|gid| NotGid(*gid)).collect();
                output(&none_of, Return, Rule::OwnerGroup);
            }
        }
        // 13
        if let Some(servers) = &options.dns {
            let servers: Vec<Vec<Match>> = match servers {
                All::Star => vec![vec![]],
                All::These(servers) => {
                    let ours = servers.iter().filter(|server| server.is_ipv6() == v6);
                    ours.map(|server| vec![To(host(*server))]).collect()
                }
            };
            output(&[], Jump("ISTIO_OUTPUT_DNS"), Rule::Dns);
            for protocol in [Tcp, Udp] {
                for server in &servers {
                    let mut matches = vec![Is(protocol), Port((53, 53))];
                    matches.extend(server);
                    let to_agent = Redirect(DNS_AGENT_PORT);
                    table.add("ISTIO_OUTPUT_DNS", &matches, to_agent, None);
                }
            }
        }
        let mut output = |matches: &[Match], target, name| {
            table.add("ISTIO_OUTPUT", matches, target, Some(name));
        };
        // 14 to 17
        let redirect = Jump("ISTIO_REDIRECT");
        output(&[To(loopback)], Return, Rule::Loopback);
        for cidr in of_family(&options.exclude_outbound) {
            output(&[To(cidr)], Return, Rule::ExcludedCidr);
        }
        for ports in &options.outbound_ports {
            output(&[tcp, Port(*ports)], redirect, Rule::IncludedPort);
        }
        let captured = Rule::MachineCaptured;
        match &options.outbound {
            All::Star => {
                output(&[], redirect, Rule::IncludedCidr);
                table.insert(&[FromMachine], redirect, captured);
            }
            All::These(cidrs) => {
                for cidr in of_family(cidrs) {
                    output(&[To(cidr)], redirect, Rule::IncludedCidr);
                }
                for cidr in of_family(cidrs) {
                    table.insert(&[FromMachine, To(cidr)], redirect, captured);
                }
            }
        }
        table
    }

    /// The mangle table.
    fn mangle(options: &Options, v6: bool) -> Self {
        use Match::{
            Established, Gid, InContainer, Interface, Is, Mark, NotMark, NotTo, Port, Uid,
        };
        use Target::{Jump, Return, SetMark, Tproxy};
        let mut table = Self::default();
        let Some(mark) = options.tproxy_mark else {
            return table;
        };
        if v6 && !options.ipv6 {
            return table;
        }
        let (loopback, own6) = (options.loopback_of(v6), own6(v6));
        let tcp = Is(Protocol::Tcp);
        // 1
        for index in &options.exclude_interfaces {
            let name = Some(Rule::InboundInterfaceExcluded);
            table.add("PREROUTING", &[Interface(*index)], Return, name);
            table.add("OUTPUT", &[Interface(*index)], Return, None);
        }
        // 18, what is put in front of 6
        for first in [
            vec![Mark(mark)],
            vec![Match::From(own6), Interface(LO)],
            vec![Interface(LO), NotMark(SELF_MARK)],
        ] {
            table.add("ISTIO_INBOUND", &first, Return, Some(Rule::PodLocal));
        }
        // 6
        let captured = Some(Rule::InboundCaptured);
        let capture = Tproxy(INBOUND_PORT);
        table.add("ISTIO_TPROXY", &[tcp, NotTo(loopback)], capture, captured);
        let hand_over = |table: &mut Self, ports: &[Match]| {
            let ports = [&[tcp], ports].concat();
            let established = [&ports[..], &[Established]].concat();
            table.add("ISTIO_INBOUND", &established, Return, Some(Rule::PodLocal));
            table.add("ISTIO_INBOUND", &ports, Jump("ISTIO_TPROXY"), None);
        };
        match &options.inbound {
            All::These(ports) if ports.is_empty() => {}
            All::These(ports) => {
                table.add("PREROUTING", &[tcp], Jump("ISTIO_INBOUND"), None);
                for ports in ports {
                    hand_over(&mut table, &[Port(*ports)]);
                }
            }
            All::Star => {
                table.add("PREROUTING", &[tcp], Jump("ISTIO_INBOUND"), None);
                for ports in &options.exclude_inbound {
                    let name = Some(Rule::InboundPortExcluded);
                    table.add("ISTIO_INBOUND", &[tcp, Port(*ports)], Return, name);
                }
                hand_over(&mut table, &[]);
            }
        }
        // 18, the rest
        table.add("OUTPUT", &[tcp, Interface(LO), Mark(mark)], Return, None);
        let own = [NotTo(loopback), tcp, Interface(LO)];
        let owners: Vec<Match> = if options.by_container {
            vec![InContainer]
        } else {
            let uids = options.uids.iter().map(|uid| Uid(*uid));
            uids.chain(options.gids.iter().map(|gid| Gid(*gid)))
                .collect()
        };
        for owner in owners {
            let matches = [own[0], own[1], own[2], owner];
            table.add("OUTPUT", &matches, SetMark(SELF_MARK), None);
        }
        table
    }

    /// The mark that a packet has after OUTPUT.
    fn mark(&self, packet: &Packet) -> u32 {
        let mut packet = *packet;
        for line in self.lines.iter().filter(|line| line.chain == "OUTPUT") {
            if line.matches.iter().all(|m| m.holds(&packet)) {
                match line.target {
                    Target::SetMark(mark) => packet.mark = mark,
                    _ => break,
                }
            }
        }
        packet.mark
    }

    /// Walks a chain as the kernel does. The port handed over to, and the line that led there.
    fn walk(&self, chain: &str, packet: &Packet) -> (Option<u16>, Option<Rule>) {
        for line in self.lines.iter().filter(|line| line.chain == chain) {
            if !line.matches.iter().all(|m| m.holds(packet)) {
                continue;
            }
            match line.target {
                Target::Return => return (None, line.name),
                Target::Redirect(port) | Target::Tproxy(port) => return (Some(port), line.name),
                Target::SetMark(_) => {}
                Target::Jump(to) => {
                    let (port, name) = self.walk(to, packet);
                    if port.is_some() || name.is_some() {
                        return (port, line.name.or(name));
                    }
                }
            }
        }
        (None, None)
    }
}

fn own6(v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()
    } else {
        Ipv4Addr::new(127, 0, 0, 6).into()
    }
}

impl Options {
    fn loopback_of(&self, v6: bool) -> Cidr {
        if v6 { cidr("::1", 128) } else { self.loopback }
    }

    fn loopback_included(&self) -> bool {
        match &self.outbound {
            All::Star => false,
            All::These(cidrs) => cidrs.iter().any(|cidr| cidr.address.is_loopback()),
        }
    }

    /// What the Kubernetes injector passes.
    fn injected() -> Self {
        Self {
            tunnel_port: 15008,
            uids: vec![(1337, 1337)],
            gids: vec![(1337, 1337)],
            inbound: All::Star,
            exclude_inbound: [15090, 15021, 15020].map(|port| (port, port)).to_vec(),
            outbound: All::Star,
            exclude_outbound: vec![],
            outbound_ports: vec![],
            exclude_outbound_ports: vec![],
            groups: All::Star,
            exclude_groups: vec![],
            loopback: cidr("127.0.0.1", 32),
            ipv6: true,
            tproxy_mark: None,
            exclude_interfaces: vec![],
            dns: None,
            by_container: false,
        }
    }

    /// As the loader would write them into the maps.
    fn pod(&self) -> PodConfig {
        let IpAddr::V4(loopback) = self.loopback.address else {
            panic!("the loopback CIDR is IPv4")
        };
        let mask = u32::MAX << (32 - u32::from(self.loopback.bits));
        let flag = |on: bool, flag: u32| if on { flag } else { 0 };
        let any = |list: List| flag(!self.list_is_empty(list), list.bit());
        let groups = match &self.groups {
            All::Star => &self.exclude_groups,
            All::These(groups) => groups,
        };
        PodConfig {
            policy: 7,
            flags: flag(self.ipv6, FLAG_IPV6)
                | flag(matches!(self.outbound, All::Star), FLAG_OUTBOUND_ALL)
                | flag(matches!(self.inbound, All::Star), FLAG_INBOUND_ALL)
                | flag(self.loopback_included(), FLAG_LOOPBACK_INCLUDED)
                | flag(matches!(self.groups, All::These(_)), FLAG_GROUPS_INCLUDE)
                | flag(self.tproxy_mark.is_some(), FLAG_TPROXY)
                | flag(self.dns.is_some(), FLAG_DNS)
                | flag(self.by_container, FLAG_PROXY_CONTAINER)
                | flag(matches!(self.dns, Some(All::Star)), FLAG_DNS_ALL),
            lists: EVERY_LIST.map(any).iter().sum(),
            outbound_port: OUTBOUND_PORT,
            inbound_port: INBOUND_PORT,
            tunnel_port: self.tunnel_port,
            proxy_cgroup_level: 0,
            loopback_be: (loopback.to_bits() & mask).to_be(),
            loopback_mask_be: mask.to_be(),
            proxy_uid_count: self.uids.len() as u32,
            proxy_gid_count: self.gids.len() as u32,
            group_count: groups.len() as u32,
            tproxy_mark: self.tproxy_mark.unwrap_or_default(),
            proxy_uids: filled(&self.uids),
            proxy_gids: filled(&self.gids),
            groups: filled(groups),
            excluded_interfaces: std::array::from_fn(|i| {
                self.exclude_interfaces.get(i).copied().unwrap_or(LO)
            }),
            excluded_interface_count: self.exclude_interfaces.len() as u32,
            foreign_buckets: 0,
            proxy_cgroup: 0,
        }
    }

    fn ports(&self, list: List) -> &[Ports] {
        match (list, &self.inbound) {
            (List::ExcludeOutboundPorts, _) => &self.exclude_outbound_ports,
            (List::IncludeOutboundPorts, _) => &self.outbound_ports,
            (List::IncludeInboundPorts, All::These(ports)) => ports,
            (List::ExcludeInboundPorts, _) => &self.exclude_inbound,
            _ => &[],
        }
    }

    fn cidrs(&self, list: List) -> Vec<Cidr> {
        match (list, &self.outbound, &self.dns) {
            (List::ExcludeOutboundCidrs, ..) => self.exclude_outbound.clone(),
            (List::IncludeOutboundCidrs, All::These(cidrs), _) => cidrs.clone(),
            (List::DnsServers, _, Some(All::These(servers))) => {
                servers.iter().copied().map(host).collect()
            }
            _ => vec![],
        }
    }

    fn list_is_empty(&self, list: List) -> bool {
        self.ports(list).is_empty() && self.cidrs(list).is_empty()
    }
}

const EVERY_LIST: [List; 7] = [
    List::ExcludeOutboundPorts,
    List::ExcludeOutboundCidrs,
    List::IncludeOutboundPorts,
    List::IncludeOutboundCidrs,
    List::IncludeInboundPorts,
    List::ExcludeInboundPorts,
    List::DnsServers,
];

impl Lists for Options {
    fn has_port(&self, list: List, port: u16) -> bool {
        let ports = self.ports(list);
        assert!(!ports.is_empty(), "an empty list was searched");
        ports.iter().any(|(a, b)| (*a..=*b).contains(&port))
    }

    fn has_address(&self, list: List, address: &Address) -> bool {
        let cidrs = self.cidrs(list);
        assert!(!cidrs.is_empty(), "an empty list was searched");
        cidrs.iter().any(|cidr| cidr.contains((*address).into()))
    }
}

/// Unused entries hold what would match everything, if they were looked at.
fn filled<const N: usize>(ids: &[Ids]) -> [IdRange; N] {
    let everything = (0, u32::MAX);
    std::array::from_fn(|i| {
        let (first, last) = ids.get(i).copied().unwrap_or(everything);
        IdRange { first, last }
    })
}

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

fn cidr(address: &str, bits: u8) -> Cidr {
    Cidr {
        address: ip(address),
        bits,
    }
}

fn host(address: IpAddr) -> Cidr {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    Cidr { address, bits }
}

fn ip(text: &str) -> IpAddr {
    text.parse()
        .unwrap_or_else(|_| panic!("{text} is no address"))
}

/// Few values, close to each other: they must meet in lists and connections.
const PORTS: [u16; 16] = [
    0, 1, 53, 79, 80, 81, 443, 8080, 8081, 15001, 15006, 15007, 15008, 15009, 15020, 65535,
];
const IDS: [u32; 12] = [
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
const ADDRESSES: [&str; 26] = [
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

fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        8 => select(&ADDRESSES[..]).prop_map(ip),
        1 => any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
        1 => any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
    ]
}

fn any_cidr() -> impl Strategy<Value = Cidr> {
    (any_address(), 0..=128_u8, any::<bool>()).prop_map(|(address, bits, whole)| {
        let address = address.to_canonical();
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = if whole { width } else { bits % (width + 1) };
        Cidr { address, bits }
    })
}

fn any_loopback() -> impl Strategy<Value = Cidr> {
    let addresses = select(&["127.0.0.1", "127.0.0.6", "127.1.2.3", "127.0.0.0"][..]);
    prop_oneof![
        2 => Just(cidr("127.0.0.1", 32)),
        3 => (addresses, 8..=32_u8).prop_map(|(address, bits)| cidr(address, bits)),
    ]
}

fn any_ports() -> impl Strategy<Value = Vec<Ports>> {
    let range = |(a, b): Ports, single: bool| if single { (a, a) } else { (a.min(b), a.max(b)) };
    let ports = (select(&PORTS[..]), select(&PORTS[..]));
    let entry = (ports, prop::bool::weighted(0.8));
    vec(
        entry.prop_map(move |(ports, single)| range(ports, single)),
        0..4,
    )
}

fn any_ids(longest: usize) -> impl Strategy<Value = Vec<Ids>> {
    let range = |(a, b): Ids, single: bool| if single { (a, a) } else { (a.min(b), a.max(b)) };
    let ids = (select(&IDS[..]), select(&IDS[..]));
    let entry = || (ids.clone(), prop::bool::weighted(0.8));
    prop_oneof![
        9 => vec(entry().prop_map(move |(ids, single)| range(ids, single)), 0..4),
        1 => vec(entry().prop_map(move |(ids, single)| range(ids, single)), longest..=longest),
    ]
}

fn all_or<T: std::fmt::Debug + Clone>(
    list: impl Strategy<Value = T>,
) -> impl Strategy<Value = All<T>> {
    (any::<bool>(), list).prop_map(|(all, list)| if all { All::Star } else { All::These(list) })
}

fn any_options() -> impl Strategy<Value = Options> {
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

fn any_packet() -> impl Strategy<Value = Packet> {
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
fn as_family_of(destination: IpAddr, source: IpAddr) -> IpAddr {
    let last = |octets: &[u8]| octets.last().copied().unwrap_or_default();
    match (destination.to_canonical(), source.to_canonical()) {
        (IpAddr::V4(_), IpAddr::V6(v6)) => Ipv4Addr::new(127, 0, 0, last(&v6.octets())).into(),
        (IpAddr::V6(_), IpAddr::V4(v4)) => Ipv6Addr::from_bits(last(&v4.octets()).into()).into(),
        _ => source,
    }
}

fn any_packets() -> impl Strategy<Value = Vec<Packet>> {
    vec(any_packet(), CONNECTIONS_PER_CASE)
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
        let destination = ip(destination);
        let packet = Packet {
            protocol: Protocol::Tcp,
            source: ip(POD_IP),
            destination,
            port,
            interface: leaves_by(destination),
            mark: 0,
            owner: Some(owner),
            in_container: false,
            from_machine: false,
        };
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
            protocol: Protocol::Tcp,
            source: ip(POD_IP),
            destination: ip(destination),
            port,
            interface: LO,
            mark,
            owner: Some(owner),
            in_container: false,
            from_machine: false,
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
        let destination = ip(destination);
        for &protocol in protocols {
            let packet = Packet {
                protocol,
                source: ip(POD_IP),
                destination,
                port: 53,
                interface: leaves_by(destination),
                mark: 0,
                owner: Some(owner),
                in_container: false,
                from_machine: false,
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
            source: ip(POD_IP),
            destination: ip(POD_IP),
            port: 53,
            interface: LO,
            mark,
            owner: Some(owner),
            in_container: false,
            from_machine: false,
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
        let destination = ip(destination);
        let packet = Packet {
            protocol: Protocol::Tcp,
            source: ip(POD_IP),
            destination,
            port,
            interface: leaves_by(destination),
            mark: 0,
            owner: Some(owner),
            in_container,
            from_machine: false,
        };
        assert_eq!(decided_out(&options, &packet), wanted, "{packet:?}");
        assert_eq!(by_the_rules_out(&options, &packet), wanted, "{packet:?}");
    }
}
