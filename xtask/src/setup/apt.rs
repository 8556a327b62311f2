//! Debian packages, and only those whose programs are missing.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::Done;
use crate::preflight::find_program;
use crate::ui;

/// (program to look for, package that has it)
const NEEDED: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("ip6tables", "iptables"),
    ("setpriv", "util-linux"),
    ("nsenter", "util-linux"),
    ("cc", "gcc"),
    ("openssl", "openssl"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
];

/// What apt holds while it works. Others use it too: the daily update of a machine that has just started, say.
const LISTS_LOCK: &str = "/var/lib/apt/lists/lock";
const PACKAGES_LOCK: &str = "/var/lib/dpkg/lock-frontend";
/// How long others may keep them.
const WAIT: Duration = Duration::from_secs(300);

pub fn run() -> Result<Done> {
    let mut packages: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(Done::Already(
            "ip, iptables, setpriv, nsenter, cc, openssl, containerd, runc and CNI plugins are there"
                .to_owned(),
        ));
    }
    install(&packages)?;
    Ok(Done::Installed(format!(
        "installed {}",
        packages.join(", ")
    )))
}

pub fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(", ");
    if find_program("apt-get").is_none() {
        bail!(
            "missing {list}, and no apt-get here: install them with this system's package manager"
        );
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "missing {list}: run `cargo xtask setup` as root, or `apt-get install {}`",
            packages.join(" ")
        );
    }
    let limit = Duration::from_secs(300);
    wait_for(Path::new(LISTS_LOCK), WAIT)?;
    ui::run_quietly(
        "apt-get update",
        Command::new("apt-get").args(["-q", "update"]),
        limit,
    )?;
    wait_for(Path::new(PACKAGES_LOCK), WAIT)?;
    let mut command = Command::new("apt-get");
    command
        .args(["-q", "-y", "--no-install-recommends", "install"])
        .args(packages);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    ui::run_quietly(&format!("installing {list}"), &mut command, limit)
}

/// Waits until nobody holds this lock: apt-get waits for one of its locks only, and not without being told.
fn wait_for(lock: &Path, limit: Duration) -> Result<()> {
    let started = Instant::now();
    let mut is_told = false;
    while let Some(holder) = holder(lock)? {
        if started.elapsed() >= limit {
            bail!(
                "{} has been held by process {holder} for {} s: apt-get cannot work before it ends",
                lock.display(),
                limit.as_secs()
            );
        }
        if !is_told {
            ui::warn(&format!(
                "waiting for process {holder}, which holds {}",
                lock.display()
            ));
            is_told = true;
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// The process that has locked this file; None if nobody has, or there is no such file.
fn holder(lock: &Path) -> Result<Option<libc::pid_t>> {
    let whose = || format!("cannot tell who holds {}", lock.display());
    let file = match File::open(lock) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(whose),
    };
    // Answers what stands in the way of such a lock.
    let mut question = whole(libc::F_WRLCK);
    fcntl(&file, FcntlArg::F_GETLK(&mut question)).with_context(whose)?;
    let is_held = question.l_type != libc::F_UNLCK as libc::c_short;
    Ok(is_held.then_some(question.l_pid))
}

/// A lock of this type on a whole file.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_while_somebody_holds_the_lock_and_not_for_ever() -> Result<()> {
        let lock = tempfile::NamedTempFile::new()?;
        let limit = Duration::from_millis(1);
        wait_for(lock.path(), limit)?;
        // A lock of this description: a process never stands in its own way with the other kind.
        fcntl(lock.as_file(), FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK)))?;
        let error = wait_for(lock.path(), limit).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{} has been held", lock.path().display())),
            "{error}"
        );
        let path = lock.path().to_owned();
        let waiter = thread::spawn(move || wait_for(&path, Duration::from_secs(60)));
        fcntl(lock.as_file(), FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK)))?;
        waiter.join().unwrap()
    }

    #[test]
    fn nobody_holds_what_is_not_there() -> Result<()> {
        let folder = tempfile::tempdir()?;
        assert_eq!(holder(&folder.path().join("lock"))?, None);
        Ok(())
    }
}
