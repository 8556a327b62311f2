//! getsockopt(SO_ORIGINAL_DST), at SOL_IP and at SOL_IPV6, without any privilege.

use redirect_common::address::Address;
use redirect_common::connection::{
    ROLE_ACCEPTED_MACHINE, ROLE_ACCEPTED_OUTBOUND, ROLE_CLIENT, ROLE_CLIENT_DIRECT,
};

use crate::ctx::{IPPROTO_TCP, SOL_IP, SOL_IPV6, Sock, SockOpt};
use crate::maps;
use crate::part;
use crate::sockaddr::{SockaddrIn, SockaddrIn6};

/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
const SO_ORIGINAL_DST: i32 = 80;
const ALLOW: i32 = 1;

#[inline(always)]
pub fn getsockopt(ctx: &SockOpt) -> i32 {
    let level = ctx.level();
    if ctx.name() != SO_ORIGINAL_DST || (level != SOL_IP && level != SOL_IPV6) {
        return ALLOW;
    }
    let netns_cookie = ctx.netns_cookie();
    if let Some((address, port)) = ctx.sock().and_then(|sock| original(sock, netns_cookie)) {
        if level == SOL_IP && address.is_v4() {
            ctx.answer(&SockaddrIn::new(&address, port));
        } else if level == SOL_IPV6 && !address.is_v4() {
            ctx.answer(&SockaddrIn6::new(&address, port));
        }
    }
    ALLOW
}

/// Where the connection was meant to go. Like conntrack this knows the answer for every connected
/// TCP socket, captured or not, on both sides.
#[inline(always)]
fn original(sock: Sock, netns_cookie: u64) -> Option<(Address, u16)> {
    if sock.destination_port() == 0 {
        return None;
    }
    match part::of(sock, netns_cookie) {
        Some(part)
            if part.role == ROLE_CLIENT
                || part.role == ROLE_ACCEPTED_OUTBOUND
                || part.role == ROLE_ACCEPTED_MACHINE =>
        {
            Some((part.original.destination, part.original.port))
        }
        Some(part) if part.role != ROLE_CLIENT_DIRECT => Some((sock.source(), sock.source_port())),
        None if maps::pod(netns_cookie).is_none() || sock.protocol() != IPPROTO_TCP => None,
        _ => Some((sock.destination(), sock.destination_port())),
    }
}
