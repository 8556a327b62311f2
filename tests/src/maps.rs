//! The data plane's maps, as far as tests look into them.

use aya::maps::{HashMap, Map, MapData};
use redirect_common::connection::{
    DestinationKey, FlowKey, Original, STEERED_PORT_FIRST, STEERED_PORTS,
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
    let map = bpffs::map("FLOWS").unwrap();
    let flows: HashMap<_, [u8; size_of::<FlowKey>()], [u8; size_of::<Original>()]> =
        Map::LruHashMap(map).try_into().unwrap();
    let is_pods = |key: &FlowKey| key.netns_cookie == cookie;
    let keys = flows.keys().map(|key| bytemuck::cast(key.unwrap()));
    keys.filter(is_pods).count()
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
