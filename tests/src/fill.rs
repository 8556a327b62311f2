//! Maps filled with entries of nobody, until there is no room for more.

use std::{
    net::{Ipv4Addr, TcpListener},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use aya::{
    maps::{
        HashMap, LpmTrie, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, SockHash,
        lpm_trie::Key,
    },
    util::nr_cpus,
};
use nix::errno::Errno;
use redirect_common::{listener::ListenerKey, lists::ListKey, pod::PodConfig, verdict::COUNTERS};

use crate::bpffs;

/// Takes out again what has been filled in.
pub type Empty = Box<dyn FnOnce()>;

/// What keys of nobody begin with: the cookie of no network namespace.
const NOBODY: [u8; 8] = [0xff; 8];
/// In none of a policy's lists.
const NO_LIST: [u8; 4] = 31_u32.to_ne_bytes();
/// As many keys as one socket has: the kernel looks through them whenever one goes.
const KEYS_OF_A_SOCKET: usize = 1024;
const LOOK: Duration = Duration::from_millis(1);

/// A hash map whose keys begin with a cookie.
pub fn hash<const K: usize, const V: usize>(name: &str) -> Empty {
    let mut map: HashMap<MapData, [u8; K], [u8; V]> = Map::HashMap(open(name)).try_into().unwrap();
    let keys = until_full(&NOBODY, |key| map.insert(key, [0; V], 0));
    Box::new(move || keys.iter().for_each(|key| map.remove(key).unwrap()))
}

/// The counters.
pub fn counts() -> Empty {
    let mut map: PerCpuHashMap<MapData, [u8; 8], [u8; 8 * COUNTERS]> =
        Map::PerCpuHashMap(open("COUNTS")).try_into().unwrap();
    let none = vec![[0; 8 * COUNTERS]; nr_cpus().unwrap()];
    let keys = until_full(&NOBODY, |key| {
        map.insert(key, PerCpuValues::try_from(none.clone()).unwrap(), 0)
    });
    Box::new(move || keys.iter().for_each(|key| map.remove(key).unwrap()))
}

/// A trie whose keys begin with a cookie.
pub fn trie<const K: usize, const V: usize>(name: &str) -> Empty {
    trie_of::<K, V>(name, &NOBODY)
}

/// The lists: of the policy of a pod that is attached, as others would be collected.
pub fn lists() -> Empty {
    let pods: HashMap<MapData, [u8; 8], [u8; size_of::<PodConfig>()]> =
        Map::HashMap(open("PODS")).try_into().unwrap();
    let (_, config) = pods.iter().next().unwrap().unwrap();
    let policy = bytemuck::pod_read_unaligned::<PodConfig>(&config).policy;
    trie_of::<{ size_of::<ListKey>() }, 1>("LISTS", &[&policy.to_ne_bytes()[..], &NO_LIST].concat())
}

fn trie_of<const K: usize, const V: usize>(name: &str, prefix: &[u8]) -> Empty {
    let mut map: LpmTrie<MapData, [u8; K], [u8; V]> = Map::LpmTrie(open(name)).try_into().unwrap();
    let whole = |key| Key::new(8 * u32::try_from(K).unwrap(), key);
    let keys = until_full(prefix, |key| map.insert(&whole(key), [0; V], 0));
    Box::new(move || {
        keys.into_iter()
            .for_each(|key| map.remove(&whole(key)).unwrap());
    })
}

/// The listeners, with sockets that listen elsewhere.
pub fn listeners() -> Empty {
    let mut map: SockHash<MapData, [u8; size_of::<ListenerKey>()]> =
        Map::SockHash(open("LISTENERS")).try_into().unwrap();
    let (mut sockets, mut count) = (Vec::new(), 0);
    let keys = until_full(&NOBODY, |key| {
        if count % KEYS_OF_A_SOCKET == 0 {
            sockets.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        }
        count += 1;
        map.insert(key, sockets.last().unwrap().as_raw_fd(), 0)
    });
    Box::new(move || {
        keys.iter().for_each(|key| map.remove(key).unwrap());
        drop(sockets);
    })
}

fn open(name: &str) -> MapData {
    bpffs::map(name).unwrap()
}

/// Puts in as many keys as there is room for: each has that prefix, and ends with a number of its own.
fn until_full<const K: usize>(
    prefix: &[u8],
    mut put: impl FnMut([u8; K]) -> Result<(), MapError>,
) -> Vec<[u8; K]> {
    let mut keys = Vec::new();
    loop {
        let mut key = [0; K];
        key[..prefix.len()].copy_from_slice(prefix);
        let number = u32::try_from(keys.len()).unwrap();
        key[K - size_of_val(&number)..].copy_from_slice(&number.to_be_bytes());
        match put(key) {
            Ok(()) => keys.push(key),
            // Memory for values of every processor is set aside a little later.
            Err(error) if says(&error, &[Errno::ENOMEM]) => thread::sleep(LOOK),
            Err(error) => {
                // Hash maps say the first, tries the second.
                assert!(says(&error, &[Errno::E2BIG, Errno::ENOSPC]), "{error:?}");
                return keys;
            }
        }
    }
}

fn says(error: &MapError, errors: &[Errno]) -> bool {
    let MapError::SyscallError(error) = error else {
        return false;
    };
    let number = error.io_error.raw_os_error();
    errors.iter().any(|errno| number == Some(*errno as i32))
}
