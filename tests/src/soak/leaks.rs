//! What may be left behind: kernel objects, pins, entries of maps, storages of sockets, kernel memory.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, SkStorage};
use redirect_common::connection::SocketState;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::cast::Cast;
use crate::{
    actor::Actor,
    bpffs::{self, Objects},
    patience::patience,
};

/// Sockets close after their last packet, processes end after their kill.
const PATIENCE: Duration = Duration::from_secs(20);

/// How many of each thing there are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Counts {
    /// Pins and directories.
    pub pins: usize,
    /// Links.
    pub links: usize,
    /// Programs.
    pub programs: usize,
    /// Maps.
    pub maps: usize,
}

/// Kernel objects over time.
#[derive(Debug, Default)]
pub struct Kernel {
    /// All that were ever seen.
    ever: Objects,
    /// The counts of each situation: attached pods, and builds that have attached them.
    usual: BTreeMap<(usize, usize), Counts>,
}

impl Kernel {
    /// Compares what is there with what was there in the same situation before.
    pub fn look(&mut self, casts: &[Cast]) -> Result<Option<Counts>, String> {
        let objects = Objects::pinned();
        self.ever.join(&objects);
        let attached: Option<Vec<bool>> = casts.iter().map(Cast::is_attached).collect();
        let Some(attached) = attached else {
            return Ok(None);
        };
        let builds = |build| {
            let mut of = casts.iter().zip(&attached);
            of.any(|(cast, attached)| *attached && cast.other_build == build)
        };
        let situation = (
            attached.iter().filter(|attached| **attached).count(),
            usize::from(builds(false)) + usize::from(builds(true)),
        );
        let counts = Counts {
            pins: bpffs::pins().len(),
            links: objects.links().len(),
            programs: objects.programs().len(),
            maps: objects.maps().len(),
        };
        let usual = *self.usual.entry(situation).or_insert(counts);
        if counts == usual {
            Ok(Some(counts))
        } else {
            let (pods, builds) = situation;
            Err(format!(
                "with {pods} pods attached by {builds} builds there were {usual:?}, and now {counts:?}"
            ))
        }
    }

    /// What the kernel has not freed although nothing is attached.
    pub fn left(&self) -> Objects {
        self.ever.wait_until_freed()
    }
}

/// Waits until `wrong` finds nothing any more, and returns what it found last.
pub fn settle(mut wrong: impl FnMut() -> Vec<String>) -> Vec<String> {
    let deadline = Instant::now() + patience(PATIENCE);
    loop {
        let found = wrong();
        if found.is_empty() || Instant::now() > deadline {
            return found;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// How many sockets of a process have something stored by the data plane, which has to be attached to some pod.
pub fn storages(actor: &Actor) -> usize {
    let map = Map::SkStorage(bpffs::map("SOCKETS").unwrap());
    let map: SkStorage<MapData, [u8; size_of::<SocketState>()]> = map.try_into().unwrap();
    let sockets = sockets(actor).into_iter();
    sockets.filter(|socket| map.get(socket, 0).is_ok()).count()
}

/// Copies of the descriptors of a process that are sockets.
fn sockets(actor: &Actor) -> Vec<OwnedFd> {
    let pid = Pid::from_raw(actor.pid().try_into().unwrap()).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_socket = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    entries
        .filter(is_socket)
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok()
        })
        .collect()
}

/// Memory that the kernel holds and cannot give back, of the whole machine, in bytes.
pub fn kernel_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.map_or(0, |number| number.parse::<u64>().unwrap() * 1024)
    };
    ["SUnreclaim:", "Percpu:", "KernelStack:", "VmallocUsed:"]
        .map(value)
        .iter()
        .sum()
}

/// What is allowed to come and go on a machine that does other things too, in bytes.
const COMING_AND_GOING: u64 = 96 << 20;
/// A socket that is not freed is some thousand bytes, and what is stored with one more than a hundred.
const PER_CONNECTION: u64 = 32;

/// Compares the least of the first with the least of the last third of what was measured: others' memory comes
/// and goes, a leak stays. Beside each measure, how many connections had been made by then.
pub fn growth(measured: &[(u64, u64)]) -> Result<i64, String> {
    let third = measured.len() / 3;
    let least = |of: &[(u64, u64)]| of.iter().copied().min_by_key(|(memory, _)| *memory);
    let (Some(first), Some(last)) = (
        least(&measured[..third]),
        least(&measured[measured.len() - third..]),
    ) else {
        return Ok(0);
    };
    let grown = i64::try_from(last.0).unwrap() - i64::try_from(first.0).unwrap();
    let allowed = COMING_AND_GOING + PER_CONNECTION * (last.1 - first.1);
    if grown <= i64::try_from(allowed).unwrap() {
        Ok(grown)
    } else {
        Err(format!(
            "kernel memory has grown by {grown} bytes over {} connections, more than {allowed}",
            last.1 - first.1
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_others_take_for_a_while_is_no_growth() {
        let measured = [
            (100 << 20, 0),
            (900 << 20, 1),
            (100 << 20, 2),
            (1 << 30, 3),
            (100 << 20, 4),
            (2 << 30, 5),
        ];
        assert_eq!(growth(&measured), Ok(0));
    }

    #[test]
    fn memory_of_every_connection_is_growth() {
        let measured: Vec<(u64, u64)> = (0..90).map(|n| (n * 100_000 * 128, n * 100_000)).collect();
        assert!(growth(&measured).is_err());
    }
}
