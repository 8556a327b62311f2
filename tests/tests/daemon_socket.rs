//! The daemon's socket: what the CNI plugin asks, and what others try.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, thread, time::Duration};

use redirect_tests::{
    actor::Actor,
    api_server::{ApiServer, Manner},
    bpffs,
    daemon::{Daemon, sandbox},
    daemon_faults::QUIET,
    kubernetes::object,
    loader,
    mounts::{RUN, own_run_directory},
    patience::patience,
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen},
    scene::{Scene, To},
};
use rstest::rstest;
use rustix::thread::{Uid, set_thread_res_uid};
use serde_json::{Value, json};
use tempfile::TempDir;

use Family::V4;

const NO_INBOUND: (&str, &str) = ("traffic.sidecar.istio.io/includeInboundPorts", "");

fn captured() -> Value {
    json!({"result": "captured"})
}

fn ok() -> Value {
    json!({"result": "ok"})
}

#[rstest]
fn pod_is_captured_before_its_first_process_runs() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        let pod = Pod::new();
        let kubernetes = object(&pod, &[]);
        server.apply(&kubernetes);
        daemon.until_metric("redirect_pods{state=\"waiting\"}", 1.0);
        let check = sandbox("check", "c1", &pod, &kubernetes);
        assert_eq!(daemon.ask(&check)["error"], "the pod is not attached");
        let add = sandbox("add", "c1", &pod, &kubernetes);
        // Twice: a runtime may repeat it.
        for _ in 0..2 {
            assert_eq!(daemon.ask(&add), captured());
            assert_eq!(daemon.ask(&check), captured());
        }
        // The very first connection of the first process is captured, which has no proxy yet.
        let mut first = Actor::start(
            &pod.netns.path(),
            Some(pod.cgroup.child("app")),
            Identity::APP,
        );
        let mut outside = Actor::start(&pod.peer.path(), None, Identity::ROOT);
        outside.listen(Listen::new("service", (pod.peer4, 80).into()));
        let dial = Dial::new(V4, (pod.peer4, 80).into());
        assert_eq!(first.dial(&dial).outcome(), "ECONNREFUSED");
        let mut proxy = Actor::start(
            &pod.netns.path(),
            Some(pod.cgroup.child("proxy")),
            Identity::PROXY,
        );
        proxy.listen(Listen::new("proxy", ([0, 0, 0, 0], 15001).into()));
        assert_eq!(first.dial(&dial).outcome(), "proxy");
        // Once more by the path that the plugin gave, whatever the resync has found since.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(daemon.ask(&check), captured());

        drop((first, proxy));
        let del = json!({"version": 1, "op": "del", "container_id": "c1",
                         "pod": {"namespace": "shop", "name": pod.netns.name()}});
        for _ in 0..2 {
            assert_eq!(daemon.ask(&del), ok());
            assert!(bpffs::pins().is_empty());
        }
        let mut late = Actor::start(&pod.netns.path(), None, Identity::APP);
        assert_eq!(late.dial(&dial).outcome(), "service");
    });
}

/// The daemon looks at it only once an hour: what has gone meanwhile is told to who asks.
#[rstest]
#[case::connect4("connect4")]
#[case::connect6("connect6")]
#[case::sockops("sockops")]
#[case::sk_lookup("sk_lookup")]
fn pod_without_one_of_its_links_is_not_told_to_be_captured(#[case] link: &str) {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &QUIET);
        daemon.until_ready();
        let pod = Pod::new();
        let kubernetes = object(&pod, &[]);
        server.apply(&kubernetes);
        let (add, check) = (
            sandbox("add", "c1", &pod, &kubernetes),
            sandbox("check", "c1", &pod, &kubernetes),
        );
        assert_eq!(daemon.ask(&add), captured());
        assert_eq!(daemon.ask(&check), captured());
        // What the watch told it of the pod before it was asked has been looked at by then.
        thread::sleep(patience(Duration::from_secs(1)));
        fs::remove_file(bpffs::link_pin(&pod.cgroup, link)).unwrap();
        assert_eq!(
            daemon.ask(&check)["error"],
            "the pod is attached, but not captured: some of it has been removed or replaced"
        );
        let capturing = || loader::status_of(&pod)["capturing"].clone();
        assert_eq!(capturing(), false);
        assert_eq!(daemon.ask(&add), captured());
        assert_eq!(daemon.ask(&check), captured());
        assert_eq!(capturing(), true);
    });
}

#[rstest]
fn sandbox_that_has_been_replaced_does_not_take_its_successor_along() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut daemon = Daemon::start(&server, &[]);
        let mut scene = Scene::new();
        let kubernetes = object(&scene.pod, &[]);
        server.apply(&kubernetes);
        for id in ["old", "new"] {
            let add = sandbox("add", id, &scene.pod, &kubernetes);
            assert_eq!(daemon.ask(&add), captured());
        }
        let to = scene.address(V4, To::Service(80));
        let mut who = || scene.app.dial(&Dial::new(V4, to)).outcome().to_owned();
        let del = |id: &str| {
            json!({"version": 1, "op": "del", "container_id": id,
                   "pod": {"namespace": "shop", "name": kubernetes["metadata"]["name"]}})
        };
        assert_eq!(daemon.ask(&del("old")), ok());
        assert_eq!(who(), "15001");
        // What another daemon has been told is not forgotten.
        daemon.kill();
        daemon = Daemon::start(&server, &[]);
        assert_eq!(daemon.ask(&del("old")), ok());
        // A list that lacks it does not end the capture of what lives.
        let gc = json!({"version": 1, "op": "gc", "valid_container_ids": ["another"]});
        assert_eq!(daemon.ask(&gc), ok());
        assert_eq!(who(), "15001");
        server.delete(&kubernetes);
        thread::sleep(Duration::from_millis(300));
        assert_eq!(daemon.ask(&del("new")), ok());
        assert_eq!(who(), "service");
    });
}

#[rstest]
fn pod_that_the_watch_does_not_know_yet_stays_captured() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        let pod = Pod::new();
        let mut kubernetes = object(&pod, &[]);
        // The watch leaves it out, a question for it by name does not.
        kubernetes["spec"]["nodeName"] = json!("node-2");
        server.apply(&kubernetes);
        assert_eq!(
            daemon.ask(&sandbox("add", "c1", &pod, &kubernetes)),
            captured()
        );
        thread::sleep(Duration::from_millis(2500));
        let check = sandbox("check", "c1", &pod, &kubernetes);
        assert_eq!(daemon.ask(&check), captured());
        // Once it has been known and gone, it is removed at once.
        kubernetes["spec"]["nodeName"] = json!("node-1");
        server.apply(&kubernetes);
        daemon.until_metric("redirect_pods{state=\"captured\"}", 1.0);
        server.delete(&kubernetes);
        daemon.until("nothing is left", || bpffs::pins().is_empty().then_some(()));
    });
}

/// The kubelet makes it just before it asks for the sandbox, perhaps right after the daemon has looked for that of another pod.
#[rstest]
fn cgroup_that_a_search_came_too_early_for_is_found_by_the_next_request() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        let pod = Pod::new();
        fs::remove_dir(pod.cgroup.path()).unwrap();
        let kubernetes = object(&pod, &[]);
        server.apply(&kubernetes);
        let add = sandbox("add", "c1", &pod, &kubernetes);
        assert_eq!(daemon.ask(&add)["error"], "kubelet has not made its cgroup");
        fs::create_dir(pod.cgroup.path()).unwrap();
        assert_eq!(daemon.ask(&add), captured());
    });
}

#[rstest]
fn sandboxes_that_are_not_named_are_forgotten() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let pods = [Pod::new(), Pod::new()];
        for (pod, id) in pods.iter().zip(["one", "two"]) {
            let kubernetes = object(pod, &[]);
            server.apply(&kubernetes);
            assert_eq!(
                daemon.ask(&sandbox("add", id, pod, &kubernetes)),
                captured()
            );
        }
        let attached = || loader::status()["pods"].as_array().unwrap().len();
        let gc = |valid: &[&str]| {
            let request = json!({"version": 1, "op": "gc", "valid_container_ids": valid});
            assert_eq!(daemon.ask(&request), ok());
        };
        gc(&["one", "two", "three"]);
        assert_eq!(attached(), 2);
        gc(&["two"]);
        assert_eq!(attached(), 1);
        gc(&[]);
        assert_eq!(attached(), 0);
    });
}

#[rstest]
fn pod_that_is_not_captured_is_answered_with_the_reason() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let pod = Pod::new();
        let mut kubernetes = object(&pod, &[]);
        kubernetes["metadata"]["annotations"] = json!({});
        server.apply(&kubernetes);
        let ask = |kubernetes: &Value| daemon.ask(&sandbox("add", "c1", &pod, kubernetes));
        let answer = ask(&kubernetes);
        assert_eq!(answer["result"], "skipped");
        assert!(
            answer["reason"]
                .as_str()
                .unwrap()
                .contains("sidecar.istio.io/status"),
            "{answer}"
        );

        let mut invalid = object(&pod, &[("sidecar.istio.io/interceptionMode", "NONE")]);
        invalid["metadata"]["name"] = json!("invalid");
        invalid["metadata"]["uid"] = json!("another");
        server.apply(&invalid);
        let answer = ask(&invalid);
        assert_eq!(answer["retry"], false);
        let error = answer["error"].as_str().unwrap();
        assert!(
            error.contains("sidecar.istio.io/interceptionMode: \"NONE\""),
            "{error}"
        );
        daemon.until("an Event", || (server.events().len() == 1).then_some(()));
        assert!(bpffs::pins().is_empty());

        // Without a word to the API.
        server.behave(Manner::Hang);
        let mut system = kubernetes.clone();
        system["metadata"]["namespace"] = json!("kube-system");
        system["metadata"]["uid"] = json!("unknown");
        assert_eq!(ask(&system)["result"], "skipped");
        // Nothing is known of this one, and it must not start uncaptured.
        let mut unknown = kubernetes.clone();
        unknown["metadata"]["uid"] = json!("unknown");
        let answer = ask(&unknown);
        assert_eq!(answer["retry"], true, "{answer}");
        server.behave(Manner::Well);
        let answer = ask(&unknown);
        assert!(
            answer["error"].as_str().unwrap().contains("not unknown"),
            "{answer}"
        );
    });
}

#[rstest]
fn what_cannot_be_attached_is_an_error_that_names_it() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let pod = Pod::new();
        let kubernetes = object(&pod, &[NO_INBOUND]);
        server.apply(&kubernetes);
        let add = sandbox("add", "c1", &pod, &kubernetes);
        for (field, value, words) in [
            ("netns", json!("/run/netns/no-such"), "/run/netns/no-such"),
            ("netns", json!("/etc/passwd"), "/etc/passwd"),
            ("cgroup_parent", json!("../../etc"), "cgroup_parent"),
        ] {
            let mut request = add.clone();
            request[field] = value;
            let answer = daemon.ask(&request);
            assert!(
                answer["error"].as_str().unwrap().contains(words),
                "{answer}"
            );
            assert_eq!(answer["retry"], true);
        }
        assert!(bpffs::pins().is_empty());
        // A cgroup that is told wins over none; one that is not there yet is searched for.
        for parent in [
            pod.above
                .path()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned()
                + "/"
                + &pod.cgroup.path().file_name().unwrap().to_string_lossy(),
            "no-such.slice".to_owned(),
        ] {
            let mut request = add.clone();
            request["cgroup_parent"] = json!(format!("/{parent}"));
            assert_eq!(daemon.ask(&request), captured(), "{parent}");
        }
        assert!(
            daemon
                .metric("redirect_errors_total{reason=\"attach\"}")
                .unwrap()
                >= 3.0
        );
    });
}

#[rstest]
fn its_own_directory_is_closed_and_another_is_left_alone() {
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    bpffs::private(|| {
        // Open to all, as a kubelet makes it.
        own_run_directory();
        let server = ApiServer::start();
        let elsewhere = TempDir::new().unwrap();
        let [made, there] = ["made", "there"].map(|name| elsewhere.path().join(name));
        fs::create_dir(&there).unwrap();
        fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).unwrap();
        for (directory, before, expected) in [
            (Path::new(RUN), Some(0o755), 0o700),
            (&made, None, 0o700),
            (&there, Some(0o755), 0o755),
        ] {
            let found = directory.exists().then(|| mode(directory));
            assert_eq!(found, before, "{}", directory.display());
            let socket = directory.join("daemon.sock");
            let daemon = Daemon::start_at(&socket, &server, &[]);
            assert_eq!(mode(directory), expected, "{}", directory.display());
            assert_eq!(mode(daemon.socket()), 0o600);
        }
    });
}

#[rstest]
fn strangers_are_hung_up_on_and_counted() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        assert_eq!(
            fs::metadata(daemon.socket()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let status = json!({"version": 1, "op": "status"});
        assert_eq!(daemon.ask(&status), ok());
        // Even where somebody has opened the socket to all.
        fs::set_permissions(daemon.socket(), fs::Permissions::from_mode(0o666)).unwrap();
        let ask_as = |user: u32| {
            thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    // Of this thread alone, as the system call has it.
                    let user = Uid::from_raw(user);
                    set_thread_res_uid(user, user, user).unwrap();
                    daemon.say(&format!("{status}\n"))
                });
                thread.join().unwrap()
            })
        };
        assert_eq!(ask_as(0), [ok().to_string()]);
        let strangers = "redirect_errors_total{reason=\"stranger\"}";
        assert_eq!(daemon.metric(strangers), Some(0.0));
        assert_eq!(ask_as(1000), [""; 0]);
        assert_eq!(daemon.metric(strangers), Some(1.0));
    });
}

#[rstest]
fn what_is_no_request_is_refused_and_harms_nobody() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let status = r#"{"version":1,"op":"status"}"#;
        for (text, words) in [
            ("hello\n", "not a request"),
            ("\n", "not a request"),
            ("{\"version\":9,\"op\":\"status\"}\n", "version: 9"),
            ("{\"version\":1,\"op\":\"status\",\"x\":1}\n", "x"),
        ] {
            let answers = daemon.say(&format!("{text}{status}\n"));
            let [error, after] = &answers[..] else {
                panic!("{text}: {answers:?}")
            };
            assert!(
                error.contains(words) && error.contains("\"retry\":false"),
                "{error}"
            );
            assert_eq!(after, r#"{"result":"ok"}"#);
        }
        // Too long, cut off, or nothing at all: no answer.
        for text in ["x".repeat(64 * 1024 + 1), status.to_owned(), String::new()] {
            assert_eq!(daemon.say(&text), [""; 0], "{} bytes", text.len());
        }
        // As long as may be.
        let padded = format!("{}{status}\n", " ".repeat(64 * 1024 - 1 - status.len()));
        assert_eq!(padded.len(), 64 * 1024);
        assert_eq!(daemon.say(&padded), [r#"{"result":"ok"}"#]);
        // Slow callers hold nobody up.
        let idle: Vec<_> = (0..40)
            .map(|_| std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap())
            .collect();
        assert_eq!(daemon.say(&format!("{status}\n")), [r#"{"result":"ok"}"#]);
        drop(idle);
    });
}
