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

/// Bumped whenever a map's key, value or meaning changes; part of the pin directory's name, so
/// that programs never meet maps of another layout.
pub const LAYOUT_VERSION: u32 = 2;

/// Asserts a map type's size at compile time: the kernel and the verifier count in bytes.
macro_rules! assert_size {
    ($type:ty, $bytes:literal) => {
        const _: () = assert!(core::mem::size_of::<$type>() == $bytes);
    };
}
pub(crate) use assert_size;
