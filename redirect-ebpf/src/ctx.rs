//! Safe accessors of the kernel's context structures and memory: the only `unsafe` code of the
//! programs.
//!
//! Every field is read and written with volatile accesses of its own width. LLVM would otherwise
//! merge neighbours into wider accesses, or compute on the pointer first, and the verifier refuses
//! both.

use redirect_common::address::Address;

/// `SOL_IP`, and `IPPROTO_IP`.
pub const SOL_IP: i32 = 0;
/// `SOL_IPV6`, and `IPPROTO_IPV6`.
pub const SOL_IPV6: i32 = 41;
pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;
pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
pub const IPPROTO_MPTCP: u32 = 262;

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

// After the macros, which they use.
mod connection;
mod kernel;
mod packet;
mod sock;
mod sock_addr;
mod sock_lookup;
mod sock_ops;
mod sockopt;

pub use kernel::{
    argument, lru_get, map_get, map_get_mut, now_ns, random, read_global, read_kernel_or_zero,
};
pub use packet::{End, Packet};
pub use sock::{InheritedSkStorage, Sock};
pub use sock_addr::SockAddr;
pub use sock_lookup::SockLookup;
pub use sock_ops::SockOps;
pub use sockopt::SockOpt;

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
