//! Where the proxy's listening sockets are kept.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// How many listeners of each family are remembered per port. A port has several when the proxy uses
/// `SO_REUSEPORT`; the kernel spreads connections over the whole reuseport group whichever member is
/// chosen, so any living one is enough.
pub const LISTENER_SLOTS: u16 = 8;

/// The first of the [`LISTENER_SLOTS`] slots of listeners bound to addresses of this family; an
/// IPv4-mapped one is IPv4. Each family has its own, since the listeners of one may not serve the
/// other: a proxy that opens both while those of its former process are still there would push out
/// its own of the other family.
#[inline(always)]
pub const fn first_listener_slot(bound: &Address) -> u16 {
    if bound.is_v4() { 0 } else { LISTENER_SLOTS }
}

/// Key of `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListenerKey {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// The port listened on, host order.
    pub port: u16,
    /// `0..LISTENER_SLOTS` for IPv4, and as many after them for IPv6.
    pub slot: u16,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(ListenerKey, 16);

impl ListenerKey {
    /// Key of one slot of a port in host order.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, port: u16, slot: u16) -> Self {
        Self {
            netns_cookie,
            port,
            slot,
            _pad: 0,
        }
    }
}

/// May a connection for `target` be given to a listener bound to `bound`?
///
/// iptables REDIRECT changes the destination address, and the socket look-up that follows is by
/// address: a wildcard listener is found, or one on that very address. What the pod sent goes to
/// loopback; for what it got, any of its own addresses will do, since which one REDIRECT aims at
/// depends on the interface. An IPv6 socket bound to `::` may serve both families, one bound to
/// `::ffff:0.0.0.0` only IPv4.
#[inline(always)]
pub fn listener_serves(bound: &Address, target: &Address) -> bool {
    bound.is_unspecified() && (!bound.is_v4() || target.is_v4())
        || *bound == *target
        || !target.is_loopback() && !bound.is_loopback() && bound.is_v4() == target.is_v4()
}
