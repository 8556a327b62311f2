//! What is in `deploy/`, and whether Kubernetes and the program would take it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Namespace, ServiceAccount},
    rbac::v1::{ClusterRole, ClusterRoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::loader;

/// The directory.
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// A file in it.
pub fn text(path: &str) -> String {
    let path = deploy().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The YAML documents of a file in it.
pub fn manifest(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The one object of that kind.
pub fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let object = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "several {kind}");
    object
}

/// The list at that place; empty if there is none.
pub fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// All containers of a DaemonSet, those that end before the others first.
pub fn containers(daemon_set: &Value) -> impl Iterator<Item = &Value> {
    let of = |field: &str| list(daemon_set, &format!("/spec/template/spec/{field}"));
    of("initContainers").iter().chain(of("containers"))
}

/// The arguments of a container.
pub fn arguments(container: &Value) -> Vec<&str> {
    let words = list(container, "/args").iter();
    words.map(|word| word.as_str().unwrap()).collect()
}

/// Whether Kubernetes' types have all that the object says: a field that they do not have would be refused, or ignored.
pub fn check_type(object: &Value) -> Result<(), String> {
    let kind = object["kind"].as_str().unwrap_or_default();
    match kind {
        "ClusterRole" => check::<ClusterRole>(object),
        "ClusterRoleBinding" => check::<ClusterRoleBinding>(object),
        "DaemonSet" => check::<DaemonSet>(object),
        "Namespace" => check::<Namespace>(object),
        "ServiceAccount" => check::<ServiceAccount>(object),
        _ => Err(format!("no kind that is checked here: {kind:?}")),
    }
    .map_err(|error| format!("{kind}: {error}"))
}

fn check<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let typed: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let known = serde_json::to_value(typed).map_err(|error| error.to_string())?;
    compare(object, &known, "")
}

/// Both are the same, as far as the first goes.
fn compare(said: &Value, known: &Value, place: &str) -> Result<(), String> {
    match (said, known) {
        (Value::Object(said), Value::Object(known)) => said.iter().try_for_each(|(name, value)| {
            let place = format!("{place}.{name}");
            let known = known.get(name).ok_or(format!("no field {place}"))?;
            compare(value, known, &place)
        }),
        (Value::Array(said), Value::Array(known)) if said.len() == known.len() => {
            let mut pairs = said.iter().zip(known).enumerate();
            pairs.try_for_each(|(number, (said, known))| {
                compare(said, known, &format!("{place}[{number}]"))
            })
        }
        _ if said == known => Ok(()),
        _ => Err(format!("{place}: {said} is taken for {known}")),
    }
}

/// Whether the program has the command and the flags that a container or unit calls it with.
pub fn check_call(arguments: &[&str]) -> Result<(), String> {
    let words: Vec<&str> = arguments
        .iter()
        .copied()
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let help = loader::run(words.iter().copied().chain(["--help"]));
    let help = String::from_utf8(help.stdout).unwrap();
    if !help.contains("Usage: redirect") || !help.contains(&words.join(" ")) {
        return Err(format!("no command {words:?}"));
    }
    let known: BTreeSet<&str> = help
        .split(|c: char| c.is_whitespace() || ",[]=".contains(c))
        .filter(|word| word.starts_with("--"))
        .collect();
    for flag in arguments.iter().filter(|word| word.starts_with("--")) {
        let name = flag.split('=').next().unwrap();
        if !known.contains(name) {
            return Err(format!("`redirect {}` has no {name}", words.join(" ")));
        }
    }
    Ok(())
}
