//! Debian packages, and only those whose programs are missing.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

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
    ui::run_quietly(
        "apt-get update",
        Command::new("apt-get").args(["-q", "update"]),
        limit,
    )?;
    let mut command = Command::new("apt-get");
    command
        .args(["-q", "-y", "--no-install-recommends", "install"])
        .args(packages);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    ui::run_quietly(&format!("installing {list}"), &mut command, limit)
}
