//! What the eBPF programs, the loader and the tests share: the layout of every map, and the
//! capture decision as pure functions.
//!
//! Addresses are 16 bytes in network order, IPv4 as IPv4-mapped IPv6, so that IPv4, IPv6 and
//! mapped sockets take one path. Ports are in host order.
#![no_std]

pub mod address;
pub mod connection;
pub mod decide;
pub mod dns;
pub mod listener;
pub mod lists;
pub mod log;
pub mod pod;
pub mod record;
pub mod route;
pub mod verdict;
pub mod virtual_machine;

/// Layout of the maps that outlive every upgrade, since established connections rely on them. Bumped
/// whenever key, value or meaning of one changes; part of the pin directory's name. A loader refuses
/// to work beside pods of another one, so prefer padding, or another map.
pub const LAYOUT_VERSION: u32 = 2;

/// Layout of the other maps: an upgrade fills new ones. Bumped whenever key, value or meaning of one
/// changes, so that programs never meet maps of another layout. Two things hold in all of them: the
/// keys of `PODS` and `COUNTS` are cookies, and a rule's counter keeps its place.
pub const POLICY_LAYOUT_VERSION: u32 = if cfg!(feature = "other-layout") { 2 } else { 1 };

/// Asserts a map type's size at compile time: the kernel and the verifier count in bytes.
macro_rules! assert_size {
    ($type:ty, $bytes:literal) => {
        const _: () = assert!(core::mem::size_of::<$type>() == $bytes);
    };
}
pub(crate) use assert_size;
