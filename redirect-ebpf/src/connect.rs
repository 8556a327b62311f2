//! connect(): decides, and sends captured connections to a steered port on their own source address.
//!
//! The connection then leaves through `lo`, with the source address that the real destination would
//! have given it, and reaches the proxy through `sk_lookup`. No listener has to be bound where it
//! goes, both families work alike, and ephemeral ports do not run out at one destination.

use redirect_common::connection::{
    Original, ROLE_CLIENT, ROLE_CLIENT_DIRECT, STEERED_PORT_FIRST, STEERED_PORTS, SocketState,
    is_steered_port,
};
use redirect_common::decide::{Outbound, Protocol};

use crate::ctx::{Sock, SockAddr, random};
use crate::destinations;
use crate::log;
use crate::maps;
use crate::outbound::{self, Verdict};

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
    let (connection, verdict) =
        outbound::judge(ctx, netns_cookie, pod, sock, Protocol::Tcp, &bound);
    let proxy_port = match verdict {
        Verdict::Pass => return pass(ctx, sock, &connection),
        Verdict::NoRoute => {
            ctx.set_error(ENETUNREACH);
            return REFUSE;
        }
        Verdict::Capture(proxy_port) => proxy_port,
    };
    let destination = connection.destination;
    let original = Original {
        destination,
        port: connection.port,
        proxy_port,
        _pad: 0,
    };
    // A socket bound to an address that is not the pod's (IP_FREEBIND) cannot be reached there.
    let steered = if bound.is_unspecified() || maps::is_local(netns_cookie, &bound) {
        connection.source
    } else {
        destination.loopback_of_family()
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
        let original = Original {
            destination: connection.destination,
            port: connection.port,
            proxy_port: 0,
            _pad: 0,
        };
        if !remember(sock, original, ROLE_CLIENT_DIRECT) {
            ctx.set_error(ENOMEM);
            return REFUSE;
        }
    } else {
        forget(sock);
    }
    ALLOW
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
