//! The addresses of a namespace.

use std::io;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressFlags, AddressMessage};

use crate::observe::netlink::{Netlink, own_address};

#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) address: IpAddr,
    pub(super) interface: u32,
    /// Duplicate address detection is under way; the kernel does not choose such an address as a source yet.
    pub(super) tentative: bool,
}

pub(super) fn read_addresses(netlink: &Netlink) -> io::Result<Vec<Address>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    netlink.dump(&request, |addresses: &mut Vec<_>, answer| {
        if let RouteNetlinkMessage::NewAddress(message) = answer {
            addresses.extend(address_of(&message));
        }
    })
}

/// Keeps so many of each family, the first. True if others were left out.
pub(super) fn keep_first(addresses: &mut Vec<Address>, most: usize) -> bool {
    let before = addresses.len();
    let mut kept = [0; 2];
    addresses.retain(|address| {
        let kept = &mut kept[usize::from(address.address.is_ipv6())];
        *kept += 1;
        *kept <= most
    });
    addresses.len() < before
}

fn address_of(message: &AddressMessage) -> Option<Address> {
    let (address, flags) = own_address(message)?;
    Some(Address {
        address,
        interface: message.header.index,
        tentative: flags.contains(AddressFlags::Tentative)
            && !flags.intersects(AddressFlags::Dadfailed | AddressFlags::Optimistic),
    })
}

/// Neither loopback, link-local, multicast nor unspecified (Istio's `getLocalIP`).
pub(super) fn is_global(address: IpAddr) -> bool {
    !address.is_loopback()
        && !address.is_multicast()
        && !address.is_unspecified()
        && match address {
            IpAddr::V4(v4) => !v4.is_link_local(),
            IpAddr::V6(v6) => !v6.is_unicast_link_local(),
        }
}

/// The tentative address that the kernel would choose once it may: same scope, longest match, own interface first.
pub(super) fn tentative_source(
    destination: IpAddr,
    interface: u32,
    addresses: &[Address],
) -> Option<IpAddr> {
    let IpAddr::V6(destination) = destination else {
        return None;
    };
    addresses
        .iter()
        .filter(|address| address.tentative)
        .filter_map(|address| match address.address {
            IpAddr::V6(v6) if v6.is_unicast_link_local() == destination.is_unicast_link_local() => {
                let matching = (u128::from(v6) ^ u128::from(destination)).leading_zeros();
                Some(((address.interface == interface, matching), IpAddr::V6(v6)))
            }
            _ => None,
        })
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, address)| address)
}
