//! Handing over the listeners of a proxy that began to listen before it was attached.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use redirect_common::connection::SocketState;
use redirect_common::decide::is_proxy;
use redirect_common::listener::{LISTENER_SLOTS, ListenerKey, first_listener_slot};
use redirect_common::pod::PodConfig;
use redirect_common::route::{ROUTE_LOCAL, ROUTE_PREFIX_BITS, RouteKey};

use super::Request;
use crate::full::written;
use crate::observe::cgroup::Cgroup;
use crate::observe::listeners::{Among, Listener, Listeners, Unreachable, listeners};
use crate::options::Policy;
use crate::proxy::ProxyIdentity;
use crate::record::Notes;
use crate::tables::{RoutePrefix, Tables};

/// So many listeners that cannot be reached are named: the pod can open any number.
const MOST_WARNINGS: usize = 4;

/// Finds the listeners that were there before the sockops program was, and hands them over: the
/// proxy's first, as there is room for some only. The pod can open any number of others.
pub(super) fn find_listeners(
    tables: &Tables,
    request: &Request,
    notes: &Notes,
    config: &PodConfig,
    among: Among<'_>,
) -> Result<Listeners> {
    let in_container = match &request.proxy {
        ProxyIdentity::Container {
            container: Some(container),
        } => Cgroup::open(&container.cgroup).and_then(|cgroup| cgroup.processes()),
        _ => Ok(Vec::new()),
    };
    // It may have ended.
    let in_container: HashSet<i32> = in_container.unwrap_or_default().into_iter().collect();
    let of_proxy = |listener: &Listener| {
        let mut holders = listener.holders.iter();
        let is_in_container = holders.any(|holder| in_container.contains(&holder.pid));
        is_proxy(config, Some(listener.owner), is_in_container)
    };
    let ports: Vec<u16> = request.policy.listeners().map(|(port, _)| port).collect();
    let mut found = listeners(&request.netns, &ports, among)?;
    if matches!(among, Among::Pod(_)) && !found.unreachable.is_empty() {
        // Those that are held elsewhere were handed over at attach: the others are not to take their places.
        return Ok(found);
    }
    let mut refused = Vec::new();
    for port in ports.into_iter().collect::<HashSet<_>>() {
        let mut on_port = Vec::new();
        for listener in &found.found {
            if listener.address.port() == port
                && is_reachable(tables, notes.netns_cookie, listener.address.ip())?
            {
                on_port.push(listener);
            }
        }
        on_port.sort_by_cached_key(|listener| !of_proxy(listener));
        // Of each family's slots.
        let mut used = [0; 2];
        for listener in on_port {
            let first = first_listener_slot(&listener.address.ip().into());
            let used = &mut used[usize::from(first / LISTENER_SLOTS)];
            if *used == LISTENER_SLOTS {
                continue;
            }
            let socket = match listener.duplicate() {
                Ok(Some(socket)) => socket,
                Ok(None) => continue,
                Err(error) => {
                    tracing::debug!("the listener on {}: {error}", listener.address);
                    refused.push(Unreachable {
                        address: listener.address,
                        inode: listener.inode,
                    });
                    continue;
                }
            };
            let key = ListenerKey::new(notes.netns_cookie, port, first + *used);
            *used += 1;
            let fd = socket.as_raw_fd() as u32;
            let inherited = if port == request.policy.inbound_port {
                tables.sockets.set(&fd, &SocketState::of_listener(port))
            } else {
                Ok(())
            };
            let address = listener.address;
            match inherited.and_then(|()| tables.listeners.set(&key, &fd)) {
                // It does not listen any more, or is of another protocol, such as MPTCP.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    tracing::warn!("cannot hand over the listener {address}: {error}");
                }
                // Without it all that is captured would be refused.
                handed => written("LISTENERS", handed)
                    .with_context(|| format!("handing over the listener {address}"))?,
            }
        }
    }
    found.unreachable.extend(refused);
    Ok(found)
}

/// Whether what is bound there gets connections: `IP_FREEBIND` lets everybody bind addresses that are
/// not the pod's.
fn is_reachable(tables: &Tables, netns_cookie: u64, address: IpAddr) -> Result<bool> {
    let address = address.to_canonical();
    if address.is_unspecified() || address.is_loopback() {
        return Ok(true);
    }
    let key = RoutePrefix {
        prefix_bits: ROUTE_PREFIX_BITS + 128,
        data: RouteKey::new(netns_cookie, address.into()),
    };
    let route = tables.routes.get(&key).context("reading ROUTES")?;
    Ok(route.is_some_and(|route| route.flags & ROUTE_LOCAL != 0))
}

pub(super) fn warn_about_listeners(found: &Listeners, policy: &Policy) {
    for listener in found.unreachable.iter().take(MOST_WARNINGS) {
        tracing::warn!(
            "the listener on {} cannot be reached: until it is opened again, connections to it are refused",
            listener.address
        );
    }
    let more = found.unreachable.len().saturating_sub(MOST_WARNINGS);
    if more > 0 {
        tracing::warn!("{more} more listeners cannot be reached");
    }
    for (port, what) in policy.listeners() {
        if !found
            .found
            .iter()
            .any(|listener| listener.address.port() == port)
        {
            tracing::info!(
                "no proxy listens on port {port} yet: captured {what} are refused until one does"
            );
        }
    }
}
