//! From a validated policy and what was read of a pod to map entries. Pure: nothing is written here.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use bytemuck::bytes_of;
use ipnet::IpNet;
use redirect_common::address::Address;
use redirect_common::lists::{LIST_PREFIX_BITS, List, ListKey};
use redirect_common::pod::{
    self, FLAG_DNS, FLAG_DNS_ALL, FLAG_GROUPS_INCLUDE, FLAG_INBOUND_ALL, FLAG_IPV6,
    FLAG_LOOPBACK_INCLUDED, FLAG_MACHINES, FLAG_OUTBOUND_ALL, FLAG_PROXY_CONTAINER, FLAG_TPROXY,
    MAX_EXCLUDED_INTERFACES, PodConfig, port_bucket,
};
use redirect_common::route::{
    ROUTE_BIND_SOURCE, ROUTE_LOCAL, ROUTE_PREFIX_BITS, RouteInfo, RouteKey,
};
use sha2::{Digest as _, Sha256};

use crate::digest;
use crate::observe::identity::IdMap;
use crate::observe::interfaces::Interface;
use crate::observe::routes::{Route, RoutingTable};
use crate::options::{Dns, IdRange, Mode, Policy, PortRange};
use crate::proxy::ProxyIdentity;
use crate::tables::{ListPrefix, RoutePrefix};

/// Bits of an address in its 16-byte form.
const ADDRESS_BITS: u32 = 128;

/// The pod's entry of `PODS`. `ids` translates the pod's user and group ids to the kernel's,
/// `interfaces` and `table` are those of its network namespace.
pub fn pod_config(
    policy: &Policy,
    proxy: &ProxyIdentity,
    ipv6: bool,
    ids: &IdMap,
    interfaces: &[Interface],
    table: &RoutingTable,
) -> Result<PodConfig> {
    let mut config = PodConfig {
        policy: policy.digest(),
        outbound_port: policy.outbound_port,
        inbound_port: policy.inbound_port,
        tunnel_port: policy.tunnel_port,
        loopback_be: u32::from(policy.loopback.network()).to_be(),
        loopback_mask_be: u32::from(policy.loopback.netmask()).to_be(),
        ..bytemuck::Zeroable::zeroed()
    };
    for (flag, set) in [
        (FLAG_IPV6, ipv6),
        (FLAG_OUTBOUND_ALL, policy.include_outbound_cidrs.is_all()),
        (FLAG_INBOUND_ALL, policy.inbound_ports.is_all()),
        (FLAG_LOOPBACK_INCLUDED, policy.loopback_included),
        (FLAG_GROUPS_INCLUDE, !policy.owner_groups.is_all()),
        (FLAG_MACHINES, !policy.virtual_interfaces.is_empty()),
        (FLAG_TPROXY, policy.mode != Mode::Redirect),
        (FLAG_DNS, policy.dns != Dns::Off),
        (FLAG_DNS_ALL, policy.dns == Dns::All),
    ] {
        if set {
            config.flags |= flag;
        }
    }
    for (key, _) in list_entries(policy) {
        config.lists |= 1 << key.data.list;
    }
    config.unlisted_port_buckets = unlisted_port_buckets(policy);
    config.foreign_buckets = foreign_buckets(table);
    if let ProxyIdentity::Container { container } = proxy {
        config.flags |= FLAG_PROXY_CONTAINER;
        if let Some(container) = container {
            config.proxy_cgroup = container.cgroup_id;
            config.proxy_cgroup_level = container.level;
        }
    }
    if let Mode::Tproxy { mark, .. } = policy.mode {
        config.tproxy_mark = mark;
    }
    let excluded = excluded_interfaces(policy, interfaces)?;
    config.excluded_interface_count = excluded.len() as u32;
    config.excluded_interfaces[..excluded.len()].copy_from_slice(&excluded);
    let groups = if policy.owner_groups.is_all() {
        &policy.owner_groups_exclude
    } else {
        policy.owner_groups.listed()
    };
    config.proxy_uid_count = translate(&policy.proxy_uids, &mut config.proxy_uids, |range| {
        Ok(ids.uids(range.first, range.last)?)
    })?;
    config.proxy_gid_count = translate(&policy.proxy_gids, &mut config.proxy_gids, |range| {
        Ok(ids.gids(range.first, range.last)?)
    })?;
    config.group_count = translate(groups, &mut config.groups, |range| {
        Ok(ids.gids(range.first, range.last)?)
    })?;
    Ok(config)
}

/// Indexes of the interfaces that `-c` names now, in ascending order.
pub fn excluded_interfaces(policy: &Policy, interfaces: &[Interface]) -> Result<Vec<u32>> {
    let patterns = &policy.exclude_interfaces;
    let mut excluded: Vec<u32> = interfaces
        .iter()
        .filter(|interface| patterns.iter().any(|p| p.matches(&interface.name)))
        .map(|interface| interface.index)
        .collect();
    ensure!(
        excluded.len() <= MAX_EXCLUDED_INTERFACES,
        "--istio-exclude-interfaces names {} interfaces of the pod, allowed are {MAX_EXCLUDED_INTERFACES}",
        excluded.len()
    );
    excluded.sort_unstable();
    Ok(excluded)
}

fn translate(
    from: &[IdRange],
    to: &mut [pod::IdRange],
    kernel_ids: impl Fn(&IdRange) -> Result<(u32, u32)>,
) -> Result<u32> {
    ensure!(
        from.len() <= to.len(),
        "{} ids are more than {}",
        from.len(),
        to.len()
    );
    for (range, slot) in from.iter().zip(to) {
        let (first, last) = kernel_ids(range)?;
        *slot = pod::IdRange { first, last };
    }
    Ok(from.len() as u32)
}

fn port_lists(policy: &Policy) -> [(List, &[PortRange]); 4] {
    [
        (
            List::ExcludeOutboundPorts,
            policy.exclude_outbound_ports.as_slice(),
        ),
        (
            List::IncludeOutboundPorts,
            policy.include_outbound_ports.as_slice(),
        ),
        (List::IncludeInboundPorts, policy.inbound_ports.listed()),
        (
            List::ExcludeInboundPorts,
            policy.exclude_inbound_ports.as_slice(),
        ),
    ]
}

/// [`PodConfig::unlisted_port_buckets`] of a policy.
fn unlisted_port_buckets(policy: &Policy) -> u64 {
    let ranges = port_lists(policy)
        .into_iter()
        .flat_map(|(_, ranges)| ranges);
    let ports = ranges.flat_map(|range| range.first..=range.last);
    ports.fold(u64::MAX, |buckets, port| {
        buckets & !(1 << port_bucket(port))
    })
}

/// The entries of the policy's lists.
pub fn list_entries(policy: &Policy) -> Vec<(ListPrefix, u8)> {
    let id = policy.digest();
    let cidrs = [
        (
            List::IncludeOutboundCidrs,
            policy.include_outbound_cidrs.listed(),
        ),
        (
            List::ExcludeOutboundCidrs,
            policy.exclude_outbound_cidrs.as_slice(),
        ),
    ];
    let cidrs = cidrs.into_iter().flat_map(|(list, nets)| {
        let prefixes = nets.iter().flat_map(prefixes_of_family);
        prefixes.map(move |(address, bits)| (ListKey::address(id, list, address), bits))
    });
    let ports = port_lists(policy).into_iter().flat_map(|(list, ranges)| {
        ranges.iter().flat_map(move |range| {
            port_prefixes(*range).map(move |(port, bits)| (ListKey::port(id, list, port), bits))
        })
    });
    let servers = policy.dns.servers().iter().map(|server| {
        let address = ListKey::address(id, List::DnsServers, Address::from(*server));
        (address, ADDRESS_BITS)
    });
    cidrs
        .chain(ports)
        .chain(servers)
        .map(|(data, bits)| {
            let prefix_bits = LIST_PREFIX_BITS + bits;
            (ListPrefix { prefix_bits, data }, 1)
        })
        .collect()
}

/// The entries of `ROUTES` for a network namespace.
pub fn route_entries(netns_cookie: u64, table: &RoutingTable) -> HashMap<RoutePrefix, RouteInfo> {
    let entry = |net: &IpNet, info| {
        let (address, bits) = prefix(net);
        let key = RoutePrefix {
            prefix_bits: ROUTE_PREFIX_BITS + bits,
            data: RouteKey::new(netns_cookie, address),
        };
        (key, info)
    };
    let sources: HashSet<IpAddr> = table.routes.iter().map(|route| route.source).collect();
    let secondary: HashSet<IpAddr> = sources
        .into_iter()
        .filter(|source| {
            let route = table.route_to(*source);
            route.is_some_and(|route| route.source != *source)
        })
        .collect();
    let routes = table.routes.iter().map(|route| {
        let local = if route.local { ROUTE_LOCAL } else { 0 };
        let bind = if secondary.contains(&route.source) {
            ROUTE_BIND_SOURCE
        } else {
            0
        };
        let info = RouteInfo {
            source: Address::from(route.source),
            flags: local | bind,
            interface: route.interface,
        };
        entry(&route.prefix, info)
    });
    let holes = table.holes.iter().map(|hole| {
        entry(
            &hole.prefix,
            RouteInfo::hole(hole.errno as u32, hole.unicast),
        )
    });
    routes.chain(holes).collect()
}

/// Names a network namespace's entries of `ROUTES`, whatever their order.
pub fn routes_digest(entries: &HashMap<RoutePrefix, RouteInfo>) -> u64 {
    let mut lines: Vec<_> = entries
        .iter()
        .map(|(key, info)| [bytes_of(key), bytes_of(info)].concat())
        .collect();
    lines.sort_unstable();
    let mut hash = Sha256::new();
    lines.iter().for_each(|line| hash.update(line));
    digest::first_64_bits(hash)
}

/// [`PodConfig::foreign_buckets`] of a network namespace.
fn foreign_buckets(table: &RoutingTable) -> u32 {
    let mut own_buckets = 0;
    for Route { prefix, .. } in table.routes.iter().filter(|route| route.local) {
        let address = Address::from(prefix.network());
        // A prefix that begins with a loopback address has no others.
        if address.is_loopback() {
            continue;
        }
        if prefix.prefix_len() < prefix.max_prefix_len() {
            // Addresses in every bucket.
            return 0;
        }
        own_buckets |= 1 << address.bucket();
    }
    !own_buckets
}

/// Prefix length of `::ffff:0:0/96`, where IPv4 addresses are kept.
const MAPPED_BITS: u32 = 96;

/// A network as prefixes of the 16-byte form that cover addresses of its own family only: an IPv6 one around
/// `::ffff:0:0/96`, such as `::/0`, goes in pieces that leave IPv4 out.
fn prefixes_of_family(net: &IpNet) -> Vec<(Address, u32)> {
    const MAPPED: u128 = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().to_bits();
    let (address, bits) = prefix(net);
    let IpNet::V6(net) = net else {
        return vec![(address, bits)];
    };
    let common = (net.network().to_bits() ^ MAPPED).leading_zeros();
    if common < bits.min(MAPPED_BITS) {
        return vec![(address, bits)];
    }
    // What is inside IPv4's place leaves nothing.
    let pieces = (bits..MAPPED_BITS).map(|length| {
        let sibling = MAPPED ^ (1 << (127 - length));
        let network = sibling & (u128::MAX << (127 - length));
        (Ipv6Addr::from_bits(network).into(), length + 1)
    });
    pieces
        .map(|(address, bits): (IpAddr, u32)| (address.into(), bits))
        .collect()
}

/// A network as a prefix of the 16-byte form.
fn prefix(net: &IpNet) -> (Address, u32) {
    let bits = u32::from(net.prefix_len());
    match net.network() {
        address @ IpAddr::V4(_) => (address.into(), MAPPED_BITS + bits),
        address @ IpAddr::V6(_) => (address.into(), bits),
    }
}

/// A port range as the fewest prefixes of 16-bit numbers: 30 at most.
fn port_prefixes(range: PortRange) -> impl Iterator<Item = (u16, u32)> {
    let mut next = u32::from(range.first);
    let last = u32::from(range.last);
    std::iter::from_fn(move || {
        if next > last {
            return None;
        }
        let mut size_bits = next.trailing_zeros().min(16);
        while next + (1 << size_bits) - 1 > last {
            size_bits -= 1;
        }
        let prefix = (next as u16, 16 - size_bits);
        next += 1 << size_bits;
        Some(prefix)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_ports_are_never_taken_for_unlisted_ones() {
        let range = |first, last| PortRange { first, last };
        let policy = Policy {
            exclude_inbound_ports: vec![range(15090, 15090), range(65530, 65535)],
            exclude_outbound_ports: vec![range(0, 3)],
            ..Policy::default()
        };
        let config = PodConfig {
            unlisted_port_buckets: unlisted_port_buckets(&policy),
            ..bytemuck::Zeroable::zeroed()
        };
        for port in 0..=u16::MAX {
            let listed = port_lists(&policy)
                .iter()
                .any(|(_, ranges)| ranges.iter().any(|r| (r.first..=r.last).contains(&port)));
            assert!(!(listed && config.lists_no_port(port)), "{port}");
        }
        assert!(config.lists_no_port(8080) && config.lists_no_port(15089));
        assert!(!config.lists_no_port(15090));
        let none: PodConfig = bytemuck::Zeroable::zeroed();
        assert!(!none.lists_no_port(8080), "unknown");
    }

    #[test]
    fn prefixes_of_a_network_cover_its_own_family_only() {
        let addresses = [
            "::",
            "::1",
            "::fffe:ffff:ffff",
            "::1:0:0:0",
            "2001:db8::1",
            "fd00::1",
            "ffff::1",
            "0.0.0.0",
            "10.1.2.3",
            "255.255.255.255",
        ];
        let nets = [
            "::/0",
            "::/1",
            "::/16",
            "::/80",
            "::/95",
            "::/96",
            "::fffe:0:0/95",
            "::ffff:0:0/96",
            "::ffff:10.0.0.0/104",
            "2000::/3",
            "8000::/1",
            "0.0.0.0/0",
            "10.0.0.0/8",
        ];
        let words = |address: Address| {
            let [a, b, c, d] = address.words_be.map(u32::from_be);
            Ipv6Addr::from_bits(
                u128::from(a) << 96 | u128::from(b) << 64 | u128::from(c) << 32 | u128::from(d),
            )
            .to_bits()
        };
        for net in nets.map(|net| net.parse::<IpNet>().unwrap()) {
            let prefixes = prefixes_of_family(&net);
            for address in addresses.map(|address| address.parse::<IpAddr>().unwrap()) {
                let bits = words(address.into());
                let covered = prefixes
                    .iter()
                    .any(|(network, length)| (words(*network) ^ bits).leading_zeros() >= *length);
                assert_eq!(covered, net.contains(&address), "{net} and {address}");
            }
        }
    }

    fn config_for(own: &[&str]) -> PodConfig {
        let route = |prefix: &str, local| Route {
            prefix: prefix.parse().unwrap(),
            source: Ipv4Addr::UNSPECIFIED.into(),
            local,
            interface: 1,
        };
        let all = ["0.0.0.0/0", "10.1.2.0/24", "::/0"].map(|prefix| route(prefix, false));
        let own = own.iter().map(|prefix| route(prefix, true));
        let table = RoutingTable {
            routes: all.into_iter().chain(own).collect(),
            holes: Vec::new(),
            left_out: false,
        };
        PodConfig {
            foreign_buckets: foreign_buckets(&table),
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn is_foreign(config: &PodConfig, address: impl Into<IpAddr>) -> bool {
        config.is_foreign(&Address::from(address.into()))
    }

    #[test]
    fn most_addresses_but_none_of_the_pods_own_are_foreign() {
        let own = ["10.1.2.3", "10.1.2.4", "fd00::3", "fe80::1234"];
        let mut prefixes = vec!["127.0.0.0/8", "127.0.0.1/32", "::1/128"];
        let hosts = own.map(|address| IpNet::from(address.parse::<IpAddr>().unwrap()).to_string());
        prefixes.extend(hosts.iter().map(String::as_str));
        let config = config_for(&prefixes);
        for address in own.into_iter().chain(["127.9.9.9", "::1"]) {
            let address: IpAddr = address.parse().unwrap();
            assert!(!is_foreign(&config, address), "{address}");
        }
        let neighbours = (0..=255).map(|last| IpAddr::from([10, 1, 2, last]));
        let others = (0..=255).map(|last| Ipv6Addr::from_bits(0xfd00 << 112 | last).into());
        for network in [neighbours.collect::<Vec<_>>(), others.collect()] {
            let foreign = network.into_iter().filter(|a| is_foreign(&config, *a));
            // Four of the 32 buckets are taken, or fewer.
            let foreign = foreign.count();
            assert!((192..256).contains(&foreign), "{foreign}");
        }
    }

    #[test]
    fn no_address_is_foreign_where_a_whole_network_is_the_pods_own() {
        for network in ["198.51.100.0/24", "2001:db8::/64"] {
            let config = config_for(&["10.1.2.3/32", network]);
            for last in 0..=255 {
                assert!(!is_foreign(&config, [198, 51, 100, last]), "{network}");
                assert!(!is_foreign(&config, [192, 0, 2, last]), "{network}");
            }
        }
    }

    #[test]
    fn port_prefixes_cover_exactly_the_range() {
        for (first, last) in [
            (0, 0),
            (0, 65535),
            (1, 65534),
            (80, 80),
            (8000, 9000),
            (65535, 65535),
        ] {
            let range = PortRange { first, last };
            let prefixes: Vec<_> = port_prefixes(range).collect();
            assert!(prefixes.len() <= 30);
            for port in 0..=u16::MAX {
                let covered = prefixes
                    .iter()
                    .any(|(start, bits)| bits == &0 || (port ^ start) >> (16 - bits) == 0);
                assert_eq!(
                    covered,
                    (first..=last).contains(&port),
                    "{first}-{last}: {port}"
                );
            }
        }
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::config;

    /// Often near the place of the IPv4 addresses.
    fn ipv6() -> impl Strategy<Value = Ipv6Addr> {
        const MAPPED: u128 = 0xffff << 32;
        prop_oneof![
            any::<Ipv6Addr>(),
            any::<u32>().prop_map(|low| Ipv6Addr::from_bits(MAPPED | u128::from(low))),
            (0..128_u32, any::<u32>())
                .prop_map(|(bit, low)| Ipv6Addr::from_bits(MAPPED ^ 1 << bit ^ u128::from(low))),
        ]
    }

    fn covers(prefixes: &[(Address, u32)], address: IpAddr) -> bool {
        let bits = |address: Address| u128::from_be_bytes(address.octets());
        let wanted = bits(address.into());
        prefixes
            .iter()
            .any(|(network, length)| (bits(*network) ^ wanted).leading_zeros() >= *length)
    }

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_port_range_has_exactly_its_ports(a: u16, b: u16, port: u16) {
            let range = PortRange { first: a.min(b), last: a.max(b) };
            let prefixes: Vec<_> = port_prefixes(range).collect();
            prop_assert!(prefixes.len() <= 30);
            for port in [port, range.first, range.last, range.first.wrapping_sub(1), range.last.wrapping_add(1)] {
                let covered = prefixes.iter().any(|(start, bits)| *bits == 0 || (port ^ start) >> (16 - bits) == 0);
                prop_assert_eq!(covered, (range.first..=range.last).contains(&port), "{}", port);
            }
        }

        #[test]
        fn any_network_has_exactly_its_addresses(v4: Ipv4Addr, v6 in ipv6(), bits in 0..=128_u8, other4: Ipv4Addr, other6 in ipv6()) {
            for net in [IpNet::new(v4.into(), bits % 33), IpNet::new(v6.into(), bits)] {
                let net = net.expect("a network").trunc();
                let prefixes = prefixes_of_family(&net);
                let mapped = |address: Ipv6Addr| address.to_ipv4_mapped().is_some();
                // An IPv4-mapped address stands for the IPv4 one, which no IPv6 network has.
                let inside = |address: Ipv6Addr| net.contains(&IpAddr::from(address)) && !mapped(address);
                for address in [other6, v6] {
                    if !mapped(address) {
                        prop_assert_eq!(covers(&prefixes, address.into()), inside(address), "{} {}", net, address);
                    }
                }
                for address in [other4, v4] {
                    prop_assert_eq!(covers(&prefixes, address.into()), net.contains(&IpAddr::from(address)), "{} {}", net, address);
                }
            }
        }
    }
}
