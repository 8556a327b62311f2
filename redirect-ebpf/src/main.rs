//! The eBPF programs: thin entry points, one per hook.
#![no_std]
#![no_main]

mod connect;
mod ctx;
mod destinations;
mod dns;
mod ephemeral;
mod globals;
mod listeners;
mod log;
mod machines;
mod maps;
mod names;
mod original_dst;
mod outbound;
mod owner;
mod part;
mod segment;
mod sk_lookup;
mod sockaddr;
mod sockops;

use aya_ebpf::macros;
use aya_ebpf::programs::{
    SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext, TcContext,
};

use crate::ctx::{Family, Packet, SockAddr, SockLookup, SockOps, SockOpt};

#[macros::cgroup_sock_addr(connect4)]
fn redirect_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(connect6)]
fn redirect_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(getpeername4)]
fn redirect_getpeername4(ctx: SockAddrContext) -> i32 {
    names::getpeername(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(getpeername6)]
fn redirect_getpeername6(ctx: SockAddrContext) -> i32 {
    names::getpeername(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(getsockname4)]
fn redirect_getsockname4(ctx: SockAddrContext) -> i32 {
    names::getsockname(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(getsockname6)]
fn redirect_getsockname6(ctx: SockAddrContext) -> i32 {
    names::getsockname(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(connect4)]
fn redirect_dns_connect4(ctx: SockAddrContext) -> i32 {
    dns::connect(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(connect6)]
fn redirect_dns_connect6(ctx: SockAddrContext) -> i32 {
    dns::connect(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(sendmsg4)]
fn redirect_sendmsg4(ctx: SockAddrContext) -> i32 {
    dns::sendmsg(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(sendmsg6)]
fn redirect_sendmsg6(ctx: SockAddrContext) -> i32 {
    dns::sendmsg(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(sendmsg4)]
fn redirect_answer4(ctx: SockAddrContext) -> i32 {
    dns::sendmsg_of_agent(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(sendmsg6)]
fn redirect_answer6(ctx: SockAddrContext) -> i32 {
    dns::sendmsg_of_agent(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sock_addr(recvmsg4)]
fn redirect_recvmsg4(ctx: SockAddrContext) -> i32 {
    dns::recvmsg(&SockAddr::new(ctx, Family::V4))
}

#[macros::cgroup_sock_addr(recvmsg6)]
fn redirect_recvmsg6(ctx: SockAddrContext) -> i32 {
    dns::recvmsg(&SockAddr::new(ctx, Family::V6))
}

#[macros::cgroup_sockopt(getsockopt)]
fn redirect_getsockopt(ctx: SockoptContext) -> i32 {
    original_dst::getsockopt(&SockOpt::new(ctx))
}

#[macros::sock_ops]
fn redirect_sockops(ctx: SockOpsContext) -> u32 {
    sockops::sockops(&SockOps::new(ctx))
}

#[macros::sk_lookup]
fn redirect_sk_lookup(ctx: SkLookupContext) -> u32 {
    sk_lookup::sk_lookup(&SockLookup::new(ctx))
}

#[macros::classifier]
fn redirect_machine_ingress(ctx: TcContext) -> i32 {
    machines::ingress(&Packet::new(ctx))
}

#[macros::classifier]
fn redirect_machine_egress(ctx: TcContext) -> i32 {
    machines::egress(&Packet::new(ctx))
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
