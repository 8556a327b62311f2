//! Detaching: new connections are let alone first, then everything of the pod is removed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::collect;
use crate::layouts;
use crate::machines;
use crate::passthrough;
use crate::pins::{self, Pins};
use crate::programs::{HOOKS, SK_LOOKUP};
use crate::record::{self, Notes};
use crate::sys::bpf;
use crate::tables::{RoutePrefix, Tables};
use crate::tproxy;

/// How long to wait for connections that are being handed to the proxy; a handshake inside the pod
/// takes microseconds.
const HANDSHAKES: Duration = Duration::from_millis(200);

/// Detaches one cgroup. False if it was not attached.
pub fn detach(cgroup_id: u64) -> Result<bool> {
    let Some(pins) = Pins::open_any()? else {
        return Ok(false);
    };
    if !pins.is_complete() && pins.pods()?.is_empty() {
        pins.remove_all()?;
        return Ok(false);
    }
    let tables = Tables::open(&pins)?;
    let noted = collect::gone(&pins, &tables)?.but_for(cgroup_id)?;
    let was = pins.pod(cgroup_id).is_dir() || tables.records.get(&cgroup_id)?.is_some();
    one(&pins, &tables, cgroup_id, &noted)?;
    finish(&pins, &tables)?;
    Ok(was)
}

/// Removes pods whose cgroup or network namespace has gone.
pub fn collect() -> Result<()> {
    let Some(pins) = Pins::open_existing()? else {
        return Ok(());
    };
    let tables = Tables::open(&pins)?;
    let collected = collect::gone(&pins, &tables)?;
    let finished = finish(&pins, &tables);
    collected.result().and(finished)
}

/// Detaches everything; answers with the number of pods.
pub fn detach_all() -> Result<usize> {
    let Some(pins) = Pins::open_any()? else {
        return Ok(0);
    };
    let pods = pins.pods()?;
    match Tables::open(&pins) {
        Ok(tables) => {
            // Notes without links: an attachment, or a detachment, was interrupted.
            let keys = tables.records.keys().context("reading RECORDS")?;
            let noted = record::all(&tables)?;
            let all = pods.iter().copied().chain(keys);
            collect::each(&pins, &tables, all, noted).result()?;
        }
        Err(_) if pods.is_empty() => {}
        // Capture ends with the links; what the maps hold goes with them.
        Err(error) => tracing::warn!("removing pins without reading the maps: {error:#}"),
    }
    pins.remove_all()?;
    Ok(pods.len())
}

/// Detaches a cgroup while holding the lock. Can be repeated after a kill at any point. `noted` are the notes on the pods
/// that are attached.
pub(crate) fn one(
    pins: &Pins,
    tables: &Tables,
    cgroup_id: u64,
    noted: &[(u64, Notes)],
) -> Result<()> {
    let notes = Notes::read(tables, cgroup_id)?;
    let shared = notes.as_ref().is_some_and(|notes| {
        let mut others = noted.iter().filter(|(id, _)| *id != cgroup_id);
        others.any(|(_, other)| other.netns_cookie == notes.netns_cookie)
    });
    let directory = pins.pod(cgroup_id);
    // Or the link was detached by a call that was killed, or is none.
    let may_be_gone = match pins::is_cut_off(&directory.join(SK_LOOKUP), bpf::netns_link) {
        Err(error) if pins::is_strange(&error) => true,
        answer => answer? == Some(true),
    };
    if let Some(notes) = notes.as_ref().filter(|_| !shared) {
        layouts::let_alone(pins, tables, notes)?;
        bpf::wait_for_running_programs().context("membarrier")?;
        wait_for_handshakes(tables, notes.netns_cookie)?;
    }
    // The links that capture go first: what is left then only serves what has been captured.
    // An unpinned link stays attached for a while: attached again meanwhile, a connection would meet
    // both programs.
    for name in HOOKS.iter().rev().map(|hook| hook.name).chain([SK_LOOKUP]) {
        pins::detach_link(&directory.join(name))?;
    }
    if let Some(notes) = notes.as_ref().filter(|_| !shared) {
        tproxy::take_back_noted(notes, may_be_gone)?;
        // What the node's daemon has added for the proxy. Not later: without notes nobody would know.
        if notes.pod.is_some()
            && notes.ipv6
            && let Some(netns) = notes.namespace()
        {
            passthrough::remove(&netns)?;
        }
    }
    pins::remove(&directory)?;
    if let Some(notes) = notes.as_ref().filter(|_| !shared) {
        machines::forget(pins, tables, notes)?;
        forget_namespace(tables, notes.netns_cookie)?;
    }
    tables.records.remove(&cgroup_id).context("writing RECORDS")
}

/// Removes what no pod uses any more.
fn finish(pins: &Pins, tables: &Tables) -> Result<()> {
    let linked = pins.pods()?;
    if linked.is_empty() {
        return pins.remove_all();
    }
    let noted = record::all(tables)?;
    // A pod whose notes cannot be read may be this build's.
    let is_noted = |id: &u64| noted.iter().any(|(noted, _)| noted == id);
    let all_noted = linked.iter().all(is_noted);
    if all_noted {
        collect::unnoted_namespaces(tables, &noted)?;
    }
    collect::unused_lists(tables)?;
    collect::unused_builds(pins, &noted, !all_noted)
}

fn wait_for_handshakes(tables: &Tables, netns_cookie: u64) -> Result<()> {
    let deadline = Instant::now() + HANDSHAKES;
    while Instant::now() < deadline {
        let flows = tables.flows.keys().context("reading FLOWS")?;
        if !flows.iter().any(|flow| flow.netns_cookie == netns_cookie) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Removes what the maps hold of a namespace beside its settings.
pub(crate) fn forget_namespace(tables: &Tables, netns_cookie: u64) -> Result<()> {
    for key in routes_of(tables, netns_cookie)? {
        tables.routes.remove(&key).context("writing ROUTES")?;
    }
    // By what is there: the ports may have been others before.
    for key in tables.listeners.keys().context("reading LISTENERS")? {
        if key.netns_cookie == netns_cookie {
            tables.listeners.remove(&key).context("writing LISTENERS")?;
        }
    }
    let destinations = tables.destinations.keys();
    for key in destinations.context("reading DESTINATIONS")? {
        if key.netns_cookie == netns_cookie {
            let removed = tables.destinations.remove(&key);
            removed.context("writing DESTINATIONS")?;
        }
    }
    for key in tables.dns_slots.keys().context("reading DNS_SLOTS")? {
        if key.netns_cookie == netns_cookie {
            tables.dns_slots.remove(&key).context("writing DNS_SLOTS")?;
        }
    }
    for flow in tables.flows.keys().context("reading FLOWS")? {
        if flow.netns_cookie == netns_cookie {
            tables.flows.remove(&flow).context("writing FLOWS")?;
        }
    }
    tables
        .counts
        .remove(&netns_cookie)
        .context("writing COUNTS")
}

/// Keys of a namespace's routes.
pub(crate) fn routes_of(tables: &Tables, netns_cookie: u64) -> Result<Vec<RoutePrefix>> {
    let own = redirect_common::route::RouteKey::new(netns_cookie, Default::default()).netns_cookie;
    let mut keys = tables.routes.keys().context("reading ROUTES")?;
    keys.retain(|key| key.data.netns_cookie == own);
    Ok(keys)
}
