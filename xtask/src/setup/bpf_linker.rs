//! bpf-linker, at the one version that works with rustc's own LLVM.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::Done;
use crate::{cargo, ui};

/// From 0.12 on it wants a system LLVM of exactly rustc's version.
const VERSION: &str = "0.10.4";

pub fn run() -> Result<Done> {
    let wanted = format!("bpf-linker {VERSION}");
    let found = installed();
    if found.as_deref() == Some(&wanted) {
        return Ok(Done::Already(wanted));
    }
    let mut command = cargo::command();
    command.args([
        "install",
        "bpf-linker",
        "--version",
        VERSION,
        "--locked",
        "--force",
    ]);
    // Its build must not read this workspace's configuration.
    command.current_dir("/");
    ui::run_quietly(
        "cargo install bpf-linker (about a minute)",
        &mut command,
        Duration::from_secs(900),
    )?;
    let instead = found
        .map(|old| format!(", instead of {old}"))
        .unwrap_or_default();
    Ok(Done::Installed(format!("installed {wanted}{instead}")))
}

fn installed() -> Option<String> {
    let program = crate::preflight::find_program("bpf-linker")?;
    let output = Command::new(program).arg("--version").output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
