//! getpeername() and getsockname(): the addresses that iptables REDIRECT would show.

use redirect_common::connection::{
    ROLE_ACCEPTED_INBOUND, ROLE_ACCEPTED_MACHINE, ROLE_ACCEPTED_OUTBOUND, ROLE_CLIENT,
    is_steered_port,
};

use crate::ctx::SockAddr;
use crate::dns;
use crate::part;

const ALLOW: i32 = 1;

/// To the application, its peer is the original destination.
#[inline(always)]
pub fn getpeername(ctx: &SockAddr) -> i32 {
    if ctx.is_udp() {
        return dns::getpeername(ctx);
    }
    // accept() asks for the peer too: what no captured connection goes to costs no look-up.
    if let Some(sock) = ctx.sock()
        && is_steered_port(sock.destination_port())
        && let Some(state) = part::of(sock, ctx.netns_cookie())
        && state.role == ROLE_CLIENT
    {
        ctx.set_address(&state.original.destination);
        ctx.set_port(state.original.port);
    }
    ALLOW
}

/// To the proxy, its own end is its listener: on loopback for what the pod sent, on the pod's
/// address for what the pod got, on the interface's for what a virtual machine behind it sent
/// (`nf_nat_redirect.c`).
#[inline(always)]
pub fn getsockname(ctx: &SockAddr) -> i32 {
    if ctx.is_udp() {
        return dns::getsockname(ctx);
    }
    if let Some(state) = ctx
        .sock()
        .and_then(|sock| part::of(sock, ctx.netns_cookie()))
    {
        if state.role == ROLE_ACCEPTED_OUTBOUND {
            ctx.set_address(&ctx.address().loopback_of_family());
            ctx.set_port(state.original.proxy_port);
        } else if state.role == ROLE_ACCEPTED_INBOUND || state.role == ROLE_ACCEPTED_MACHINE {
            ctx.set_port(state.original.proxy_port);
        }
    }
    ALLOW
}
