//! What is attached, and what it has done.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use aya::maps::MapInfo;
use redirect_common::POLICY_LAYOUT_VERSION;
use redirect_common::listener::ListenerKey;
use redirect_common::verdict::Rule;
use serde::Serialize;

use crate::collect;
use crate::layouts;
use crate::machines;
use crate::observe::cgroup::Cgroup;
use crate::observe::interfaces::interfaces;
use crate::observe::netns::NetworkNamespace;
use crate::observe::routes::routing_table;
use crate::options::Policy;
use crate::pins::{self, Pins};
use crate::programs::{self, Hook, Side};
use crate::proxy::ProxyIdentity;
use crate::record::{self, KubernetesPod, Notes};
use crate::settings;
use crate::tables::Tables;
use crate::tproxy;

/// The state of this machine.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Version of this binary.
    pub version: String,
    /// Build of the programs in this binary.
    pub build: String,
    /// Attached pods, by cgroup path.
    pub pods: Vec<Pod>,
}

/// An attached pod.
#[derive(Debug, Serialize)]
pub struct Pod {
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// The cgroup's inode, which names the pins.
    pub cgroup_id: u64,
    /// Network namespace.
    pub netns: String,
    /// Its cookie.
    pub netns_cookie: u64,
    /// The Kubernetes pod, if the node's daemon attached it.
    pub pod: Option<KubernetesPod>,
    /// Version of redirect that attached it.
    pub version: String,
    /// Build of the programs attached.
    pub build: String,
    /// False if an attach was interrupted, or one of the links has gone: not everything is captured until it is repeated.
    pub capturing: bool,
    /// Whether the addresses, routes and excluded interfaces known here are those of the namespace,
    /// and what TPROXY needs is there; None if it is found neither by the path it was attached
    /// with nor by a process of the pod, or cannot be read, or if a build with another layout attached it.
    pub routes_current: Option<bool>,
    /// By pattern of `-k`: the interfaces that match, and whether the machines behind them are
    /// captured; None if the namespace is not found.
    pub virtual_interfaces: Option<BTreeMap<String, BTreeMap<String, bool>>>,
    /// Whether IPv6 is captured.
    pub ipv6: bool,
    /// Sockets known to listen, by the proxy's ports.
    pub listeners: BTreeMap<u16, usize>,
    /// What is captured.
    pub policy: Policy,
    /// Who is the proxy.
    pub proxy: ProxyIdentity,
    /// Connections by rule; rules that never decided are left out.
    pub connections: BTreeMap<&'static str, u64>,
}

/// Reads the state of this machine.
pub fn status() -> Result<Status> {
    let mut pods = Vec::new();
    if let Some(pins) = Pins::open_existing()? {
        let tables = Tables::open(&pins)?;
        let records = record::all(&tables)?;
        for cgroup_id in pins.pods()? {
            if !records.iter().any(|(known, _)| *known == cgroup_id) {
                tracing::warn!(
                    "attaching cgroup {cgroup_id} was interrupted and nothing of it is captured: attach it again, or detach it"
                );
            }
        }
        for (cgroup_id, notes) in records {
            pods.push(pod(&pins, &tables, cgroup_id, notes)?);
        }
    }
    pods.sort_by(|a, b| a.cgroup.cmp(&b.cgroup));
    Ok(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        build: format!("{:016x}", programs::build_id()),
        pods,
    })
}

/// What the attached pods have done, without asking their namespaces.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// False if an attach was interrupted.
    pub capturing: bool,
    /// Connections by rule.
    pub connections: Vec<(Rule, u64)>,
    /// Sockets known to listen on the outbound and on the inbound port.
    pub listeners: [usize; 2],
    /// Whether it is known who is the proxy.
    pub knows_proxy: bool,
}

/// How full a map is.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries it can hold.
    pub capacity: u32,
}

/// Reads the counters of all pods.
pub fn traffic() -> Result<Vec<Traffic>> {
    let Some(pins) = Pins::open_existing()? else {
        return Ok(Vec::new());
    };
    let tables = Tables::open(&pins)?;
    let known = tables.listeners.keys()?;
    let mut pods = BTreeMap::new();
    for (_, notes) in record::all(&tables)? {
        let cookie = notes.netns_cookie;
        let on_port = |port| {
            let here = |key: &&ListenerKey| key.netns_cookie == cookie && key.port == port;
            known.iter().filter(here).count()
        };
        let pod = Traffic {
            netns_cookie: cookie,
            capturing: layouts::is_capturing(&pins, &tables, &notes)?,
            connections: layouts::connections(&pins, &tables, &notes)?,
            listeners: [notes.policy.outbound_port, notes.policy.inbound_port].map(on_port),
            knows_proxy: notes.proxy.is_known(),
        };
        pods.insert(cookie, pod);
    }
    Ok(pods.into_values().collect())
}

/// Reads how full the maps are whose entries come with pods and their connections.
pub fn fill() -> Result<Vec<Fill>> {
    let Some(pins) = Pins::open_existing()? else {
        return Ok(Vec::new());
    };
    let tables = Tables::open(&pins)?;
    [
        ("PODS", tables.pods.keys()?.len()),
        ("RECORDS", tables.records.keys()?.len()),
        ("LISTS", tables.lists.keys()?.len()),
        ("ROUTES", tables.routes.keys()?.len()),
        ("DESTINATIONS", tables.destinations.keys()?.len()),
        ("DNS_SLOTS", tables.dns_slots.keys()?.len()),
        ("FLOWS", tables.flows.keys()?.len()),
        ("INTERFACES", tables.interfaces.keys()?.len()),
        ("MACHINE_FLOWS", tables.machine_flows.keys()?.len()),
        ("LISTENERS", tables.listeners.keys()?.len()),
    ]
    .into_iter()
    // A layout that only other builds have attached pods with has no maps of this one.
    .filter(|(map, _)| pins.map(map).exists())
    .map(|(map, entries)| {
        let info = MapInfo::from_pin(pins.map(map))?;
        Ok(Fill {
            map,
            entries,
            capacity: info.max_entries(),
        })
    })
    .collect()
}

/// Whether connections of this pod are captured: false if an attach was interrupted, or one of its links has gone.
pub fn is_capturing(cgroup_id: u64, notes: &Notes) -> Result<bool> {
    match Pins::open_existing()? {
        Some(pins) => is_whole(&pins, &Tables::open(&pins)?, cgroup_id, notes),
        None => Ok(false),
    }
}

fn is_whole(pins: &Pins, tables: &Tables, cgroup_id: u64, notes: &Notes) -> Result<bool> {
    let is_due = |hook: &Hook| match hook.side {
        Side::Client | Side::Proxy => hook.need.is_of(&notes.policy),
        // The notes do not tell whether the proxy has a cgroup of its own.
        Side::ProxyElsewhere => false,
    };
    let is_linked = match collect::is_linked(pins, cgroup_id, is_due) {
        Err(error) if pins::is_strange(&error) => {
            tracing::warn!("{error:#}");
            false
        }
        answer => answer?,
    };
    Ok(is_linked && layouts::is_capturing(pins, tables, notes)?)
}

/// The notes on every pod that is attached.
pub fn attached() -> Result<Vec<(u64, Notes)>> {
    match Pins::open_existing()? {
        Some(pins) => record::all(&Tables::open(&pins)?),
        None => Ok(Vec::new()),
    }
}

fn pod(pins: &Pins, tables: &Tables, cgroup_id: u64, notes: Notes) -> Result<Pod> {
    // A map of sockets has keys to list, but no values to read.
    let known = tables.listeners.keys()?;
    let on_port = |port| {
        let here = |key: &&ListenerKey| key.netns_cookie == notes.netns_cookie && key.port == port;
        (port, known.iter().filter(here).count())
    };
    let listeners = notes
        .policy
        .listeners()
        .map(|(port, _)| on_port(port))
        .collect();
    Ok(Pod {
        capturing: is_whole(pins, tables, cgroup_id, &notes)?,
        routes_current: routes_current(tables, &notes),
        virtual_interfaces: virtual_interfaces(pins, &notes),
        connections: layouts::connections(pins, tables, &notes)?
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(rule, count)| (rule.label(), count))
            .collect(),
        listeners,
        cgroup_id,
        cgroup: notes.cgroup,
        netns: notes.netns,
        netns_cookie: notes.netns_cookie,
        pod: notes.pod,
        version: notes.version,
        build: format!("{:016x}", notes.build),
        ipv6: notes.ipv6,
        policy: notes.policy,
        proxy: notes.proxy,
    })
}

fn virtual_interfaces(
    pins: &Pins,
    notes: &Notes,
) -> Option<BTreeMap<String, BTreeMap<String, bool>>> {
    let patterns = &notes.policy.virtual_interfaces;
    if patterns.is_empty() {
        return Some(BTreeMap::new());
    }
    let netns = namespace(notes)?;
    patterns
        .iter()
        .map(|pattern| {
            let found = machines::inspect(pins, &netns, std::slice::from_ref(pattern)).ok()?;
            let interfaces = found.into_iter().map(|found| (found.name, found.filtered));
            Some((pattern.to_string(), interfaces.collect()))
        })
        .collect()
}

fn routes_current(tables: &Tables, notes: &Notes) -> Option<bool> {
    if notes.layout != POLICY_LAYOUT_VERSION {
        // They are written in a way that this build does not know.
        return None;
    }
    let netns = namespace(notes)?;
    let wanted = settings::route_entries(notes.netns_cookie, &routing_table(&netns).ok()?);
    let known = crate::detach::routes_of(tables, notes.netns_cookie).ok()?;
    let excluded = settings::excluded_interfaces(&notes.policy, &interfaces(&netns).ok()?).ok();
    let config = tables.pods.get(&notes.netns_cookie).ok()?;
    let known_excluded = config.map(|config| {
        let count = config.excluded_interface_count as usize;
        config.excluded_interfaces[..count].to_vec()
    });
    let complete = tproxy::is_complete(&netns, &notes.policy, notes.ipv6).ok()?;
    Some(
        complete
            && (known_excluded.is_none() || known_excluded == excluded)
            && wanted.len() == known.len()
            && wanted
                .iter()
                .all(|(key, info)| tables.routes.get(key).ok().flatten() == Some(*info)),
    )
}

/// The pod's namespace by the path it was attached with, else by a process in the pod's cgroup: the path may have gone, or mean
/// something else here than in the container that attached it.
fn namespace(notes: &Notes) -> Option<NetworkNamespace> {
    let is_same = |netns: &NetworkNamespace| netns.inode() == notes.netns_inode;
    let by_path = NetworkNamespace::open(notes.netns.as_ref()).ok();
    by_path.filter(is_same).or_else(|| {
        let processes = Cgroup::open(&notes.cgroup).ok()?.processes().ok()?;
        processes
            .into_iter()
            .filter_map(|pid| NetworkNamespace::of_process(pid).ok())
            .find(is_same)
    })
}
