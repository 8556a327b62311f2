//! From a validated policy and what was read of a pod to map entries. Pure: nothing is written here.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use ipnet::IpNet;
use redirect_common::address::Address;
use redirect_common::lists::{LIST_PREFIX_BITS, List, ListKey};
use redirect_common::pod::{
    self, FLAG_GROUPS_INCLUDE, FLAG_INBOUND_ALL, FLAG_IPV6, FLAG_LOOPBACK_INCLUDED, FLAG_MACHINES,
    FLAG_OUTBOUND_ALL, PodConfig,
};
use redirect_common::route::{
    ROUTE_LOCAL, ROUTE_PREFIX_BITS, ROUTE_UNREACHABLE, RouteInfo, RouteKey,
};

use crate::observe::identity::IdMap;
use crate::observe::routes::RoutingTable;
use crate::options::{IdRange, Policy, PortRange};
use crate::tables::{ListPrefix, RoutePrefix};

/// The pod's entry of `PODS`. `ids` translates the pod's user and group ids to the kernel's.
pub fn pod_config(policy: &Policy, ipv6: bool, ids: &IdMap) -> Result<PodConfig> {
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
    ] {
        if set {
            config.flags |= flag;
        }
    }
    for (key, _) in list_entries(policy) {
        config.lists |= 1 << key.data.list;
    }
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
    let ports = [
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
    ];
    let cidrs = cidrs.into_iter().flat_map(|(list, nets)| {
        nets.iter().map(move |net| {
            let (address, bits) = prefix(net);
            (ListKey::address(id, list, address), bits)
        })
    });
    let ports = ports.into_iter().flat_map(|(list, ranges)| {
        ranges.iter().flat_map(move |range| {
            port_prefixes(*range).map(move |(port, bits)| (ListKey::port(id, list, port), bits))
        })
    });
    cidrs
        .chain(ports)
        .map(|(data, bits)| {
            let prefix_bits = LIST_PREFIX_BITS + bits;
            (ListPrefix { prefix_bits, data }, 1)
        })
        .collect()
}

/// The entries of `ROUTES` for a network namespace.
pub fn route_entries(netns_cookie: u64, table: &RoutingTable) -> Vec<(RoutePrefix, RouteInfo)> {
    let entry = |net: &IpNet, info| {
        let (address, bits) = prefix(net);
        let key = RoutePrefix {
            prefix_bits: ROUTE_PREFIX_BITS + bits,
            data: RouteKey::new(netns_cookie, address),
        };
        (key, info)
    };
    let routes = table.routes.iter().map(|route| {
        let info = RouteInfo {
            source: Address::from(route.source),
            flags: if route.local { ROUTE_LOCAL } else { 0 },
            interface: route.interface,
        };
        entry(&route.prefix, info)
    });
    let holes = table.holes.iter().map(|net| {
        let info = RouteInfo {
            flags: ROUTE_UNREACHABLE,
            ..RouteInfo::default()
        };
        entry(net, info)
    });
    routes.chain(holes).collect()
}

/// A network as a prefix of the 16-byte form.
fn prefix(net: &IpNet) -> (Address, u32) {
    const MAPPED_BITS: u32 = 96;
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
