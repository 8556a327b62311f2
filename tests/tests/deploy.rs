//! The files in `deploy/`: they can be read, agree with each other, and call the program by words that it knows.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use redirect_tests::{
    bpffs, loader,
    namespace::errors,
    options::Options,
    protocol::{Family, Identity},
    scene::{Lands, Scene, To, out},
    skip,
};
use serde_json::Value;
use tempfile::TempDir;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn text(path: &str) -> String {
    let path = deploy().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documents(what: &str, text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{what}: {error}\n{text}"))
}

fn manifest(path: &str) -> Vec<Value> {
    documents(path, &text(path))
}

/// The one object of that kind.
fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind);
    let object = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "several {kind}");
    object
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// All containers of a DaemonSet.
fn containers(daemon_set: &Value) -> impl Iterator<Item = &Value> {
    let of = |field: &str| list(daemon_set, &format!("/spec/template/spec/{field}"));
    of("initContainers").iter().chain(of("containers"))
}

fn values() -> Value {
    manifest("helm/redirect/values.yaml").remove(0)
}

/// A template with the chart's default values, and the branches of both outcomes of every `if`.
///
/// It knows the forms that the chart uses, and stops at any other: `helm template` has the last word where there is one.
fn rendered(template: &str) -> String {
    let values = values();
    let mut output = String::new();
    for line in text(&format!("helm/redirect/templates/{template}")).lines() {
        let control = line.trim_start();
        if control.starts_with("{{- if ") || control == "{{- end }}" {
            continue;
        }
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("{{ ") {
            let (expression, after) = after.split_once(" }}").unwrap();
            output += before;
            output += &evaluate(expression, &values);
            rest = after;
        }
        output += rest;
        output.push('\n');
    }
    output
}

fn evaluate(expression: &str, values: &Value) -> String {
    let value = |name: &str| -> Value {
        let path = name
            .strip_prefix(".Values.")
            .unwrap_or_else(|| panic!("unknown form: {expression}"));
        let found = values.pointer(&format!("/{}", path.replace('.', "/")));
        found
            .unwrap_or_else(|| panic!("no {path} in values.yaml"))
            .clone()
    };
    let plain = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    match expression.split(' ').collect::<Vec<_>>()[..] {
        [".Release.Namespace"] => "redirect-system".to_owned(),
        ["toJson", name] => value(name).to_string(),
        ["join", "\",\"", name] => {
            let parts: Vec<String> = list(&value(name), "").iter().cloned().map(plain).collect();
            parts.join(",")
        }
        [name, "|", "default", ".Chart.AppVersion"] => match plain(value(name)) {
            empty if empty.is_empty() => "0.1.0".to_owned(),
            tag => tag,
        },
        ["printf", format, name, "|", "toJson"] => {
            let text = format.trim_matches('"').replace("%s", &plain(value(name)));
            Value::from(text).to_string()
        }
        [name] => plain(value(name)),
        _ => panic!("unknown form: {expression}"),
    }
}

/// Checks that the program has the command and the flags that a container or unit calls it with.
fn check_call(arguments: &[&str]) -> Result<(), String> {
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

/// Whether this build has the daemon at all.
fn has_daemon() -> bool {
    let help = loader::run(["--help"]);
    String::from_utf8(help.stdout)
        .unwrap()
        .contains("\n  daemon ")
}

#[test]
fn flags_that_do_not_exist_are_noticed() {
    check_call(&["cni", "install", "--watch"]).unwrap();
    assert!(check_call(&["cni", "install", "--wach"]).is_err());
    assert!(check_call(&["cni", "instal"]).is_err());
}

#[test]
fn containers_and_units_call_the_program_by_commands_and_flags_that_it_has() {
    if !has_daemon() {
        skip!("this build has no `redirect daemon`");
    }
    let chart = documents("daemonset.yaml", &rendered("daemonset.yaml"));
    for objects in [
        manifest("kustomize/base/daemonset.yaml"),
        manifest("kustomize/remove-cni/daemonset.yaml"),
        chart,
    ] {
        let mut checked = 0;
        for container in containers(&objects[0]).filter(|one| one["$patch"].is_null()) {
            let arguments = list(container, "/args")
                .iter()
                .map(|word| word.as_str().unwrap());
            check_call(&arguments.collect::<Vec<_>>()).unwrap();
            checked += 1;
        }
        assert!(checked > 0);
    }
    for unit in ["systemd/redirect.service", "systemd/redirect@.service"] {
        let text = text(unit);
        let calls = text
            .lines()
            .filter_map(|line| line.split_once("=/usr/bin/redirect "));
        let calls: Vec<_> = calls.map(|(_, call)| call).collect();
        assert!(!calls.is_empty(), "{unit}");
        for call in calls {
            let words = call.split(' ').filter(|word| !word.starts_with('$'));
            check_call(&words.collect::<Vec<_>>())
                .unwrap_or_else(|error| panic!("{unit}: {error}"));
        }
    }
}

#[test]
fn chart_and_manifests_grant_and_mount_the_same() {
    let base = manifest("kustomize/base/daemonset.yaml").remove(0);
    let chart = documents("daemonset.yaml", &rendered("daemonset.yaml")).remove(0);
    let pod = |object: &Value| object.pointer("/spec/template/spec").unwrap().clone();
    for field in [
        "hostNetwork",
        "hostPID",
        "volumes",
        "securityContext",
        "tolerations",
        "nodeSelector",
        "priorityClassName",
        "dnsPolicy",
        "serviceAccountName",
    ] {
        assert!(!pod(&base)[field].is_null(), "{field}");
        assert_eq!(pod(&base)[field], pod(&chart)[field], "{field}");
    }
    for ours in containers(&base) {
        let theirs = containers(&chart)
            .find(|one| one["name"] == ours["name"])
            .unwrap();
        for field in [
            "securityContext",
            "volumeMounts",
            "env",
            "ports",
            "livenessProbe",
            "readinessProbe",
            "resources",
        ] {
            assert_eq!(ours[field], theirs[field], "{} {field}", ours["name"]);
        }
        for argument in list(ours, "/args") {
            assert!(list(theirs, "/args").contains(argument), "{argument}");
        }
    }
    let (ours, theirs) = (
        manifest("kustomize/base/rbac.yaml"),
        documents("rbac.yaml", &rendered("rbac.yaml")),
    );
    for kind in ["ClusterRole", "ClusterRoleBinding"] {
        for field in ["rules", "roleRef", "subjects"] {
            assert_eq!(
                of_kind(&ours, kind)[field],
                of_kind(&theirs, kind)[field],
                "{kind} {field}"
            );
        }
    }
}

#[test]
fn every_mount_has_its_volume_and_no_container_is_privileged() {
    let base = manifest("kustomize/base/daemonset.yaml").remove(0);
    let volumes: BTreeSet<_> = list(&base, "/spec/template/spec/volumes")
        .iter()
        .map(|volume| volume["name"].as_str())
        .collect();
    let removal = manifest("kustomize/remove-cni/daemonset.yaml").remove(0);
    for container in containers(&base)
        .chain(containers(&removal))
        .filter(|one| one["$patch"].is_null())
    {
        for mount in list(container, "/volumeMounts") {
            assert!(volumes.contains(&mount["name"].as_str()), "{mount}");
        }
        let context = &container["securityContext"];
        assert!(context["privileged"].is_null(), "{}", container["name"]);
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["capabilities"]["drop"][0], "ALL");
    }
    let kustomization = manifest("kustomize/base/kustomization.yaml").remove(0);
    for resource in list(&kustomization, "/resources") {
        assert!(!manifest(&format!("kustomize/base/{}", resource.as_str().unwrap())).is_empty());
    }
}

/// The program as root with only the capabilities that the manifest gives to that container.
fn as_container(name: &str) -> Command {
    let base = manifest("kustomize/base/daemonset.yaml").remove(0);
    let container = containers(&base).find(|one| one["name"] == name).unwrap();
    let added = list(container, "/securityContext/capabilities/add").iter();
    let added: Vec<String> = added
        .map(|name| format!("+{}", name.as_str().unwrap().to_lowercase()))
        .collect();
    as_root_with(&added.join(","))
}

fn as_root_with(added: &str) -> Command {
    let program = loader::redirect();
    let mut command = Command::new("setpriv");
    let set = ["-all", added].join(",");
    command.args([
        "--inh-caps=-all",
        "--no-new-privs",
        "--bounding-set",
        set.trim_end_matches(','),
    ]);
    command.arg(program.get_program());
    command
}

#[test]
fn capabilities_of_the_daemon_are_enough_to_capture_a_pod_whose_proxy_runs() {
    bpffs::private(attach_by_capabilities_of_the_daemon);
}

fn attach_by_capabilities_of_the_daemon() {
    let mut scene = Scene::new();
    let connection = out(Identity::APP, To::Service(80), Lands::Outbound);
    let attach = |command: &mut Command| {
        command
            .arg("attach")
            .arg("--cgroup")
            .arg(scene.pod.cgroup.path());
        command.arg("--netns").arg(scene.pod.netns.path());
        loader::finish(command.args(Options::ISTIO.arguments()))
    };
    assert!(!attach(&mut as_root_with("")).status.success());
    let output = attach(&mut as_container("daemon"));
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(errors(&output), "", "no listener of the proxy is missed");
    scene.adopt(&Options::ISTIO);
    scene.attempt(Family::V4, &connection).unwrap();
    scene.detach();
    scene.attempt(Family::V4, &connection).unwrap_err();
}

#[test]
fn capabilities_of_the_installer_are_enough_where_files_belong_to_others() {
    let directory = TempDir::new().unwrap();
    let (conf, bin) = (directory.path().join("net.d"), directory.path().join("bin"));
    for path in [&conf, &bin] {
        fs::create_dir(path).unwrap();
    }
    let file = conf.join("10-a.conflist");
    fs::write(
        &file,
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"}]}"#,
    )
    .unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    for path in [&file, &conf, &bin] {
        chown(path, Some(1000), Some(1000)).unwrap();
    }
    let install = |command: &mut Command| {
        command
            .args(["cni", "install", "--cni-conf-dir"])
            .arg(&conf);
        loader::finish(command.arg("--cni-bin-dir").arg(&bin))
    };
    assert!(!install(&mut as_root_with("")).status.success());
    let output = install(&mut as_container("cni"));
    assert!(output.status.success(), "{}", errors(&output));
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o777), (1000, 0o600));
    assert!(fs::read_to_string(&file).unwrap().contains("redirect-cni"));
}

#[test]
fn every_value_of_the_chart_is_explained_and_used() {
    let text = text("helm/redirect/values.yaml");
    let lines: Vec<&str> = text.lines().collect();
    for (number, line) in lines.iter().enumerate() {
        let is_section = line.ends_with(':') && !line.starts_with(' ');
        if line.trim().is_empty() || line.trim().starts_with('#') || is_section {
            continue;
        }
        let above = number
            .checked_sub(1)
            .map_or("", |above| lines[above].trim());
        assert!(above.starts_with("# "), "no comment above {line:?}");
    }
    let templates = ["daemonset.yaml", "rbac.yaml"]
        .map(|name| self::text(&format!("helm/redirect/templates/{name}")))
        .concat();
    for (section, value) in values().as_object().unwrap() {
        let fields: Vec<String> = match value {
            Value::Object(fields) if ["image", "daemon", "cni"].contains(&section.as_str()) => {
                fields
                    .keys()
                    .map(|field| format!("{section}.{field}"))
                    .collect()
            }
            _ => vec![section.clone()],
        };
        for field in fields {
            assert!(
                templates.contains(&format!(".Values.{field} ")),
                "{field} is not used"
            );
        }
    }
}

#[test]
fn versions_are_those_of_the_program() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = manifest("helm/redirect/Chart.yaml").remove(0);
    assert_eq!(chart["version"], version);
    assert_eq!(chart["appVersion"], version);
    for directory in ["base", "remove-cni"] {
        let kustomization =
            manifest(&format!("kustomize/{directory}/kustomization.yaml")).remove(0);
        assert_eq!(kustomization["images"][0]["newTag"], version);
    }
}
