//! What the kernel is asked: which prefixes its tables and rules name, and where it would send to.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::addresses::{Address, tentative_source};
use crate::observe::netlink::Netlink;

/// Destination prefixes: the widest, if there are more than are kept.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    by_length: BTreeSet<(u8, IpNet)>,
    /// Whether narrower ones were left out.
    pub(super) left_out: bool,
}

impl Prefixes {
    fn add(&mut self, prefix: IpNet, most: usize) {
        self.by_length.insert((prefix.prefix_len(), prefix));
        if self.by_length.len() > most {
            self.by_length.pop_last();
            self.left_out = true;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = IpNet> {
        self.by_length.iter().map(|(_, prefix)| *prefix)
    }
}

/// The destination prefixes of every table and rule, whatever their type; the widest, if there are more than `most`.
pub(super) fn read_prefixes(netlink: &Netlink, most: usize) -> io::Result<Prefixes> {
    let mut prefixes = Prefixes::default();
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
            let found = netlink.dump(&request, |found: &mut Prefixes, answer| {
                if let Some(prefix) = prefix_of(&answer) {
                    found.add(prefix, most);
                }
            });
            let found = match found {
                // A kernel without IPv6, or without policy routing.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
                    ) =>
                {
                    continue;
                }
                found => found?,
            };
            prefixes.left_out |= found.left_out;
            found.iter().for_each(|prefix| prefixes.add(prefix, most));
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
pub(super) struct Answer {
    pub(super) source: IpAddr,
    pub(super) local: bool,
    pub(super) interface: u32,
}

/// Why a destination cannot be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreachable {
    /// What connect(2) fails with.
    pub(super) errno: i32,
    /// False for broadcast and multicast.
    pub(super) unicast: bool,
}

impl Unreachable {
    /// No route leads there.
    pub(super) const NO_ROUTE: Self = Self {
        errno: libc::ENETUNREACH,
        unicast: true,
    };
    /// No single host is there.
    pub(super) const NOT_UNICAST: Self = Self {
        unicast: false,
        ..Self::NO_ROUTE
    };
}

/// Asks the kernel; an inner error when the destination is not unicast or not reachable.
pub(super) fn ask(
    netlink: &Netlink,
    destination: IpAddr,
    addresses: &[Address],
) -> io::Result<Result<Answer, Unreachable>> {
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
        Ok(_) => return Ok(Err(Unreachable::NO_ROUTE)),
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
            return Ok(Err(Unreachable {
                errno: error.raw_os_error().unwrap_or(libc::ENETUNREACH),
                unicast: true,
            }));
        }
        Err(error) => return Err(error),
    };
    let local = match answer.header.kind {
        RouteType::Local => true,
        RouteType::Unicast => false,
        _ => return Ok(Err(Unreachable::NOT_UNICAST)),
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
    Ok(source
        .map(|source| Answer {
            source,
            local,
            interface,
        })
        .ok_or(Unreachable::NO_ROUTE))
}
