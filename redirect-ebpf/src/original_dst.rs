//! getsockopt(SO_ORIGINAL_DST), at SOL_IP and at SOL_IPV6, without any privilege.

use redirect_common::address::Address;
use redirect_common::connection::{
    ROLE_ACCEPTED_MACHINE, ROLE_ACCEPTED_OUTBOUND, ROLE_CLIENT, ROLE_CLIENT_DIRECT,
};

use crate::ctx::{AF_INET, AF_INET6, SOL_IP, SOL_IPV6, Sock, SockOpt};
use crate::maps;
use crate::part;

/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
const SO_ORIGINAL_DST: i32 = 80;
const ALLOW: i32 = 1;

/// `struct sockaddr_in`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SockaddrIn {
    family: u16,
    port_be: u16,
    address_be: u32,
    zero: [u32; 2],
}

/// `struct sockaddr_in6`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SockaddrIn6 {
    family: u16,
    port_be: u16,
    flow_info: u32,
    address_be: [u32; 4],
    scope_id: u32,
}

#[inline(always)]
pub fn getsockopt(ctx: &SockOpt) -> i32 {
    let level = ctx.level();
    if ctx.name() != SO_ORIGINAL_DST || (level != SOL_IP && level != SOL_IPV6) {
        return ALLOW;
    }
    let netns_cookie = ctx.netns_cookie();
    if let Some((address, port)) = ctx.sock().and_then(|sock| original(sock, netns_cookie)) {
        if level == SOL_IP && address.is_v4() {
            ctx.answer(&SockaddrIn {
                family: AF_INET as u16,
                port_be: port.to_be(),
                address_be: address.v4_be(),
                zero: [0; 2],
            });
        } else if level == SOL_IPV6 && !address.is_v4() {
            ctx.answer(&SockaddrIn6 {
                family: AF_INET6 as u16,
                port_be: port.to_be(),
                flow_info: 0,
                address_be: address.words_be,
                scope_id: 0,
            });
        }
    }
    ALLOW
}

/// Where the connection was meant to go. Like conntrack this knows the answer for every connected
/// socket, captured or not, on both sides.
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
        None if maps::pod(netns_cookie).is_none() => None,
        _ => Some((sock.destination(), sock.destination_port())),
    }
}
