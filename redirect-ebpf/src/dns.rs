//! DNS queries over UDP: they go to the agent, and its answers seem to come from the server asked.
//!
//! A connected socket remembers its server. A datagram from any other gets a slot address as its
//! source (`redirect_common::dns`), so that its answer tells what was asked, whatever else the
//! socket asks. Queries over TCP are captured like every connection.

use redirect_common::address::Address;
use redirect_common::connection::{
    Original, ROLE_DNS_CLIENT, ROLE_DNS_CLIENT_ON_LOOPBACK, SocketState,
};
use redirect_common::decide::Protocol;
use redirect_common::dns::{
    DNS_AGENT_PORT, DNS_PORT, DNS_SLOT_TRIES, DnsSlot, DnsSlotKey, slot_of,
};
use redirect_common::log::Decision;
use redirect_common::pod::FLAG_DNS;
use redirect_common::verdict::Rule;

use crate::ctx::{Sock, SockAddr};
use crate::log;
use crate::maps;
use crate::outbound::{self, Verdict};

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ENOMEM: i32 = 12;

/// connect() of a UDP socket to a server: from then on it talks to the agent.
#[inline(always)]
pub fn connect(ctx: &SockAddr) -> i32 {
    if !ctx.is_udp() || !matches!(ctx.port(), DNS_PORT | DNS_AGENT_PORT) {
        return ALLOW;
    }
    let Some(sock) = ctx.sock() else {
        return ALLOW;
    };
    // It may have been connected to a server before.
    let before = sock.state().map(|state| state.role);
    if before.is_some() {
        sock.forget();
    }
    if ctx.port() != DNS_PORT {
        return ALLOW;
    }
    let bound = sock.source();
    let (query, netns_cookie) = match captured(ctx, sock, &bound) {
        Captured::Yes(query, netns_cookie) => (query, netns_cookie),
        Captured::No => return ALLOW,
        Captured::NoRoute => return REFUSE,
    };
    // A loopback source that the connection before has left is not the application's choice.
    let role = if bound.is_loopback() && before != Some(ROLE_DNS_CLIENT) {
        ROLE_DNS_CLIENT_ON_LOOPBACK
    } else {
        ROLE_DNS_CLIENT
    };
    if !remember(sock, &query.destination, role) {
        log::socket_storage_refused(netns_cookie, &query.destination, DNS_PORT);
        ctx.set_error(ENOMEM);
        return REFUSE;
    }
    if bound.is_unspecified() && !query.source.is_loopback() {
        // Or else the source would be that of loopback. If the socket has a port already, it will be.
        ctx.bind(&query.source);
    }
    to_agent(ctx, &query.destination);
    ALLOW
}

/// A datagram with a destination of its own.
#[inline(always)]
pub fn sendmsg(ctx: &SockAddr) -> i32 {
    if ctx.port() != DNS_PORT && slot_of(&ctx.address()).is_none() {
        return ALLOW;
    }
    let Some(sock) = ctx.sock() else {
        return ALLOW;
    };
    // First: the client's port may be that of DNS.
    if is_answer(ctx, sock) || ctx.port() != DNS_PORT || !ctx.is_udp() {
        return ALLOW;
    }
    query(ctx, sock)
}

/// The same of processes whose own queries are nobody's business.
#[inline(always)]
pub fn sendmsg_of_agent(ctx: &SockAddr) -> i32 {
    if slot_of(&ctx.address()).is_some()
        && let Some(sock) = ctx.sock()
    {
        is_answer(ctx, sock);
    }
    ALLOW
}

/// Is a datagram, or what a socket will send, to go to the agent?
enum Captured {
    /// The query, and the network namespace cookie.
    Yes(Decision, u64),
    No,
    /// The error is set already.
    NoRoute,
}

#[inline(always)]
fn captured(ctx: &SockAddr, sock: Sock, bound: &Address) -> Captured {
    let netns_cookie = ctx.netns_cookie();
    let Some(pod) = maps::pod(netns_cookie) else {
        return Captured::No;
    };
    if !pod.has(FLAG_DNS) {
        return Captured::No;
    }
    let destination = (outbound::meant(ctx.address(), bound), ctx.port());
    let judged = outbound::judge(
        netns_cookie,
        pod,
        (sock, sock.address()),
        Protocol::Udp,
        destination,
        bound,
    );
    match judged.verdict {
        Verdict::Capture(..) => Captured::Yes(judged.about, netns_cookie),
        Verdict::Pass | Verdict::InPlace(_) => Captured::No,
        Verdict::NoRoute(errno) => {
            ctx.set_error(errno);
            Captured::NoRoute
        }
    }
}

#[inline(always)]
fn query(ctx: &SockAddr, sock: Sock) -> i32 {
    let bound = ctx.message_source();
    let (query, netns_cookie) = match captured(ctx, sock, &bound) {
        Captured::Yes(query, netns_cookie) => (query, netns_cookie),
        Captured::No => return ALLOW,
        Captured::NoRoute => return REFUSE,
    };
    let server = query.destination;
    to_agent(ctx, &server);
    // A connected socket takes answers from its peer only.
    if sock.destination_port() != 0 {
        return ALLOW;
    }
    // The kernel refuses a source that is not the pod's, or with IP_TRANSPARENT lets it be. No answer
    // finds back to it.
    if !bound.is_unspecified() && !maps::is_local(netns_cookie, &bound) {
        return ALLOW;
    }
    let slot = DnsSlot {
        server,
        client: if bound.is_unspecified() {
            server.loopback_of_family()
        } else {
            bound
        },
    };
    if let Some(number) = slot_for(netns_cookie, &slot) {
        ctx.set_message_source(&slot.address(number));
        return ALLOW;
    }
    maps::count(netns_cookie, Rule::NoDnsSlot);
    log::no_dns_slot(netns_cookie, &server, DNS_PORT);
    // Right as long as the socket asks one server after the other.
    if !remember(sock, &server, ROLE_DNS_CLIENT) {
        ctx.set_error(ENOMEM);
        return REFUSE;
    }
    ALLOW
}

/// The agent's answer to a query from a slot address goes to the client, and comes from that address.
#[inline(always)]
fn is_answer(ctx: &SockAddr, sock: Sock) -> bool {
    if sock.source_port() != DNS_AGENT_PORT {
        return false;
    }
    let destination = ctx.address();
    let Some(slot) = known_slot(ctx.netns_cookie(), &destination) else {
        return false;
    };
    ctx.set_address(&slot.client);
    ctx.set_message_source(&destination);
    true
}

/// recvmsg() and recvfrom(): whom the datagram comes from.
#[inline(always)]
pub fn recvmsg(ctx: &SockAddr) -> i32 {
    if ctx.port() != DNS_AGENT_PORT {
        return ALLOW;
    }
    let source = ctx.address();
    let server = match known_slot(ctx.netns_cookie(), &source) {
        Some(slot) => Some(slot.server),
        None => remembered(ctx, &source).map(|state| state.original.destination),
    };
    if let Some(server) = server {
        ctx.set_address(&server);
        ctx.set_port(DNS_PORT);
    }
    ALLOW
}

/// To the application, its peer is the server.
#[inline(always)]
pub fn getpeername(ctx: &SockAddr) -> i32 {
    if ctx.port() == DNS_AGENT_PORT
        && let Some(state) = remembered(ctx, &ctx.address())
    {
        ctx.set_address(&state.original.destination);
        ctx.set_port(DNS_PORT);
    }
    ALLOW
}

/// To the application, its own end is the address that it would reach the server from: resolvers
/// compare addresses by it. One that it has chosen itself stays.
#[inline(always)]
pub fn getsockname(ctx: &SockAddr) -> i32 {
    let Some(sock) = ctx.sock() else {
        return ALLOW;
    };
    if sock.destination_port() == DNS_AGENT_PORT
        && let Some(state) = remembered(ctx, &ctx.address())
        && state.role != ROLE_DNS_CLIENT_ON_LOOPBACK
        && !state.original.destination.is_loopback()
        && let Some(route) = maps::route(ctx.netns_cookie(), &state.original.destination)
    {
        ctx.set_address(&route.source);
    }
    ALLOW
}

/// What is known of the server that the socket talks to through the agent, if this address of its connection is on
/// loopback as that of the agent is.
#[inline(always)]
fn remembered(ctx: &SockAddr, address: &Address) -> Option<&'static SocketState> {
    if !address.is_loopback() {
        return None;
    }
    let state = ctx.sock()?.state()?;
    matches!(state.role, ROLE_DNS_CLIENT | ROLE_DNS_CLIENT_ON_LOOPBACK).then_some(state)
}

#[inline(always)]
fn remember(sock: Sock, server: &Address, role: u32) -> bool {
    sock.set_state(&SocketState {
        original: Original {
            destination: *server,
            port: DNS_PORT,
            proxy_port: DNS_AGENT_PORT,
            in_place: 0,
        },
        role,
        _pad: 0,
    })
}

#[inline(always)]
fn to_agent(ctx: &SockAddr, server: &Address) {
    ctx.set_address(&server.loopback_of_family());
    ctx.set_port(DNS_AGENT_PORT);
}

/// What a slot address of this pod stands for.
#[inline(always)]
fn known_slot(netns_cookie: u64, address: &Address) -> Option<&'static DnsSlot> {
    let number = slot_of(address)?;
    maps::dns_slot(&DnsSlotKey::new(netns_cookie, number))
        .filter(|slot| slot.address(number) == *address)
}

/// The slot that stands for this server and this client. None if all that were tried stand for others.
#[inline(always)]
fn slot_for(netns_cookie: u64, wanted: &DnsSlot) -> Option<u32> {
    for attempt in 0..DNS_SLOT_TRIES {
        let number = wanted.number(attempt);
        let key = DnsSlotKey::new(netns_cookie, number);
        let known = match maps::dns_slot(&key) {
            Some(known) => Some(known),
            None if maps::add_dns_slot(&key, wanted) => return Some(number),
            // Another CPU was faster.
            None => maps::dns_slot(&key),
        };
        if known.is_some_and(|known| *known == *wanted) {
            return Some(number);
        }
    }
    None
}
