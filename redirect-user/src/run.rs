//! `redirect run`: a command in a cgroup of its own, its outbound TCP captured.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::{Context, Result};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::attach::{self, Request};
use crate::detach;
use crate::follow::{self, Forwarder};
use crate::observe::cgroup::Cgroup;
use crate::observe::mounts;
use crate::observe::netns::NetworkNamespace;
use crate::options::{Policy, Scope};
use crate::proxy::ProxyIdentity;

/// The command could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot run {program:?}: {source}")]
pub struct NotStarted {
    /// The command's first word.
    pub program: OsString,
    /// What the kernel said.
    pub source: io::Error,
}

/// Runs the command and waits for it. The proxy may be any process on this machine that listens in
/// the same network namespace; capture ends with the command.
pub fn run(mut policy: Policy, command: &[OsString]) -> Result<ExitStatus> {
    if policy.include_outbound_cidrs == Scope::Listed(Vec::new())
        && policy.include_outbound_ports.is_empty()
    {
        policy.include_outbound_cidrs = Scope::All;
    }
    // Everything else in this namespace is not the command's.
    policy.inbound_ports = Scope::Listed(Vec::new());
    policy.virtual_interfaces = Vec::new();

    let mountpoint = mounts::mountpoint()?;
    let own = RunCgroup::create(&mountpoint)?;
    let cgroup = Cgroup::open(&own.path)?;
    let cgroup_id = cgroup.id();
    let netns = NetworkNamespace::open(Path::new("/proc/self/ns/net"))?;
    let mut forwarder = Forwarder::new(netns.cookie()?);
    attach::attach(&Request {
        cgroup,
        proxy_cgroup: Some(File::open(&mountpoint)?),
        netns,
        run_by: Some(std::process::id() as i32),
        pod: None,
        policy,
        proxy: ProxyIdentity::Uid,
    })?;
    remove_abandoned(&mountpoint);
    let result = spawn_and_wait(&own, &mountpoint, command, &mut forwarder);
    forwarder.look();
    drop(forwarder);
    let detached = detach::detach(cgroup_id);
    let status = result?;
    detached?;
    Ok(status)
}

/// Starts the command and waits for it. The terminal sends its signals to the command too; SIGTERM
/// is passed on. This process stays until the command has ended, to detach it.
fn spawn_and_wait(
    own: &RunCgroup,
    mountpoint: &Path,
    command: &[OsString],
    forwarder: &mut Forwarder,
) -> Result<ExitStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    runtime.block_on(async {
        let mut interrupted = signal(SignalKind::interrupt())?;
        let mut terminated = signal(SignalKind::terminate())?;
        let mut looks = tokio::time::interval(follow::LOOK);
        forwarder.look();
        let mut child = spawn(own, mountpoint, command)?;
        loop {
            tokio::select! {
                status = child.wait() => return status.context("waiting for the command"),
                _ = interrupted.recv() => {}
                _ = looks.tick() => forwarder.look(),
                _ = terminated.recv() => {
                    if let Some(pid) = child.id() {
                        let pid = nix::unistd::Pid::from_raw(pid as i32);
                        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
                            .context("passing SIGTERM on to the command")?;
                    }
                }
            }
        }
    })
}

/// A child is born into its parent's cgroup: move there, start it, move back.
fn spawn(own: &RunCgroup, mountpoint: &Path, command: &[OsString]) -> Result<Child> {
    let (program, arguments) = command.split_first().context("no command given")?;
    let before = Cgroup::of_process(std::process::id() as i32)
        .map_or_else(|_| mountpoint.to_owned(), |cgroup| cgroup.path().to_owned());
    enter(&own.path)?;
    let child = Command::new(program).args(arguments).spawn();
    enter(&before)?;
    child.map_err(|source| {
        let program = program.clone();
        NotStarted { program, source }.into()
    })
}

fn enter(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("writing {}", procs.display()))
}

/// Removes the empty cgroups of runs that were killed before anything was noted of them.
fn remove_abandoned(mountpoint: &Path) {
    for entry in fs::read_dir(mountpoint).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Fails while a command that outlives its run is in it.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// What the names of these cgroups begin with; the process id follows.
const PREFIX: &str = "redirect-run-";

/// Removed when dropped, with what the command left running.
struct RunCgroup {
    path: PathBuf,
}

impl RunCgroup {
    fn create(mountpoint: &Path) -> Result<Self> {
        let path = mountpoint.join(format!("{PREFIX}{}", std::process::id()));
        let making = || format!("making cgroup {}", path.display());
        let mut made = fs::create_dir(&path);
        if made
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
        {
            // A run that was killed had the same process id. The kernel takes its time to cut off what it has attached.
            let former = fs::metadata(&path).with_context(making)?.ino();
            fs::remove_dir(&path).with_context(making)?;
            detach::detach(former)?;
            made = fs::create_dir(&path);
        }
        made.with_context(making)?;
        Ok(Self { path })
    }
}

impl Drop for RunCgroup {
    fn drop(&mut self) {
        // Fails while a process that the command left behind lives on there, uncaptured from now on.
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!("cgroup {} stays: {error}", self.path.display());
        }
    }
}
