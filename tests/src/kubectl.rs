//! kubectl, as far as it needs no cluster.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{manifests::deploy, namespace::succeed, target::in_target};

/// Seconds that a call may take.
const LIMIT: &str = "60";

/// Where Helm and kubectl are: `REDIRECT_KUBERNETES`, or `kubernetes` in a target directory; else what was looked at.
pub fn kubernetes_programs() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("REDIRECT_KUBERNETES") {
        return Ok(path.into());
    }
    in_target("kubernetes").ok_or_else(|| {
        "no kubernetes in the target directory: `cargo xtask setup` makes it".to_owned()
    })
}

/// Where kubectl is, or what was looked at.
pub fn find() -> Result<PathBuf, String> {
    let path = kubernetes_programs()?.join("bin/kubectl");
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("no {}", path.display()))
    }
}

/// The objects that `kubectl apply -k` would send for a directory of `deploy/kustomize`.
pub fn kustomize(kubectl: &Path, directory: &str) -> Vec<Value> {
    let path = deploy().join("kustomize");
    let mut command = Command::new("timeout");
    command.arg(LIMIT).arg(kubectl);
    let text = succeed(command.arg("kustomize").arg(path.join(directory)));
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{directory}: {error}"))
}
