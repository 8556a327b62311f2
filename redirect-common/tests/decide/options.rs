//! istio-iptables' flags, and what the loader makes of them.

use super::*;

pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PORT: u16 = 15006;
/// Index of `lo`.
pub const LO: u32 = 1;
pub const SELF_MARK: u32 = 1338;

pub type Ids = (u32, u32);
pub type Ports = (u16, u16);

/// istio-iptables' flags.
#[derive(Clone, Debug)]
pub struct Options {
    pub tunnel_port: u16,
    pub uids: Vec<Ids>,
    pub gids: Vec<Ids>,
    pub inbound: All<Vec<Ports>>,
    pub exclude_inbound: Vec<Ports>,
    pub outbound: All<Vec<Cidr>>,
    pub exclude_outbound: Vec<Cidr>,
    pub outbound_ports: Vec<Ports>,
    pub exclude_outbound_ports: Vec<Ports>,
    pub groups: All<Vec<Ids>>,
    pub exclude_groups: Vec<Ids>,
    pub loopback: Cidr,
    pub ipv6: bool,
    /// `-m TPROXY` and its `-t`.
    pub tproxy_mark: Option<u32>,
    /// Indexes in place of `-c`'s names.
    pub exclude_interfaces: Vec<u32>,
    /// The servers whose queries are captured; None without DNS capture.
    pub dns: Option<All<Vec<IpAddr>>>,
    /// The proxy is known by its container: its uids and gids say nothing.
    pub by_container: bool,
}

/// `*`, or a list.
#[derive(Clone, Debug)]
pub enum All<T> {
    Star,
    These(T),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cidr {
    pub address: IpAddr,
    pub bits: u8,
}

impl Cidr {
    pub fn contains(&self, address: IpAddr) -> bool {
        let (ours, theirs, width) = match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let host_bits = width - u32::from(self.bits);
        ours.checked_shr(host_bits).unwrap_or(0) == theirs.checked_shr(host_bits).unwrap_or(0)
    }
}

impl Options {
    pub fn loopback_of(&self, v6: bool) -> Cidr {
        if v6 { cidr("::1", 128) } else { self.loopback }
    }

    pub fn loopback_included(&self) -> bool {
        match &self.outbound {
            All::Star => false,
            All::These(cidrs) => cidrs.iter().any(|cidr| cidr.address.is_loopback()),
        }
    }

    /// What the Kubernetes injector passes.
    pub fn injected() -> Self {
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
    pub fn pod(&self) -> PodConfig {
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
            unlisted_port_buckets: 0,
        }
    }

    pub fn ports(&self, list: List) -> &[Ports] {
        match (list, &self.inbound) {
            (List::ExcludeOutboundPorts, _) => &self.exclude_outbound_ports,
            (List::IncludeOutboundPorts, _) => &self.outbound_ports,
            (List::IncludeInboundPorts, All::These(ports)) => ports,
            (List::ExcludeInboundPorts, _) => &self.exclude_inbound,
            _ => &[],
        }
    }

    pub fn cidrs(&self, list: List) -> Vec<Cidr> {
        match (list, &self.outbound, &self.dns) {
            (List::ExcludeOutboundCidrs, ..) => self.exclude_outbound.clone(),
            (List::IncludeOutboundCidrs, All::These(cidrs), _) => cidrs.clone(),
            (List::DnsServers, _, Some(All::These(servers))) => {
                servers.iter().copied().map(host).collect()
            }
            _ => vec![],
        }
    }

    pub fn list_is_empty(&self, list: List) -> bool {
        self.ports(list).is_empty() && self.cidrs(list).is_empty()
    }
}

pub const EVERY_LIST: [List; 7] = [
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
pub fn filled<const N: usize>(ids: &[Ids]) -> [IdRange; N] {
    let everything = (0, u32::MAX);
    std::array::from_fn(|i| {
        let (first, last) = ids.get(i).copied().unwrap_or(everything);
        IdRange { first, last }
    })
}

pub fn cidr(address: &str, bits: u8) -> Cidr {
    Cidr {
        address: ip(address),
        bits,
    }
}

pub fn host(address: IpAddr) -> Cidr {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    Cidr { address, bits }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse()
        .unwrap_or_else(|_| panic!("{text} is no address"))
}
