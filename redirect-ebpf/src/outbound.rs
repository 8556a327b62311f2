//! Judging what is about to leave the pod: a connection, or a datagram.

use core::hint::black_box;

use redirect_common::address::Address;
use redirect_common::decide::{self, Outbound, Protocol};
use redirect_common::dns::DNS_AGENT_PORT;
use redirect_common::log::Decision;
use redirect_common::pod::PodConfig;
use redirect_common::route::{ROUTE_LOCAL, ROUTE_NOT_UNICAST, ROUTE_UNREACHABLE, RouteInfo};
use redirect_common::verdict::{Action, Rule};

use crate::ctx::{Sock, argument};
use crate::log;
use crate::maps::{self, PolicyLists};
use crate::owner;

const EINVAL: i32 = 22;
const ENETUNREACH: i32 = 101;

/// What is to happen to it.
pub enum Verdict {
    Pass,
    /// To the listener on this port, host order, with its own destination kept.
    InPlace(u16),
    /// To the listener on this port, host order; it would have taken this route.
    Capture(u16, &'static RouteInfo),
    /// It is to be captured, but the kernel would refuse it with this errno.
    NoRoute(i32),
}

/// What was judged, and how. It is there once, as it is told: programs have little stack.
pub struct Judged {
    pub about: Decision,
    pub verdict: Verdict,
}

/// Decides, counts and tells. `address` is where the kernel has the socket; the destination's port is in host order; `bound` is the source address
/// that is wanted, or unspecified.
#[inline(always)]
pub fn judge(
    netns_cookie: u64,
    pod: &PodConfig,
    (sock, address): (Sock, u64),
    protocol: Protocol,
    (destination, port): (Address, u16),
    bound: &Address,
) -> Judged {
    let found = maps::route_or_hole(netns_cookie, &destination);
    let route = found.filter(|route| route.errno().is_none());
    let local =
        destination.is_loopback() || route.is_some_and(|route| route.flags & ROUTE_LOCAL != 0);
    let routed = route.map_or(0, |route| route.interface);
    let bound_interface = sock.bound_interface();
    let owner = owner::of(address);
    let connection = Outbound {
        protocol,
        source: if bound.is_unspecified() {
            route.map_or(Address::UNSPECIFIED, |route| route.source)
        } else {
            *bound
        },
        destination,
        port,
        local,
        // What goes to the pod itself leaves through `lo`, whatever the socket is bound to.
        interface: if local || bound_interface == 0 {
            routed
        } else {
            bound_interface
        },
        mark: sock.mark(),
        in_proxy_container: owner.is_some() && owner::is_in_proxy_container(pod, address),
        owner,
    };
    let about = log::outbound(netns_cookie, pod, &connection);
    let wanted = decide(pod, &about);
    // Passing it would let it out if a route has come since; the kernel would say the same.
    let refused = if wanted.action() == Action::Pass {
        None
    } else {
        error(found, &sock.source(), &destination, local, bound_interface)
    };
    let rule = if refused.is_some() {
        Rule::NoRoute
    } else {
        wanted
    };
    maps::count(netns_cookie, rule);
    log::decided(&about, rule);
    let proxy_port = match wanted.action() {
        Action::Pass => 0,
        Action::CaptureOutbound => pod.outbound_port,
        Action::CaptureInbound | Action::CaptureInPlace => pod.inbound_port,
        Action::CaptureDns => DNS_AGENT_PORT,
    };
    let verdict = match (wanted.action(), route, refused) {
        (Action::Pass, ..) => Verdict::Pass,
        (Action::CaptureInPlace, ..) => Verdict::InPlace(proxy_port),
        (_, Some(route), None) => Verdict::Capture(proxy_port, route),
        (.., errno) => {
            log::no_route(netns_cookie, &about.destination, port);
            Verdict::NoRoute(errno.unwrap_or(EINVAL))
        }
    };
    Judged { about, verdict }
}

/// The unspecified address as a destination means this host (`ip_route_output_key_hash`,
/// `tcp_v6_connect`).
#[inline(always)]
pub fn meant(destination: Address, bound: &Address) -> Address {
    if !destination.is_unspecified() {
        destination
    } else if !destination.is_v4() {
        bound.loopback_of_family()
    } else if bound.is_unspecified() {
        destination.loopback_of_family()
    } else {
        *bound
    }
}

/// The errno that connect() to there fails with.
#[inline(always)]
fn error(
    found: Option<&RouteInfo>,
    bound: &Address,
    destination: &Address,
    local: bool,
    bound_interface: u32,
) -> Option<i32> {
    let Some(found) = found else {
        return Some(ENETUNREACH);
    };
    // Such destinations are taken to be on the interface that has the source address
    // (`ip_route_output_key_hash_rcu`): with a loopback address, on `lo`.
    let by_source = bound_interface == 0 && destination.is_v4_multicast_or_limited_broadcast();
    // A loopback address is no source for a packet that leaves (`__mkroute_output`).
    let leaves = found.flags & (ROUTE_UNREACHABLE | ROUTE_NOT_UNICAST) != ROUTE_UNREACHABLE;
    if leaves && !by_source && !local && bound.is_v4() && bound.is_loopback() {
        return Some(EINVAL);
    }
    found.errno().map(|errno| errno as i32)
}

#[inline(always)]
fn decide(pod: &PodConfig, about: &Decision) -> Rule {
    // Opaque: LLVM knows what the function can answer, the verifier does not.
    let number = black_box(rule_for(pod, about));
    Rule::from_number(number).unwrap_or(Rule::NotIncluded)
}

/// A global function: the verifier walks the rules once, and not again on every path that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rule_for(pod: *const PodConfig, about: *const Decision) -> u32 {
    let (Some(pod), Some(about)) = (argument(&pod), argument(&about)) else {
        return Rule::NotIncluded as u32;
    };
    let lists = PolicyLists(pod);
    decide::outbound(pod, &lists, &about.connection()) as u32
}
