//! Attaching a pod: everything is prepared first, then one map update begins the capture.
//!
//! State is a difference of wanted against observed, so that attaching for the first time, changing
//! the policy, upgrading and repairing after a kill are the same steps.

mod hand_over;
mod settled;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use redirect_common::POLICY_LAYOUT_VERSION;
use redirect_common::pod::PodConfig;
use redirect_common::route::RouteInfo;
use redirect_common::verdict::COUNTERS;

use self::hand_over::{find_listeners, warn_about_listeners};
pub use self::settled::is_settled;
use crate::collect;
use crate::detach;
use crate::full::written;
use crate::kernel;
use crate::layouts;
use crate::machines;
use crate::observe::cgroup::Cgroup;
use crate::observe::identity::{IdMap, UserNamespace};
use crate::observe::interfaces::{Interface, interfaces};
use crate::observe::listeners::Among;
use crate::observe::netns::NetworkNamespace;
use crate::observe::routes::{
    Family, MOST_ENTRIES, RoutingTable, first_global_family, routing_table,
};
use crate::options::{Ipv6, Policy};
use crate::pins::{self, Pins};
use crate::programs::{self, Entered, HOOKS, Hook, Need, Programs, SK_LOOKUP, Side};
use crate::proxy::ProxyIdentity;
use crate::record::{KubernetesPod, Notes};
use crate::settings;
use crate::sys::bpf::{self, Kind};
use crate::tables::{RoutePrefix, Tables};
use crate::tproxy::{self, Change};

/// What to attach.
#[derive(Debug)]
pub struct Request {
    /// Whose connections are captured.
    pub cgroup: Cgroup,
    /// Where the proxy runs: the same cgroup (None), or one above it.
    pub proxy_cgroup: Option<File>,
    /// The network namespace of both.
    pub netns: NetworkNamespace,
    /// The process that removes it again, if it is not to outlive that one.
    pub run_by: Option<i32>,
    /// The Kubernetes pod, if the node's daemon attaches it.
    pub pod: Option<KubernetesPod>,
    /// What is captured.
    pub policy: Policy,
    /// Who is the proxy.
    pub proxy: ProxyIdentity,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Capture has begun.
    Attached,
    /// The pod was attached; its policy, addresses or programs have changed.
    Changed,
    /// The pod was attached just so.
    Unchanged,
}

impl Outcome {
    /// In one word, for people and for metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
        }
    }
}

/// What a request comes to, as far as the pod tells.
struct Wanted {
    /// Without what only attaching tells: changes, counters and routes.
    notes: Notes,
    ids: IdMap,
    interfaces: Vec<Interface>,
}

impl Wanted {
    fn of(request: &Request) -> Result<Self> {
        let ipv6 = captures_ipv6(&request.policy, &request.netns)?;
        let ids = UserNamespace::owning(&request.netns)?.id_map()?;
        if !request.policy.exclude_interfaces.is_empty() && !kernel::tells_ingress_interface()? {
            bail!(
                "--istio-exclude-interfaces: needs Linux 5.17, where programs can read the interface a packet came by"
            );
        }
        let interfaces = interfaces(&request.netns)?;
        let notes = Notes {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build: programs::build_id(),
            cgroup: request.cgroup.path().to_owned(),
            netns: request.netns.name().to_owned(),
            netns_cookie: request.netns.cookie()?,
            layout: POLICY_LAYOUT_VERSION,
            counted_before: Vec::new(),
            netns_inode: request.netns.inode(),
            ipv6,
            run_by: request.run_by,
            changes: Vec::new(),
            pod: request.pod.clone(),
            // Room for any.
            routes: u64::MAX,
            policy: request.policy.clone(),
            proxy: request.proxy.clone(),
        };
        Ok(Self {
            notes,
            ids,
            interfaces,
        })
    }

    /// The pod's settings under that policy.
    fn config(
        &self,
        policy: &Policy,
        proxy: &ProxyIdentity,
        ipv6: bool,
        table: &RoutingTable,
    ) -> Result<PodConfig> {
        settings::pod_config(policy, proxy, ipv6, &self.ids, &self.interfaces, table)
    }
}

/// Attaches, or brings what is attached up to date.
pub fn attach(request: &Request) -> Result<Outcome> {
    let wanted = Wanted::of(request)?;
    let mut notes = wanted.notes.clone();
    let ipv6 = notes.ipv6;
    // Routes are read when the namespace has what TPROXY needs. All else that may be refused, now.
    let unrouted = wanted.config(
        &request.policy,
        &request.proxy,
        ipv6,
        &RoutingTable::default(),
    )?;
    notes.encode()?;

    let pins = Pins::open()?;
    let cgroup_id = request.cgroup.id();
    let programs = Programs::open_or_load(&pins, &needs(request, &pins.pod(cgroup_id)))?;
    let tables = Tables::open(&pins)?;
    let mut noted = collect::gone(&pins, &tables)?.but_for(cgroup_id)?;
    refuse_overlap(&tables, &noted, request, &notes, &unrouted)?;

    let own = noted.iter().position(|(id, _)| *id == cgroup_id);
    let mut attached = own.map(|own| noted.swap_remove(own).1);
    if attached
        .as_ref()
        .is_some_and(|attached| attached.netns_cookie != notes.netns_cookie)
    {
        // The cgroup has moved to another network namespace: `sk_lookup` hangs on the old one.
        detach::one(&pins, &tables, cgroup_id, &noted)?;
        attached = None;
    }
    let known = pins.pod(cgroup_id).is_dir();
    if let Some(attached) = &attached {
        notes.layout = attached.layout;
        notes.counted_before.clone_from(&attached.counted_before);
    }
    // Programs of another layout of the maps run until they are replaced: these are their notes.
    let taken_over = attached
        .as_ref()
        .filter(|attached| attached.layout != POLICY_LAYOUT_VERSION);
    if taken_over.is_some() {
        // Room for the counters that are written down then.
        let counted_before = vec![u64::MAX; COUNTERS];
        Notes {
            counted_before,
            ..notes.clone()
        }
        .encode()?;
    }
    let made = changes_made(attached.as_ref(), &noted, &notes);
    notes.changes = tproxy::plan(&request.netns, &request.policy, ipv6, &made)?;
    let obsolete: Vec<_> = made
        .into_iter()
        .filter(|change| !notes.changes.contains(change))
        .collect();
    let record = notes.encode()?;
    let steps = || -> Result<Outcome> {
        let mut changed = !obsolete.is_empty();
        if !known {
            // First of all, so that what comes next is found and removed if this call is killed.
            written("RECORDS", tables.records.set(&cgroup_id, &record))?;
        }
        note_changes(&tables, cgroup_id, &notes, &obsolete)?;
        changed |= tproxy::make(&request.netns, &notes.changes)?;
        for (key, value) in settings::list_entries(&request.policy) {
            written("LISTS", tables.lists.set(&key, &value))?;
        }
        let table = routing_table(&request.netns)?;
        if table.left_out {
            tracing::warn!(
                "network namespace {} has more routes or addresses than are kept for one: some are left out, and what they lead to is captured as what is around it",
                request.netns
            );
        }
        let routes = settings::route_entries(notes.netns_cookie, &table);
        changed |= sync_routes(&tables, &notes, &routes)?;
        let notes = Notes {
            routes: settings::routes_digest(&routes),
            ..notes.clone()
        };
        let config = wanted.config(&request.policy, &request.proxy, ipv6, &table)?;
        written("COUNTS", tables.counts.insert_zeroed(&notes.netns_cookie))?;
        let found = find_listeners(&tables, request, &notes, &config, Among::All)?;
        if let Some(attached) = taken_over {
            let config = wanted.config(&attached.policy, &attached.proxy, attached.ipv6, &table)?;
            layouts::enter(&tables, attached, &config)?;
        }
        changed |= link(&pins, &programs, request, &notes, attached.as_ref())?;
        let before = tables.pods.get(&notes.netns_cookie)?;
        let kept = notes.with_also(&obsolete);
        if attached.as_ref() != Some(&kept) {
            written("RECORDS", tables.records.set(&cgroup_id, &kept.encode()?))?;
            changed = true;
        }
        // After the notes: they tell detach where the filters are.
        changed |= machines::add(
            &pins,
            &programs,
            &tables,
            &request.netns,
            &request.policy.virtual_interfaces,
        )?;
        if before != Some(config) {
            written("PODS", tables.pods.set(&notes.netns_cookie, &config))?;
            changed = true;
            // A proxy may have begun to listen before its port was known to the sockops program.
            find_listeners(&tables, request, &notes, &config, Among::All)?;
        }
        // Only now: until the policy is written these interfaces are captured by the old one.
        changed |=
            machines::remove_others(&tables, &request.netns, &request.policy.virtual_interfaces)?;
        if !obsolete.is_empty() {
            tproxy::take_back(&request.netns, &obsolete)?;
        }
        if let Some(attached) = taken_over {
            let entered = layouts::entered(&pins, attached, notes.clone())?;
            written(
                "RECORDS",
                tables.records.set(&cgroup_id, &entered.encode()?),
            )?;
        } else if !obsolete.is_empty() {
            written("RECORDS", tables.records.set(&cgroup_id, &notes.encode()?))?;
        }
        // Also after a call that was killed here.
        layouts::leave(&pins, &notes, &noted)?;
        warn_about_listeners(&found, &request.policy);
        Ok(match (known && before.is_some(), changed) {
            (false, _) => Outcome::Attached,
            (true, true) => Outcome::Changed,
            (true, false) => Outcome::Unchanged,
        })
    };
    match steps() {
        Ok(outcome) => {
            // Whatever the outcome: a call that was killed, or a pod that has gone, may have left something.
            collect::unused_lists(&tables)?;
            collect::unused_builds(&pins, &noted, true)?;
            Ok(outcome)
        }
        Err(error) => {
            // Best effort: the error that matters is the first one.
            let unstaged = pins.remove_staging();
            let undone = if known {
                unstaged
            } else {
                unstaged.and(detach::one(&pins, &tables, cgroup_id, &noted))
            };
            // What was written for a policy that no pod has now.
            if let Err(undo) = undone.and_then(|()| collect::unused_lists(&tables)) {
                tracing::warn!("undoing the attachment: {undo:#}");
            }
            // What the kernel says then names no path.
            if !request.cgroup.path().exists() {
                return Err(error.context(format!("cgroup {} has gone", request.cgroup)));
            }
            Err(error)
        }
    }
}

/// What the request needs, and what is linked already: `links` is where those of the pod are pinned.
fn needs(request: &Request, links: &Path) -> Vec<Need> {
    let is_linked = |need: Need| {
        let mut hooks = HOOKS.iter().filter(|hook| hook.need == need);
        hooks.any(|hook| links.join(hook.name).exists())
    };
    Need::ALL
        .into_iter()
        .filter(|need| need.is_of(&request.policy) || is_linked(*need))
        .collect()
}

/// What was made in the namespace for this cgroup, or for one of the `others` that shares it.
fn changes_made(attached: Option<&Notes>, others: &[(u64, Notes)], notes: &Notes) -> Vec<Change> {
    // The cgroup's own notes first: those of the others are copies.
    attached
        .into_iter()
        .chain(others.iter().map(|(_, other)| other))
        .find(|known| known.netns_cookie == notes.netns_cookie && !known.changes.is_empty())
        .map(|known| known.changes.clone())
        .unwrap_or_default()
}

/// Writes down what is about to be made, so that it is taken back even after a kill. The rest of the
/// notes stays as it was: nothing else has changed yet.
fn note_changes(tables: &Tables, cgroup_id: u64, notes: &Notes, obsolete: &[Change]) -> Result<()> {
    let changes = notes.with_also(obsolete).changes;
    let known = Notes::read(tables, cgroup_id)?;
    if known
        .as_ref()
        .map(|known| &known.changes)
        .unwrap_or(&Vec::new())
        == &changes
    {
        return Ok(());
    }
    let ahead = Notes {
        changes,
        // Of no build: its programs are not attached yet.
        ..known.unwrap_or(Notes {
            build: 0,
            ..notes.clone()
        })
    };
    written("RECORDS", tables.records.set(&cgroup_id, &ahead.encode()?))
}

/// Whether IPv6 is captured, by the policy and the namespace's addresses.
pub fn captures_ipv6(policy: &Policy, netns: &NetworkNamespace) -> Result<bool> {
    Ok(match policy.ipv6 {
        Ipv6::On => true,
        Ipv6::Off => false,
        Ipv6::Auto => first_global_family(netns, false)? == Family::V6,
        Ipv6::DualStack => first_global_family(netns, true)? == Family::V6,
    })
}

/// A connection must meet each program once, and a network namespace has one policy.
fn refuse_overlap(
    tables: &Tables,
    noted: &[(u64, Notes)],
    request: &Request,
    notes: &Notes,
    config: &PodConfig,
) -> Result<()> {
    let relatives = request.cgroup.relatives()?;
    for (cgroup_id, other) in noted {
        if *cgroup_id == request.cgroup.id() {
            continue;
        }
        let theirs = other.cgroup.display();
        if relatives.contains(cgroup_id) {
            bail!(
                "--cgroup {}: overlaps {theirs}, which is attached; detach that first",
                request.cgroup,
            );
        }
        let same_pod = other.netns_cookie == notes.netns_cookie;
        let same_options = other.policy.mode == notes.policy.mode
            && other.policy.virtual_interfaces == notes.policy.virtual_interfaces
            && tables
                .pods
                .get(&notes.netns_cookie)?
                .is_none_or(|mut attached| {
                    // Not an option, but what was observed.
                    attached.foreign_buckets = config.foreign_buckets;
                    attached == *config
                });
        if same_pod && !same_options {
            bail!(
                "network namespace {} is captured with other options for cgroup {theirs}; use the same or detach that first",
                request.netns,
            );
        }
    }
    Ok(())
}

/// Writes the namespace's routes and removes those that have gone. True if anything changed.
fn sync_routes(
    tables: &Tables,
    notes: &Notes,
    wanted: &HashMap<RoutePrefix, RouteInfo>,
) -> Result<bool> {
    let observed: HashSet<_> = detach::routes_of(tables, notes.netns_cookie)?
        .into_iter()
        .collect();
    let obsolete: Vec<_> = observed
        .iter()
        .filter(|key| !wanted.contains_key(key))
        .collect();
    let remove = || -> Result<()> {
        let mut keys = obsolete.iter();
        keys.try_for_each(|key| tables.routes.remove(key).context("writing ROUTES"))
    };
    let mut changed = !obsolete.is_empty();
    // Last, so that no destination is unknown meanwhile; but while there are two sets of routes, they share the pod's room.
    let is_crowded = obsolete.len() + wanted.len() > MOST_ENTRIES;
    if is_crowded {
        remove()?;
    }
    for (key, info) in wanted {
        if !observed.contains(key) || tables.routes.get(key)? != Some(*info) {
            written("ROUTES", tables.routes.set(key, info))?;
            changed = true;
        }
    }
    if !is_crowded {
        remove()?;
    }
    Ok(changed)
}

/// Attaches the programs that are missing, and updates those of another build than the one in the
/// notes on what is `attached`. True if anything changed.
fn link(
    pins: &Pins,
    programs: &Programs<'_>,
    request: &Request,
    notes: &Notes,
    attached: Option<&Notes>,
) -> Result<bool> {
    let directory = pins.pod(request.cgroup.id());
    if directory.is_dir() {
        let same_build = attached.is_some_and(|attached| attached.build == notes.build);
        let lookup = pins::open_existing(&directory.join(SK_LOOKUP), Kind::Link)?;
        let mut changed = false;
        for hook in HOOKS {
            let path = directory.join(hook.name);
            if let Some(link) = pins::open_link(&path)? {
                if !same_build {
                    programs.update(hook, &link)?;
                }
            } else if let Some(cgroup) = cgroup_of(hook, request) {
                bpf::pin(programs.attach(hook, cgroup)?.as_fd(), &path)
                    .with_context(|| format!("pinning link {}", hook.name))?;
                changed = true;
            }
        }
        if !same_build {
            let program = programs.load_entry(notes.netns_cookie, Entered::SkLookup)?;
            bpf::link_update(lookup.as_fd(), program.as_fd()).context("updating link sk_lookup")?;
            changed = true;
        }
        return Ok(changed);
    }
    let staged = pins.stage()?;
    let pin = |link: OwnedFd, name: &str| {
        bpf::pin(link.as_fd(), &staged.join(name)).with_context(|| format!("pinning link {name}"))
    };
    let program = programs.load_entry(notes.netns_cookie, Entered::SkLookup)?;
    pin(
        programs::attach_sk_lookup(&program, &request.netns)?,
        SK_LOOKUP,
    )?;
    for hook in HOOKS {
        if let Some(cgroup) = cgroup_of(hook, request) {
            pin(programs.attach(hook, cgroup)?, hook.name)?;
        }
    }
    pins.publish(&staged, &directory)?;
    Ok(true)
}

/// Where a hook is to be attached; None if this pod does not need it.
fn cgroup_of<'a>(hook: &Hook, request: &'a Request) -> Option<BorrowedFd<'a>> {
    if !hook.need.is_of(&request.policy) {
        return None;
    }
    let own = request.cgroup.as_fd();
    let proxy = request.proxy_cgroup.as_ref().map(AsFd::as_fd);
    match hook.side {
        Side::Client => Some(own),
        Side::Proxy => Some(proxy.unwrap_or(own)),
        Side::ProxyElsewhere => proxy,
    }
}
