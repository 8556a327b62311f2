//! The cells between prefixes, within each of which the kernel answers alike, and an address to ask about for each.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::addresses::Address;

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

/// Why a prefix is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// A route or rule names it.
    Named,
    /// Source selection may change at its border.
    Refinement,
}

/// At most three for each address, one for each name, and a dozen.
pub(super) fn cells(
    named: impl Iterator<Item = IpNet>,
    addresses: &[Address],
) -> BTreeMap<IpNet, Cell> {
    let never = NEVER_UNICAST
        .iter()
        .filter_map(|prefix| prefix.parse::<IpNet>().ok());
    let own: BTreeSet<Ipv6Addr> = addresses
        .iter()
        .filter_map(|address| match address.address {
            IpAddr::V6(v6) if !v6.is_loopback() => Some(v6),
            _ => None,
        })
        .collect();
    // Mostly named as well, but for those of which the routes were left out.
    let hosts = addresses.iter().map(|address| address.address.into());
    let mut cells: BTreeMap<_, _> = hosts.map(|host| (host, Cell::Refinement)).collect();
    // With one IPv6 address there is nothing to choose from. IPv4 chooses by route alone.
    if own.len() > 1 {
        let labels = IPV6_LABELS
            .iter()
            .filter_map(|prefix| prefix.parse::<IpNet>().ok());
        // RFC 6724 rule 8, the longest matching prefix: what tells two addresses apart is the first bit they
        // differ in. Wherever any two of them part, two neighbours in their order do.
        let neighbours = own.iter().zip(own.iter().skip(1));
        let splits = neighbours.flat_map(|(one, other)| {
            let common = (u128::from(*one) ^ u128::from(*other)).leading_zeros();
            [one, other].into_iter().filter_map(move |address| {
                let length = u8::try_from(common + 1).ok()?;
                Some(IpNet::V6(Ipv6Net::new(*address, length).ok()?.trunc()))
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
            .filter(|prefix| !is_multicast(*prefix))
            .map(|prefix| (prefix, Cell::Named)),
    );
    cells.extend(never.map(|prefix| (prefix, Cell::Named)));
    cells
}

pub(super) fn is_never_unicast(prefix: IpNet) -> bool {
    NEVER_UNICAST
        .iter()
        .any(|never| never.parse() == Ok(prefix))
}

/// Whether multicast addresses are all there is in a prefix.
fn is_multicast(prefix: IpNet) -> bool {
    prefix.network().is_multicast() && prefix.broadcast().is_multicast()
}

/// The answer of the longest prefix around this one.
pub(super) fn parent<T>(prefix: IpNet, answers: &BTreeMap<IpNet, T>) -> Option<&T> {
    (0..prefix.prefix_len()).rev().find_map(|length| {
        let wider = IpNet::new(prefix.addr(), length).ok()?.trunc();
        answers.get(&wider)
    })
}

/// An address of `prefix` that belongs to no more specific one of `prefixes`; `None` when they cover it whole.
pub(super) fn representative(prefix: IpNet, prefixes: &BTreeSet<IpNet>) -> Option<IpAddr> {
    // In the order of prefixes, those inside of one follow it.
    let mut inside: Vec<IpNet> = prefixes
        .range(prefix..)
        .take_while(|other| prefix.contains(*other))
        .filter(|other| prefix != **other)
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
pub(super) fn gap(prefix: IpNet, inside: &[IpNet]) -> Option<IpAddr> {
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
