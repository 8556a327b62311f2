//! The interfaces of a pod, and what hangs on them (tc).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use netlink_packet_route::tc::{
    TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;

const CLSACT: &str = "clsact";

/// An interface, with the addresses that iptables REDIRECT would choose from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
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

/// One side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What comes in.
    Ingress,
    /// What goes out.
    Egress,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    fn parent(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// A tc filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its priority.
    pub priority: u16,
    /// Its number among those of that priority.
    pub handle: u32,
    /// The kernel's number of its program, if it runs one.
    pub program_id: Option<u32>,
}

/// Lists the interfaces of the calling thread's network namespace, by index.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let mut interfaces: Vec<_> = netlink
        .dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => interface_of(&link),
            _ => None,
        })
        .collect();
    interfaces.sort_by_key(|interface| interface.index);
    // In the kernel's order, which is the one that REDIRECT looks through.
    for answer in netlink.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(message) = answer
            && let Some(address) = usable_address(&message)
            && let Some(interface) = interfaces
                .iter_mut()
                .find(|interface| interface.index == message.header.index)
        {
            match address {
                IpAddr::V4(v4) => interface.ipv4.get_or_insert(v4).to_bits().into(),
                IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                    interface.ipv6_link_local.get_or_insert(v6).to_bits()
                }
                IpAddr::V6(v6) => interface.ipv6.get_or_insert(v6).to_bits(),
            };
        }
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
    let (mut local, mut peer) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags |= *all,
            _ => {}
        }
    }
    let waits =
        flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    local.or(peer).filter(|_| !waits)
}

/// True if the interface has a clsact qdisc.
pub fn has_clsact(index: u32) -> io::Result<bool> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let request = RouteNetlinkMessage::GetQueueDiscipline(message(index, TcHandle::UNSPEC));
    let answers = netlink.dump(&request)?;
    Ok(answers.iter().any(|answer| match answer {
        // Kernels before 6.x list the qdiscs of every interface whatever was asked.
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) => {
            qdisc.header.index == index as i32
                && qdisc
                    .attributes
                    .contains(&TcAttribute::Kind(CLSACT.to_owned()))
        }
        _ => false,
    }))
}

/// Removes the interface's clsact qdisc, and every filter on it.
pub fn remove_clsact(index: u32) -> io::Result<()> {
    let mut qdisc = message(index, TcHandle::CLSACT);
    qdisc.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    qdisc.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    Netlink::open(NETLINK_ROUTE)?.change(&RouteNetlinkMessage::DelQueueDiscipline(qdisc))
}

/// Lists the filters on one side of an interface that has a clsact qdisc.
pub fn filters(index: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let request = RouteNetlinkMessage::GetTrafficFilter(message(index, direction.parent()));
    let answers = Netlink::open(NETLINK_ROUTE)?.dump(&request)?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter_of(&filter)),
            _ => None,
        })
        // Each priority has an entry of its own in front of its filters.
        .filter(|filter| filter.handle != 0)
        .collect())
}

fn filter_of(message: &TcMessage) -> Filter {
    let options = message
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.as_slice(),
            _ => &[],
        });
    Filter {
        priority: (message.header.info >> 16) as u16,
        handle: message.header.handle.into(),
        program_id: options.into_iter().find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
            _ => None,
        }),
    }
}

fn message(index: u32, parent: TcHandle) -> TcMessage {
    let header = TcHeader {
        index: index as i32,
        parent,
        ..TcHeader::default()
    };
    TcMessage::from_parts(header, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing::TestNamespace;

    fn inside<T: Send>(pod: &TestNamespace, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        pod.open()
            .run_inside(work)
            .expect("a namespace")
            .expect("an answer")
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
        let interfaces = inside(&pod, interfaces);
        let net1 = interfaces.iter().find(|i| i.name == "net1").expect("net1");
        assert_eq!(net1.layer, Layer::Ethernet);
        assert_eq!(net1.ipv4, Some(Ipv4Addr::new(10, 1, 0, 1)));
        // The kernel puts a new IPv6 address in front of the others of its scope.
        assert_eq!(net1.ipv6, Some("fd00:2::1".parse().expect("an address")));
        assert_eq!(
            net1.ipv6_link_local,
            Some("fe80::9".parse().expect("an address"))
        );
        let lo = interfaces.iter().find(|i| i.name == "lo").expect("lo");
        assert_eq!(lo.layer, Layer::Other);
    }

    #[test]
    fn clsact_is_seen_and_removed_with_its_filters() {
        let pod = TestNamespace::new();
        pod.ip("link add net1 type veth peer name net2");
        let index = inside(&pod, || {
            let found = interfaces()?.into_iter().find(|i| i.name == "net1");
            Ok(found.expect("net1").index)
        });
        assert!(!inside(&pod, || has_clsact(index)));
        inside(&pod, || {
            aya::programs::tc::qdisc_add_clsact("net1").map_err(io::Error::other)
        });
        assert!(inside(&pod, || has_clsact(index)));
        for direction in Direction::BOTH {
            assert_eq!(inside(&pod, || filters(index, direction)), []);
        }
        inside(&pod, || remove_clsact(index));
        assert!(!inside(&pod, || has_clsact(index)));
    }
}
