//! Context of the program that looks for a connection's listener.

use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_sk_lookup;
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::SkLookupContext;
use redirect_common::address::Address;
use redirect_common::listener::ListenerKey;

use super::{IPPROTO_TCP, Sock, by_family};
use crate::globals;
use crate::maps::LISTENERS;

/// Context of an `sk_lookup` program.
pub struct SockLookup {
    pointer: *mut bpf_sk_lookup,
}

impl SockLookup {
    #[inline(always)]
    pub fn new(ctx: SkLookupContext) -> Self {
        Self {
            pointer: ctx.as_ptr().cast(),
        }
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        read!(self.pointer, protocol) == IPPROTO_TCP
    }

    /// Local and remote address.
    #[inline(always)]
    pub fn addresses(&self) -> (Address, Address) {
        let family = read!(self.pointer, family);
        (
            by_family(
                family,
                read!(self.pointer, local_ip4),
                read_words!(self.pointer, local_ip6),
            ),
            by_family(
                family,
                read!(self.pointer, remote_ip4),
                read_words!(self.pointer, remote_ip6),
            ),
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
        u16::from_be(read!(self.pointer, remote_port))
    }

    /// Index of the interface the packet came by; 0 before Linux 5.17, which does not tell.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        if globals::has_ingress_interface() {
            read!(self.pointer, ingress_ifindex)
        } else {
            0
        }
    }

    /// Gives the packet to the listener under `key` if it accepts `serves` (asked with the address
    /// the listener is bound to) and the kernel finds it fit. True if it did.
    #[inline(always)]
    pub fn assign(&self, key: &ListenerKey, serves: impl Fn(&Address) -> bool) -> bool {
        // SAFETY: the map's key is `ListenerKey`. The socket found is released on every path, as
        // the verifier demands.
        unsafe {
            let sk = helpers::bpf_map_lookup_elem(
                (&raw const LISTENERS).cast_mut().cast(),
                ptr::from_ref(key).cast(),
            )
            .cast();
            let Some(sock) = Sock::new(sk) else {
                return false;
            };
            let assigned = serves(&sock.source())
                && helpers::bpf_sk_assign(self.pointer.cast(), sk.cast(), 0) == 0;
            let _ = helpers::bpf_sk_release(sk.cast());
            assigned
        }
    }
}
