//! Virtual machines behind interfaces of the pod (`-k`): their packets are only forwarded, so no
//! socket of the pod makes their connections. Addresses and ports in the packets are translated
//! instead.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// Key of `INTERFACES`: an interface with virtual machines behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct InterfaceKey {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// Interface index.
    pub index: u32,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(InterfaceKey, 16);

impl InterfaceKey {
    /// Key of the interface with this index.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, index: u32) -> Self {
        Self {
            netns_cookie,
            index,
            _pad: 0,
        }
    }
}

/// Value of `INTERFACES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Interface {
    /// Its first IPv4 address; [`Address::UNSPECIFIED`] if it has none, as for the others.
    pub ipv4: Address,
    /// Its first IPv6 address that is not link-local.
    pub ipv6: Address,
    /// Its first link-local IPv6 address.
    pub ipv6_link_local: Address,
    /// Bytes in front of the network header.
    pub link_header: u32,
    /// 1 if its clsact qdisc was added by the loader, to be removed again.
    pub qdisc_is_ours: u32,
}

crate::assert_size!(Interface, 56);

impl Interface {
    /// The address that iptables REDIRECT gives to a connection that came by this interface
    /// (`nf_nat_redirect.c`): of the destination's family and scope. None if there is none: REDIRECT
    /// drops the packet then.
    #[inline(always)]
    pub const fn address_for(&self, destination: &Address) -> Option<Address> {
        let address = if destination.is_v4() {
            self.ipv4
        } else if destination.is_link_local() {
            self.ipv6_link_local
        } else {
            self.ipv6
        };
        if address.is_unspecified() {
            None
        } else {
            Some(address)
        }
    }
}

/// Value of `MACHINE_FLOWS`, keyed by the machine's end and the destination it wants: what is done
/// with the connection's packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Translation {
    /// The address that takes the destination's place: the interface's.
    pub address: Address,
    /// The steered port that takes the place of the destination's, host order; 0 if the connection
    /// is let alone.
    pub port: u16,
    /// Padding, zero.
    pub _pad: [u16; 3],
}

crate::assert_size!(Translation, 24);

impl Translation {
    /// Of a connection that is let alone.
    pub const NONE: Self = Self {
        address: Address::UNSPECIFIED,
        port: 0,
        _pad: [0; 3],
    };

    /// To an address and a port in host order.
    #[inline(always)]
    pub const fn to(address: Address, port: u16) -> Self {
        Self {
            address,
            port,
            _pad: [0; 3],
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().expect("an address").into()
    }

    #[test]
    fn the_address_has_the_destinations_family_and_scope() {
        let interface = Interface {
            ipv4: address("10.0.2.1"),
            ipv6: address("fd00::1"),
            ipv6_link_local: address("fe80::1"),
            ..Interface::default()
        };
        for (destination, expected) in [
            ("192.0.2.1", "10.0.2.1"),
            ("2001:db8::1", "fd00::1"),
            ("fe80::9", "fe80::1"),
            ("febf::9", "fe80::1"),
            ("fec0::9", "fd00::1"),
        ] {
            let chosen = interface.address_for(&address(destination));
            assert_eq!(chosen, Some(address(expected)), "{destination}");
        }
        let bare = Interface::default();
        for destination in ["192.0.2.1", "2001:db8::1", "fe80::9"] {
            assert_eq!(bare.address_for(&address(destination)), None);
        }
    }
}
