//! `::6` on the pod's `lo`: the address from which the proxy calls its own pod over IPv6. 127.0.0.6 needs no such help.

use std::io;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use crate::observe::netlink::Netlink;
use crate::observe::netns::NetworkNamespace;

const PASSTHROUGH: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The kernel makes an address the machine's own a moment after it is there: on a machine with much to do, long after. Never
/// while `lo` is down.
const OWN: Duration = Duration::from_millis(2500);
const OWN_POLL: Duration = Duration::from_millis(1);

/// Adds the address; it may be there. Before attaching: `ROUTES` has to know it as the pod's own.
pub fn add(netns: &NetworkNamespace) -> Result<()> {
    change(netns, Errno::EEXIST, |netlink, address| {
        netlink.change(&RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE)
    })
    .with_context(|| format!("adding {PASSTHROUGH} to lo"))?;
    netns
        .run_inside(wait_until_own)?
        .with_context(|| format!("asking for the route to {PASSTHROUGH}"))
}

/// Runs inside the namespace.
fn wait_until_own() -> io::Result<()> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let deadline = Instant::now() + OWN;
    while !is_own(&netlink)? && Instant::now() < deadline {
        std::thread::sleep(OWN_POLL);
    }
    Ok(())
}

fn is_own(netlink: &Netlink) -> io::Result<bool> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet6;
    request.header.destination_prefix_length = 128;
    request.attributes = vec![RouteAttribute::Destination(PASSTHROUGH.into())];
    match netlink.ask(&RouteNetlinkMessage::GetRoute(request)) {
        Ok(RouteNetlinkMessage::NewRoute(route)) => Ok(route.header.kind == RouteType::Local),
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(Errno::ENETUNREACH as i32) => Ok(false),
        Err(error) => Err(error),
    }
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
        let is_own = || {
            let ask = || is_own(&Netlink::open(NETLINK_ROUTE).expect("a socket"));
            netns.run_inside(ask).expect("inside").expect("a route")
        };
        assert!(!is_own());
        for _ in 0..2 {
            add(&netns).expect("added");
            assert!(has() && is_own());
        }
        for _ in 0..2 {
            remove(&netns).expect("removed");
            assert!(!has());
        }
    }
}
