//! The guest's first process: this program, run by the kernel as `xtask vm-init`.
//!
//! It mounts what Linux programs expect, loads the modules, runs the job and powers off.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, chroot, getpid};

use super::job::{self, GuestCommand, Job, Mark};

/// (type, where)
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];

/// Never returns: when the first process ends the kernel panics.
pub fn run() -> Result<()> {
    if getpid() != Pid::from_raw(1) {
        bail!("vm-init is a guest's first process; use `cargo xtask vm`");
    }
    if let Err(error) = job() {
        mark(&Mark::Trouble(format!("{error:#}")));
    }
    match reboot(RebootMode::RB_POWER_OFF)? {}
}

fn job() -> Result<()> {
    leave_rootfs().context("mounting the root anew")?;
    for (kind, place) in MOUNTS {
        let nothing = None::<&str>;
        mount(Some(*kind), *place, Some(*kind), MsFlags::empty(), nothing)
            .with_context(|| format!("mounting {place}"))?;
    }
    // As under systemd: tests move mounts of their own, which must not show elsewhere unless shared.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("sharing mounts")?;
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        std::os::unix::fs::symlink(target, format!("/dev/{link}"))?;
    }
    load_modules()?;
    let up = guest_command(&["ip", "link", "set", "lo", "up"])
        .status()
        .context("ip")?;
    if !up.success() {
        bail!("cannot set lo up");
    }
    let text = fs::read(job::PATH).context(job::PATH)?;
    let job: Job = serde_json::from_slice(&text).context(job::PATH)?;
    mark(&Mark::Started);
    // Whoever closes it last waits for what is on its way, but not if that is a thread that is being killed.
    let terminal = OpenOptions::new().write(true).open(job::TERMINAL)?;
    for command in &job.commands {
        mark(&Mark::Begin(command.name.clone()));
        let status = match command.start() {
            Ok(child) => wait(child)?,
            Err(error) => {
                mark(&Mark::Trouble(format!("{}: {error:#}", command.name)));
                127
            }
        };
        mark(&Mark::End(command.name.clone(), status));
        if command.essential && status != 0 {
            break;
        }
    }
    drop(terminal);
    mark(&Mark::Done);
    Ok(())
}

/// pivot_root(2), with which runtimes start containers, refuses the kernel's first mount, but not another one of the same files.
fn leave_rootfs() -> nix::Result<()> {
    const PLACE: &str = "/vm";
    let nothing = None::<&str>;
    mount(Some("/"), PLACE, nothing, MsFlags::MS_BIND, nothing)?;
    chdir(PLACE)?;
    mount(Some("."), "/", nothing, MsFlags::MS_MOVE, nothing)?;
    chroot(".")
}

fn load_modules() -> Result<()> {
    let Ok(folder) = fs::read_dir(job::MODULES) else {
        return Ok(());
    };
    let mut files: Vec<_> = folder
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    files.sort();
    for path in files {
        let file = File::open(&path)?;
        match nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            // Not the end: what needs it will say so.
            Err(error) => mark(&Mark::Trouble(format!(
                "module {}: {error}",
                path.display()
            ))),
        }
        fs::remove_file(path)?;
    }
    Ok(())
}

fn guest_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(arguments[0]);
    command
        .args(&arguments[1..])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root");
    command
}

impl GuestCommand {
    /// Starts it. The terminal does not become its own: when the owner ends, what is still on its way is dropped.
    fn start(&self) -> Result<Child> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let terminal = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(job::TERMINAL)
        };
        let mut command = guest_command(&arguments);
        command
            .envs(self.environment.iter().cloned())
            .stdin(terminal()?)
            .stdout(terminal()?)
            .stderr(terminal()?)
            .process_group(0);
        command.spawn().context("cannot start it")
    }
}

/// Waits for it, and buries the orphans that come to process 1 meanwhile.
fn wait(child: Child) -> Result<i32> {
    let wanted = Pid::from_raw(i32::try_from(child.id())?);
    loop {
        match waitpid(None, None)? {
            WaitStatus::Exited(pid, status) if pid == wanted => return Ok(status),
            WaitStatus::Signaled(pid, signal, _) if pid == wanted => {
                return Ok(128 + signal as i32);
            }
            _ => {}
        }
    }
}

/// Through the kernel's log, at a level that any console shows.
fn mark(mark: &Mark) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one line. If it fails there is nobody left to tell.
        let _ = log.write_all(format!("<1>{mark}\n").as_bytes());
    }
}
