//! The pinned maps, with their types.

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use redirect_common::connection::{DestinationKey, FlowKey, Original, SocketState};
use redirect_common::dns::{DnsSlot, DnsSlotKey};
use redirect_common::listener::ListenerKey;
use redirect_common::lists::ListKey;
use redirect_common::log::Follower;
use redirect_common::pod::PodConfig;
use redirect_common::record::Record;
use redirect_common::route::{RouteInfo, RouteKey};
use redirect_common::verdict::COUNTERS;
use redirect_common::virtual_machine::{Interface, InterfaceKey, Translation};

use crate::pins::Pins;
use crate::sys::bpf::{PerCpuTable, Table};

/// Every map a loader reads or writes.
pub struct Tables {
    /// Settings, by network namespace cookie.
    pub pods: Table<u64, PodConfig>,
    /// Counters, by network namespace cookie.
    pub counts: PerCpuTable<u64, [u64; COUNTERS]>,
    /// Membership lists of all policies.
    pub lists: Table<ListPrefix, u8>,
    /// Routes of all pods.
    pub routes: Table<RoutePrefix, RouteInfo>,
    /// What the steered ports stand for.
    pub destinations: Table<DestinationKey, Original>,
    /// What the slot addresses of DNS queries stand for.
    pub dns_slots: Table<DnsSlotKey, DnsSlot>,
    /// Connections on their way to the proxy.
    pub flows: Table<FlowKey, Original>,
    /// Interfaces with virtual machines behind them.
    pub interfaces: Table<InterfaceKey, Interface>,
    /// Connections that virtual machines make.
    pub machine_flows: Table<FlowKey, Translation>,
    /// The proxies' listeners; the value is a descriptor.
    pub listeners: Table<ListenerKey, u32>,
    /// What sockets remember; the key is a descriptor.
    pub sockets: Table<u32, SocketState>,
    /// The loader's notes, by cgroup id.
    pub records: Table<u64, Record>,
    /// Who reads messages and decisions, by `FOLLOWER_` number.
    pub followers: Table<u32, Follower>,
}

/// Key of `LISTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ListPrefix {
    /// Bits of `data` that count.
    pub prefix_bits: u32,
    /// What is matched.
    pub data: ListKey,
}

/// Key of `ROUTES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct RoutePrefix {
    /// Bits of `data` that count.
    pub prefix_bits: u32,
    /// What is matched.
    pub data: RouteKey,
}

/// Names of the maps that every build shares, since established connections and other loaders rely on
/// them. Names are those in the object and of the pins.
pub const KEPT: &[&str] = &[
    "DESTINATIONS",
    "DNS_SLOTS",
    "FLOWS",
    "INTERFACES",
    "MACHINE_FLOWS",
    "LISTENERS",
    "SOCKETS",
    "RECORDS",
];

/// Names of the maps that builds of the same [`POLICY_LAYOUT_VERSION`](redirect_common::POLICY_LAYOUT_VERSION)
/// share. An upgrade to another one fills new ones.
pub const RENEWED: &[&str] = &[
    "PODS",
    "COUNTS",
    "LISTS",
    "ROUTES",
    "NETNS",
    "FOLLOWERS",
    "DECISIONS",
    "AYA_LOGS",
];

impl Tables {
    /// Opens the pinned maps. Those that an upgrade renews are empty if only builds of another layout have attached pods.
    pub fn open(pins: &Pins) -> Result<Self> {
        Ok(Self {
            pods: open_or_empty(pins, "PODS")?,
            counts: PerCpuTable::open_or_empty(&pins.map("COUNTS"), possible_cpus()?)
                .context("opening map COUNTS")?,
            lists: open_or_empty(pins, "LISTS")?,
            routes: open_or_empty(pins, "ROUTES")?,
            destinations: open(pins, "DESTINATIONS")?,
            dns_slots: open(pins, "DNS_SLOTS")?,
            flows: open(pins, "FLOWS")?,
            interfaces: open(pins, "INTERFACES")?,
            machine_flows: open(pins, "MACHINE_FLOWS")?,
            listeners: open(pins, "LISTENERS")?,
            sockets: open(pins, "SOCKETS")?,
            records: open(pins, "RECORDS")?,
            followers: open_or_empty(pins, "FOLLOWERS")?,
        })
    }
}

fn open<K: Pod, V: Pod>(pins: &Pins, name: &str) -> Result<Table<K, V>> {
    let path = pins.map(name);
    Table::open(&path).with_context(|| format!("opening map {}", path.display()))
}

fn open_or_empty<K: Pod, V: Pod>(pins: &Pins, name: &str) -> Result<Table<K, V>> {
    let path = pins.map(name);
    Table::open_or_empty(&path).with_context(|| format!("opening map {}", path.display()))
}

/// How many values an entry of a per-CPU map has.
pub(crate) fn possible_cpus() -> Result<usize> {
    aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("reading {path}: {error}"))
}
