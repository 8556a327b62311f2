//! Context of the programs that see a socket call's address.

use core::ptr;

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::SockAddrContext;
use redirect_common::address::Address;

use super::connection::has_connection;
use super::{Family, IPPROTO_TCP, IPPROTO_UDP, Sock};
use crate::globals;
use crate::sockaddr::{SockaddrIn, SockaddrIn6};

/// Context of `connect`, `getpeername`, `getsockname`, `sendmsg` and `recvmsg`.
pub struct SockAddr {
    pointer: *mut bpf_sock_addr,
    family: Family,
}

impl SockAddr {
    #[inline(always)]
    pub fn new(ctx: SockAddrContext, family: Family) -> Self {
        Self {
            pointer: ctx.sock_addr,
            family,
        }
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        read!(self.pointer, protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    pub fn is_udp(&self) -> bool {
        read!(self.pointer, protocol) == IPPROTO_UDP
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the kernel's.
        unsafe { helpers::bpf_get_netns_cookie(self.pointer.cast()) }
    }

    #[inline(always)]
    pub fn sock(&self) -> Option<Sock> {
        Sock::new(read!(self.pointer, __bindgen_anon_1.sk))
    }

    #[inline(always)]
    pub fn address(&self) -> Address {
        match self.family {
            Family::V4 => Address::from_v4_be(read!(self.pointer, user_ip4)),
            Family::V6 => read_words!(self.pointer, user_ip6),
        }
    }

    /// Host order.
    #[inline(always)]
    pub fn port(&self) -> u16 {
        u16::from_be(read!(self.pointer, user_port) as u16)
    }

    /// Replaces the address. IPv4 hooks take the IPv4 part.
    #[inline(always)]
    pub fn set_address(&self, address: &Address) {
        match self.family {
            Family::V4 => write!(self.pointer, address.v4_be(), user_ip4),
            Family::V6 => {
                write!(self.pointer, address.words_be[0], user_ip6[0]);
                write!(self.pointer, address.words_be[1], user_ip6[1]);
                write!(self.pointer, address.words_be[2], user_ip6[2]);
                write!(self.pointer, address.words_be[3], user_ip6[3]);
            }
        }
    }

    /// Host order.
    #[inline(always)]
    pub fn set_port(&self, port: u16) {
        write!(self.pointer, u32::from(port.to_be()), user_port);
    }

    /// Binds the socket to an address, but to no port. False if it is bound already. In `connect`
    /// programs only.
    #[inline(always)]
    pub fn bind(&self, address: &Address) -> bool {
        let failed = match self.family {
            Family::V4 => self.bind_to(&SockaddrIn::new(address, 0)),
            Family::V6 => self.bind_to(&SockaddrIn6::new(address, 0)),
        };
        failed == 0
    }

    /// True if there is a connection, of whatever state, from `local` to `remote` in this network
    /// namespace: addresses of one family, and ports in host order.
    #[inline(always)]
    pub fn is_connected(&self, local: (&Address, u16), remote: (&Address, u16)) -> bool {
        has_connection(self.pointer.cast(), remote, local)
    }

    #[inline(always)]
    fn bind_to<T>(&self, address: &T) -> i64 {
        // SAFETY: the context is the kernel's; the helper reads as many bytes as the address has.
        unsafe {
            helpers::bpf_bind(
                self.pointer,
                ptr::from_ref(address).cast_mut().cast(),
                size_of::<T>() as i32,
            )
        }
    }

    /// The source that a datagram is to have: what the socket is bound to or the sender asks for, or
    /// else unspecified. In `sendmsg` programs only.
    #[inline(always)]
    pub fn message_source(&self) -> Address {
        match self.family {
            Family::V4 => Address::from_v4_be(read!(self.pointer, msg_src_ip4)),
            Family::V6 => read_words!(self.pointer, msg_src_ip6),
        }
    }

    /// Replaces the source of a datagram, also on a socket that is bound to another. In `sendmsg`
    /// programs only.
    #[inline(always)]
    pub fn set_message_source(&self, address: &Address) {
        match self.family {
            Family::V4 => write!(self.pointer, address.v4_be(), msg_src_ip4),
            Family::V6 => {
                write!(self.pointer, address.words_be[0], msg_src_ip6[0]);
                write!(self.pointer, address.words_be[1], msg_src_ip6[1]);
                write!(self.pointer, address.words_be[2], msg_src_ip6[2]);
                write!(self.pointer, address.words_be[3], msg_src_ip6[3]);
            }
        }
    }

    /// Makes the system call fail with this error if the program refuses it. Before Linux 5.18 the
    /// error is always EPERM.
    #[inline(always)]
    pub fn set_error(&self, errno: i32) {
        /// Verifiers since 7.2 want to see that it is one: at most 4095 (`MAX_ERRNO`).
        const ERRNO_BITS: i32 = 0xfff;
        if globals::has_set_retval() {
            // SAFETY: takes a number only.
            let _ = unsafe { helpers::bpf_set_retval(-(errno & ERRNO_BITS)) };
        }
    }
}
