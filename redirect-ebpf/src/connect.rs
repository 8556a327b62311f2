//! connect(): decides, and sends captured connections to a steered port on their own source address.
//!
//! The connection then leaves through `lo`, with the source address that the real destination would
//! have given it, and reaches the proxy through `sk_lookup`. No listener has to be bound where it
//! goes, both families work alike, and ephemeral ports do not run out at one destination.

use redirect_common::address::Address;
use redirect_common::connection::{
    Original, ROLE_CLIENT, ROLE_CLIENT_DIRECT, STEERED_PORT_FIRST, STEERED_PORTS, SocketState,
    is_steered_port,
};
use redirect_common::decide::{self, Outbound};
use redirect_common::pod::FLAG_TPROXY;
use redirect_common::route::ROUTE_LOCAL;
use redirect_common::verdict::{Action, Rule};

use crate::ctx::{Sock, SockAddr, random};
use crate::destinations;
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
    let routed = route.map_or(0, |route| route.interface);
    let bound_interface = sock.bound_interface();
    let connection = Outbound {
        source,
        destination,
        port: ctx.port(),
        local,
        // What goes to the pod itself leaves through `lo`, whatever the socket is bound to.
        interface: if local || bound_interface == 0 {
            routed
        } else {
            bound_interface
        },
        mark: sock.mark(),
        owner: owner::of(sock),
    };
    let lists = PolicyLists { policy: pod.policy };
    let rule = decide::outbound(pod, &lists, &connection);
    let proxy_port = match rule.action() {
        Action::Pass => {
            maps::count(netns_cookie, rule);
            log::decided_outbound(netns_cookie, rule, &connection, 0);
            // A foreign source makes it look like one from outside.
            let like_inbound = pod.has(FLAG_TPROXY)
                && local
                && !bound.is_unspecified()
                && !maps::is_local(netns_cookie, &bound);
            return if like_inbound {
                in_place(ctx, sock, &connection, 0)
            } else {
                pass(ctx, sock, &connection)
            };
        }
        Action::CaptureInPlace => {
            maps::count(netns_cookie, rule);
            log::decided_outbound(netns_cookie, rule, &connection, pod.inbound_port);
            return in_place(ctx, sock, &connection, pod.inbound_port);
        }
        Action::CaptureOutbound => pod.outbound_port,
        Action::CaptureInbound => pod.inbound_port,
    };
    if route.is_none() {
        // Passing it would let it out if a route has come since; the kernel would say the same.
        maps::count(netns_cookie, Rule::NoRoute);
        log::decided_outbound(netns_cookie, Rule::NoRoute, &connection, 0);
        log::no_route(netns_cookie, &destination, connection.port);
        ctx.set_error(ENETUNREACH);
        return REFUSE;
    }
    maps::count(netns_cookie, rule);
    log::decided_outbound(netns_cookie, rule, &connection, proxy_port);
    // A socket bound to an address that is not the pod's (IP_FREEBIND) cannot be reached there.
    let steered = if bound.is_unspecified() || maps::is_local(netns_cookie, &bound) {
        source
    } else {
        destination.loopback_of_family()
    };
    let original = Original {
        destination,
        port: connection.port,
        proxy_port,
        in_place: 0,
    };
    let Some(port) = steered_port(netns_cookie, sock, &original) else {
        log::socket_storage_refused(netns_cookie, &destination, connection.port);
        ctx.set_error(ENOMEM);
        return REFUSE;
    };
    ctx.set_address(&steered);
    ctx.set_port(port);
    ALLOW
}

/// Lets the connection go where it is meant to. One to a steered port of the pod itself has to be
/// remembered: it looks like a captured one otherwise.
#[inline(always)]
fn pass(ctx: &SockAddr, sock: Sock, connection: &Outbound) -> i32 {
    if connection.local && is_steered_port(connection.port) {
        return remember_direct(ctx, sock, connection, 0, 0);
    }
    forget(sock);
    ALLOW
}

/// Lets the connection go to the pod's own address that it is meant for. Only its flow tells
/// `sk_lookup` what to do with it: to give it to the proxy, or with `proxy_port` 0 to let it alone.
#[inline(always)]
fn in_place(ctx: &SockAddr, sock: Sock, connection: &Outbound, proxy_port: u16) -> i32 {
    remember_direct(ctx, sock, connection, proxy_port, 1)
}

#[inline(always)]
fn remember_direct(
    ctx: &SockAddr,
    sock: Sock,
    connection: &Outbound,
    proxy_port: u16,
    in_place: u32,
) -> i32 {
    let original = Original {
        destination: connection.destination,
        port: connection.port,
        proxy_port,
        in_place,
    };
    if remember(sock, original, ROLE_CLIENT_DIRECT) {
        ALLOW
    } else {
        ctx.set_error(ENOMEM);
        REFUSE
    }
}

/// The port that the connection is sent to: the one that stands for its destination, or a random
/// one if there is none, with the destination in the socket's memory. None if memory runs out.
#[inline(always)]
fn steered_port(netns_cookie: u64, sock: Sock, original: &Original) -> Option<u16> {
    let source_port = sock.source_port();
    if let Some(port) = destinations::port_of(netns_cookie, original, source_port) {
        forget(sock);
        return Some(port);
    }
    if !remember(sock, *original, ROLE_CLIENT) {
        return None;
    }
    let port = STEERED_PORT_FIRST + (random() % u32::from(STEERED_PORTS)) as u16;
    // Not the socket's own: it would connect to itself.
    Some(if port != source_port {
        port
    } else if port == STEERED_PORT_FIRST {
        port + 1
    } else {
        port - 1
    })
}

#[inline(always)]
fn remember(sock: Sock, original: Original, role: u32) -> bool {
    sock.set_state(&SocketState {
        original,
        role,
        watching: 0,
    })
}

/// Forgets what the socket's connection before this one was.
#[inline(always)]
fn forget(sock: Sock) {
    if sock.state().is_some() {
        sock.forget();
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
