//! connect(): decides, and sends captured connections to a steered port on their own source address.
//!
//! The connection then leaves through `lo`, with the source address that the real destination would
//! have given it, and reaches the proxy through `sk_lookup`. No listener has to be bound where it
//! goes, both families work alike, and ephemeral ports do not run out at one destination.

use redirect_common::address::Address;
use redirect_common::connection::{
    Original, ROLE_CLIENT, ROLE_CLIENT_DIRECT, SPARE_PORT_FIRST, SPARE_PORT_TRIES, SPARE_PORTS,
    SocketState, is_steered_port,
};
use redirect_common::decide::Protocol;
use redirect_common::log::Decision;
use redirect_common::pod::FLAG_TPROXY;
use redirect_common::route::{ROUTE_BIND_SOURCE, RouteInfo};

use crate::ctx::{Sock, SockAddr, random};
use crate::destinations;
use crate::ephemeral;
use crate::log;
use crate::maps;
use crate::outbound::{self, Verdict};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const EADDRNOTAVAIL: i32 = 99;
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
    let asked = ctx.address();
    let destination = outbound::meant(asked, &bound_to(sock, &asked));
    let bound = bound_to(sock, &destination);
    if bound.is_v4() && !destination.is_v4() {
        // The kernel refuses it (`ip6_dst_lookup_tail`); to a steered address it would become IPv4.
        forget(sock);
        return ALLOW;
    }
    let address = sock.address();
    let judged = outbound::judge(
        netns_cookie,
        pod,
        (sock, address),
        Protocol::Tcp,
        (destination, ctx.port()),
        &bound,
    );
    let connection = &judged.about;
    let (proxy_port, route) = match judged.verdict {
        Verdict::Pass => {
            // A foreign source makes it look like one from outside.
            let like_inbound = pod.has(FLAG_TPROXY)
                && connection.is_local()
                && !bound.is_unspecified()
                && !maps::is_local(netns_cookie, &bound);
            return if like_inbound {
                in_place(ctx, sock, connection, 0)
            } else {
                pass(ctx, sock, connection)
            };
        }
        Verdict::InPlace(port) => return in_place(ctx, sock, connection, port),
        Verdict::NoRoute(errno) => {
            ctx.set_error(errno);
            return REFUSE;
        }
        Verdict::Capture(port, route) => (port, route),
    };
    let original = Original {
        destination: connection.destination,
        port: connection.port,
        proxy_port,
        in_place: 0,
    };
    let standing = destinations::port_of(netns_cookie, &original, sock.source_port());
    let port = match standing {
        Some(port) => {
            forget(sock);
            port
        }
        None => {
            if !remember(sock, original, ROLE_CLIENT) {
                log::socket_storage_refused(netns_cookie, &connection.destination, connection.port);
                ctx.set_error(ENOMEM);
                return REFUSE;
            }
            random_spare_port()
        }
    };
    let steered = steered_address(
        ctx,
        (sock, address),
        port,
        &bound,
        &connection.source,
        route,
    );
    let port = if standing.is_some() || sock.source_port() == 0 {
        Some(port)
    } else {
        free_spare_port(
            ctx,
            port,
            (&connection.source, sock.source_port()),
            &steered,
        )
    };
    let Some(port) = port else {
        ctx.set_error(EADDRNOTAVAIL);
        return REFUSE;
    };
    ctx.set_address(&steered);
    ctx.set_port(port);
    ALLOW
}

/// The address of the pod that the connection is sent to: its own source address if possible, which
/// the kernel then chooses as the source. An unbound socket is bound where it would not.
#[inline(always)]
fn steered_address(
    ctx: &SockAddr,
    (sock, address): (Sock, u64),
    port: u16,
    bound: &Address,
    source: &Address,
    route: &RouteInfo,
) -> Address {
    let loopback = other_loopback(source);
    // A socket bound to an address that is not the pod's (IP_FREEBIND) cannot be reached there.
    if !bound.is_unspecified() && !maps::is_local(ctx.netns_cookie(), bound) {
        return loopback;
    }
    // The kernel chooses the source port: the steered one would connect the socket to itself.
    // Interfaces other than lo do not lead to loopback.
    let apart = sock.source_port() == 0
        && sock.bound_interface() == 0
        && ephemeral::contains(address, port);
    let bind = bound.is_unspecified() && (apart || route.flags & ROUTE_BIND_SOURCE != 0);
    if apart && (!bind || ctx.bind(source)) {
        return loopback;
    }
    if bind && !apart {
        ctx.bind(source);
    }
    *source
}

/// A loopback address that is not `address`, where the family has one.
#[inline(always)]
fn other_loopback(address: &Address) -> Address {
    let loopback = address.loopback_of_family();
    if *address == loopback && address.is_v4() {
        Address::from_v4_be(0x7f00_0002_u32.to_be())
    } else {
        loopback
    }
}

/// Lets the connection go where it is meant to. One to a steered port of the pod itself has to be
/// remembered: it looks like a captured one otherwise.
#[inline(always)]
fn pass(ctx: &SockAddr, sock: Sock, connection: &Decision) -> i32 {
    if connection.is_local() && is_steered_port(connection.port) {
        return remember_direct(ctx, sock, connection, 0, 0);
    }
    forget(sock);
    ALLOW
}

/// Lets the connection go to the pod's own address that it is meant for. Only its flow tells
/// `sk_lookup` what to do with it: to give it to the proxy, or with `proxy_port` 0 to let it alone.
#[inline(always)]
fn in_place(ctx: &SockAddr, sock: Sock, connection: &Decision, proxy_port: u16) -> i32 {
    remember_direct(ctx, sock, connection, proxy_port, 1)
}

#[inline(always)]
fn remember_direct(
    ctx: &SockAddr,
    sock: Sock,
    connection: &Decision,
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

#[inline(always)]
fn random_spare_port() -> u16 {
    SPARE_PORT_FIRST + (random() % u32::from(SPARE_PORTS)) as u16
}

/// `port` or another spare one, for a socket that is bound to a port. Another socket of the same
/// source may have drawn the same one: connect() would fail.
#[inline(always)]
fn free_spare_port(
    ctx: &SockAddr,
    mut port: u16,
    source: (&Address, u16),
    steered: &Address,
) -> Option<u16> {
    for _ in 0..SPARE_PORT_TRIES {
        // The socket's own would connect it to itself.
        if port != source.1 && !ctx.is_connected(source, (steered, port)) {
            return Some(port);
        }
        port = random_spare_port();
    }
    None
}

#[inline(always)]
fn remember(sock: Sock, original: Original, role: u32) -> bool {
    sock.set_state(&SocketState {
        original,
        role,
        _pad: 0,
    })
}

/// Forgets what the socket's connection before this one was.
#[inline(always)]
fn forget(sock: Sock) {
    if sock.state().is_some() {
        sock.forget();
    }
}

/// The address that the socket is bound to, as a connection to `destination` has it.
#[inline(always)]
fn bound_to(sock: Sock, destination: &Address) -> Address {
    let (any_family, v4) = (sock.source(), sock.source_v4());
    if destination.is_v4() { v4 } else { any_family }
}
