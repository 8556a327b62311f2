//! The data plane's maps, as far as tests look into them.

use std::net::SocketAddr;

use aya::maps::{HashMap, Map, MapData};
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

type Flows = HashMap<MapData, [u8; size_of::<FlowKey>()], [u8; size_of::<Original>()]>;

fn flows() -> Flows {
    let map = bpffs::map("FLOWS").unwrap();
    Map::LruHashMap(map).try_into().unwrap()
}

/// How many connections of the pod are on their way.
pub fn flows_of(pod: &Pod) -> usize {
    let cookie = pod.netns.enter(netns_cookie);
    let is_pods = |key: &FlowKey| key.netns_cookie == cookie;
    let flows = flows();
    let keys = flows.keys().map(|key| bytemuck::cast(key.unwrap()));
    keys.filter(is_pods).count()
}

/// Adds connections of nobody as there is room for, and more, until those of the pod are forgotten.
pub fn push_out_flows(pod: &Pod) {
    const ROOM: u32 = 1 << 16;
    let mut map = flows();
    for round in 0..4 {
        for number in 0..ROOM {
            let key = FlowKey {
                netns_cookie: u64::MAX,
                client_port: round,
                _pad: number,
                ..FlowKey::default()
            };
            let key: [u8; size_of::<FlowKey>()] = bytemuck::cast(key);
            map.insert(key, [0; size_of::<Original>()], 0).unwrap();
        }
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
