//! The data plane's maps, as far as tests look into them.

use std::net::SocketAddr;

use aya::maps::{HashMap, Map, MapData};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use redirect_common::{
    connection::{DestinationKey, FlowKey, Original, STEERED_PORT_FIRST, STEERED_PORTS},
    virtual_machine::Translation,
};

use crate::{bpffs, pod::Pod, sockopt::netns_cookie};

type Destinations =
    HashMap<MapData, [u8; size_of::<DestinationKey>()], [u8; size_of::<Original>()]>;

fn destinations() -> Destinations {
    let map = bpffs::map("DESTINATIONS").unwrap();
    Map::HashMap(map).try_into().unwrap()
}

/// How many steered ports of the pod stand for a destination.
pub fn destinations_of(pod: &Pod) -> usize {
    let cookie = pod.netns.enter(netns_cookie);
    let is_pods = |key: &DestinationKey| key.netns_cookie == cookie;
    let map = destinations();
    let keys = map.keys().map(|key| bytemuck::cast(key.unwrap()));
    keys.filter(is_pods).count()
}

/// How many connections of the pod are on their way.
pub fn flows_of(pod: &Pod) -> usize {
    let cookie = pod.netns.enter(netns_cookie);
    let flows = bpffs::flows().unwrap().into_iter();
    flows.filter(|flow| flow.netns_cookie == cookie).count()
}

/// Adds connections of nobody as there is room for, and more, until those of the pod are forgotten.
pub fn push_out_flows(pod: &Pod) {
    const ROOM: u32 = 1 << 16;
    /// More than a CPU keeps to itself of the last ones: only another one of that CPU puts them in line with all.
    const KEPT: u32 = 512;
    let map = Map::LruHashMap(bpffs::map("FLOWS").unwrap());
    let mut map: HashMap<_, [u8; size_of::<FlowKey>()], [u8; size_of::<Original>()]> =
        map.try_into().unwrap();
    let mut number = 0;
    let mut add = |count| {
        for _ in 0..count {
            number += 1;
            let key = FlowKey {
                netns_cookie: u64::MAX,
                _pad: number,
                ..FlowKey::default()
            };
            let key: [u8; size_of::<FlowKey>()] = bytemuck::cast(key);
            map.insert(key, [0; size_of::<Original>()], 0).unwrap();
        }
    };
    let this_thread = Pid::from_raw(0);
    let cpus = sched_getaffinity(this_thread).unwrap();
    for _ in 0..4 {
        for cpu in (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu).unwrap()) {
            let mut only = CpuSet::new();
            only.set(cpu).unwrap();
            sched_setaffinity(this_thread, &only).unwrap();
            add(KEPT);
        }
        sched_setaffinity(this_thread, &cpus).unwrap();
        add(ROOM);
        if flows_of(pod) == 0 {
            return;
        }
    }
    panic!("the oldest are not forgotten");
}

/// Whether a connection of a virtual machine of the pod is in `MACHINE_FLOWS`.
pub fn remembers(pod: &Pod, client: SocketAddr, original: SocketAddr) -> bool {
    let cookie = pod.netns.enter(netns_cookie);
    let end = |address: SocketAddr| (address.ip().into(), address.port());
    let key: [u8; size_of::<FlowKey>()] =
        bytemuck::cast(FlowKey::new(cookie, end(client), end(original)));
    let map = bpffs::map("MACHINE_FLOWS").unwrap();
    let flows: HashMap<_, [u8; size_of::<FlowKey>()], [u8; size_of::<Translation>()]> =
        Map::LruHashMap(map).try_into().unwrap();
    flows.get(&key, 0).is_ok()
}

/// Lets all steered ports of the pod stand for a destination that nobody has: later ones find none.
pub fn exhaust_ports(pod: &Pod) {
    let cookie = pod.netns.enter(netns_cookie);
    let nobody = Original {
        port: 1,
        proxy_port: 1,
        ..Original::default()
    };
    let mut map = destinations();
    for port in STEERED_PORT_FIRST..STEERED_PORT_FIRST + STEERED_PORTS {
        let key: [u8; size_of::<DestinationKey>()] =
            bytemuck::cast(DestinationKey::new(cookie, port));
        map.insert(
            key,
            bytemuck::cast::<_, [u8; size_of::<Original>()]>(nobody),
            0,
        )
        .unwrap();
    }
}
