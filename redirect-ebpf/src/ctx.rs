//! Safe accessors of the kernel's context structures: the only `unsafe` code of the programs.
//!
//! Every field is read and written with volatile accesses of its own width. LLVM would otherwise
//! merge neighbours into wider accesses, or compute on the pointer first, and the verifier refuses
//! both.

use core::ptr;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::bpf_map_type::BPF_MAP_TYPE_SK_STORAGE;
use aya_ebpf::bindings::{
    BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sk_lookup, bpf_sock,
    bpf_sock_addr, bpf_sock_ops, bpf_sock_tuple, bpf_sockopt,
};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::maps::{HashMap, LruHashMap, PerCpuHashMap};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext, SockoptContext};
use redirect_common::address::Address;
use redirect_common::connection::SocketState;
use redirect_common::listener::ListenerKey;

use crate::maps::{LISTENERS, SOCKETS};
use crate::sockaddr::{SockaddrIn, SockaddrIn6};

/// `SOL_IP`, and `IPPROTO_IP`.
pub const SOL_IP: i32 = 0;
/// `SOL_IPV6`, and `IPPROTO_IPV6`.
pub const SOL_IPV6: i32 = 41;
pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;
pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
pub const IPPROTO_MPTCP: u32 = 262;
const BPF_SK_STORAGE_GET_F_CREATE: u64 = 1;
const TCP_LISTEN: u32 = 10;
/// `BPF_F_CURRENT_NETNS`, which is negative.
const CURRENT_NETNS: u64 = u64::MAX;

/// `struct bpf_sock_tuple` of one family: addresses and ports in network order.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tuple<A> {
    source: A,
    destination: A,
    source_port: u16,
    destination_port: u16,
}

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

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

macro_rules! read {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: the kernel hands a valid context; the verifier checks offset and width.
        unsafe { ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}

macro_rules! write {
    ($pointer:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for `read`; the verifier checks that the field may be written.
        unsafe { ptr::write_volatile(&raw mut (*$pointer).$($field)+, $value) }
    };
}

macro_rules! read_words {
    ($pointer:expr, $($field:tt)+) => {
        Address::from_words_be([
            read!($pointer, $($field)+[0]),
            read!($pointer, $($field)+[1]),
            read!($pointer, $($field)+[2]),
            read!($pointer, $($field)+[3]),
        ])
    };
}

pub mod packet;

/// Takes the address of the family. Both are read before the choice is made: a choice of what to
/// read would become arithmetic on the pointer.
#[inline(always)]
fn by_family(family: u32, v4_be: u32, v6: Address) -> Address {
    if family == AF_INET {
        Address::from_v4_be(v4_be)
    } else {
        v6
    }
}

/// Reads a value that the loader may have replaced after compilation.
#[inline(always)]
pub fn read_global<T: Copy>(global: &T) -> T {
    // SAFETY: a reference is valid to read.
    unsafe { ptr::read_volatile(global) }
}

#[inline(always)]
pub fn map_get<K, V>(map: &'static HashMap<K, V>, key: &K) -> Option<&'static V> {
    // SAFETY: the map is not preallocated, so the kernel frees a replaced value only after all
    // running programs have ended.
    unsafe { map.get(key) }
}

#[inline(always)]
pub fn lru_get<K, V>(map: &'static LruHashMap<K, V>, key: &K) -> Option<&'static V> {
    // SAFETY: an entry is written once and read by the two ends of one handshake; the kernel may
    // give its memory to another connection only after the accepting end removed it.
    unsafe { map.get(key) }
}

#[expect(
    clippy::mut_from_ref,
    reason = "the kernel owns the value; every CPU has its own"
)]
#[inline(always)]
pub fn map_get_mut<K, V>(map: &'static PerCpuHashMap<K, V>, key: &K) -> Option<&'static mut V> {
    let value = map.get_ptr_mut(key)?;
    // SAFETY: the value is this CPU's own; a program that interrupts this one loses a count at most.
    unsafe { value.as_mut() }
}

/// Reads kernel memory: the value and true; where it faults zero, which the helper leaves, and false.
#[inline(always)]
pub fn read_kernel_or_zero<T: Copy + Default>(address: u64) -> (T, bool) {
    let mut value = T::default();
    // SAFETY: the helper writes at most `size_of::<T>()` bytes to `value` and handles bad addresses.
    let failed = unsafe {
        helpers::bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            address as *const _,
        )
    };
    (value, failed == 0)
}

#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments, no preconditions.
    unsafe { helpers::bpf_get_prandom_u32() }
}

/// What a global function got a pointer to: null, for all the verifier knows of its callers.
#[inline(always)]
pub fn argument<T>(pointer: &*const T) -> Option<&T> {
    // SAFETY: the verifier lets only null or readable memory of that size be passed.
    unsafe { pointer.as_ref() }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments, no preconditions.
    unsafe { helpers::bpf_ktime_get_ns() }
}

/// A socket, as the verifier knows it.
#[derive(Clone, Copy)]
pub struct Sock(*mut bpf_sock);

impl Sock {
    #[inline(always)]
    fn new(pointer: *mut bpf_sock) -> Option<Self> {
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

    /// Index of the interface that the socket is bound to; 0 if none.
    #[inline(always)]
    pub fn interface(self) -> u32 {
        read!(self.0, bound_dev_if)
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
        // As a packet of the peer's has it.
        let (mut v4, mut v6);
        let (tuple, length): (*mut bpf_sock_tuple, usize) = if local.0.is_v4() {
            v4 = Tuple {
                source: remote.0.v4_be(),
                destination: local.0.v4_be(),
                source_port: remote.1.to_be(),
                destination_port: local.1.to_be(),
            };
            (ptr::from_mut(&mut v4).cast(), size_of::<Tuple<u32>>())
        } else {
            v6 = Tuple {
                source: remote.0.words_be,
                destination: local.0.words_be,
                source_port: remote.1.to_be(),
                destination_port: local.1.to_be(),
            };
            (ptr::from_mut(&mut v6).cast(), size_of::<Tuple<[u32; 4]>>())
        };
        // SAFETY: `tuple` has `length` bytes.
        let sk = unsafe {
            helpers::bpf_skc_lookup_tcp(self.pointer.cast(), tuple, length as u32, CURRENT_NETNS, 0)
        };
        if sk.is_null() {
            return false;
        }
        let listens = read!(sk, state) == TCP_LISTEN;
        // SAFETY: the socket is the one found above; the verifier demands its release.
        let _ = unsafe { helpers::bpf_sk_release(sk.cast()) };
        !listens
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
        if crate::globals::has_set_retval() {
            // SAFETY: takes a number only.
            let _ = unsafe { helpers::bpf_set_retval(-errno) };
        }
    }
}

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

/// Context of a `getsockopt` program.
pub struct SockOpt {
    pointer: *mut bpf_sockopt,
}

impl SockOpt {
    #[inline(always)]
    pub fn new(ctx: SockoptContext) -> Self {
        Self {
            pointer: ctx.sockopt,
        }
    }

    #[inline(always)]
    pub fn level(&self) -> i32 {
        read!(self.pointer, level)
    }

    #[inline(always)]
    pub fn name(&self) -> i32 {
        read!(self.pointer, optname)
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

    /// Answers the call with `value`. The length stays the caller's, as netfilter leaves it.
    /// Returns false if the caller's buffer is too small.
    #[inline(always)]
    pub fn answer<T: Copy>(&self, value: &T) -> bool {
        let start = read!(self.pointer, __bindgen_anon_2.optval);
        let end = read!(self.pointer, __bindgen_anon_3.optval_end);
        // SAFETY: the verifier checks the comparison that keeps the write inside of the buffer.
        unsafe {
            if start.cast::<u8>().add(size_of::<T>()) > end.cast::<u8>() {
                return false;
            }
            ptr::write_unaligned(start.cast::<T>(), *value);
        }
        // The kernel copies at most a page back and refuses to return more than it copied.
        if read!(self.pointer, optlen) > 4096 {
            write!(self.pointer, size_of::<T>() as i32, optlen);
        }
        write!(self.pointer, 0, retval);
        true
    }
}

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
        if crate::globals::has_ingress_interface() {
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
            .cast::<bpf_sock>();
            if sk.is_null() {
                return false;
            }
            let assigned = serves(&Sock(sk).source())
                && helpers::bpf_sk_assign(self.pointer.cast(), sk.cast(), 0) == 0;
            let _ = helpers::bpf_sk_release(sk.cast());
            assigned
        }
    }
}
