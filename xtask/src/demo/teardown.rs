//! Leaves nothing behind: at the end, after a failure, on Ctrl-C, and for a demo that was killed.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::ui;

const PREFIX: &str = "redirect-demo-";

/// The one demo of this process, for the handler of Ctrl-C.
static ARMED: Mutex<Option<Teardown>> = Mutex::new(None);

/// Everything the demo makes has a name that follows from its process id.
#[derive(Clone)]
pub struct Teardown {
    pub cgroup: PathBuf,
    pub pod_namespace: String,
    pub peer_namespace: String,
    /// Holds what the pod's users must be able to read.
    pub shared: PathBuf,
    redirect: PathBuf,
    captured: bool,
}

impl Teardown {
    pub fn new(cgroup2: &Path, redirect: &Path) -> Self {
        Self::of_process(std::process::id(), cgroup2, redirect)
    }

    fn of_process(pid: u32, cgroup2: &Path, redirect: &Path) -> Self {
        Self {
            cgroup: cgroup2.join(format!("{PREFIX}{pid}")),
            pod_namespace: format!("{PREFIX}{pid}"),
            peer_namespace: format!("{PREFIX}{pid}-peer"),
            shared: std::env::temp_dir().join(format!("{PREFIX}{pid}")),
            redirect: redirect.to_owned(),
            captured: true,
        }
    }

    /// From here on the teardown happens however this process ends, short of SIGKILL.
    pub fn armed(self) -> Result<Armed> {
        *lock() = Some(self.clone());
        ctrlc::set_handler(|| {
            // The lock is held to the very end: a main thread that fails meanwhile waits on it in `drop`.
            let mut armed = lock();
            if let Some(teardown) = armed.take() {
                eprintln!("\ninterrupted: cleaning up");
                teardown.run();
            }
            std::process::exit(130);
        })
        .context("cannot catch Ctrl-C")?;
        Ok(Armed { teardown: self })
    }

    /// Goes on whatever fails: each part is worth removing by itself.
    fn run(&self) {
        if self.cgroup.is_dir() {
            if self.captured {
                let mut detach = Command::new(&self.redirect);
                detach.args(["detach", "--cgroup"]).arg(&self.cgroup);
                detach
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .ok();
            }
            self.remove_cgroup();
        }
        for name in [&self.pod_namespace, &self.peer_namespace] {
            if super::pod::namespace_path(name).exists() {
                let status = Command::new("ip").args(["netns", "delete", name]).status();
                if !status.is_ok_and(|status| status.success()) {
                    ui::warn(&format!(
                        "namespace {name} stays behind: `ip netns delete {name}`"
                    ));
                }
            }
        }
        if self.shared.is_dir() && fs::remove_dir_all(&self.shared).is_err() {
            ui::warn(&format!("{} stays behind", self.shared.display()));
        }
    }

    fn remove_cgroup(&self) {
        let kill = || {
            fs::OpenOptions::new()
                .write(true)
                .open(self.cgroup.join("cgroup.kill"))?
                .write_all(b"1")
        };
        kill().ok();
        // Processes that were just killed hold the cgroup for a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        ui::warn(&format!("cgroup {} stays behind", self.cgroup.display()));
    }
}

fn lock() -> MutexGuard<'static, Option<Teardown>> {
    ARMED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the teardown when dropped.
pub struct Armed {
    teardown: Teardown,
}

impl Armed {
    pub fn teardown(&self) -> &Teardown {
        &self.teardown
    }

    /// `redirect detach` has been called already.
    pub fn detached(&self) {
        if let Some(teardown) = lock().as_mut() {
            teardown.captured = false;
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        let mut armed = lock();
        if let Some(teardown) = armed.take() {
            teardown.run();
        }
    }
}

/// Removes what demos left that were killed with SIGKILL: their process is gone, their names are not.
pub fn sweep_leftovers(cgroup2: &Path, redirect: &Path) {
    let temporary = std::env::temp_dir();
    let names = [cgroup2, Path::new("/run/netns"), &temporary]
        .into_iter()
        .filter_map(|folder| fs::read_dir(folder).ok());
    let mut dead: Vec<u32> = names
        .flatten()
        .filter_map(|entry| process_in(entry.ok()?.file_name().to_str()?))
        .filter(|pid| !Path::new("/proc").join(pid.to_string()).exists())
        .collect();
    dead.sort_unstable();
    dead.dedup();
    for pid in dead {
        ui::warn(&format!(
            "removing what the demo of process {pid} left behind"
        ));
        Teardown::of_process(pid, cgroup2, redirect).run();
    }
}

fn process_in(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?
        .trim_end_matches("-peer")
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::process_in;

    #[test]
    fn only_the_demos_own_names_are_recognised() {
        assert_eq!(process_in("redirect-demo-42"), Some(42));
        assert_eq!(process_in("redirect-demo-42-peer"), Some(42));
        assert_eq!(process_in("redirect-demo-x"), None);
        assert_eq!(process_in("system.slice"), None);
    }
}
