//! `::6` on the pod's `lo`: the address from which the proxy calls its own pod over IPv6. 127.0.0.6 needs no such help.

use std::io;
use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use crate::observe::netlink::Netlink;
use crate::observe::netns::NetworkNamespace;

const PASSTHROUGH: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// Adds the address; it may be there. Before attaching: `ROUTES` has to know it as the pod's own.
pub fn add(netns: &NetworkNamespace) -> Result<()> {
    change(netns, Errno::EEXIST, |netlink, address| {
        netlink.change(&RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE)
    })
    .with_context(|| format!("adding {PASSTHROUGH} to lo"))
}

/// Removes the address; it may be absent.
pub fn remove(netns: &NetworkNamespace) -> Result<()> {
    change(netns, Errno::EADDRNOTAVAIL, |netlink, address| {
        netlink.change(&RouteNetlinkMessage::DelAddress(address), 0)
    })
    .with_context(|| format!("removing {PASSTHROUGH} from lo"))
}

fn change(
    netns: &NetworkNamespace,
    done_already: Errno,
    request: impl FnOnce(&Netlink, AddressMessage) -> io::Result<()> + Send,
) -> Result<()> {
    let changed = netns.run_inside(|| {
        let mut address = AddressMessage::default();
        address.header.family = AddressFamily::Inet6;
        address.header.prefix_len = 128;
        address.header.flags = AddressHeaderFlags::Nodad;
        address.header.scope = AddressScope::Host;
        address.header.index = nix::net::if_::if_nametoindex("lo")?;
        address.attributes = vec![
            AddressAttribute::Local(PASSTHROUGH.into()),
            AddressAttribute::Address(PASSTHROUGH.into()),
        ];
        request(&Netlink::open(NETLINK_ROUTE)?, address)
    })?;
    match changed {
        Err(error) if error.raw_os_error() == Some(done_already as i32) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::routes::local_addresses;
    use crate::observe::testing::TestNamespace;

    #[test]
    fn address_is_added_and_removed_any_number_of_times() {
        let pod = TestNamespace::new();
        let netns = pod.open();
        let has = || {
            let addresses = local_addresses(&netns).expect("a namespace");
            addresses.contains(&PASSTHROUGH.into())
        };
        assert!(!has());
        for _ in 0..2 {
            add(&netns).expect("added");
            assert!(has());
        }
        for _ in 0..2 {
            remove(&netns).expect("removed");
            assert!(!has());
        }
    }
}
