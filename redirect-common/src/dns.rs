//! How a captured DNS query over UDP finds its way back: by the address that it seems to come from.
//!
//! A query goes to the agent on loopback. One from a socket that is not connected gets a *slot
//! address* as its source. It stands for the server asked and for the client's own address, and
//! comes back as the destination of the agent's answer: so no packet has to be followed, answers may
//! come in any order, and one socket may ask many servers at once.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// The port of DNS servers, host order.
pub const DNS_PORT: u16 = 53;
/// The port that Istio's agent answers DNS queries on, host order: it binds 127.0.0.1 and `::1`. It
/// cannot be chosen.
pub const DNS_AGENT_PORT: u16 = 15_053;

/// How many slots a pod has. Few: no pod may fill a map that all pods share.
pub const DNS_SLOTS_PER_POD: u32 = 4096;
/// How many slots are tried for a server and a client address.
pub const DNS_SLOT_TRIES: u32 = 8;

/// 127.128.0.0: on loopback, and far from the addresses that people choose there.
const SLOTS_V4: u32 = 0x7f80_0000;
/// The first word of 100::/64, the prefix for traffic to be discarded (RFC 6666).
const SLOTS_V6: u32 = 0x0100_0000;

/// What a slot address stands for. Never changes while the pod is attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct DnsSlot {
    /// The server asked, on [`DNS_PORT`].
    pub server: Address,
    /// Where the client's socket takes answers: what it is bound to, else loopback.
    pub client: Address,
}

crate::assert_size!(DnsSlot, 32);

/// Key of `DNS_SLOTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct DnsSlotKey {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// `0..DNS_SLOTS_PER_POD`.
    pub slot: u32,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(DnsSlotKey, 16);

impl DnsSlotKey {
    /// Key of a slot.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, slot: u32) -> Self {
        Self {
            netns_cookie,
            slot,
            _pad: 0,
        }
    }
}

impl DnsSlot {
    /// The slot to use if those of the tries before are taken. `attempt` counts from 0.
    #[inline(always)]
    pub const fn number(&self, attempt: u32) -> u32 {
        // Odd constants of the golden ratio and of MurmurHash.
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        const MURMUR: u64 = 0xff51_afd7_ed55_8ccd;
        let mixed = fold(&self.server).wrapping_mul(GOLDEN) ^ fold(&self.client);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(MURMUR);
        ((mixed >> 33) as u32).wrapping_add(attempt * 977) % DNS_SLOTS_PER_POD
    }

    /// The slot's address, of the server's family.
    #[inline(always)]
    pub const fn address(&self, slot: u32) -> Address {
        if self.server.is_v4() {
            Address::from_v4_be((SLOTS_V4 + slot).to_be())
        } else {
            Address::from_words_be([SLOTS_V6.to_be(), 0, 0, slot.to_be()])
        }
    }
}

#[inline(always)]
const fn fold(address: &Address) -> u64 {
    let words = address.words_be;
    let high = (words[0] as u64) << 32 | words[1] as u64;
    let low = (words[2] as u64) << 32 | words[3] as u64;
    high.rotate_left(29) ^ low
}

/// The slot that an address could be one of.
#[inline(always)]
pub const fn slot_of(address: &Address) -> Option<u32> {
    let words = address.words_be;
    let slot = if address.is_v4() {
        u32::from_be(words[3]).wrapping_sub(SLOTS_V4)
    } else if words[0] == SLOTS_V6.to_be() && words[1] == 0 && words[2] == 0 {
        u32::from_be(words[3])
    } else {
        return None;
    };
    if slot < DNS_SLOTS_PER_POD {
        Some(slot)
    } else {
        None
    }
}
