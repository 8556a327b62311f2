//! The one reader of the programs' ring buffers.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, RingBuf};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use redirect_common::POLICY_LAYOUT_VERSION;
use redirect_common::log::{self, FOLLOWER_LOG, FOLLOWER_RUN, Follower};
use rustix::time::{ClockId, clock_gettime};

use super::event::{Decision, Event, Message};
use super::messages::{Messages, Raw};
use super::{Wanted, busy};
use crate::pins::{self, Pins};
use crate::programs::{self, HOOKS, Need};
use crate::record;
use crate::sys::bpf::{self, Kind};
use crate::tables::Tables;

/// How long programs go on telling after the reader was heard of last.
const HEARD: Duration = Duration::from_secs(2);
/// How long `redirect log` waits for a `redirect run` to give way.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to go by what is known of the pods: a network namespace may get another cgroup.
const NAMES_KEPT: Duration = Duration::from_secs(1);

/// Who reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// `redirect run`.
    Run,
    /// `redirect log`.
    Log,
}

impl Role {
    const fn index(self) -> u32 {
        match self {
            Self::Run => FOLLOWER_RUN,
            Self::Log => FOLLOWER_LOG,
        }
    }
}

/// Reads while it lives. The lock goes with the process, the request to be told ends by itself.
pub(super) struct Reader {
    role: Role,
    wanted: Wanted,
    tables: Tables,
    messages: Messages,
    decisions: RingBuf<MapData>,
    /// Cgroup paths by network namespace cookie.
    names: HashMap<u64, Vec<PathBuf>>,
    names_read: Instant,
    lock: Flock<File>,
}

impl Reader {
    /// None if nothing is attached, or if this is `redirect run` and somebody else reads. What was
    /// told before is passed over.
    pub(super) fn open(role: Role, wanted: Wanted) -> Result<Option<Self>> {
        let Some(directory) = pins::open_maps_directory()? else {
            return Ok(None);
        };
        let lock = match (lock(directory)?, role) {
            (Ok(lock), _) => lock,
            (Err(_), Role::Run) => return Ok(None),
            (Err(directory), Role::Log) => match wait(directory)? {
                Some(lock) => lock,
                None => return busy(),
            },
        };
        let Some(pins) = Pins::open_existing()? else {
            return Ok(None);
        };
        if !pins.map("DECISIONS").exists() {
            // Only builds of another layout have attached pods.
            return Ok(None);
        }
        let tables = Tables::open(&pins)?;
        let Some(mut messages) = messages(&pins, &tables)? else {
            return Ok(None);
        };
        let path = pins.map("DECISIONS");
        let mut decisions = MapData::from_pin(&path)
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .with_context(|| format!("opening map {}", path.display()))?;
        messages.read();
        while decisions.next().is_some() {}
        // Left by a reader that was killed; one that waits for the lock says it again.
        let nobody = Follower::default();
        tables.followers.set(&FOLLOWER_LOG, &nobody)?;
        let mut reader = Self {
            role,
            wanted,
            tables,
            messages,
            decisions,
            names: HashMap::new(),
            names_read: Instant::now(),
            lock,
        };
        reader.learn_names()?;
        reader.renew()?;
        Ok(Some(reader))
    }

    /// True once the last pod has been detached, and the maps unpinned: others will come.
    pub(super) fn is_gone(&self) -> bool {
        self.lock.metadata().map_or(true, |meta| meta.nlink() == 0)
    }

    /// True while a `redirect log` wants to read.
    pub(super) fn has_to_give_way(&self) -> bool {
        self.is_gone() || log_reads(&self.tables).unwrap_or(true)
    }

    /// All that has been told since the last call, decisions before the troubles they led to.
    pub(super) fn read(&mut self) -> Result<Vec<Event>> {
        self.renew()?;
        let now_ns = now_ns();
        let mut raw = Vec::new();
        while let Some(record) = self.decisions.next() {
            raw.push(
                bytemuck::try_pod_read_unaligned::<log::Decision>(&record)
                    .map_err(|error| anyhow::anyhow!("a record of DECISIONS: {error}"))?,
            );
        }
        let mut events = Vec::new();
        for decision in raw {
            let cgroups = self.cgroups(decision.netns_cookie)?;
            events.push(Event::Decision(Decision::new(&decision, now_ns, cgroups)));
        }
        for message in self.messages.read() {
            let others = self.wanted.netns_cookie.is_some()
                && message.netns_cookie != self.wanted.netns_cookie;
            if !others {
                events.push(Event::Message(self.message(message)?));
            }
        }
        Ok(events)
    }

    fn message(&mut self, raw: Raw) -> Result<Message> {
        Ok(Message {
            time: SystemTime::now(),
            cgroups: match raw.netns_cookie {
                Some(cookie) => self.cgroups(cookie)?,
                None => Vec::new(),
            },
            netns_cookie: raw.netns_cookie,
            level: raw.level.as_str().to_ascii_lowercase(),
            text: raw.text,
        })
    }

    fn cgroups(&mut self, netns_cookie: u64) -> Result<Vec<PathBuf>> {
        if !self.names.contains_key(&netns_cookie) || self.names_read.elapsed() > NAMES_KEPT {
            self.learn_names()?;
        }
        Ok(self.names.get(&netns_cookie).cloned().unwrap_or_default())
    }

    fn learn_names(&mut self) -> Result<()> {
        let mut names: HashMap<u64, Vec<PathBuf>> = HashMap::new();
        for (_, notes) in record::all(&self.tables)? {
            names
                .entry(notes.netns_cookie)
                .or_default()
                .push(notes.cgroup);
        }
        self.names = names;
        self.names_read = Instant::now();
        Ok(())
    }

    fn renew(&mut self) -> Result<()> {
        let follower = Follower {
            until_ns: now_ns() + HEARD.as_nanos() as u64,
            netns_cookie: self.wanted.netns_cookie.unwrap_or(0),
            decisions: self.wanted.decisions.into(),
            _pad: 0,
        };
        self.tables
            .followers
            .set(&self.role.index(), &follower)
            .context("writing FOLLOWERS")
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Ends by itself otherwise.
        let _ = self
            .tables
            .followers
            .set(&self.role.index(), &Follower::default());
    }
}

/// The lock, or the directory back if somebody has it.
fn lock(directory: File) -> Result<std::result::Result<Flock<File>, File>> {
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Ok(lock)),
        Err((directory, Errno::EWOULDBLOCK)) => Ok(Err(directory)),
        Err((_, errno)) => Err(errno).context("locking the maps' directory"),
    }
}

/// Asks a `redirect run` to give way and takes the lock. None if a `redirect log` has it.
fn wait(mut directory: File) -> Result<Option<Flock<File>>> {
    let Some(pins) = Pins::open_existing()? else {
        return Ok(None);
    };
    let tables = Tables::open(&pins)?;
    drop(pins);
    if log_reads(&tables)? {
        return Ok(None);
    }
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let wish = Follower {
            until_ns: now_ns() + PATIENCE.as_nanos() as u64,
            ..Follower::default()
        };
        tables
            .followers
            .set(&FOLLOWER_LOG, &wish)
            .context("writing FOLLOWERS")?;
        match lock(directory)? {
            Ok(lock) => return Ok(Some(lock)),
            Err(back) => directory = back,
        }
        sleep(super::LOOK / 4);
    }
    Ok(None)
}

fn log_reads(tables: &Tables) -> Result<bool> {
    let follower = tables
        .followers
        .get(&FOLLOWER_LOG)
        .context("reading FOLLOWERS")?;
    Ok(follower.is_some_and(|follower| follower.reads_at(now_ns())))
}

/// Messages are found by a program that writes them. None if no program is pinned.
fn messages(pins: &Pins, tables: &Tables) -> Result<Option<Messages>> {
    let mut failed = None;
    // Builds of another layout have ring buffers of their own.
    let mut builds = vec![programs::build_id()];
    builds.extend(
        record::all(tables)?
            .into_iter()
            .filter(|(_, notes)| notes.layout == POLICY_LAYOUT_VERSION)
            .map(|(_, notes)| notes.build),
    );
    for directory in builds
        .into_iter()
        .map(|build| pins.programs(build, Need::Always))
    {
        if !directory.is_dir() {
            continue;
        }
        for hook in HOOKS.iter().filter(|hook| hook.need == Need::Always) {
            let program = pins::open_existing(&directory.join(hook.program()), Kind::Program)?;
            match Messages::of_program(bpf::program_id(program.as_fd())?) {
                Ok(messages) => return Ok(Some(messages)),
                // Not every program has something to tell.
                Err(error) => failed = Some(error),
            }
        }
    }
    failed.map_or(Ok(None), Err)
}

/// `CLOCK_MONOTONIC`, as `bpf_ktime_get_ns` tells it.
fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
