//! The ordered rules of istio-iptables in REDIRECT mode, as pure functions.
//!
//! The order is the specification: with several proxy ids the result of a later rule depends on an
//! earlier one having returned, so there is no "is it the proxy?" predicate to be had.

use crate::address::Address;
use crate::lists::{List, Lists};
use crate::pod::{
    FLAG_GROUPS_INCLUDE, FLAG_INBOUND_ALL, FLAG_IPV6, FLAG_LOOPBACK_INCLUDED, FLAG_OUTBOUND_ALL,
    IdRange, MAX_OWNER_GROUPS, MAX_PROXY_IDS, PodConfig,
};
use crate::verdict::Rule;

/// Who created a socket: kernel ids of the file's credentials, as `xt_owner` reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// `fsuid` at creation.
    pub uid: u32,
    /// `fsgid` at creation.
    pub gid: u32,
}

/// A TCP connection about to be made in the pod.
#[derive(Clone, Copy, Debug)]
pub struct Outbound {
    /// The source address the connection will have.
    pub source: Address,
    /// Where it is meant to go.
    pub destination: Address,
    /// Its port, host order.
    pub port: u16,
    /// The destination is one of the pod's own addresses (iptables' `-o lo`).
    pub local: bool,
    /// None for a socket of the kernel's, which no `--uid-owner` matches.
    pub owner: Option<Owner>,
}

/// Decides about a connection made in the pod.
#[inline(always)]
pub fn outbound(pod: &PodConfig, lists: &impl Lists, to: &Outbound) -> Rule {
    if !to.destination.is_v4() && !pod.has(FLAG_IPV6) {
        return Rule::Ipv6Off;
    }
    if has_port(pod, lists, List::ExcludeOutboundPorts, to.port) {
        return Rule::ExcludedPort;
    }
    if to.local && to.source.is_proxy_passthrough() {
        return Rule::ProxyPassthrough;
    }
    let loopback = pod.in_loopback_cidr(&to.destination);
    let to_self = to.local && !loopback && to.port != pod.tunnel_port;
    let pass_local = to.local && !pod.has(FLAG_LOOPBACK_INCLUDED);
    let owner = to.owner;
    if let Some(rule) = by_proxy_id(
        &pod.proxy_uids,
        pod.proxy_uid_count,
        owner.map(|o| o.uid),
        to_self,
        pass_local,
    ) {
        return rule;
    }
    if let Some(rule) = by_proxy_id(
        &pod.proxy_gids,
        pod.proxy_gid_count,
        owner.map(|o| o.gid),
        to_self,
        pass_local,
    ) {
        return rule;
    }
    if owner_group_left_out(pod, owner) {
        return Rule::OwnerGroup;
    }
    if loopback {
        return Rule::Loopback;
    }
    if has_address(pod, lists, List::ExcludeOutboundCidrs, &to.destination) {
        return Rule::ExcludedCidr;
    }
    if has_port(pod, lists, List::IncludeOutboundPorts, to.port) {
        return Rule::IncludedPort;
    }
    if pod.has(FLAG_OUTBOUND_ALL)
        || has_address(pod, lists, List::IncludeOutboundCidrs, &to.destination)
    {
        return Rule::IncludedCidr;
    }
    Rule::NotIncluded
}

/// Decides about a connection that comes from outside of the pod. `port` in host order.
#[inline(always)]
pub fn inbound(pod: &PodConfig, lists: &impl Lists, destination: &Address, port: u16) -> Rule {
    if !destination.is_v4() && !pod.has(FLAG_IPV6) {
        return Rule::InboundIpv6Off;
    }
    let all = pod.has(FLAG_INBOUND_ALL);
    if !all && !pod.lists_any(List::IncludeInboundPorts) {
        return Rule::InboundOff;
    }
    if port == pod.tunnel_port {
        return Rule::TunnelPort;
    }
    if all {
        if has_port(pod, lists, List::ExcludeInboundPorts, port) {
            return Rule::InboundPortExcluded;
        }
        return Rule::InboundCaptured;
    }
    if has_port(pod, lists, List::IncludeInboundPorts, port) {
        return Rule::InboundCaptured;
    }
    Rule::InboundPortNotIncluded
}

/// Decides about a connection that comes from a virtual machine, by an interface of `-k`. No other
/// option has a say.
#[inline(always)]
pub fn machine(pod: &PodConfig, lists: &impl Lists, destination: &Address) -> Rule {
    if !destination.is_v4() && !pod.has(FLAG_IPV6) {
        return Rule::MachineIpv6Off;
    }
    if pod.has(FLAG_OUTBOUND_ALL)
        || has_address(pod, lists, List::IncludeOutboundCidrs, destination)
    {
        return Rule::MachineCaptured;
    }
    Rule::MachineNotIncluded
}

/// The three rules that istio-iptables writes for each proxy id, in turn.
#[inline(always)]
fn by_proxy_id(
    ids: &[IdRange; MAX_PROXY_IDS],
    count: u32,
    id: Option<u32>,
    to_self: bool,
    pass_local: bool,
) -> Option<Rule> {
    for (index, range) in ids.iter().enumerate() {
        if index as u32 >= count {
            break;
        }
        let matches = match id {
            Some(id) => range.contains(id),
            None => false,
        };
        if matches {
            return Some(if to_self {
                Rule::ProxyToSelf
            } else {
                Rule::Proxy
            });
        }
        if pass_local {
            return Some(Rule::PodLocal);
        }
    }
    None
}

#[inline(always)]
fn owner_group_left_out(pod: &PodConfig, owner: Option<Owner>) -> bool {
    let include = pod.has(FLAG_GROUPS_INCLUDE);
    if let Some(owner) = owner {
        for (index, range) in pod.groups.iter().enumerate().take(MAX_OWNER_GROUPS) {
            if index as u32 >= pod.group_count {
                break;
            }
            if range.contains(owner.gid) {
                return !include;
            }
        }
    }
    include
}

#[inline(always)]
fn has_port(pod: &PodConfig, lists: &impl Lists, list: List, port: u16) -> bool {
    pod.lists_any(list) && lists.has_port(list, port)
}

#[inline(always)]
fn has_address(pod: &PodConfig, lists: &impl Lists, list: List, address: &Address) -> bool {
    pod.lists_any(list) && lists.has_address(list, address)
}
