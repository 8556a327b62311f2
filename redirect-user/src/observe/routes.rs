//! Which source address the kernel would choose for every destination of a pod, and which destinations are its own.
//!
//! Addresses and tables are dumped, then the kernel itself is asked (`RTM_GETROUTE`) about one address of every cell
//! between two prefixes: rules, tables and source selection are not rebuilt here.

mod addresses;
mod cells;
mod kernel;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_ROUTE;

use self::addresses::{is_global, keep_first, read_addresses};
use self::cells::{Cell, cells, is_never_unicast, parent, representative};
use self::kernel::{Answer, Unreachable, ask, read_prefixes};
use super::netlink::Netlink;
use super::netns::{self, NetworkNamespace};

/// How long to wait for duplicate address detection: it takes one to two seconds, but never ends without a carrier.
const TENTATIVE_WAIT: Duration = Duration::from_millis(2500);
const TENTATIVE_POLL: Duration = Duration::from_millis(50);

/// Entries of `ROUTES` for one namespace, a sixteenth of that map: no pod is to take the room of the others.
pub const MOST_ENTRIES: usize = 1 << 14;
/// Prefixes that routes and rules of one namespace name, the widest first: half of the entries.
const MOST_PREFIXES: usize = 1 << 13;
/// Addresses of each family in one namespace, in the kernel's order. Each makes three entries at most.
const MOST_ADDRESSES: usize = 1 << 10;

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why routes or addresses could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    /// The kernel did not answer.
    #[error("cannot read the {what} of network namespace {name}: {source}")]
    Netlink {
        /// `routes` or `addresses`.
        what: &'static str,
        /// Display name of the namespace.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Istio's words when there is no address but loopback and link-local ones.
    #[error("no valid local IP address found")]
    NoAddress,
}

/// What the kernel does with a set of destinations, by longest prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The destinations.
    pub prefix: IpNet,
    /// The source address that an unbound socket would get.
    pub source: IpAddr,
    /// Whether the destinations are this pod itself (route type `local`).
    pub local: bool,
    /// Index of the outgoing interface; lo's for local destinations. One of several for a multipath route.
    pub interface: u32,
}

/// Every destination of a namespace, by longest prefix over both lists together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingTable {
    /// Destinations that can be connected to, ordered by prefix.
    pub routes: Vec<Route>,
    /// Destinations inside a wider route that cannot: blackhole, unreachable, prohibit, broadcast, multicast,
    /// anycast or without a source address. `connect` fails there or never leaves, so nothing is to be captured.
    pub holes: Vec<Hole>,
    /// Whether there are more than are looked at: 8,192 prefixes, the widest, and 1,024 addresses of each family, the kernel's
    /// first. Then no network is local, nor known to lead over an interface: what the kernel answered for it may be about what
    /// was left out.
    pub left_out: bool,
}

impl RoutingTable {
    /// The most specific route to a destination. Holes inside of it are ignored.
    pub fn route_to(&self, destination: IpAddr) -> Option<&Route> {
        let longest = IpNet::from(destination).prefix_len();
        (0..=longest).rev().find_map(|length| {
            let prefix = IpNet::new(destination, length).ok()?.trunc();
            let found = self
                .routes
                .binary_search_by_key(&prefix, |route| route.prefix);
            Some(&self.routes[found.ok()?])
        })
    }
}

/// Destinations that cannot be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hole {
    /// The destinations.
    pub prefix: IpNet,
    /// What connect(2) fails with.
    pub errno: i32,
    /// False for broadcast and multicast.
    pub unicast: bool,
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What the kernel does with every destination, in both families. Takes up to 2.5 s while a global IPv6 address is
/// still tentative.
pub fn routing_table(ns: &NetworkNamespace) -> Result<RoutingTable> {
    table_within(ns, TENTATIVE_WAIT)
}

/// The same without waiting: an address that is tentative is the source only where the kernel offers no other.
pub fn routing_table_now(ns: &NetworkNamespace) -> Result<RoutingTable> {
    table_within(ns, Duration::ZERO)
}

fn table_within(ns: &NetworkNamespace, wait: Duration) -> Result<RoutingTable> {
    ns.run_inside(|| read_table(wait))?
        .map_err(|source| Error::Netlink {
            what: "routes",
            name: ns.to_string(),
            source,
        })
}

/// Istio's rule for `--ipv6 auto` (semantics.md 1.4): the family of the first address that is neither loopback nor
/// link-local, in the kernel's order, which is all of IPv4 before IPv6. With `dual_stack`, IPv6 when there is any.
pub fn first_global_family(ns: &NetworkNamespace, dual_stack: bool) -> Result<Family> {
    choose_family(&local_addresses(ns)?, dual_stack).ok_or(Error::NoAddress)
}

/// Every address of the namespace in the kernel's order, loopback and link-local ones included.
pub fn local_addresses(ns: &NetworkNamespace) -> Result<Vec<IpAddr>> {
    let addresses = ns
        .run_inside(|| read_addresses(&Netlink::open(NETLINK_ROUTE)?))?
        .map_err(|source| Error::Netlink {
            what: "addresses",
            name: ns.to_string(),
            source,
        })?;
    Ok(addresses
        .into_iter()
        .map(|address| address.address)
        .collect())
}

fn choose_family(addresses: &[IpAddr], dual_stack: bool) -> Option<Family> {
    let mut families = addresses
        .iter()
        .filter_map(|address| match address.to_canonical() {
            IpAddr::V4(v4) if is_global(IpAddr::V4(v4)) => Some(Family::V4),
            IpAddr::V6(v6) if is_global(IpAddr::V6(v6)) => Some(Family::V6),
            _ => None,
        });
    let first = families.next()?;
    Some(
        if dual_stack && families.any(|family| family == Family::V6) {
            Family::V6
        } else {
            first
        },
    )
}

/// Runs on a thread inside the namespace.
fn read_table(wait: Duration) -> io::Result<RoutingTable> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    let start = Instant::now();
    let mut addresses = read_addresses(&netlink)?;
    while addresses
        .iter()
        .any(|address| address.tentative && is_global(address.address))
        && start.elapsed() < wait
    {
        std::thread::sleep(TENTATIVE_POLL);
        addresses = read_addresses(&netlink)?;
    }

    let named = read_prefixes(&netlink, MOST_PREFIXES)?;
    let left_out = keep_first(&mut addresses, MOST_ADDRESSES) || named.left_out;
    let cells = cells(named.iter(), &addresses);
    let prefixes: BTreeSet<IpNet> = cells.keys().copied().collect();
    let mut answers = BTreeMap::new();
    // Wider prefixes first: a cell that only refines is dropped when its parent answers the same.
    let mut order: Vec<(IpNet, Cell)> = cells.into_iter().collect();
    order.sort_by_key(|(prefix, _)| prefix.prefix_len());
    for (prefix, cell) in order {
        let answer = if is_never_unicast(prefix) {
            Err(Unreachable::NOT_UNICAST)
        } else {
            let Some(destination) = representative(prefix, &prefixes) else {
                continue;
            };
            ask(&netlink, destination, &addresses)?
        };
        let parent = parent(prefix, &answers)
            .copied()
            .unwrap_or(Err(Unreachable::NO_ROUTE));
        let redundant = match answer {
            // A hole like what is around it says nothing.
            Err(_) => parent == answer,
            Ok(_) => cell == Cell::Refinement && parent == answer,
        };
        if !redundant {
            answers.insert(prefix, answer);
        }
    }

    let mut table = RoutingTable {
        left_out,
        ..RoutingTable::default()
    };
    for (prefix, answer) in answers {
        // What was left out may be in any network.
        let is_sure = !left_out || prefix.prefix_len() == prefix.max_prefix_len();
        match answer {
            Ok(Answer {
                source,
                local,
                interface,
            }) => {
                table.routes.push(Route {
                    prefix,
                    source,
                    local: local && is_sure,
                    interface: if is_sure { interface } else { 0 },
                });
            }
            Err(Unreachable { errno, unicast }) => table.holes.push(Hole {
                prefix,
                errno,
                unicast,
            }),
        }
    }
    Ok(table)
}
