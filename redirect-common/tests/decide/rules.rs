//! The chains that istio-iptables writes, and an interpreter that walks them.

use super::*;

/// The first packet of a TCP connection, or a datagram.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub protocol: Protocol,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub port: u16,
    /// Where it leaves by, or comes by.
    pub interface: u32,
    pub mark: u32,
    pub owner: Option<(u32, u32)>,
    /// The owner is in the proxy's container.
    pub in_container: bool,
    /// It came in by an interface of `-k`.
    pub from_machine: bool,
}

/// What a rule asks of a packet; `NotX` is iptables' `! X`.
#[derive(Clone, Copy, Debug)]
pub enum Match {
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
    pub fn holds(&self, packet: &Packet) -> bool {
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
pub enum Target {
    Return,
    Jump(&'static str),
    Redirect(u16),
    Tproxy(u16),
    SetMark(u32),
}

/// One line of the rules text. `name` is what this project calls a connection that it decides.
#[derive(Clone, Debug)]
pub struct Line {
    pub chain: &'static str,
    pub matches: Vec<Match>,
    pub target: Target,
    pub name: Option<Rule>,
}

/// A table of one family.
#[derive(Debug, Default)]
pub struct Table {
    pub lines: Vec<Line>,
}

impl Table {
    pub fn add(
        &mut self,
        chain: &'static str,
        matches: &[Match],
        target: Target,
        name: Option<Rule>,
    ) {
        self.lines.push(Line {
            chain,
            matches: matches.to_vec(),
            target,
            name,
        });
    }

    /// `-I CHAIN 1`
    pub fn insert(&mut self, matches: &[Match], target: Target, name: Rule) {
        self.add("PREROUTING", matches, target, Some(name));
        self.lines.rotate_right(1);
    }

    /// The nat table.
    pub fn nat(options: &Options, v6: bool) -> Self {
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
    pub fn mangle(options: &Options, v6: bool) -> Self {
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
    pub fn mark(&self, packet: &Packet) -> u32 {
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
    pub fn walk(&self, chain: &str, packet: &Packet) -> (Option<u16>, Option<Rule>) {
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

pub fn own6(v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()
    } else {
        Ipv4Addr::new(127, 0, 0, 6).into()
    }
}
