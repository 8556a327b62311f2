//! Virtual machines behind interfaces of a pod (`-k`): filters on those interfaces.
//!
//! A filter has no link that could be pinned: it stays with its interface. So what is wanted is
//! compared with what the kernel shows, and what has to be undone is written to `INTERFACES` before
//! it is done. All of it can be repeated after a kill.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::programs::links::Link as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact,
};
use aya::programs::{SchedClassifier, TcAttachType};
use redirect_common::address::Address;
use redirect_common::virtual_machine::{Interface, InterfaceKey};

use crate::full::written;
use crate::observe::interfaces::filters::{self, Direction, Filter};
use crate::observe::interfaces::{self, Layer};
use crate::observe::netns::NetworkNamespace;
use crate::options::InterfacePattern;
use crate::pins::{self, Pins};
use crate::programs::{self, Entered, Need, Programs};
use crate::record::Notes;
use crate::sys::bpf::{self, Kind};
use crate::tables::Tables;

/// Where our filters are among those of an interface. Nobody else is likely to use it; ours come
/// before those whose priority the kernel chooses.
const PRIORITY: u16 = 15_001;
/// Number of our filter in that priority.
const HANDLE: u32 = 1;

const ETHERNET_HEADER: u32 = 14;

/// Interfaces of one namespace with entries: a sixteenth of `INTERFACES`, as no pod is to take the room of the others.
const MOST_INTERFACES: usize = 256;
/// So many that cannot be captured are named.
const MOST_WARNINGS: usize = 4;

/// Program of each side.
const PROGRAMS: [(Direction, Entered); 2] = [
    (Direction::Egress, Entered::MachineEgress),
    (Direction::Ingress, Entered::MachineIngress),
];

/// An interface that the options name, and whether it has both filters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// False until the next attach.
    pub filtered: bool,
}

/// Puts filters on the loopback interface of a namespace that is given up afterwards, to see whether the kernel takes them.
pub fn rehearse(pins: &Pins, programs: &Programs<'_>, netns: &NetworkNamespace) -> Result<()> {
    let pinned = entries(pins, programs, netns.cookie()?)?;
    let found = interfaces::interfaces(netns)?;
    let lo = found.iter().find(|found| found.name == "lo");
    let lo = lo.context("a new network namespace has no lo")?;
    netns.run_inside(|| put_filters(&pinned, lo, false))??;
    Ok(())
}

/// Puts filters on the interfaces that match. True if anything changed.
pub fn add(
    pins: &Pins,
    programs: &Programs<'_>,
    tables: &Tables,
    netns: &NetworkNamespace,
    patterns: &[InterfacePattern],
) -> Result<bool> {
    if patterns.is_empty() {
        return Ok(false);
    }
    let netns_cookie = netns.cookie()?;
    let all = interfaces::interfaces(netns)?;
    let known = known_of(tables, netns_cookie, &all)?;
    let wanted = matching(all, patterns);
    for pattern in patterns {
        if !wanted.iter().any(|found| pattern.matches(&found.name)) {
            tracing::warn!(
                "--kube-virt-interfaces: no interface {pattern} in {netns} yet: attach again when it is there"
            );
        }
    }
    let pinned = entries(pins, programs, netns_cookie)?;
    let mut changed = false;
    let (usable, unusable): (Vec<_>, Vec<_>) =
        wanted.iter().partition(|found| found.layer != Layer::Other);
    for found in unusable.iter().take(MOST_WARNINGS) {
        tracing::warn!(
            "--kube-virt-interfaces: {} is neither an Ethernet nor an IP interface: its machines are not captured",
            found.name
        );
    }
    let (old, new): (Vec<_>, Vec<_>) = usable
        .into_iter()
        .partition(|found| known.contains(&found.index));
    let room = MOST_INTERFACES.saturating_sub(old.len());
    for found in old.into_iter().chain(new.iter().copied().take(room)) {
        changed |= on_interface(netns, found, || {
            add_one(tables, netns_cookie, &pinned, found)
        })?;
    }
    if new.len() > room {
        tracing::warn!(
            "--kube-virt-interfaces: {netns} has room for {MOST_INTERFACES} interfaces: machines behind {} more are not captured",
            new.len() - room
        );
    }
    Ok(changed)
}

/// Takes everything of ours from interfaces that match none of the patterns. True if anything
/// changed.
pub fn remove_others(
    tables: &Tables,
    netns: &NetworkNamespace,
    patterns: &[InterfacePattern],
) -> Result<bool> {
    let netns_cookie = netns.cookie()?;
    let mut changed = false;
    let known = known(tables, netns_cookie)?;
    if known.is_empty() {
        return Ok(false);
    }
    let there = interfaces::interfaces(netns)?;
    for key in known {
        let found = there.iter().find(|found| found.index == key.index);
        if let Some(found) = found {
            if patterns.iter().any(|pattern| pattern.matches(&found.name)) {
                continue;
            }
            on_interface(netns, found, || remove_one(tables, &key, &found.name))?;
        }
        tables
            .interfaces
            .remove(&key)
            .context("writing INTERFACES")?;
        changed = true;
    }
    Ok(changed)
}

/// Forgets everything about a namespace's interfaces and machines. The filters go too, if the
/// namespace can be entered; they do nothing any more where it cannot.
pub fn forget(pins: &Pins, tables: &Tables, notes: &Notes) -> Result<()> {
    let netns_cookie = notes.netns_cookie;
    let interfaces = known(tables, netns_cookie)?;
    if !interfaces.is_empty() {
        match NetworkNamespace::find(netns_cookie, Path::new(&notes.netns)) {
            Some(netns) => drop(remove_others(tables, &netns, &[])?),
            None => tracing::info!(
                "network namespace {} is gone or nobody is in it: its interfaces are left alone",
                notes.netns
            ),
        }
    }
    for key in interfaces {
        let removed = tables.interfaces.remove(&key);
        removed.context("writing INTERFACES")?;
    }
    let flows = tables.machine_flows.keys();
    for flow in flows.context("reading MACHINE_FLOWS")? {
        if flow.netns_cookie == netns_cookie {
            let removed = tables.machine_flows.remove(&flow);
            removed.context("writing MACHINE_FLOWS")?;
        }
    }
    let suffix = suffix(netns_cookie);
    for path in pins.all_program_pins()? {
        if path.to_string_lossy().ends_with(&suffix) {
            std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

/// The interfaces that match a pattern, with what is on them.
pub fn inspect(
    pins: &Pins,
    netns: &NetworkNamespace,
    patterns: &[InterfacePattern],
) -> Result<Vec<Found>> {
    let netns_cookie = netns.cookie()?;
    let ids = PROGRAMS.map(|(_, program)| {
        pins.all_program_pins()
            .unwrap_or_default()
            .iter()
            .filter(|path| path.ends_with(pin_name(program, netns_cookie)))
            .filter_map(|path| bpf::open_pinned(path, Kind::Program).ok())
            .filter_map(|program| bpf::program_id(program.as_fd()).ok())
            .collect::<Vec<_>>()
    });
    let mut answer = Vec::new();
    for found in matching(interfaces::interfaces(netns)?, patterns) {
        let filtered = PROGRAMS.iter().zip(&ids).all(|((direction, _), ids)| {
            let filters = netns.run_inside(|| filters::filters(found.index, *direction));
            let filters = filters.ok().and_then(Result::ok).unwrap_or_default();
            filters.iter().any(|filter| {
                is_ours(filter) && filter.program_id.is_some_and(|id| ids.contains(&id))
            })
        });
        answer.push(Found {
            name: found.name,
            filtered,
        });
    }
    Ok(answer)
}

fn known(tables: &Tables, netns_cookie: u64) -> Result<Vec<InterfaceKey>> {
    let mut keys = tables.interfaces.keys().context("reading INTERFACES")?;
    keys.retain(|key| key.netns_cookie == netns_cookie);
    Ok(keys)
}

/// Indexes of the interfaces with entries. Entries of those that have gone are removed.
fn known_of(
    tables: &Tables,
    netns_cookie: u64,
    there: &[interfaces::Interface],
) -> Result<HashSet<u32>> {
    let is_there = |key: &InterfaceKey| there.iter().any(|found| found.index == key.index);
    let (known, gone): (Vec<_>, Vec<_>) =
        known(tables, netns_cookie)?.into_iter().partition(is_there);
    for key in gone {
        let removed = tables.interfaces.remove(&key);
        removed.context("writing INTERFACES")?;
    }
    Ok(known.iter().map(|key| key.index).collect())
}

fn matching(
    mut all: Vec<interfaces::Interface>,
    patterns: &[InterfacePattern],
) -> Vec<interfaces::Interface> {
    // Nothing comes in by `lo`: what the pod sends to itself is decided when it is sent.
    all.retain(|found| {
        found.name != "lo" && patterns.iter().any(|pattern| pattern.matches(&found.name))
    });
    all
}

/// Works on an interface, inside its namespace. One that goes meanwhile is not missed: everything on it goes too.
fn on_interface<T: Default + Send>(
    netns: &NetworkNamespace,
    interface: &interfaces::Interface,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let done = netns.run_inside(work)?;
    let is_there = |found: &interfaces::Interface| found.index == interface.index;
    if done.is_err() && !interfaces::interfaces(netns)?.iter().any(is_there) {
        return Ok(T::default());
    }
    done.with_context(|| format!("interface {}", interface.name))
}

/// Runs inside the namespace.
fn add_one(
    tables: &Tables,
    netns_cookie: u64,
    pinned: &[PathBuf; 2],
    found: &interfaces::Interface,
) -> Result<bool> {
    let key = InterfaceKey::new(netns_cookie, found.index);
    let observed = tables.interfaces.get(&key)?;
    let has_clsact = filters::has_clsact(found.index).context("listing qdiscs")?;
    let wanted = Interface {
        ipv4: found.ipv4.map_or(Address::UNSPECIFIED, |ip| {
            Address::from(std::net::IpAddr::from(ip))
        }),
        ipv6: found.ipv6.map_or(Address::UNSPECIFIED, |ip| {
            Address::from(std::net::IpAddr::from(ip))
        }),
        ipv6_link_local: found.ipv6_link_local.map_or(Address::UNSPECIFIED, |ip| {
            Address::from(std::net::IpAddr::from(ip))
        }),
        link_header: match found.layer {
            Layer::Ethernet => ETHERNET_HEADER,
            _ => 0,
        },
        qdisc_is_ours: match observed {
            Some(observed) if has_clsact => observed.qdisc_is_ours,
            _ => u32::from(!has_clsact),
        },
    };
    let mut changed = false;
    if observed != Some(wanted) {
        written("INTERFACES", tables.interfaces.set(&key, &wanted))?;
        changed = true;
    }
    changed |= put_filters(pinned, found, has_clsact)?;
    Ok(changed)
}

fn put_filters(
    pinned: &[PathBuf; 2],
    found: &interfaces::Interface,
    has_clsact: bool,
) -> Result<bool> {
    if !has_clsact {
        qdisc_add_clsact(&found.name).context("adding a clsact qdisc")?;
    }
    let mut changed = !has_clsact;
    for ((direction, _), path) in PROGRAMS.iter().zip(pinned) {
        changed |= put_filter(found, *direction, path)
            .with_context(|| format!("adding the {direction:?} filter"))?;
    }
    Ok(changed)
}

fn put_filter(found: &interfaces::Interface, direction: Direction, pinned: &Path) -> Result<bool> {
    let wanted = bpf::program_id(pins::open_existing(pinned, Kind::Program)?.as_fd())?;
    let there = filters::filters(found.index, direction).context("listing filters")?;
    let there = there.into_iter().find(is_ours);
    if there.is_some_and(|filter| filter.program_id == Some(wanted)) {
        return Ok(false);
    }
    let mut program = SchedClassifier::from_pin(pinned)?;
    let link = if there.is_some() {
        program.attach_to_link(our_link(&found.name, direction)?)?
    } else {
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: PRIORITY,
            handle: TcHandle::from(HANDLE),
            classid: None,
        });
        program.attach_with_options(&found.name, attach_type(direction), options)?
    };
    // It stays when this process ends.
    std::mem::forget(program.take_link(link)?);
    Ok(true)
}

/// Runs inside the namespace.
fn remove_one(tables: &Tables, key: &InterfaceKey, name: &str) -> Result<()> {
    if !filters::has_clsact(key.index).context("listing qdiscs")? {
        return Ok(());
    }
    let mut others = false;
    for direction in [Direction::Ingress, Direction::Egress] {
        let there = filters::filters(key.index, direction).context("listing filters")?;
        others |= there.iter().any(|filter| !is_ours(filter));
        if there.iter().any(is_ours) {
            our_link(name, direction)?
                .detach()
                .with_context(|| format!("removing the {direction:?} filter"))?;
        }
    }
    let ours = tables
        .interfaces
        .get(key)?
        .is_some_and(|it| it.qdisc_is_ours != 0);
    if ours && !others {
        filters::remove_clsact(key.index).context("removing the clsact qdisc")?;
    }
    Ok(())
}

fn is_ours(filter: &Filter) -> bool {
    filter.priority == PRIORITY && filter.handle == HANDLE
}

fn our_link(name: &str, direction: Direction) -> io::Result<SchedClassifierLink> {
    let handle = TcHandle::from(HANDLE);
    SchedClassifierLink::attached(name, attach_type(direction), PRIORITY, handle, None)
}

fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::Ingress => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    }
}

/// Pins of the namespace's entries to the programs of this build. Every cgroup in the namespace uses
/// them: they are loaded if they are not there.
fn entries(pins: &Pins, programs: &Programs<'_>, netns_cookie: u64) -> Result<[PathBuf; 2]> {
    let directory = pins.programs(programs::build_id(), Need::Always);
    let paths = PROGRAMS.map(|(_, program)| directory.join(pin_name(program, netns_cookie)));
    for ((_, program), path) in PROGRAMS.iter().zip(&paths) {
        if !path.exists() {
            let entry = programs.load_entry(netns_cookie, *program)?;
            bpf::pin(entry.as_fd(), path).with_context(|| format!("pinning {}", path.display()))?;
        }
    }
    Ok(paths)
}

fn pin_name(program: Entered, netns_cookie: u64) -> String {
    format!("{}{}", program.program(), suffix(netns_cookie))
}

fn suffix(netns_cookie: u64) -> String {
    format!("-{netns_cookie:x}")
}
