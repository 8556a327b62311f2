//! `redirect log` beside a test: what it tells, event by event.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    loader::redirect,
    patience::{patience, patience_ms},
};

/// What has happened is told within a tenth of a second; a busy machine takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// There is one reader on a machine.
static ONE_READER: Mutex<()> = Mutex::new(());

/// To be held while a program of the test reads, other than through a [`Follower`].
pub fn sole_reader() -> MutexGuard<'static, ()> {
    ONE_READER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running `redirect log`; ends with this value.
pub struct Follower {
    child: Child,
    events: Receiver<Value>,
    _sole: MutexGuard<'static, ()>,
}

impl Follower {
    /// Starts it; it may take a moment until it reads.
    pub fn start<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let sole = sole_reader();
        let mut child = redirect()
            .args(["log", "-o", "json"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, events) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            events,
            _sole: sole,
        }
    }

    /// Provokes again and again until an event comes that fits, and hands over all that came up to it.
    pub fn until(
        &self,
        mut provoke: impl FnMut(),
        mut fits: impl FnMut(&Value) -> bool,
    ) -> Vec<Value> {
        let deadline = Instant::now() + patience(PATIENCE);
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            provoke();
            while let Ok(event) = self.events.recv_timeout(patience_ms(300)) {
                seen.push(event);
                if fits(&seen[seen.len() - 1]) {
                    return seen;
                }
            }
        }
        panic!("it does not come: {seen:#?}");
    }

    /// Ends it without a chance to tidy up.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}
