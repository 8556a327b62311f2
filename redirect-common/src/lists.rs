//! The membership lists of a policy, all in one longest-prefix-match map.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// Which list of the policy an entry belongs to; named after istio-iptables' flag.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum List {
    /// `-o`: ports never captured on their way out.
    ExcludeOutboundPorts = 0,
    /// `-x`: destinations never captured.
    ExcludeOutboundCidrs = 1,
    /// `-q`: ports captured whatever `-i` says.
    IncludeOutboundPorts = 2,
    /// `-i`: destinations captured.
    IncludeOutboundCidrs = 3,
    /// `-b`: ports captured on their way in.
    IncludeInboundPorts = 4,
    /// `-d`: ports not captured on their way in, if `-b` is `*`.
    ExcludeInboundPorts = 5,
    /// The servers of `--resolv-conf`: queries to them are captured.
    DnsServers = 6,
}

impl List {
    /// The list's bit in [`PodConfig::lists`](crate::pod::PodConfig::lists): an empty list costs no look-up.
    #[inline(always)]
    pub const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// Bits of [`ListKey`] in front of the address: policy and list.
pub const LIST_PREFIX_BITS: u32 = 96;

/// Data part of a key of `LISTS` (the map's key has a 32-bit prefix length in front).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListKey {
    /// [`PodConfig::policy`](crate::pod::PodConfig::policy) as two words: keeps the key 4-byte aligned, as the map packs it.
    pub policy: [u32; 2],
    /// A [`List`].
    pub list: u32,
    /// An address, or a port in the upper half of the first word.
    pub address: Address,
}

crate::assert_size!(ListKey, 28);

impl ListKey {
    /// Key of an address.
    #[inline(always)]
    pub fn address(policy: u64, list: List, address: Address) -> Self {
        Self {
            policy: split(policy),
            list: list as u32,
            address,
        }
    }

    /// Key of a port in host order.
    #[inline(always)]
    pub fn port(policy: u64, list: List, port: u16) -> Self {
        let word = (u32::from(port) << 16).to_be();
        Self::address(policy, list, Address::from_words_be([word, 0, 0, 0]))
    }
}

#[inline(always)]
fn split(policy: u64) -> [u32; 2] {
    [policy as u32, (policy >> 32) as u32]
}

/// The decision's view of the lists: over maps in eBPF, over plain collections in tests.
pub trait Lists {
    /// Is the port (host order) in the list? Called only for lists that are not empty.
    fn has_port(&self, list: List, port: u16) -> bool;
    /// Is the address in the list? Called only for lists that are not empty.
    fn has_address(&self, list: List, address: &Address) -> bool;
}
