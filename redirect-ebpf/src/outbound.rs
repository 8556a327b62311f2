//! Judging what is about to leave the pod: a connection, or a datagram.

use redirect_common::address::Address;
use redirect_common::decide::{self, Outbound, Protocol};
use redirect_common::dns::DNS_AGENT_PORT;
use redirect_common::pod::PodConfig;
use redirect_common::route::ROUTE_LOCAL;
use redirect_common::verdict::{Action, Rule};

use crate::ctx::{Sock, SockAddr};
use crate::log;
use crate::maps::{self, PolicyLists};
use crate::owner;

/// What is to happen to it.
pub enum Verdict {
    Pass,
    /// To the listener on this port, host order.
    Capture(u16),
    /// It is to be captured, but the pod has no route there.
    NoRoute,
}

/// Decides, counts and tells. `bound` is the source address that is wanted, or unspecified.
#[inline(always)]
pub fn judge(
    ctx: &SockAddr,
    netns_cookie: u64,
    pod: &PodConfig,
    sock: Sock,
    protocol: Protocol,
    bound: &Address,
) -> (Outbound, Verdict) {
    let destination = meant(ctx.address(), bound);
    let route = maps::route(netns_cookie, &destination);
    let connection = Outbound {
        protocol,
        source: if bound.is_unspecified() {
            route.map_or(Address::UNSPECIFIED, |route| route.source)
        } else {
            *bound
        },
        destination,
        port: ctx.port(),
        local: destination.is_loopback()
            || route.is_some_and(|route| route.flags & ROUTE_LOCAL != 0),
        owner: owner::of(sock),
    };
    let lists = PolicyLists { policy: pod.policy };
    let rule = decide::outbound(pod, &lists, &connection);
    let proxy_port = match rule.action() {
        Action::Pass => {
            maps::count(netns_cookie, rule);
            log::decided_outbound(netns_cookie, rule, &connection, 0);
            return (connection, Verdict::Pass);
        }
        Action::CaptureOutbound => pod.outbound_port,
        Action::CaptureInbound => pod.inbound_port,
        Action::CaptureDns => DNS_AGENT_PORT,
    };
    if route.is_none() {
        // Passing it would let it out if a route has come since; the kernel would say the same.
        maps::count(netns_cookie, Rule::NoRoute);
        log::decided_outbound(netns_cookie, Rule::NoRoute, &connection, 0);
        log::no_route(netns_cookie, &destination, connection.port);
        return (connection, Verdict::NoRoute);
    }
    maps::count(netns_cookie, rule);
    log::decided_outbound(netns_cookie, rule, &connection, proxy_port);
    (connection, Verdict::Capture(proxy_port))
}

/// The unspecified address as a destination means this host (`ip_route_output_key_hash`,
/// `tcp_v6_connect`).
#[inline(always)]
fn meant(destination: Address, bound: &Address) -> Address {
    if !destination.is_unspecified() {
        destination
    } else if destination.is_v4() && bound.is_v4() && !bound.is_unspecified() {
        *bound
    } else {
        destination.loopback_of_family()
    }
}
