//! Whether a pod is attached as it should be, by what is its own: what looks at many pods again and again must not read all of
//! them for each.

use anyhow::{Context, Result};

use super::{Request, Wanted, cgroup_of, find_listeners};
use crate::observe::listeners::Among;
use crate::observe::routes::routing_table_now;
use crate::options::Mode;
use crate::pins::Pins;
use crate::record::Notes;
use crate::tables::Tables;
use crate::{collect, settings};

/// True if [`attach`](super::attach()) would find nothing to do for this pod. The proxy's listeners are handed over again, as it
/// does, if processes of the pod hold all that listen there. What others have left is not collected; that is for
/// [`collect`](crate::detach::collect()), once for all pods.
///
/// False where that takes more to tell: virtual machines, TPROXY.
pub fn is_settled(request: &Request) -> Result<bool> {
    if request.policy.mode != Mode::Redirect || !request.policy.virtual_interfaces.is_empty() {
        return Ok(false);
    }
    let wanted = Wanted::of(request)?;
    let table = routing_table_now(&request.netns)?;
    let config = wanted.config(&request.policy, &request.proxy, wanted.notes.ipv6, &table)?;
    let notes = wanted.notes;
    let routes = settings::route_entries(notes.netns_cookie, &table);
    let Some(pins) = Pins::open_existing()? else {
        return Ok(false);
    };
    let tables = Tables::open(&pins)?;
    let Some(known) = Notes::read(&tables, request.cgroup.id())? else {
        return Ok(false);
    };
    let notes = Notes {
        routes: settings::routes_digest(&routes),
        counted_before: known.counted_before.clone(),
        ..notes
    };
    if known != notes
        || tables.pods.get(&notes.netns_cookie)? != Some(config)
        || tables.counts.get(&notes.netns_cookie)?.is_empty()
        || !collect::is_linked(&pins, request.cgroup.id(), |hook| {
            cgroup_of(hook, request).is_some()
        })?
    {
        return Ok(false);
    }
    for (key, info) in &routes {
        if tables.routes.get(key).context("reading ROUTES")? != Some(*info) {
            return Ok(false);
        }
    }
    for (key, value) in settings::list_entries(&request.policy) {
        if tables.lists.get(&key).context("reading LISTS")? != Some(value) {
            return Ok(false);
        }
    }
    let among = Among::Pod(&request.cgroup);
    find_listeners(&tables, request, &notes, &config, among)?;
    Ok(true)
}
