//! The one probe that leaves no doubt: loading every program and attaching it, to a cgroup and a network namespace that
//! are made for it, with pins in a BPF file system that nobody else sees.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::{Finding, Level};
use crate::machines;
use crate::observe::mounts;
use crate::observe::netns::NetworkNamespace;
use crate::pins::Pins;
use crate::programs::{self, Entered, HOOKS, Need, Programs};

const WHAT: &str = "rehearsal";

pub(super) fn finding() -> Finding {
    // On a thread: its namespaces end with it.
    let outcome = thread::spawn(rehearse)
        .join()
        .unwrap_or_else(|_| Err(anyhow!("the rehearsal ended too early")));
    judge(outcome)
}

fn judge(outcome: Result<Machines>) -> Finding {
    match outcome {
        Ok(Ok(())) => Finding::new(WHAT, Level::Ok, "every program loads and attaches"),
        Ok(Err(error)) => Finding::new(
            WHAT,
            Level::Warning,
            format!("pods can be captured, but not virtual machines in them (-k): {error:#}"),
        ),
        Err(error) => Finding::new(WHAT, Level::Bad, format!("{error:#}")),
    }
}

/// Whether the filters for virtual machines attach too, which few pods need.
type Machines = Result<()>;

fn rehearse() -> Result<Machines> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("making namespaces")?;
    let nothing = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, nothing).context("keeping mounts to itself")?;
    let flags = MsFlags::empty();
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), flags, nothing)
        .context("mounting a BPF file system")?;
    let pins = Pins::open()?;
    let loaded = Programs::open_or_load(&pins, &Need::ALL)?;
    // The thread's, which is not the process'.
    let netns = NetworkNamespace::open(Path::new("/proc/thread-self/ns/net"))?;
    let entry = loaded.load_entry(netns.cookie()?, Entered::SkLookup)?;
    let _steering = programs::attach_sk_lookup(&entry, &netns)?;
    let place = Place::new()?;
    let cgroup = File::open(&place.0).with_context(|| format!("opening {}", place.0.display()))?;
    let _links = HOOKS
        .iter()
        .map(|hook| loaded.attach(hook, &cgroup))
        .collect::<Result<Vec<_>>>()?;
    Ok(machines::rehearse(&pins, &loaded, &netns))
}

/// A cgroup without processes, directly below the mount point. It is removed with this value.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self> {
        let name = format!("redirect-check-{}", std::process::id());
        let path = mounts::mountpoint()?.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It is empty; if it stays nevertheless it does no harm.
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_filters_are_in_the_way_of_machines_only() {
        let level = |outcome| judge(outcome).level;
        assert_eq!(level(Ok(Ok(()))), Level::Ok);
        assert_eq!(level(Ok(Err(anyhow!("no clsact")))), Level::Warning);
        assert_eq!(level(Err(anyhow!("no sk_lookup"))), Level::Bad);
    }
}
