//! How this program calls cargo, and where the workspace and its build products are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::ui;

const STRIP_LIMIT: Duration = Duration::from_secs(60);

/// The eBPF crate builds for another target and is left out of every ordinary workspace command.
pub const EBPF_CRATE: &str = "redirect-ebpf";

#[derive(Deserialize)]
pub struct Workspace {
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
}

/// Asks cargo, so `CARGO_TARGET_DIR` and `build.target-dir` are honoured.
pub fn workspace() -> Result<&'static Workspace> {
    static FOUND: OnceLock<Workspace> = OnceLock::new();
    if let Some(workspace) = FOUND.get() {
        return Ok(workspace);
    }
    let output = command()
        .args(["metadata", "--no-deps", "--format-version=1"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .context("cannot run `cargo metadata`")?;
    if !output.status.success() {
        bail!(
            "`cargo metadata` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let workspace = serde_json::from_slice(&output.stdout)
        .context("cargo metadata is not what was expected")?;
    Ok(FOUND.get_or_init(|| workspace))
}

/// `cargo`, with cargo's own bin directory on the PATH: bpf-linker may have just been put there.
pub fn command() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env("PATH", path_with_cargo_bin());
    // `cargo xtask` describes the xtask package in the environment; build scripts must not see that.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The same, at the root of the workspace.
pub fn at_root() -> Result<Command> {
    let mut command = command();
    command.current_dir(&workspace()?.root);
    Ok(command)
}

pub fn path_with_cargo_bin() -> std::ffi::OsString {
    let old = env::var_os("PATH").unwrap_or_default();
    let Some(home) = cargo_home() else { return old };
    let all = std::iter::once(home.join("bin")).chain(env::split_paths(&old));
    env::join_paths(all).unwrap_or(old)
}

fn cargo_home() -> Option<PathBuf> {
    let by_default = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(by_default)
}

/// The program that tests of upgrades change to: its maps have another layout.
pub const OTHER_LAYOUT: &str = "redirect-other-layout";

/// The call that builds [`OTHER_LAYOUT`], next to `redirect`. For a single package, dependencies would have other features and be
/// built again.
pub fn build_other_layout() -> Result<Command> {
    let mut command = at_root()?;
    command.args(["build", "--features", "redirect-user/other-layout"]);
    command.args(["--bin", OTHER_LAYOUT]);
    Ok(command)
}

/// Builds what the demo and the tests run; redirect-user's build script builds the eBPF object on
/// the way. Not this program, which is running.
pub fn build(release: bool) -> Result<()> {
    let mut command = at_root()?;
    command.args([
        "build",
        "--package=redirect-user",
        "--package=redirect-tests",
    ]);
    if release {
        command.arg("--release");
    }
    ui::command(&command);
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the build failed ({status})");
    }
    Ok(())
}

/// Where [`build`] leaves the `redirect` program.
pub fn built_binary(release: bool) -> Result<PathBuf> {
    let profile = if release { "release" } else { "debug" };
    let path = workspace()?.target.join(profile).join("redirect");
    if !path.is_file() {
        bail!("the build left no program at {}", path.display());
    }
    Ok(path)
}

/// A copy of a program without symbols, which are most of it.
pub fn strip(program: &Path, copy: &Path) -> Result<()> {
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(copy).arg(program);
    ui::run_quietly(
        &format!("strip {}", program.display()),
        &mut strip,
        STRIP_LIMIT,
    )
}
