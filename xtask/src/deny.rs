//! `cargo xtask deny`: what `deny.toml` says of the dependencies, checked by cargo-deny.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::ui::{self, Mark};
use crate::{cargo, preflight};

/// Without the network, a fetch may hang instead of failing.
const FETCH: Duration = Duration::from_secs(120);
/// Built from source, in few jobs.
const INSTALL: Duration = Duration::from_secs(1800);

pub fn run() -> Result<()> {
    install()?;
    ui::heading("deny");
    let checks = check(&["bans", "licenses", "sources"])?;
    // The list of known weaknesses comes from the network, which is not everywhere.
    let advisories = match deny(&["fetch", "db"])
        .and_then(|mut fetch| ui::run_quietly("cargo deny fetch db", &mut fetch, FETCH))
    {
        Ok(()) => check(&["--disable-fetch", "advisories"])?,
        Err(error) => {
            ui::step(
                Mark::Warn,
                "advisories",
                &format!("not checked: the database cannot be fetched: {error:#}"),
            );
            true
        }
    };
    if !(checks && advisories) {
        bail!("a dependency is not as deny.toml wants it: see above");
    }
    Ok(())
}

fn install() -> Result<()> {
    if preflight::find_program("cargo-deny").is_some() {
        return Ok(());
    }
    let mut command = cargo::command();
    command.args(["install", "cargo-deny", "--locked"]);
    // Its build must not read this workspace's configuration.
    command.current_dir("/");
    ui::run_quietly(
        "cargo install cargo-deny (some minutes)",
        &mut command,
        INSTALL,
    )
}

fn deny(arguments: &[&str]) -> Result<std::process::Command> {
    let mut command = cargo::at_root()?;
    command.arg("deny").args(arguments);
    Ok(command)
}

/// Whether all is well.
fn check(which: &[&str]) -> Result<bool> {
    let mut command = deny(&["check"])?;
    command.args(which);
    ui::command(&command);
    let status = command.status().context("cannot run cargo-deny")?;
    Ok(status.success())
}
