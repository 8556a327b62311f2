//! Following what the programs tell: troubles, and decisions if asked for.
//!
//! The programs tell only while somebody reads, and a ring buffer has one reader. `redirect log`
//! comes first; `redirect run` reads while nobody else does.

mod event;
mod messages;
mod reader;

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

pub use self::event::{Decision, Event, Message};
use self::reader::{Reader, Role};
use crate::pins::Pins;
use crate::record;
use crate::tables::Tables;

/// How often the ring buffers are emptied: they hold thousands of records.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// Whoever does not read at present looks that often whether it can: once in so many looks.
const RETRY: u32 = 10;

/// What somebody wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Only this network namespace's.
    pub netns_cookie: Option<u64>,
    /// Decisions too.
    pub decisions: bool,
}

/// Follows until Ctrl-C, SIGTERM, or until `each` breaks. Waits while nothing is attached. An error
/// if another `redirect log` is at it.
pub fn follow(wanted: Wanted, mut each: impl FnMut(&Event) -> ControlFlow<()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    runtime.block_on(async {
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reader = Reader::open(Role::Log, wanted)?;
        if reader.is_none() {
            tracing::warn!("nothing is attached: waiting");
        }
        let mut look = 0_u32;
        loop {
            tokio::select! {
                _ = interrupted.recv() => return Ok(()),
                _ = terminated.recv() => return Ok(()),
                _ = looks.tick() => {}
            }
            look = look.wrapping_add(1);
            if let Some(following) = &mut reader {
                // Asked first: what was told before everything was detached is still read.
                let gone = following.is_gone();
                for event in following.read()? {
                    if each(&event).is_break() {
                        return Ok(());
                    }
                }
                if gone {
                    reader = None;
                }
            } else if look.is_multiple_of(RETRY) {
                reader = Reader::open(Role::Log, wanted)?;
            }
        }
    })
}

/// The network namespace cookie that a cgroup is attached with.
pub fn cookie_of_cgroup(cgroup_id: u64) -> Result<Option<u64>> {
    Ok(attached()?
        .into_iter()
        .find_map(|(id, cookie)| (id == cgroup_id).then_some(cookie)))
}

/// Whether anything is attached in a network namespace.
pub fn is_attached(netns_cookie: u64) -> Result<bool> {
    Ok(attached()?
        .into_iter()
        .any(|(_, cookie)| cookie == netns_cookie))
}

fn attached() -> Result<Vec<(u64, u64)>> {
    let Some(pins) = Pins::open_existing()? else {
        return Ok(Vec::new());
    };
    Ok(record::all(&Tables::open(&pins)?)?
        .into_iter()
        .map(|(id, notes)| (id, notes.netns_cookie))
        .collect())
}

/// Passes troubles in one network namespace on to this process's log.
pub(crate) struct Forwarder {
    wanted: Wanted,
    reader: Option<Reader>,
    look: u32,
}

impl Forwarder {
    pub(crate) fn new(netns_cookie: u64) -> Self {
        Self {
            wanted: Wanted {
                netns_cookie: Some(netns_cookie),
                decisions: false,
            },
            reader: None,
            look: 0,
        }
    }

    /// To be called every [`LOOK`], and once in the end. Messages are a convenience: what goes wrong
    /// here must not end the command.
    pub(crate) fn look(&mut self) {
        if let Err(error) = self.try_look() {
            tracing::debug!("reading the programs' messages: {error:#}");
            self.reader = None;
        }
    }

    fn try_look(&mut self) -> Result<()> {
        if self.reader.as_ref().is_some_and(Reader::has_to_give_way) {
            self.reader = None;
        }
        if self.reader.is_none() && self.look.is_multiple_of(RETRY) {
            self.reader = Reader::open(Role::Run, self.wanted)?;
        }
        self.look = self.look.wrapping_add(1);
        if let Some(reader) = &mut self.reader {
            for event in reader.read()? {
                if let Event::Message(message) = event {
                    tracing::warn!("{}", message.text);
                }
            }
        }
        Ok(())
    }
}

fn busy() -> Result<Option<Reader>> {
    bail!("another `redirect log` is running; the programs' messages have one reader at a time")
}
