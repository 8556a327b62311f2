//! Sockets, and what is remembered about them.

use core::ptr;

use aya_ebpf::bindings::bpf_map_type::BPF_MAP_TYPE_SK_STORAGE;
use aya_ebpf::bindings::{BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_sock};
use aya_ebpf::helpers::generated as helpers;
use redirect_common::address::Address;
use redirect_common::connection::SocketState;

use super::{by_family, read_kernel_or_zero};
use crate::maps::SOCKETS;

const BPF_SK_STORAGE_GET_F_CREATE: u64 = 1;

/// Storage in sockets that accepted sockets inherit from their listener: aya-ebpf's `SkStorage` with
/// one flag more. The loader reads the numbers from the types (BTF).
#[repr(C)]
pub struct InheritedSkStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: nothing is read through the pointers; the loader puts the map in this place.
unsafe impl<T: Sync> Sync for InheritedSkStorage<T> {}

impl<T> InheritedSkStorage<T> {
    pub const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }
}

/// A socket, as the verifier knows it.
#[derive(Clone, Copy)]
pub struct Sock(*mut bpf_sock);

impl Sock {
    #[inline(always)]
    pub(super) fn new(pointer: *mut bpf_sock) -> Option<Self> {
        (!pointer.is_null()).then_some(Self(pointer))
    }

    #[inline(always)]
    pub fn family(self) -> u32 {
        read!(self.0, family)
    }

    #[inline(always)]
    pub fn protocol(self) -> u32 {
        read!(self.0, protocol)
    }

    #[inline(always)]
    pub fn source(self) -> Address {
        by_family(
            self.family(),
            read!(self.0, src_ip4),
            read_words!(self.0, src_ip6),
        )
    }

    /// The source of an IPv4 connection, whatever the socket's family. An IPv6 socket bound to an
    /// IPv6 address has 127.0.0.6 here (`LOOPBACK4_IPV6`, `__inet6_bind`).
    #[inline(always)]
    pub fn source_v4(self) -> Address {
        Address::from_v4_be(read!(self.0, src_ip4))
    }

    /// Host order.
    #[inline(always)]
    pub fn source_port(self) -> u16 {
        read!(self.0, src_port) as u16
    }

    #[inline(always)]
    pub fn destination(self) -> Address {
        by_family(
            self.family(),
            read!(self.0, dst_ip4),
            read_words!(self.0, dst_ip6),
        )
    }

    /// Host order; 0 if not connected.
    #[inline(always)]
    pub fn destination_port(self) -> u16 {
        u16::from_be(read!(self.0, dst_port))
    }

    /// `SO_MARK`.
    #[inline(always)]
    pub fn mark(self) -> u32 {
        read!(self.0, mark)
    }

    /// Index of the interface it is bound to (`SO_BINDTODEVICE`); 0 if it is not.
    #[inline(always)]
    pub fn bound_interface(self) -> u32 {
        read!(self.0, bound_dev_if)
    }

    /// Address in kernel memory, as a number: the verifier allows no arithmetic on the pointer.
    #[inline(always)]
    pub fn address(self) -> u64 {
        let pointer = self.0;
        read_kernel_or_zero(&raw const pointer as u64).0
    }

    #[inline(always)]
    fn storage(self, initial: *const SocketState, flags: u64) -> *mut SocketState {
        // SAFETY: the map holds `SocketState`; the verifier checks the socket.
        unsafe {
            helpers::bpf_sk_storage_get(
                (&raw const SOCKETS).cast_mut().cast(),
                self.0.cast(),
                initial.cast_mut().cast(),
                flags,
            )
        }
        .cast()
    }

    /// What was remembered about the socket.
    #[inline(always)]
    pub fn state(self) -> Option<&'static mut SocketState> {
        // SAFETY: null or a value that lives until the program ends; the socket is locked.
        unsafe { self.storage(ptr::null(), 0).as_mut() }
    }

    /// Remembers `state`, in place of what was known before. False if memory ran out.
    #[inline(always)]
    pub fn set_state(self, state: &SocketState) -> bool {
        let value = self.storage(state, BPF_SK_STORAGE_GET_F_CREATE);
        // SAFETY: null or a value that lives until the program ends.
        match unsafe { value.as_mut() } {
            Some(value) => {
                *value = *state;
                true
            }
            None => false,
        }
    }

    /// Forgets the socket; costs a look-up where nothing is known.
    #[inline(always)]
    pub fn forget(self) {
        // SAFETY: as for `storage`; an error means that there was nothing.
        let _ = unsafe {
            helpers::bpf_sk_storage_delete((&raw const SOCKETS).cast_mut().cast(), self.0.cast())
        };
    }
}
