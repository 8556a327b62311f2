//! connect(): decides, and sends captured connections to a steered port on their own source address.
//!
//! The connection then leaves through `lo`, with the source address that the real destination would
//! have given it, and reaches the proxy through `sk_lookup`. No listener has to be bound where it
//! goes, both families work alike, and ephemeral ports do not run out at one destination.

use redirect_common::address::Address;
use redirect_common::connection::{
    Original, ROLE_CLIENT, STEERED_PORT_FIRST, STEERED_PORTS, SocketState,
};
use redirect_common::decide::{self, Outbound};
use redirect_common::route::ROUTE_LOCAL;
use redirect_common::verdict::{Action, Rule};

use crate::ctx::{Sock, SockAddr, random};
use crate::log;
use crate::maps::{self, PolicyLists};
use crate::owner;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ENETUNREACH: i32 = 101;
const ENOMEM: i32 = 12;

#[inline(always)]
pub fn connect(ctx: &SockAddr) -> i32 {
    if !ctx.is_tcp() {
        return ALLOW;
    }
    let netns_cookie = ctx.netns_cookie();
    let Some(pod) = maps::pod(netns_cookie) else {
        return ALLOW;
    };
    let Some(sock) = ctx.sock() else {
        return ALLOW;
    };
    let bound = sock.source();
    let destination = meant(ctx.address(), &bound);
    let route = maps::route(netns_cookie, &destination);
    let local =
        destination.is_loopback() || route.is_some_and(|route| route.flags & ROUTE_LOCAL != 0);
    let source = if bound.is_unspecified() {
        route.map_or(Address::UNSPECIFIED, |route| route.source)
    } else {
        bound
    };
    let connection = Outbound {
        source,
        destination,
        port: ctx.port(),
        local,
        owner: owner::of(sock),
    };
    let lists = PolicyLists { policy: pod.policy };
    let about = log::outbound(netns_cookie, pod, &connection);
    let rule = match decide::outbound(pod, &lists, &connection) {
        // Passing it would let it out if a route has come since; the kernel would say the same.
        rule if rule.action() != Action::Pass && route.is_none() => Rule::NoRoute,
        rule => rule,
    };
    maps::count(netns_cookie, rule);
    log::decided(&about, rule);
    let proxy_port = match rule.action() {
        Action::Pass if rule == Rule::NoRoute => {
            log::no_route(netns_cookie, &destination, connection.port);
            ctx.set_error(ENETUNREACH);
            return REFUSE;
        }
        Action::Pass => {
            if sock.state().is_some() {
                sock.forget();
            }
            return ALLOW;
        }
        Action::CaptureOutbound => pod.outbound_port,
        Action::CaptureInbound => pod.inbound_port,
    };
    // A socket bound to an address that is not the pod's (IP_FREEBIND) cannot be reached there.
    let steered = if bound.is_unspecified() || maps::is_local(netns_cookie, &bound) {
        source
    } else {
        destination.loopback_of_family()
    };
    capture(ctx, sock, netns_cookie, &connection, &steered, proxy_port)
}

#[inline(always)]
fn capture(
    ctx: &SockAddr,
    sock: Sock,
    netns_cookie: u64,
    connection: &Outbound,
    steered: &Address,
    proxy_port: u16,
) -> i32 {
    let state = SocketState {
        original: Original {
            destination: connection.destination,
            port: connection.port,
            proxy_port,
            _pad: 0,
        },
        role: ROLE_CLIENT,
        watching: 0,
    };
    if !sock.set_state(&state) {
        log::socket_storage_refused(netns_cookie, &connection.destination, connection.port);
        ctx.set_error(ENOMEM);
        return REFUSE;
    }
    ctx.set_address(steered);
    ctx.set_port(steered_port(sock.source_port()));
    ALLOW
}

/// A random steered port, but not the socket's own: it would connect to itself.
#[inline(always)]
fn steered_port(source_port: u16) -> u16 {
    let port = STEERED_PORT_FIRST + (random() % u32::from(STEERED_PORTS)) as u16;
    if port != source_port {
        port
    } else if port == STEERED_PORT_FIRST {
        port + 1
    } else {
        port - 1
    }
}

/// connect() to the unspecified address means this host (`ip_route_output_key_hash`, `tcp_v6_connect`).
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
