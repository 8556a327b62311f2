//! The files in `deploy/` that need no other program to be read; `chart.rs` has the chart and the kustomizations as a whole.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    process::Command,
};

use redirect_tests::{
    bpffs, loader,
    manifests::{check_call, containers, list, manifest, text},
    namespace::errors,
    options::Options,
    protocol::{Family, Identity},
    scene::{Lands, Scene, To, out},
};
use tempfile::TempDir;

#[test]
fn flags_that_do_not_exist_are_noticed() {
    check_call(&["cni", "install", "--watch"]).unwrap();
    assert!(check_call(&["cni", "install", "--wach"]).is_err());
    assert!(check_call(&["cni", "instal"]).is_err());
}

#[test]
fn units_call_the_program_by_commands_and_flags_that_it_has() {
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
fn every_value_of_the_chart_is_explained() {
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
