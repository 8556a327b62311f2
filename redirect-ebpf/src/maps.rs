//! Every map, and safe look-ups in them. All are pinned by name and shared by all pods.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockHash,
};
use redirect_common::address::Address;
use redirect_common::connection::{DestinationKey, FlowKey, Original, SocketState};
use redirect_common::dns::{DnsSlot, DnsSlotKey};
use redirect_common::listener::ListenerKey;
use redirect_common::lists::{LIST_PREFIX_BITS, List, ListKey, Lists};
use redirect_common::log::{self, Follower};
use redirect_common::pod::PodConfig;
use redirect_common::record::Record;
use redirect_common::route::{ROUTE_LOCAL, ROUTE_PREFIX_BITS, RouteInfo, RouteKey};
use redirect_common::verdict::{COUNTERS, Rule};
use redirect_common::virtual_machine::{Interface, InterfaceKey, Translation};

use crate::ctx::{InheritedSkStorage, lru_get, map_get, map_get_mut};

const ADDRESS_BITS: u32 = 128;

/// As many as a node can have pods, many times over.
const MOST_PODS: u32 = if cfg!(feature = "other-layout") {
    8192
} else {
    4096
};

/// Not preallocated: elements are then freed only after an RCU grace period, so a program never
/// reads half of an old and half of a new policy.
#[map]
pub static PODS: HashMap<u64, PodConfig> = HashMap::pinned(MOST_PODS, BPF_F_NO_PREALLOC);

#[map]
pub static COUNTS: PerCpuHashMap<u64, [u64; COUNTERS]> =
    PerCpuHashMap::pinned(MOST_PODS, BPF_F_NO_PREALLOC);

#[map]
pub static LISTS: LpmTrie<ListKey, u8> = LpmTrie::pinned(1 << 18, BPF_F_NO_PREALLOC);

#[map]
pub static ROUTES: LpmTrie<RouteKey, RouteInfo> = LpmTrie::pinned(1 << 18, BPF_F_NO_PREALLOC);

/// What the steered ports stand for. Entries stay until the pod is detached.
#[map]
pub static DESTINATIONS: HashMap<DestinationKey, Original> =
    HashMap::pinned(1 << 18, BPF_F_NO_PREALLOC);

/// What the slot addresses of DNS queries stand for. Entries stay until the pod is detached.
#[map]
pub static DNS_SLOTS: HashMap<DnsSlotKey, DnsSlot> = HashMap::pinned(1 << 18, BPF_F_NO_PREALLOC);

/// Holds connections only from SYN to the end of the handshake. LRU, so that attempts that never
/// end cannot fill it.
#[map]
pub static FLOWS: LruHashMap<FlowKey, Original> = LruHashMap::pinned(1 << 16, 0);

/// The interfaces with virtual machines behind them.
#[map]
pub static INTERFACES: HashMap<InterfaceKey, Interface> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

/// What is done with connections that virtual machines make. LRU: what is pushed out is found again
/// by its socket.
#[map]
pub static MACHINE_FLOWS: LruHashMap<FlowKey, Translation> = LruHashMap::pinned(1 << 15, 0);

#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(1 << 16, 0);

/// Never read here: the loader's notes, which live and die with the other maps.
#[map]
pub static RECORDS: HashMap<u64, Record> = HashMap::pinned(4096, BPF_F_NO_PREALLOC);

/// Who reads messages and decisions now.
#[map]
pub static FOLLOWERS: Array<Follower> = Array::pinned(log::FOLLOWERS, 0);

/// Decisions on their way to `redirect log`: room for about 3000.
#[map]
pub static DECISIONS: RingBuf = RingBuf::pinned(1 << 18, 0);

/// Where a pod's own program leaves its network namespace cookie before it jumps to a shared program.
/// Nothing comes between on that CPU: packets are taken in and sent with softirqs off.
#[map]
pub static NETNS: PerCpuArray<u64> = PerCpuArray::pinned(1, 0);

#[btf_map]
pub static SOCKETS: InheritedSkStorage<SocketState> = InheritedSkStorage::new();

#[inline(always)]
pub fn pod(netns_cookie: u64) -> Option<&'static PodConfig> {
    map_get(&PODS, &netns_cookie)
}

/// The network namespace of the program that runs, if it was reached by a pod's own: one for which no
/// helper tells it.
#[inline(always)]
pub fn netns_cookie() -> Option<u64> {
    NETNS.get(0).copied()
}

/// The route to a destination, or the hole that it lies in.
#[inline(always)]
pub fn route_or_hole(netns_cookie: u64, destination: &Address) -> Option<&'static RouteInfo> {
    ROUTES.get(Key::new(
        ROUTE_PREFIX_BITS + ADDRESS_BITS,
        RouteKey::new(netns_cookie, *destination),
    ))
}

/// The route to a destination, if it can be reached.
#[inline(always)]
pub fn route(netns_cookie: u64, destination: &Address) -> Option<&'static RouteInfo> {
    route_or_hole(netns_cookie, destination).filter(|route| route.errno().is_none())
}

/// True if the address is one of the pod's own.
#[inline(always)]
pub fn is_local(netns_cookie: u64, address: &Address) -> bool {
    address.is_loopback()
        || route(netns_cookie, address).is_some_and(|route| route.flags & ROUTE_LOCAL != 0)
}

/// The destination that a steered port stands for.
#[inline(always)]
pub fn destination(key: &DestinationKey) -> Option<&'static Original> {
    map_get(&DESTINATIONS, key)
}

/// Lets a steered port stand for a destination. False if it stands for one, or if there is no room.
#[inline(always)]
pub fn add_destination(key: &DestinationKey, original: &Original) -> bool {
    DESTINATIONS
        .insert(key, original, u64::from(BPF_NOEXIST))
        .is_ok()
}

/// What a slot stands for.
#[inline(always)]
pub fn dns_slot(key: &DnsSlotKey) -> Option<&'static DnsSlot> {
    map_get(&DNS_SLOTS, key)
}

/// Lets a slot stand for a server and a client. False if it stands for others, or if there is no room.
#[inline(always)]
pub fn add_dns_slot(key: &DnsSlotKey, slot: &DnsSlot) -> bool {
    DNS_SLOTS.insert(key, slot, u64::from(BPF_NOEXIST)).is_ok()
}

/// Publishes a captured connection before its SYN leaves. False if there is no room.
#[inline(always)]
pub fn publish_flow(key: &FlowKey, original: &Original) -> bool {
    FLOWS.insert(key, original, 0).is_ok()
}

#[inline(always)]
pub fn flow(key: &FlowKey) -> Option<&'static Original> {
    lru_get(&FLOWS, key)
}

/// Removes a flow that has been handed over, or never will be.
#[inline(always)]
pub fn take_flow(key: &FlowKey) {
    // An error means that it has gone already.
    let _ = FLOWS.remove(key);
}

/// The interface with virtual machines behind it.
#[inline(always)]
pub fn interface(key: &InterfaceKey) -> Option<&'static Interface> {
    map_get(&INTERFACES, key)
}

/// What is done with a virtual machine's connection. Copied: the kernel may give the entry's memory
/// to another one.
#[inline(always)]
pub fn machine_flow(key: &FlowKey) -> Option<Translation> {
    lru_get(&MACHINE_FLOWS, key).copied()
}

/// Remembers what is done with a virtual machine's connection. False if there is no room.
#[inline(always)]
pub fn set_machine_flow(key: &FlowKey, translation: &Translation) -> bool {
    MACHINE_FLOWS.insert(key, translation, 0).is_ok()
}

/// Forgets a virtual machine's connection.
#[inline(always)]
pub fn take_machine_flow(key: &FlowKey) {
    // An error means that it has gone already.
    let _ = MACHINE_FLOWS.remove(key);
}

/// Adds one to the rule's counter of the pod.
#[inline(always)]
pub fn count(netns_cookie: u64, rule: Rule) {
    if let Some(counters) = map_get_mut(&COUNTS, &netns_cookie) {
        counters[rule as usize] += 1;
    }
}

/// The lists of a pod's policy.
pub struct PolicyLists<'a>(pub &'a PodConfig);

impl Lists for PolicyLists<'_> {
    #[inline(always)]
    fn has_port(&self, list: List, port: u16) -> bool {
        !self.0.lists_no_port(port) && contains(ListKey::port(self.0.policy, list, port))
    }

    #[inline(always)]
    fn has_address(&self, list: List, address: &Address) -> bool {
        contains(ListKey::address(self.0.policy, list, *address))
    }
}

#[inline(always)]
fn contains(key: ListKey) -> bool {
    LISTS
        .get(Key::new(LIST_PREFIX_BITS + ADDRESS_BITS, key))
        .is_some()
}
