//! The interfaces of a network namespace, by name.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;
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

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name now.
    pub name: String,
}

/// Every interface of the namespace, `lo` too, in the kernel's order.
pub fn interfaces(ns: &NetworkNamespace) -> Result<Vec<Interface>> {
    ns.run_inside(read_interfaces)?
        .map_err(|source| Error::Netlink {
            name: ns.to_string(),
            source,
        })
}

/// As [`interfaces`], of the calling thread's namespace.
pub(crate) fn read_interfaces() -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let answers = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => interface_of(link),
            _ => None,
        })
        .collect())
}

fn interface_of(link: LinkMessage) -> Option<Interface> {
    let name = link.attributes.into_iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some(name)
        } else {
            None
        }
    })?;
    Some(Interface {
        index: link.header.index,
        name,
    })
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
}
