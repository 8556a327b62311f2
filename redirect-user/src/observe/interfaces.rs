//! The interfaces of a network namespace: names, first addresses, and what filters their packets.

pub mod filters;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::{Netlink, own_address};
use super::netns::{self, NetworkNamespace};

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why interfaces could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    /// The kernel did not answer.
    #[error("cannot read the interfaces of network namespace {name}: {source}")]
    Netlink {
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A network interface, with the addresses that iptables REDIRECT would choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name now.
    pub name: String,
    /// What its packets begin with.
    pub layer: Layer,
    /// Its first IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its first IPv6 address that is not link-local.
    pub ipv6: Option<Ipv6Addr>,
    /// Its first link-local IPv6 address.
    pub ipv6_link_local: Option<Ipv6Addr>,
}

/// What an interface's packets begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// An Ethernet header.
    Ethernet,
    /// The IP header.
    Ip,
    /// Something else: the loopback interface too, which nothing comes in by from outside.
    Other,
}

/// Every interface of the namespace, `lo` too, by index.
pub fn interfaces(ns: &NetworkNamespace) -> Result<Vec<Interface>> {
    ns.run_inside(read_interfaces)?
        .map_err(|source| Error::Netlink {
            name: ns.to_string(),
            source,
        })
}

/// As [`interfaces`], of the calling thread's namespace.
fn read_interfaces() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut interfaces = netlink.dump(&links, |interfaces: &mut Vec<_>, answer| {
        if let RouteNetlinkMessage::NewLink(link) = answer {
            interfaces.extend(interface_of(&link));
        }
    })?;
    interfaces.sort_by_key(|interface| interface.index);
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let addresses = netlink.dump(&addresses, |addresses: &mut Vec<_>, answer| {
        if let RouteNetlinkMessage::NewAddress(message) = answer {
            addresses.extend(usable_address(&message).map(|it| (message.header.index, it)));
        }
    })?;
    // In the kernel's order, which is the one that REDIRECT looks through.
    for (index, address) in addresses {
        let Ok(at) = interfaces.binary_search_by_key(&index, |interface| interface.index) else {
            continue;
        };
        let interface = &mut interfaces[at];
        match address {
            IpAddr::V4(v4) => interface.ipv4.get_or_insert(v4).to_bits().into(),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                interface.ipv6_link_local.get_or_insert(v6).to_bits()
            }
            IpAddr::V6(v6) => interface.ipv6.get_or_insert(v6).to_bits(),
        };
    }
    Ok(interfaces)
}

fn interface_of(link: &LinkMessage) -> Option<Interface> {
    let name = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })?;
    Some(Interface {
        index: link.header.index,
        name,
        layer: match link.header.link_layer_type {
            LinkLayerType::Ether => Layer::Ethernet,
            LinkLayerType::None => Layer::Ip,
            _ => Layer::Other,
        },
        ipv4: None,
        ipv6: None,
        ipv6_link_local: None,
    })
}

/// None for an IPv6 address that the kernel does not use yet (`nf_nat_redirect_ipv6_usable`).
fn usable_address(message: &AddressMessage) -> Option<IpAddr> {
    let (address, flags) = own_address(message)?;
    let waits =
        flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    (!waits).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing::TestNamespace;

    #[test]
    fn interfaces_are_told_by_their_name_of_now() {
        let pod = TestNamespace::new();
        let names = |pod: &TestNamespace| -> Vec<String> {
            let found = interfaces(&pod.open()).unwrap();
            found.into_iter().map(|found| found.name).collect()
        };
        assert_eq!(names(&pod), ["lo"]);
        pod.ip("link add net1 type veth peer name net2");
        let before = interfaces(&pod.open()).unwrap();
        assert_eq!(before.len(), 3, "{before:?}");
        pod.ip("link set net1 name net9");
        let after = interfaces(&pod.open()).unwrap();
        let renamed: Vec<_> = after.iter().filter(|now| !before.contains(now)).collect();
        let [renamed] = renamed[..] else {
            panic!("{before:?} {after:?}")
        };
        assert_eq!(renamed.name, "net9");
        assert!(
            before
                .iter()
                .any(|was| was.index == renamed.index && was.name == "net1")
        );
    }

    #[test]
    fn first_addresses_are_those_of_the_kernels_own_list() {
        let pod = TestNamespace::new();
        pod.ip("link add net1 type veth peer name net2");
        pod.ip("link set net1 up");
        for address in [
            "10.1.0.1/24",
            "10.2.0.1/24",
            "fe80::9/64",
            "fd00:1::1/64",
            "fd00:2::1/64",
        ] {
            pod.ip(&format!("addr add {address} dev net1 nodad"));
        }
        let found = interfaces(&pod.open()).unwrap();
        let net1 = found.iter().find(|i| i.name == "net1").expect("net1");
        assert_eq!(net1.layer, Layer::Ethernet);
        assert_eq!(net1.ipv4, Some(Ipv4Addr::new(10, 1, 0, 1)));
        // The kernel puts a new IPv6 address in front of the others of its scope.
        assert_eq!(net1.ipv6, Some("fd00:2::1".parse().expect("an address")));
        assert_eq!(
            net1.ipv6_link_local,
            Some("fe80::9".parse().expect("an address"))
        );
        let lo = found.iter().find(|i| i.name == "lo").expect("lo");
        assert_eq!(lo.layer, Layer::Other);
    }
}
