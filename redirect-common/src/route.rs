//! What the pod's routing tables say, as far as the programs need it: `bpf_fib_lookup` is not
//! offered to programs attached to `connect`.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// Bits of [`RouteKey`] in front of the address: the cookie.
pub const ROUTE_PREFIX_BITS: u32 = 64;

/// Data part of a key of `ROUTES` (the map's key has a 32-bit prefix length in front).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct RouteKey {
    /// Network namespace cookie as two words: keeps the key 4-byte aligned, as the map packs it.
    pub netns_cookie: [u32; 2],
    /// Destination.
    pub address: Address,
}

crate::assert_size!(RouteKey, 24);

impl RouteKey {
    /// Key of a destination in a network namespace.
    #[inline(always)]
    pub fn new(netns_cookie: u64, address: Address) -> Self {
        Self {
            netns_cookie: [netns_cookie as u32, (netns_cookie >> 32) as u32],
            address,
        }
    }
}

/// The destination is one of the namespace's own addresses: traffic to it leaves through `lo`.
pub const ROUTE_LOCAL: u32 = 1;

/// A hole in a wider route: nothing can be reached there.
pub const ROUTE_UNREACHABLE: u32 = 2;

/// A connection to `source` itself would get another source address: a secondary one is left for
/// the primary. A socket has to be bound to it.
pub const ROUTE_BIND_SOURCE: u32 = 4;

/// Of a hole: broadcast or multicast addresses, which packets can be sent to.
pub const ROUTE_NOT_UNICAST: u32 = 8;

/// Value of `ROUTES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct RouteInfo {
    /// The source address the kernel chooses for such destinations.
    pub source: Address,
    /// `ROUTE_` bits.
    pub flags: u32,
    /// Index of the interface it leaves by; of a hole, the errno that connect() fails with.
    pub interface: u32,
}

crate::assert_size!(RouteInfo, 24);

impl RouteInfo {
    /// A hole: connect() fails with this errno.
    pub const fn hole(errno: u32, unicast: bool) -> Self {
        let not_unicast = if unicast { 0 } else { ROUTE_NOT_UNICAST };
        Self {
            source: Address::UNSPECIFIED,
            flags: ROUTE_UNREACHABLE | not_unicast,
            interface: errno,
        }
    }

    /// The errno of a hole.
    #[inline(always)]
    pub const fn errno(&self) -> Option<u32> {
        if self.flags & ROUTE_UNREACHABLE != 0 {
            Some(self.interface)
        } else {
            None
        }
    }
}
