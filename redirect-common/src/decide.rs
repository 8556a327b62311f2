//! The ordered rules of istio-iptables, as pure functions.
//!
//! The order is the specification: with several proxy ids the result of a later rule depends on an
//! earlier one having returned, so there is no "is it the proxy?" predicate to be had.

use crate::address::Address;
use crate::dns::DNS_PORT;
use crate::lists::{List, Lists};
use crate::pod::{
    FLAG_DNS, FLAG_DNS_ALL, FLAG_GROUPS_INCLUDE, FLAG_INBOUND_ALL, FLAG_IPV6,
    FLAG_LOOPBACK_INCLUDED, FLAG_OUTBOUND_ALL, FLAG_PROXY_CONTAINER, FLAG_TPROXY, IdRange,
    MAX_OWNER_GROUPS, MAX_PROXY_IDS, PodConfig,
};
use crate::verdict::{Action, Rule};

/// What istio-iptables marks the proxy's connections to its own pod with, for TPROXY to take them.
const SELF_MARK: u32 = 1338;

/// Who created a socket: kernel ids of the file's credentials, as `xt_owner` reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// `fsuid` at creation.
    pub uid: u32,
    /// `fsgid` at creation.
    pub gid: u32,
}

/// A protocol that has ports, of those that the rules tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP: only DNS queries are captured.
    Udp,
}

impl Protocol {
    /// IP's number of it.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// A connection about to be made in the pod, or a datagram about to leave.
#[derive(Clone, Copy, Debug)]
pub struct Outbound {
    /// How it is made.
    pub protocol: Protocol,
    /// The source address the connection will have.
    pub source: Address,
    /// Where it is meant to go.
    pub destination: Address,
    /// Its port, host order.
    pub port: u16,
    /// The destination is one of the pod's own addresses (iptables' `-o lo`).
    pub local: bool,
    /// Index of the interface it leaves by; 0 if that is not known.
    pub interface: u32,
    /// The socket's `SO_MARK`.
    pub mark: u32,
    /// None for a socket of the kernel's, which no `--uid-owner` matches.
    pub owner: Option<Owner>,
    /// The socket was created in the proxy's container, or in a cgroup below that. False for a socket of
    /// the kernel's, and where the proxy is known by its ids.
    pub in_proxy_container: bool,
}

/// A TCP connection that comes from outside of the pod.
#[derive(Clone, Copy, Debug)]
pub struct Inbound {
    /// Where it is meant to go.
    pub destination: Address,
    /// Its port, host order.
    pub port: u16,
    /// Index of the interface it came by.
    pub interface: u32,
}

/// Decides about a connection made in the pod, or a datagram: the nat table, then, for what that lets alone on its
/// way to the pod itself, TPROXY's part of the mangle table.
#[inline(always)]
pub fn outbound(pod: &PodConfig, lists: &impl Lists, to: &Outbound) -> Rule {
    if !to.destination.is_v4() && !pod.has(FLAG_IPV6) {
        return Rule::Ipv6Off;
    }
    if pod.excludes_interface(to.interface) {
        return Rule::ExcludedInterface;
    }
    let rule = redirected(pod, lists, to);
    if rule.action() == Action::Pass && is_tproxied(pod, lists, to) {
        return Rule::ProxyToSelfInPlace;
    }
    rule
}

/// The nat table's chain OUTPUT.
#[inline(always)]
fn redirected(pod: &PodConfig, lists: &impl Lists, to: &Outbound) -> Rule {
    if has_port(pod, lists, List::ExcludeOutboundPorts, to.port) {
        return Rule::ExcludedPort;
    }
    if to.local && to.source.is_proxy_passthrough() {
        return Rule::ProxyPassthrough;
    }
    // Conditions are looked at where they count and not before: the verifier walks the loops over ids
    // once for every combination of what is known by then.
    let pass_local = to.local && !pod.has(FLAG_LOOPBACK_INCLUDED) && passes_local(pod, to);
    let by_owner = if pod.has(FLAG_PROXY_CONTAINER) {
        by_container(pod, to, pass_local)
    } else {
        by_ids(pod, to, pass_local)
    };
    if let Some(rule) = by_owner {
        return rule;
    }
    if owner_group_left_out(pod, to.owner) {
        return Rule::OwnerGroup;
    }
    if is_query(pod, to)
        && (pod.has(FLAG_DNS_ALL) || has_address(pod, lists, List::DnsServers, &to.destination))
    {
        return Rule::Dns;
    }
    if pod.in_loopback_cidr(&to.destination) {
        return Rule::Loopback;
    }
    if has_address(pod, lists, List::ExcludeOutboundCidrs, &to.destination) {
        return Rule::ExcludedCidr;
    }
    if to.protocol != Protocol::Tcp {
        return Rule::NotIncluded;
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

/// Does the mangle table give a connection of the pod to itself to TPROXY? It sees such packets twice,
/// in OUTPUT, where the proxy's get their mark, and in PREROUTING.
#[inline(always)]
fn is_tproxied(pod: &PodConfig, lists: &impl Lists, to: &Outbound) -> bool {
    if !pod.has(FLAG_TPROXY)
        || to.protocol != Protocol::Tcp
        || !to.local
        || to.mark == pod.tproxy_mark
        || pod.tproxy_mark == SELF_MARK
        || to.source.is_proxy_passthrough()
        || pod.in_loopback_cidr(&to.destination)
    {
        return false;
    }
    let marked = to.mark == SELF_MARK || is_proxy(pod, to.owner, to.in_proxy_container);
    marked && inbound_port(pod, lists, to.port) == Rule::InboundCaptured
}

/// Decides about a connection that comes from outside of the pod.
#[inline(always)]
pub fn inbound(pod: &PodConfig, lists: &impl Lists, from: &Inbound) -> Rule {
    if !from.destination.is_v4() && !pod.has(FLAG_IPV6) {
        return Rule::InboundIpv6Off;
    }
    if pod.excludes_interface(from.interface) {
        return Rule::InboundInterfaceExcluded;
    }
    if !pod.has(FLAG_INBOUND_ALL) && !pod.lists_any(List::IncludeInboundPorts) {
        return Rule::InboundOff;
    }
    if pod.has(FLAG_TPROXY) {
        let rule = inbound_port(pod, lists, from.port);
        if rule == Rule::InboundCaptured && pod.in_loopback_cidr(&from.destination) {
            return Rule::InboundLoopback;
        }
        return rule;
    }
    if from.port == pod.tunnel_port {
        return Rule::TunnelPort;
    }
    inbound_port(pod, lists, from.port)
}

/// `-b` and `-d`.
#[inline(always)]
fn inbound_port(pod: &PodConfig, lists: &impl Lists, port: u16) -> Rule {
    if pod.has(FLAG_INBOUND_ALL) {
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

/// Does any rule take it for the proxy's?
#[inline(always)]
pub fn is_proxy(pod: &PodConfig, owner: Option<Owner>, in_proxy_container: bool) -> bool {
    if pod.has(FLAG_PROXY_CONTAINER) {
        return in_proxy_container;
    }
    owner.is_some_and(|owner| {
        has_id(&pod.proxy_uids, pod.proxy_uid_count, owner.uid)
            || has_id(&pod.proxy_gids, pod.proxy_gid_count, owner.gid)
    })
}

#[inline(always)]
fn has_id(ids: &[IdRange; MAX_PROXY_IDS], count: u32, id: u32) -> bool {
    for (index, range) in ids.iter().enumerate() {
        if index as u32 >= count {
            break;
        }
        if range.contains(id) {
            return true;
        }
    }
    false
}

/// A DNS query, where these are captured.
#[inline(always)]
fn is_query(pod: &PodConfig, to: &Outbound) -> bool {
    to.port == DNS_PORT && pod.has(FLAG_DNS)
}

/// Pod-local traffic of others than the proxy passes. With DNS capture, UDP and port 53 are left to
/// the rules that follow.
#[inline(always)]
fn passes_local(pod: &PodConfig, to: &Outbound) -> bool {
    !pod.has(FLAG_DNS) || to.protocol == Protocol::Tcp && to.port != DNS_PORT
}

/// The proxy dials: its own pod, or out.
#[inline(always)]
fn by_proxy(pod: &PodConfig, to: &Outbound) -> Rule {
    let to_self = to.local
        && to.protocol == Protocol::Tcp
        && to.port != pod.tunnel_port
        && !pod.in_loopback_cidr(&to.destination);
    if to_self {
        Rule::ProxyToSelf
    } else {
        Rule::Proxy
    }
}

/// The rules about the proxy, where its container tells it: those for one user, whatever the ids.
///
/// Calls of 127.0.0.6 and `::6` go the way that the proxy's go, whoever makes them: Istio tests by one, in a
/// container of its own and before there is a proxy, whether the pod is captured.
///
/// With TPROXY the proxy's calls to its own pod are left to the mangle table: Istio runs the proxy as root
/// then, whom the rules for its user do not match.
#[inline(always)]
fn by_container(pod: &PodConfig, to: &Outbound, pass_local: bool) -> Option<Rule> {
    if !to.in_proxy_container {
        let is_probe = to.destination.is_proxy_passthrough() && !is_query(pod, to);
        return match by_proxy(pod, to) {
            Rule::ProxyToSelf if is_probe => Some(Rule::ProxyToSelf),
            _ => pass_local.then_some(Rule::PodLocal),
        };
    }
    if is_query(pod, to) || pod.has(FLAG_TPROXY) {
        return Some(Rule::Proxy);
    }
    Some(by_proxy(pod, to))
}

/// The rules about the proxy's users, then those about its groups.
#[inline(always)]
fn by_ids(pod: &PodConfig, to: &Outbound, pass_local: bool) -> Option<Rule> {
    let owner = to.owner;
    let (uids, count) = (&pod.proxy_uids, pod.proxy_uid_count);
    match by_proxy_id(uids, count, owner.map(|o| o.uid), pass_local) {
        // The rules for groups make no such exception.
        Some(Match::Proxy) if is_query(pod, to) => return Some(Rule::Proxy),
        Some(Match::Proxy) => return Some(by_proxy(pod, to)),
        Some(Match::Other) => return Some(Rule::PodLocal),
        None => {}
    }
    let (gids, count) = (&pod.proxy_gids, pod.proxy_gid_count);
    match by_proxy_id(gids, count, owner.map(|o| o.gid), pass_local) {
        Some(Match::Proxy) => Some(by_proxy(pod, to)),
        Some(Match::Other) => Some(Rule::PodLocal),
        None => None,
    }
}

/// Which of the rules for a proxy id matches.
enum Match {
    /// One about the proxy.
    Proxy,
    /// The one about everybody else in the pod.
    Other,
}

/// The rules that istio-iptables writes for each proxy id, in turn.
#[inline(always)]
fn by_proxy_id(
    ids: &[IdRange; MAX_PROXY_IDS],
    count: u32,
    id: Option<u32>,
    pass_local: bool,
) -> Option<Match> {
    for (index, range) in ids.iter().enumerate() {
        if index as u32 >= count {
            break;
        }
        let matches = match id {
            Some(id) => range.contains(id),
            None => false,
        };
        if matches {
            return Some(Match::Proxy);
        }
        if pass_local {
            return Some(Match::Other);
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
