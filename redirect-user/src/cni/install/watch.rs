//! Installs again whenever somebody else has changed the directories.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::{Installation, State, files, install};

/// How soon a stop is noticed.
const LOOK: Duration = Duration::from_millis(200);
/// Directories that cannot be watched, as they are not there yet, are looked at this often.
const UNWATCHED: Duration = Duration::from_secs(2);
/// Others write a file in steps: their last one is waited for.
const SETTLE: Duration = Duration::from_millis(100);

/// Installs, and installs again after every change by others, until `stop`. `told` hears of every outcome that differs
/// from the one before it, and of every insertion.
pub fn keep(installation: &Installation, stop: &AtomicBool, mut told: impl FnMut(&Result<State>)) {
    let mut throttle = Throttle::default();
    let mut last = String::new();
    while !stop.load(Ordering::Relaxed) {
        // Before installing: a change meanwhile is then not missed.
        let watched = Watched::new(installation);
        let outcome = install(installation);
        let words = format!("{outcome:?}");
        let inserted = matches!(outcome, Ok(State::Inserted(_)));
        if inserted || words != last {
            told(&outcome);
        }
        last = words;
        let mut pause = SETTLE;
        if inserted {
            pause = throttle.inserted(Instant::now());
            if pause > Throttle::USUAL {
                tracing::warn!(
                    "{} is written by others again and again; is cni.exclusive set in Cilium?",
                    installation.conf_dir.display()
                );
            }
        }
        let patience = if outcome.is_err() || watched.is_err() {
            Some(UNWATCHED)
        } else {
            None
        };
        wait(watched.as_ref().ok(), patience, stop);
        sleep(pause, stop);
    }
}

/// Until something changes, `patience` ends, or `stop`.
fn wait(watched: Option<&Watched>, patience: Option<Duration>, stop: &AtomicBool) {
    let until = patience.map(|patience| Instant::now() + patience);
    while !stop.load(Ordering::Relaxed) && until.is_none_or(|until| Instant::now() < until) {
        match watched {
            None => std::thread::sleep(LOOK),
            Some(watched) => match watched.changes.recv_timeout(LOOK) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            },
        }
    }
}

fn sleep(pause: Duration, stop: &AtomicBool) {
    let until = Instant::now() + pause;
    while !stop.load(Ordering::Relaxed) && Instant::now() < until {
        std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
    }
}

struct Watched {
    changes: Receiver<()>,
    _watcher: RecommendedWatcher,
}

impl Watched {
    fn new(installation: &Installation) -> notify::Result<Self> {
        let (sender, changes) = channel();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if event.map_or(true, |event| is_a_change(&event)) {
                // Nobody listens any more: that is all right.
                let _ = sender.send(());
            }
        })?;
        for directory in [&installation.conf_dir, &installation.bin_dir] {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
        }
        Ok(Self {
            changes,
            _watcher: watcher,
        })
    }
}

/// By anybody, ourselves included; not our unfinished files, and not that somebody reads.
fn is_a_change(event: &Event) -> bool {
    let changes = match event.kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    };
    changes && (event.paths.is_empty() || !event.paths.iter().all(|path| files::is_temporary(path)))
}

/// Two who both want to have the last word must not keep a node busy.
#[derive(Default)]
struct Throttle {
    recent: VecDeque<Instant>,
}

impl Throttle {
    /// Pause after an insertion.
    const USUAL: Duration = Duration::from_secs(1);
    /// Pause after more than [`Self::MANY`] of them.
    const LONG: Duration = Duration::from_secs(15);
    /// Insertions within [`Self::WINDOW`].
    const MANY: usize = 5;
    /// How far back they count.
    const WINDOW: Duration = Duration::from_secs(60);

    /// How long to pause after one more.
    fn inserted(&mut self, now: Instant) -> Duration {
        self.recent.push_back(now);
        self.recent
            .retain(|then| now.saturating_duration_since(*then) < Self::WINDOW);
        if self.recent.len() > Self::MANY {
            Self::LONG
        } else {
            Self::USUAL
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insertions_slow_down_when_there_are_many_and_recover() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        for number in 0..Throttle::MANY as u64 {
            let now = start + Duration::from_secs(number);
            assert_eq!(throttle.inserted(now), Throttle::USUAL);
        }
        assert_eq!(
            throttle.inserted(start + Duration::from_secs(9)),
            Throttle::LONG
        );
        assert_eq!(
            throttle.inserted(start + Duration::from_secs(200)),
            Throttle::USUAL
        );
    }
}
