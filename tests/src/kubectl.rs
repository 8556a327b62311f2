//! kubectl, as far as it needs no cluster.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::Value;

use crate::namespace::succeed;

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

/// What is at that place in the target directory that this program is in, or else in the workspace's.
pub fn in_target(place: &str) -> Option<PathBuf> {
    let test = env::current_exe().unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let mut places = test
        .ancestors()
        .chain([workspace.as_path()])
        .map(|directory| directory.join(place));
    places.find(|path| path.exists())
}

/// The objects that `kubectl apply -k` would send for a directory of `deploy/kustomize`.
pub fn kustomize(kubectl: &Path, directory: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kustomize");
    let mut command = Command::new("timeout");
    command.arg(LIMIT).arg(kubectl);
    let text = succeed(command.arg("kustomize").arg(path.join(directory)));
    serde_saphyr::from_multiple(&text).unwrap_or_else(|error| panic!("{directory}: {error}"))
}

/// The one DaemonSet among them.
pub fn daemon_set(objects: &[Value]) -> DaemonSet {
    let mut found = objects.iter().filter(|one| one["kind"] == "DaemonSet");
    let (Some(one), None) = (found.next(), found.next()) else {
        panic!("not one DaemonSet: {objects:?}");
    };
    serde_json::from_value(one.clone()).unwrap()
}
