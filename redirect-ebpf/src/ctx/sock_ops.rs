//! Context of the program that follows a connection's life.

use core::ptr;

use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock_ops};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::SockOpsContext;
use redirect_common::address::Address;
use redirect_common::listener::ListenerKey;

use super::{AF_INET, AF_INET6, Sock, by_family};
use crate::maps::LISTENERS;

/// Context of a `sockops` program.
pub struct SockOps {
    pointer: *mut bpf_sock_ops,
}

impl SockOps {
    #[inline(always)]
    pub fn new(ctx: SockOpsContext) -> Self {
        Self { pointer: ctx.ops }
    }

    #[inline(always)]
    pub fn op(&self) -> u32 {
        read!(self.pointer, op)
    }

    #[inline(always)]
    pub fn old_and_new_state(&self) -> (u32, u32) {
        (
            read!(self.pointer, __bindgen_anon_1.args[0]),
            read!(self.pointer, __bindgen_anon_1.args[1]),
        )
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the kernel's.
        unsafe { helpers::bpf_get_netns_cookie(self.pointer.cast()) }
    }

    #[inline(always)]
    pub fn sock(&self) -> Option<Sock> {
        Sock::new(read!(self.pointer, __bindgen_anon_2.sk))
    }

    /// Local and remote address. A socket of an IPv4-mapped connection may have its IPv6 fields
    /// unset while it connects: its IPv4 fields are right.
    #[inline(always)]
    pub fn addresses(&self) -> (Address, Address) {
        let remote6 = read_words!(self.pointer, remote_ip6);
        let family = if read!(self.pointer, family) == AF_INET6 && !remote6.is_v4() {
            AF_INET6
        } else {
            AF_INET
        };
        (
            by_family(
                family,
                read!(self.pointer, local_ip4),
                read_words!(self.pointer, local_ip6),
            ),
            by_family(family, read!(self.pointer, remote_ip4), remote6),
        )
    }

    /// Host order.
    #[inline(always)]
    pub fn local_port(&self) -> u16 {
        read!(self.pointer, local_port) as u16
    }

    /// Host order.
    #[inline(always)]
    pub fn remote_port(&self) -> u16 {
        u32::from_be(read!(self.pointer, remote_port)) as u16
    }

    /// Asks to be called for this socket's state changes.
    #[inline(always)]
    pub fn watch_state(&self) {
        let flags = read!(self.pointer, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
        // SAFETY: the context is the kernel's.
        let _ = unsafe { helpers::bpf_sock_ops_cb_flags_set(self.pointer, flags as i32) };
    }

    /// Puts the socket into `LISTENERS`.
    #[inline(always)]
    pub fn record_listener(&self, key: &mut ListenerKey, flags: u64) -> bool {
        // SAFETY: the map's key is `ListenerKey`; the context is the kernel's.
        let failed = unsafe {
            helpers::bpf_sock_hash_update(
                self.pointer,
                (&raw const LISTENERS).cast_mut().cast(),
                ptr::from_mut(key).cast(),
                flags,
            )
        };
        failed == 0
    }
}
