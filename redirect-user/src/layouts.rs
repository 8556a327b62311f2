//! Pods that a build with another layout of the renewed maps ([`tables::RENEWED`](crate::tables::RENEWED)) has attached, and
//! taking them over.
//!
//! The order: this build's maps are filled with the pod's policy, each link gets this build's program in one step, and only
//! then the other build's entries go. Whatever program a connection meets meanwhile, old or new, finds the same policy in its
//! own maps, and the connection itself in the maps that all builds share.

use std::path::Path;

use anyhow::{Context, Result};
use redirect_common::POLICY_LAYOUT_VERSION;
use redirect_common::pod::PodConfig;
use redirect_common::verdict::Rule;

use crate::full::written;
use crate::pins::Pins;
use crate::record::Notes;
use crate::settings;
use crate::sys::bpf::{self, OtherTable};
use crate::tables::{self, Tables};

/// Whether connections of the pod are captured: false if an attach was interrupted.
pub(crate) fn is_capturing(pins: &Pins, tables: &Tables, notes: &Notes) -> Result<bool> {
    Ok(tables.pods.get(&notes.netns_cookie)?.is_some()
        || match other(pins, notes, "PODS")? {
            Some(pods) => pods.get(notes.netns_cookie)?.is_some(),
            None => false,
        })
}

/// What each rule has decided in the pod, whichever programs it ran.
pub(crate) fn connections(pins: &Pins, tables: &Tables, notes: &Notes) -> Result<Vec<(Rule, u64)>> {
    let own = tables.counts.get(&notes.netns_cookie)?;
    let before = counted_before(pins, notes)?;
    let count = |rule: Rule| {
        let number = rule as usize;
        let here: u64 = own.iter().map(|cpu| cpu[number]).sum();
        here + before.get(number).unwrap_or(&0)
    };
    Ok(Rule::ALL.iter().map(|rule| (*rule, count(*rule))).collect())
}

/// What has been counted in maps of other layouts, by number of the rule.
fn counted_before(pins: &Pins, notes: &Notes) -> Result<Vec<u64>> {
    let mut sums = notes.counted_before.clone();
    let Some(counts) = other(pins, notes, "COUNTS")? else {
        return Ok(sums);
    };
    let Some(values) = counts.get(notes.netns_cookie)? else {
        return Ok(sums);
    };
    for cpu in values.chunks_exact(values.len() / tables::possible_cpus()?) {
        // Another number of counters than this build's.
        sums.resize(sums.len().max(cpu.len() / size_of::<u64>()), 0);
        for (sum, count) in sums.iter_mut().zip(cpu.chunks_exact(size_of::<u64>())) {
            *sum += bytemuck::pod_read_unaligned::<u64>(count);
        }
    }
    Ok(sums)
}

/// Lets new connections of the pod alone.
pub(crate) fn let_alone(pins: &Pins, tables: &Tables, notes: &Notes) -> Result<()> {
    tables
        .pods
        .remove(&notes.netns_cookie)
        .context("writing PODS")?;
    if let Some(pods) = other(pins, notes, "PODS")? {
        pods.remove(notes.netns_cookie).context("writing PODS")?;
    }
    Ok(())
}

/// Makes this build's maps ready for programs that are put behind the pod's links: its policy is what it has been.
pub(crate) fn enter(tables: &Tables, notes: &Notes, config: &PodConfig) -> Result<()> {
    for (key, value) in settings::list_entries(&notes.policy) {
        written("LISTS", tables.lists.set(&key, &value))?;
    }
    written("PODS", tables.pods.set(&notes.netns_cookie, config))
}

/// The notes after the last link has got its program: with what was counted until then.
pub(crate) fn entered(pins: &Pins, before: &Notes, mut notes: Notes) -> Result<Notes> {
    // Programs of the other build that still run count too.
    bpf::wait_for_running_programs().context("membarrier")?;
    notes.counted_before = counted_before(pins, before)?;
    notes.layout = POLICY_LAYOUT_VERSION;
    Ok(notes)
}

/// Removes what programs of other builds went by, once none of them is attached. `others` are the notes on other cgroups,
/// which may share the namespace and still have such programs.
pub(crate) fn leave(pins: &Pins, notes: &Notes, others: &[(u64, Notes)]) -> Result<()> {
    for directory in pins.renewed_but(&[POLICY_LAYOUT_VERSION])? {
        let is_used = |other: &Notes| {
            other.netns_cookie == notes.netns_cookie && pins.renewed(other.layout) == directory
        };
        if others.iter().any(|(_, other)| is_used(other)) {
            continue;
        }
        for path in ["PODS", "COUNTS"].map(|name| directory.join(name)) {
            if let Some(map) = open(&path)? {
                map.remove(notes.netns_cookie)
                    .with_context(|| format!("writing {}", path.display()))?;
            }
        }
    }
    Ok(())
}

/// Unpins the maps of all layouts but those `used`: what pods are recorded with.
pub(crate) fn remove_unused(pins: &Pins, used: &[u32]) -> Result<()> {
    pins.renewed_but(used)?
        .iter()
        .try_for_each(|directory| pins.withdraw(directory))
}

/// The map of that name that the pod was attached with; None if it is this build's.
fn other(pins: &Pins, notes: &Notes, name: &str) -> Result<Option<OtherTable>> {
    if notes.layout == POLICY_LAYOUT_VERSION {
        return Ok(None);
    }
    open(&pins.renewed(notes.layout).join(name))
}

fn open(path: &Path) -> Result<Option<OtherTable>> {
    OtherTable::open(path, tables::possible_cpus()?)
        .with_context(|| format!("opening map {}", path.display()))
}
