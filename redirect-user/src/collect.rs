//! Collecting what nothing refers to any more: the kernel keeps a pinned link whose cgroup or
//! network namespace has gone.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Error, Result};
use redirect_common::POLICY_LAYOUT_VERSION;

use crate::detach;
use crate::layouts;
use crate::pins::{self, Pins};
use crate::programs::{self, HOOKS, Hook, SK_LOOKUP};
use crate::record::{self, Notes};
use crate::sys::bpf;
use crate::tables::Tables;

/// What came of removing pods: the notes on the others, and why some could not be removed.
pub(crate) struct Collected {
    /// Read once, since a node has many. Those on pods that could not be removed are among them.
    noted: Vec<(u64, Notes)>,
    failures: Vec<(u64, Error)>,
}

impl Collected {
    /// The notes. An error if this cgroup could not be removed; that another was not must not stop what is done for this one.
    pub(crate) fn but_for(self, cgroup_id: u64) -> Result<Vec<(u64, Notes)>> {
        for (failed, error) in self.failures {
            if failed == cgroup_id {
                return Err(error);
            }
            tracing::warn!("{error:#}");
        }
        Ok(self.noted)
    }

    /// The first failure; the others are told.
    pub(crate) fn result(self) -> Result<()> {
        let mut failures = self.failures.into_iter().map(|(_, error)| error);
        let first = failures.next();
        failures.for_each(|error| tracing::warn!("{error:#}"));
        first.map_or(Ok(()), Err)
    }
}

/// Removes pods whose cgroup or network namespace has gone, and notes without links.
pub(crate) fn gone(pins: &Pins, tables: &Tables) -> Result<Collected> {
    let linked: HashSet<u64> = pins.pods()?.into_iter().collect();
    let noted = record::all(tables)?;
    let left_over: HashSet<u64> = noted
        .iter()
        .filter(|(id, notes)| linked.contains(id) && is_left_over(notes))
        .map(|(id, _)| *id)
        .collect();
    let keys = tables.records.keys().context("reading RECORDS")?;
    let mut gone: Vec<u64> = keys.into_iter().filter(|id| !linked.contains(id)).collect();
    for cgroup_id in linked {
        let is_gone = match is_gone(pins, cgroup_id) {
            // Somebody else's pin in one pod's place is no reason to leave all others alone.
            Err(error) if pins::is_strange(&error) => {
                tracing::warn!("{error:#}");
                false
            }
            answer => answer?,
        };
        if left_over.contains(&cgroup_id) || is_gone {
            gone.push(cgroup_id);
        }
    }
    Ok(each(pins, tables, gone, noted))
}

/// Removes these pods, as far as it goes. `noted` are the notes on all that are attached.
pub(crate) fn each(
    pins: &Pins,
    tables: &Tables,
    pods: impl IntoIterator<Item = u64>,
    mut noted: Vec<(u64, Notes)>,
) -> Collected {
    let mut failures = Vec::new();
    for cgroup_id in pods {
        match detach::one(pins, tables, cgroup_id, &noted) {
            Ok(()) => noted.retain(|(id, _)| *id != cgroup_id),
            Err(error) => {
                failures.push((cgroup_id, error.context(detaching(&noted, cgroup_id))));
            }
        }
    }
    Collected { noted, failures }
}

/// What is said of a pod that could not be removed.
fn detaching(noted: &[(u64, Notes)], cgroup_id: u64) -> String {
    let notes = noted.iter().find(|(id, _)| *id == cgroup_id);
    let cgroup = notes.map(|(_, notes)| notes.cgroup.display().to_string());
    let cgroup = cgroup.unwrap_or_else(|| format!("number {cgroup_id}"));
    format!("detaching cgroup {cgroup}")
}

/// True if the kernel has cut the links off, or they are incomplete. An error is no answer: the pod may well be there.
pub(crate) fn is_gone(pins: &Pins, cgroup_id: u64) -> Result<bool> {
    let directory = pins.pod(cgroup_id);
    let is_cut_off = |name: &str, target| {
        let cut_off = pins::is_cut_off(&directory.join(name), target)?;
        Ok::<_, Error>(cut_off.unwrap_or(true))
    };
    Ok(is_cut_off("connect4", bpf::cgroup_link)? || is_cut_off(SK_LOOKUP, bpf::netns_link)?)
}

/// True if nothing of the pod has gone, and each of its hooks that is due has its link. A detach that was killed may have cut
/// off some.
pub(crate) fn is_linked(
    pins: &Pins,
    cgroup_id: u64,
    is_due: impl Fn(&Hook) -> bool,
) -> Result<bool> {
    let directory = pins.pod(cgroup_id);
    for hook in HOOKS.iter().filter(|hook| is_due(hook)) {
        if pins::is_cut_off(&directory.join(hook.name), bpf::cgroup_link)? != Some(false) {
            return Ok(false);
        }
    }
    Ok(!is_gone(pins, cgroup_id)?)
}

/// True for a command whose `redirect run` was killed, once the command itself has ended. Its empty
/// cgroup goes too.
fn is_left_over(notes: &Notes) -> bool {
    let Some(pid) = notes.run_by else {
        return false;
    };
    // Only an empty cgroup can be removed. Another run may have done so.
    let is_removed = || match fs::remove_dir(&notes.cgroup) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    };
    !Path::new("/proc").join(pid.to_string()).exists() && is_removed()
}

/// Removes what the maps hold of network namespaces that no notes tell of: those on them could not be read.
pub(crate) fn unnoted_namespaces(tables: &Tables, noted: &[(u64, Notes)]) -> Result<()> {
    let mut unnoted = tables.pods.keys().context("reading PODS")?;
    unnoted.retain(|cookie| !noted.iter().any(|(_, notes)| notes.netns_cookie == *cookie));
    for cookie in unnoted {
        tables.pods.remove(&cookie).context("writing PODS")?;
        detach::forget_namespace(tables, cookie)?;
    }
    Ok(())
}

/// Removes lists of policies that no pod has, once no program reads them any more.
pub(crate) fn unused_lists(tables: &Tables) -> Result<()> {
    let mut used = HashSet::new();
    for cookie in tables.pods.keys().context("reading PODS")? {
        if let Some(config) = tables.pods.get(&cookie)? {
            used.insert([config.policy as u32, (config.policy >> 32) as u32]);
        }
    }
    let mut unused = tables.lists.keys().context("reading LISTS")?;
    unused.retain(|key| !used.contains(&key.data.policy));
    if !unused.is_empty() {
        bpf::wait_for_running_programs().context("membarrier")?;
    }
    unused
        .iter()
        .try_for_each(|key| tables.lists.remove(key))
        .context("writing LISTS")
}

/// Unpins the programs of all builds, and the maps of all layouts, that no pod in `noted` is recorded with, and that this build
/// does not need itself. A link that still runs another program, since an upgrade was killed, keeps it.
pub(crate) fn unused_builds(pins: &Pins, noted: &[(u64, Notes)], needs_own: bool) -> Result<()> {
    let mut builds: Vec<u64> = noted.iter().map(|(_, notes)| notes.build).collect();
    let mut layouts: Vec<u32> = noted.iter().map(|(_, notes)| notes.layout).collect();
    if needs_own {
        builds.push(programs::build_id());
        layouts.push(POLICY_LAYOUT_VERSION);
    }
    pins.programs_but(&builds)?
        .iter()
        .try_for_each(|directory| pins.withdraw(directory))?;
    // After the programs: these would go on with maps that are no longer found.
    layouts::remove_unused(pins, &layouts)
}
