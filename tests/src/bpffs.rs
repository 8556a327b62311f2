//! A BPF file system of a test's own, and what the loader keeps in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Pod,
    maps::{
        HashMap, LpmTrie, Map, MapData, MapError, MapInfo, PerCpuHashMap, SockHash, lpm_trie::Key,
    },
    programs::{
        links::{FdLink, PinnedLink},
        loaded_links, loaded_programs,
    },
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use redirect_common::{
    POLICY_LAYOUT_VERSION,
    connection::{DestinationKey, FlowKey, Original},
    dns::{DnsSlot, DnsSlotKey},
    listener::ListenerKey,
    lists::ListKey,
    pod::PodConfig,
    record::Record,
    route::{RouteInfo, RouteKey},
    verdict::COUNTERS,
    virtual_machine::{Interface, InterfaceKey},
};

use crate::{cgroup::Cgroup, differences::differences, map_ids::map_ids, patience::patience};

/// Where the loader expects it.
const MOUNT_POINT: &str = "/sys/fs/bpf";
/// The loader's own directory.
pub const ROOT: &str = "/sys/fs/bpf/redirect/v2";
/// The kernel frees what is no longer referred to after a grace period.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `work` where [`MOUNT_POINT`] is empty and nobody else's: on a thread with a mount namespace of its own, which the
/// processes it starts share.
pub fn private<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let name = thread::current().name().unwrap_or("?").to_owned();
    thread::scope(|scope| {
        thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let nothing = None::<&str>;
                // Only below /sys: network namespaces are to be found by everybody.
                mount(
                    nothing,
                    "/sys",
                    nothing,
                    MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                    nothing,
                )
                .unwrap();
                mount(
                    Some("bpf"),
                    MOUNT_POINT,
                    Some("bpf"),
                    MsFlags::empty(),
                    nothing,
                )
                .unwrap();
                work()
            })
            .unwrap()
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Every pin and directory of the loader, relative to its own directory.
pub fn pins() -> BTreeSet<PathBuf> {
    let (mut found, mut pending) = (BTreeSet::new(), vec![PathBuf::from(ROOT)]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            }
            found.insert(entry.path().strip_prefix(ROOT).unwrap().to_owned());
        }
    }
    found
}

/// How often pins are read at most while somebody changes them.
const READS: u32 = 100;

/// Ids of kernel objects.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Objects {
    links: BTreeSet<u32>,
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
}

impl Objects {
    /// All that the loader's pins keep alive: links, their programs and the maps of those. Read again if a pin goes meanwhile.
    pub fn pinned() -> Self {
        let mut tries = (0..READS).map(|_| Self::try_pinned());
        tries.find_map(Result::ok).expect("pins that stay")
    }

    fn try_pinned() -> Result<Self, Box<dyn Error>> {
        let mut objects = Self::default();
        for pin in pins() {
            let path = Path::new(ROOT).join(&pin);
            let name = pin.to_string_lossy().into_owned();
            if path.is_dir() {
                continue;
            } else if is_map(&pin) {
                objects.maps.insert(MapInfo::from_pin(&path)?.id());
            } else if name.starts_with("programs-") {
                let info = aya::programs::ProgramInfo::from_pin(&path)?;
                objects.programs.insert(info.id());
            } else if name.starts_with("pods/") {
                let info = FdLink::from(PinnedLink::from_pin(&path)?).info()?;
                objects.links.insert(info.id());
                objects.programs.insert(info.program_id());
            }
            // What is left is being staged: programs as well as links.
        }
        for program in loaded_programs().flatten() {
            if objects.programs.contains(&program.id()) {
                objects.maps.extend(program.map_ids()?.unwrap());
            }
        }
        Ok(objects)
    }

    /// All that is loaded and works with the loader's pinned maps, pinned itself or not: programs, their links, and all
    /// maps of those programs.
    pub fn loaded() -> Self {
        let mut objects = Self::default();
        for pin in pins().iter().filter(|pin| is_map(pin)) {
            let info = MapInfo::from_pin(Path::new(ROOT).join(pin)).unwrap();
            objects.maps.insert(info.id());
        }
        // An object that goes while the others are listed is an error in the list.
        let mut used = BTreeSet::new();
        for program in loaded_programs().flatten() {
            let maps = program.map_ids().unwrap().unwrap();
            if maps.iter().any(|map| objects.maps.contains(map)) {
                objects.programs.insert(program.id());
                used.extend(maps);
            }
        }
        objects.maps.append(&mut used);
        objects.links = loaded_links()
            .flatten()
            .filter(|link| objects.programs.contains(&link.program_id()))
            .map(|link| link.id())
            .collect();
        objects
    }

    /// Those of both.
    pub fn with(mut self, other: Self) -> Self {
        self.links.extend(other.links);
        self.programs.extend(other.programs);
        self.maps.extend(other.maps);
        self
    }

    /// How many links, programs and maps.
    pub fn counts(&self) -> [usize; 3] {
        [self.links.len(), self.programs.len(), self.maps.len()]
    }

    /// Ids of links.
    pub fn links(&self) -> &BTreeSet<u32> {
        &self.links
    }

    /// Ids of programs, pinned or run by a link.
    pub fn programs(&self) -> &BTreeSet<u32> {
        &self.programs
    }

    /// Ids of maps.
    pub fn maps(&self) -> &BTreeSet<u32> {
        &self.maps
    }

    /// Adds those of `other`.
    pub fn join(&mut self, other: &Self) {
        self.links.extend(&other.links);
        self.programs.extend(&other.programs);
        self.maps.extend(&other.maps);
    }

    /// Those of `self` that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let less = |a: &BTreeSet<u32>, b: &BTreeSet<u32>| a.difference(b).copied().collect();
        Self {
            links: less(&self.links, &other.links),
            programs: less(&self.programs, &other.programs),
            maps: less(&self.maps, &other.maps),
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Waits until the kernel has freed all of them. Those that stay are returned.
    pub fn wait_until_freed(&self) -> Self {
        let deadline = Instant::now() + patience(PATIENCE);
        loop {
            thread::sleep(Duration::from_millis(50));
            let alive = self.alive();
            if alive.is_empty() || Instant::now() > deadline {
                return alive;
            }
        }
    }

    fn alive(&self) -> Self {
        let keep = |ours: &BTreeSet<u32>, loaded: BTreeSet<u32>| {
            ours.intersection(&loaded).copied().collect()
        };
        // An object that goes while the others are listed is an error in the list.
        Self {
            links: keep(
                &self.links,
                loaded_links().flatten().map(|i| i.id()).collect(),
            ),
            programs: keep(
                &self.programs,
                loaded_programs().flatten().map(|i| i.id()).collect(),
            ),
            maps: keep(&self.maps, map_ids()),
        }
    }
}

/// Contents of a map: keys, with values where programs act on them.
type Contents = BTreeMap<Vec<u8>, Vec<u8>>;

/// All that the loader has put in place: its pins, and the contents of its maps by name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct State {
    pins: BTreeSet<PathBuf>,
    maps: BTreeMap<&'static str, Contents>,
}

impl State {
    /// As it is now. Maps that are not there are left out.
    pub fn read() -> Self {
        let mut maps = BTreeMap::new();
        let mut add = |name, contents: Option<Contents>| {
            if let Some(contents) = contents {
                maps.insert(name, contents);
            }
        };
        add("PODS", hash::<8, { size_of::<PodConfig>() }>("PODS"));
        add("RECORDS", hash::<8, { size_of::<Record>() }>("RECORDS"));
        add(
            "ROUTES",
            trie::<{ size_of::<RouteKey>() }, { size_of::<RouteInfo>() }>("ROUTES"),
        );
        add("LISTS", trie::<{ size_of::<ListKey>() }, 1>("LISTS"));
        add(
            "INTERFACES",
            hash::<{ size_of::<InterfaceKey>() }, { size_of::<Interface>() }>("INTERFACES"),
        );
        add("COUNTS", counts());
        add(
            "LISTENERS",
            listeners().map(|keys| {
                let bytes = |key: &ListenerKey| (bytemuck::bytes_of(key).to_vec(), Vec::new());
                keys.iter().map(bytes).collect()
            }),
        );
        Self { pins: pins(), maps }
    }

    /// How many entries a map has; it has to be there.
    pub fn entries(&self, map: &str) -> usize {
        self.maps[map].len()
    }

    /// The differences to what is wanted, in words; none if equal.
    pub fn differences(&self, wanted: &Self) -> Vec<String> {
        let mut found = differences(&self.pins, &wanted.pins, |pin| {
            format!("pin {}", pin.display())
        });
        let names: BTreeSet<_> = self.maps.keys().chain(wanted.maps.keys()).collect();
        let none = Contents::new();
        for name in names {
            let ours = self.maps.get(name).unwrap_or(&none);
            let theirs = wanted.maps.get(name).unwrap_or(&none);
            found.extend(differences(ours.keys(), theirs.keys(), |key| {
                format!("{name} {key:02x?}")
            }));
            for (key, value) in ours {
                if let Some(other) = theirs.get(key).filter(|other| *other != value) {
                    found.push(format!(
                        "another value: {name} {key:02x?}: {value:02x?} for {other:02x?}"
                    ));
                }
            }
        }
        found
    }
}

/// The keys of `LISTENERS`; None if the map is not there.
pub fn listeners() -> Option<Vec<ListenerKey>> {
    let map = open("LISTENERS", Map::SockHash)?;
    let map: SockHash<MapData, [u8; size_of::<ListenerKey>()]> = map.try_into().unwrap();
    Some(
        keys(map.keys())
            .map(|key| bytemuck::pod_read_unaligned(&key))
            .collect(),
    )
}

/// The keys of `FLOWS`; None if the map is not there.
pub fn flows() -> Option<Vec<FlowKey>> {
    let map = open("FLOWS", Map::LruHashMap)?;
    let map: HashMap<MapData, [u8; size_of::<FlowKey>()], [u8; 24]> = map.try_into().unwrap();
    Some(
        keys(map.keys())
            .map(|key| bytemuck::pod_read_unaligned(&key))
            .collect(),
    )
}

/// How many entries programs have made in the maps that hold them until detach, by name of the map.
pub fn traces() -> BTreeMap<&'static str, usize> {
    const ORIGINAL: usize = size_of::<Original>();
    [
        (
            "DESTINATIONS",
            hash::<{ size_of::<DestinationKey>() }, ORIGINAL>("DESTINATIONS"),
        ),
        (
            "DNS_SLOTS",
            hash::<{ size_of::<DnsSlotKey>() }, { size_of::<DnsSlot>() }>("DNS_SLOTS"),
        ),
    ]
    .into_iter()
    .filter_map(|(name, contents)| Some((name, contents?.len())))
    .chain(flows().map(|flows| ("FLOWS", flows.len())))
    .collect()
}

fn counts() -> Option<Contents> {
    let map = open("COUNTS", Map::PerCpuHashMap)?;
    let map: PerCpuHashMap<MapData, [u8; 8], [u8; 8 * COUNTERS]> = map.try_into().unwrap();
    // How often a rule has decided is not the loader's doing.
    Some(
        keys(map.keys())
            .map(|key| (key.to_vec(), Vec::new()))
            .collect(),
    )
}

fn hash<const K: usize, const V: usize>(name: &str) -> Option<Contents> {
    let map: HashMap<MapData, [u8; K], [u8; V]> = open(name, Map::HashMap)?.try_into().unwrap();
    let value = |key: &[u8; K]| map.get(key, 0).unwrap().to_vec();
    Some(
        keys(map.keys())
            .map(|key| (key.to_vec(), value(&key)))
            .collect(),
    )
}

fn trie<const K: usize, const V: usize>(name: &str) -> Option<Contents> {
    let map: LpmTrie<MapData, [u8; K], [u8; V]> = open(name, Map::LpmTrie)?.try_into().unwrap();
    let entry = |key: Key<[u8; K]>| {
        let mut bytes = key.prefix_len().to_ne_bytes().to_vec();
        bytes.extend(key.data());
        (bytes, map.get(&key, 0).unwrap().to_vec())
    };
    Some(keys(map.keys()).map(entry).collect())
}

/// Below a directory of maps, or one that a pod's own entry jumps by.
fn is_map(pin: &Path) -> bool {
    let directory = pin.parent().and_then(Path::to_str);
    directory.is_some_and(|name| name == "maps" || name.starts_with("maps-"))
        || pin.to_string_lossy().ends_with("_jump")
}

fn open(name: &str, kind: impl FnOnce(MapData) -> Map) -> Option<Map> {
    map(name).map(kind)
}

/// The data plane's map of that name; None if it is not there.
pub fn map(name: &str) -> Option<MapData> {
    map_pin(name).map(|path| MapData::from_pin(path).unwrap())
}

/// Where the map is pinned; None if it is not there.
pub fn map_pin(name: &str) -> Option<PathBuf> {
    let own = format!("maps-{POLICY_LAYOUT_VERSION}");
    ["maps", &own]
        .map(|directory| Path::new(ROOT).join(directory).join(name))
        .into_iter()
        .find(|path| path.exists())
}

/// Where the link of that name is pinned for the cgroup.
pub fn link_pin(cgroup: &Cgroup, name: &str) -> PathBuf {
    Path::new(ROOT).join(format!("pods/{:016x}/{name}", cgroup.id()))
}

fn keys<K: Pod>(keys: impl Iterator<Item = Result<K, MapError>>) -> impl Iterator<Item = K> {
    keys.map(Result::unwrap)
}

/// Removes the loader's own directories, which it leaves in place empty.
pub fn remove_root() {
    for directory in Path::new(ROOT).ancestors().take(2) {
        fs::remove_dir(directory).unwrap();
    }
}

/// Waits until the kernel has cut off a pod's links, because their cgroup or namespace has gone.
pub fn wait_until_cut_off() {
    let deadline = Instant::now() + patience(PATIENCE);
    let links = || pins().into_iter().filter(|pin| pin.starts_with("pods"));
    while !links().any(|pin| is_cut_off(&Path::new(ROOT).join(pin))) {
        assert!(Instant::now() < deadline, "the kernel keeps dead links");
        thread::sleep(Duration::from_millis(2));
    }
}

fn is_cut_off(pin: &Path) -> bool {
    let Ok(link) = PinnedLink::from_pin(pin) else {
        return false;
    };
    let link = FdLink::from(link);
    let id = format!("link_id:\t{}\n", link.info().unwrap().id());
    let described = fs::read_dir("/proc/thread-self/fdinfo").unwrap().flatten();
    described
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter(|text| text.contains(&id))
        .any(|text| text.contains("cgroup_id:\t0\n") || text.contains("netns_ino:\t0\n"))
}
