//! The qdisc and the filters on an interface (tc), in the calling thread's network namespace.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::observe::netlink::Netlink;

const CLSACT: &str = "clsact";

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

/// True if the interface has a clsact qdisc.
pub fn has_clsact(index: u32) -> io::Result<bool> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let request = RouteNetlinkMessage::GetQueueDiscipline(message(index, TcHandle::UNSPEC));
    netlink.dump(&request, |found: &mut bool, answer| {
        // Kernels before 6.x list the qdiscs of every interface whatever was asked.
        if let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer {
            let kind = TcAttribute::Kind(CLSACT.to_owned());
            *found |= qdisc.header.index == index as i32 && qdisc.attributes.contains(&kind);
        }
    })
}

/// Removes the interface's clsact qdisc, and every filter on it.
pub fn remove_clsact(index: u32) -> io::Result<()> {
    let mut qdisc = message(index, TcHandle::CLSACT);
    qdisc.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    qdisc.attributes = vec![TcAttribute::Kind(CLSACT.to_owned())];
    Netlink::open(NETLINK_ROUTE)?.change(&RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0)
}

/// Lists the filters on one side of an interface that has a clsact qdisc.
pub fn filters(index: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let request = RouteNetlinkMessage::GetTrafficFilter(message(index, direction.parent()));
    Netlink::open(NETLINK_ROUTE)?.dump(&request, |found: &mut Vec<_>, answer| {
        if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
            let filter = filter_of(&filter);
            // Each priority has an entry of its own in front of its filters.
            found.extend((filter.handle != 0).then_some(filter));
        }
    })
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
    use crate::observe::interfaces::interfaces;
    use crate::observe::testing::TestNamespace;

    fn inside<T: Send>(pod: &TestNamespace, work: impl FnOnce() -> io::Result<T> + Send) -> T {
        pod.open()
            .run_inside(work)
            .expect("a namespace")
            .expect("an answer")
    }

    #[test]
    fn clsact_is_seen_and_removed_with_its_filters() {
        let pod = TestNamespace::new();
        pod.ip("link add net1 type veth peer name net2");
        let there = interfaces(&pod.open()).unwrap();
        let found = there.iter().find(|i| i.name == "net1");
        let index = found.expect("net1").index;
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
