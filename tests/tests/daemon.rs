//! `redirect daemon`: pods of a node come, change and go, and so do the daemon and the Kubernetes API.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{fs, thread, time::Duration};

use nix::sys::signal::Signal;
use redirect_tests::{
    actor::Actor,
    api_server::ApiServer,
    bpffs::{self, Objects},
    daemon::{Daemon, free_port, inward, out, until_out},
    kubernetes::{Layout, laid_out, object},
    loader::{self, OtherBuild, finish},
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Identity, Traffic},
    scene::{Scene, To},
};
use rstest::rstest;
use serde_json::{Value, json};

use Family::{V4, V6};

const EXCLUDE_OUT: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const INCLUDE_IN: &str = "traffic.sidecar.istio.io/includeInboundPorts";

fn only(traffic: &Traffic, who: &str) {
    let [(met, count)] = &traffic.outcomes[..] else {
        panic!("{traffic:?}");
    };
    assert!(met == who && *count > 20, "{traffic:?}");
}

/// Everything of the loader is gone, its locked directory aside.
fn is_clean() -> bool {
    bpffs::pins().is_empty()
}

#[rstest]
fn pods_that_ran_before_are_captured_with_the_options_of_their_annotations(
    #[values(
        Layout::CgroupfsGuaranteed,
        Layout::CgroupfsBurstable,
        Layout::SystemdBurstable,
        Layout::SystemdBestEffort,
        Layout::Nested
    )]
    layout: Layout,
) {
    bpffs::private(|| {
        let mut scene = Scene::with(laid_out(Pod::new(), layout), &Options::ISTIO);
        let server = ApiServer::start();
        server.apply(&object(
            &scene.pod,
            &[(EXCLUDE_OUT, "443"), (INCLUDE_IN, "8080")],
        ));
        for port in [80, 443, 15020] {
            assert_eq!(out(&mut scene, port), "service");
        }
        assert_eq!(inward(&mut scene, 8080), "app");

        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        assert_eq!(out(&mut scene, 443), "service");
        // Excluded by default, but the annotation replaces that.
        assert_eq!(out(&mut scene, 15020), "15001");
        assert_eq!(inward(&mut scene, 8080), "15006");
        assert_eq!(inward(&mut scene, 9090), "app");
        assert_eq!(
            daemon.metric("redirect_pods{state=\"captured\"}"),
            Some(1.0)
        );
        let counted = r#"redirect_connections_total{direction="outbound",verdict="captured",rule="outbound-captured"}"#;
        assert!(daemon.metric(counted).unwrap() >= 2.0);
        assert_eq!(
            daemon.metric("redirect_listeners_missing{direction=\"outbound\"}"),
            Some(0.0)
        );
        let status = loader::status();
        let pod = &status["pods"][0]["pod"];
        assert_eq!(pod["namespace"], "shop");
        assert_eq!(pod["name"], scene.pod.netns.name());
    });
}

#[rstest]
fn pod_that_comes_later_is_captured_as_soon_as_it_runs_and_nobody_elses_pods_are() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        let (mut late, mut other_node) = (Scene::new(), Scene::new());
        server.apply(&object(&late.pod, &[]));
        let mut elsewhere = object(&other_node.pod, &[]);
        elsewhere["spec"]["nodeName"] = json!("node-2");
        server.apply(&elsewhere);
        until_out(&daemon, &mut late, 80, "15001");
        assert_eq!(out(&mut other_node, 80), "service");
        // By its namespace of its own, once the API says that it runs here.
        elsewhere["spec"]["nodeName"] = json!("node-1");
        server.apply(&elsewhere);
        until_out(&daemon, &mut other_node, 80, "15001");
    });
}

#[rstest]
fn pods_that_istio_cni_skips_are_skipped() {
    let changes: [(&str, &str, Value); 6] = [
        ("/spec", "hostNetwork", json!(true)),
        (
            "/spec",
            "initContainers",
            json!([{"name": "istio-init", "image": "i"}]),
        ),
        ("/metadata", "annotations", json!({})),
        (
            "/metadata/labels",
            "sidecar.istio.io/inject",
            json!("false"),
        ),
        ("/metadata", "namespace", json!("kube-system")),
        ("/spec/containers/1", "name", json!("envoy")),
    ];
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut skipped: Vec<(Scene, Value)> = Vec::new();
        for (place, key, value) in &changes {
            let scene = Scene::new();
            let mut pod = object(&scene.pod, &[]);
            pod.pointer_mut(place).unwrap()[*key] = value.clone();
            server.apply(&pod);
            skipped.push((scene, pod));
        }
        let daemon = Daemon::start(&server, &["--exclude-namespaces", "kube-system,other"]);
        daemon.until_metric("redirect_pods{state=\"skipped\"}", 6.0);
        assert!(is_clean());
        for (scene, pod) in &mut skipped {
            assert_eq!(out(scene, 80), "service", "{pod}");
            assert_eq!(inward(scene, 8080), "app", "{pod}");
        }
        for reason in [
            "host-network",
            "init-container",
            "not-injected",
            "refused",
            "excluded-namespace",
            "no-proxy",
        ] {
            let name = format!("redirect_pods_skipped{{reason=\"{reason}\"}}");
            assert_eq!(daemon.metric(&name), Some(1.0), "{reason}");
        }
        // The same pods without that change are captured: nothing else has kept them out.
        for (scene, pod) in &mut skipped {
            if pod["metadata"]["namespace"] == "kube-system" {
                continue;
            }
            server.apply(&object(&scene.pod, &[]));
            until_out(&daemon, scene, 80, "15001");
        }
    });
}

#[rstest]
fn processes_in_the_hosts_network_are_never_captured() {
    bpffs::private(|| {
        let pod = Pod::new();
        let server = ApiServer::start();
        // A pod as any other by its object, but its only process is in the network of this machine.
        let stray = Actor::start(
            "/proc/self/ns/net".as_ref(),
            Some(pod.cgroup.child("stray")),
            Identity::ROOT,
        );
        server.apply(&object(&pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        daemon.until_metric("redirect_pods{state=\"waiting\"}", 1.0);
        thread::sleep(Duration::from_millis(1200));
        assert!(is_clean(), "{:?}", bpffs::pins());
        // With a process in a network of its own it is captured, and only that network.
        let _sandbox = Actor::start(
            &pod.netns.path(),
            Some(pod.cgroup.child("sandbox")),
            Identity::ROOT,
        );
        daemon.until_metric("redirect_pods{state=\"captured\"}", 1.0);
        drop(stray);
    });
}

#[rstest]
fn annotation_change_is_followed_while_connections_are_made() {
    bpffs::private(|| {
        let mut scene = Scene::new();
        let server = ApiServer::start();
        server.apply(&object(&scene.pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        assert_eq!(out(&mut scene, 443), "15001");
        let (service, own) = (
            scene.address(V4, To::Service(80)),
            scene.address(V4, To::Own(8080)),
        );
        let kept = scene.app.dial(&Dial::new(V4, service).keep("kept"));
        scene.outside.traffic_start(Dial::new(V4, own));
        for round in 0..4 {
            let (excluded, who) = if round % 2 == 0 {
                ("443", "service")
            } else {
                ("", "15001")
            };
            server.apply(&object(&scene.pod, &[(EXCLUDE_OUT, excluded)]));
            until_out(&daemon, &mut scene, 443, who);
            assert_eq!(out(&mut scene, 80), "15001");
        }
        only(&scene.outside.traffic_stop(), "15006");
        assert_eq!(scene.app.ask("kept", "hello").as_deref(), Ok("hello"));
        assert_eq!(scene.app.look("kept").peer, kept.peer);
        // Out of the mesh: the pod is let go.
        let mut left = object(&scene.pod, &[]);
        left["metadata"]["annotations"] = json!({});
        server.apply(&left);
        until_out(&daemon, &mut scene, 80, "service");
        assert_eq!(inward(&mut scene, 8080), "app");
        daemon.until("nothing is left", || is_clean().then_some(()));
    });
}

#[rstest]
fn pod_that_goes_leaves_nothing_and_one_that_still_runs_does_not_get_out() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let (mut stays, mut goes) = (Scene::new(), Scene::new());
        let (staying, going) = (object(&stays.pod, &[]), object(&goes.pod, &[]));
        server.apply(&staying);
        server.apply(&going);
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut stays, 80, "15001");
        until_out(&daemon, &mut goes, 80, "15001");
        // Deleted by force: its processes run on for a while.
        server.delete(&going);
        server.delete(&staying);
        daemon.until_metric("redirect_pods{state=\"captured\"}", 0.0);
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(out(&mut goes, 80), "15001");
        drop(goes);
        daemon.until("one pod is left", || {
            (loader::status()["pods"].as_array()?.len() == 1).then_some(())
        });
        assert_eq!(out(&mut stays, 80), "15001");
        drop(stays);
        daemon.until("nothing is left", || is_clean().then_some(()));
    });
}

#[rstest]
#[case::killed(Signal::SIGKILL)]
#[case::stopped(Signal::SIGTERM)]
#[case::interrupted(Signal::SIGINT)]
fn capture_goes_on_while_the_daemon_is_away_and_when_it_comes_back(#[case] signal: Signal) {
    bpffs::private(|| {
        let mut scene = Scene::new();
        let server = ApiServer::start();
        server.apply(&object(&scene.pod, &[]));
        let mut daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        assert_eq!(inward(&mut scene, 8080), "15006");
        let (service, own) = (
            scene.address(V4, To::Service(80)),
            scene.address(V4, To::Own(8080)),
        );
        scene.app.traffic_start(Dial::new(V4, service));
        scene.outside.traffic_start(Dial::new(V4, own));
        let socket = daemon.socket().to_owned();
        for _ in 0..3 {
            let status = daemon.end(signal);
            assert_eq!(status.success(), signal != Signal::SIGKILL, "{status}");
            // A killed daemon leaves its socket, which the next one replaces.
            assert_eq!(socket.exists(), signal == Signal::SIGKILL);
            thread::sleep(Duration::from_millis(100));
            daemon = Daemon::start_at(&socket, &server, &[]);
            daemon.until_ready();
            daemon.until_metric("redirect_pods{state=\"captured\"}", 1.0);
        }
        only(&scene.app.traffic_stop(), "15001");
        only(&scene.outside.traffic_stop(), "15006");
        // What an earlier daemon has counted is not counted again.
        let counted = r#"redirect_connections_total{direction="outbound",verdict="captured",rule="outbound-captured"}"#;
        let before = daemon.metric(counted).unwrap_or(0.0);
        assert_eq!(out(&mut scene, 80), "15001");
        daemon.until_metric(counted, before + 1.0);
    });
}

#[rstest]
fn daemon_of_another_build_takes_over_without_an_uncaptured_moment() {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let mut scene = Scene::new();
        let mut server = ApiServer::start();
        server.apply(&object(&scene.pod, &[]));
        let mut daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        let socket = daemon.socket().to_owned();
        let own = scene.address(V4, To::Own(8080));
        scene.outside.traffic_start(Dial::new(V4, own));
        // The API is away meanwhile: an upgrade does not wait for it.
        server.go();
        for by in [other.redirect(), loader::redirect()] {
            let before = Objects::pinned();
            assert!(daemon.end(Signal::SIGTERM).success());
            daemon = Daemon::start_by(by, &socket, &server, &[]);
            let after = daemon.until("other programs", || {
                let now = Objects::pinned();
                now.programs().is_disjoint(before.programs()).then_some(now)
            });
            assert_eq!(after.links(), before.links());
        }
        only(&scene.outside.traffic_stop(), "15006");
        assert_eq!(out(&mut scene, 80), "15001");
    });
}

#[rstest]
fn invalid_annotation_is_told_and_ends_no_capture() {
    let bad = [(EXCLUDE_OUT, "443,http-and-more")];
    bpffs::private(|| {
        let server = ApiServer::start();
        let (mut new, mut running) = (Scene::new(), Scene::new());
        server.apply(&object(&new.pod, &bad));
        server.apply(&object(&running.pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut running, 80, "15001");
        daemon.until_metric("redirect_pods{state=\"invalid\"}", 1.0);
        assert_eq!(out(&mut new, 80), "service");
        let events = daemon.until("an Event", || {
            let events = server.events();
            (!events.is_empty()).then_some(events)
        });
        let [event] = &events[..] else {
            panic!("{events:#?}")
        };
        assert_eq!(event["regarding"]["name"], new.pod.netns.name());
        assert_eq!(
            (&event["type"], &event["reason"]),
            (&json!("Warning"), &json!("NotCaptured"))
        );
        let note = event["note"].as_str().unwrap();
        for part in [
            EXCLUDE_OUT,
            "\"443,http-and-more\"",
            "\"http-and-more\"",
            "allowed are",
        ] {
            assert!(note.contains(part), "{note}");
        }
        let name = new.pod.netns.name();
        let metric = format!("redirect_pod_invalid{{namespace=\"shop\",pod=\"{name}\"}}");
        assert_eq!(daemon.metric(&metric), Some(1.0));
        assert_eq!(
            daemon.metric("redirect_errors_total{reason=\"invalid-pod\"}"),
            Some(1.0)
        );

        // A running pod keeps the policy it had.
        server.apply(&object(&running.pod, &bad));
        daemon.until_metric("redirect_pods{state=\"invalid\"}", 2.0);
        assert_eq!(out(&mut running, 80), "15001");
        assert_eq!(out(&mut running, 443), "15001");
        // Put right, both are as they should be.
        for scene in [&mut new, &mut running] {
            server.apply(&object(&scene.pod, &[(EXCLUDE_OUT, "443")]));
            until_out(&daemon, scene, 80, "15001");
            until_out(&daemon, scene, 443, "service");
        }
        daemon.until_metric("redirect_pods{state=\"invalid\"}", 0.0);
        assert_eq!(server.events().len(), 2);
    });
}

#[rstest]
fn pods_addresses_and_programs_are_looked_at_again() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut scene = Scene::new();
        server.apply(&object(&scene.pod, &[]));
        let mut seldom = Daemon::start(&server, &["--resync", "3600s"]);
        until_out(&seldom, &mut scene, 80, "15001");
        let current = || loader::status()["pods"][0]["routes_current"].clone();
        let change = |number: u8| {
            scene.pod.netns.ip(&format!(
                "addr add 192.0.2.{number}/32 dev eth0\nroute add 198.51.100.{number}/32 via 192.0.2.{number}"
            ));
        };
        assert_eq!(current(), json!(true));
        change(77);
        assert_eq!(current(), json!(false));
        seldom.kill();
        // One that looks each second, at the start and later.
        let daemon = Daemon::start(&server, &[]);
        let known = || (current() == json!(true)).then_some(());
        daemon.until("routes of before it started are known", known);
        for number in [78, 79] {
            change(number);
            daemon.until("new routes are known", known);
        }
    });
}

#[rstest]
fn commands_work_beside_the_daemon_which_puts_its_pods_right_again() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let (mut ours, mut by_hand) = (Scene::new(), Scene::new());
        server.apply(&object(&ours.pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut ours, 80, "15001");
        // A pod that is none of Kubernetes'.
        loader::attach(&by_hand.pod, &Options::ISTIO);
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(out(&mut by_hand, 80), "15001");
        assert!(loader::detach(by_hand.pod.cgroup.path()).status.success());
        assert_eq!(out(&mut by_hand, 80), "service");
        assert!(loader::detach(ours.pod.cgroup.path()).status.success());
        until_out(&daemon, &mut ours, 80, "15001");
    });
}

#[rstest]
fn selector_captures_without_a_mesh() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let (mut chosen, mut other) = (Scene::new(), Scene::new());
        for (scene, label) in [(&chosen, "on"), (&other, "off")] {
            let mut pod = object(&scene.pod, &[]);
            pod["metadata"]["annotations"] = json!({});
            pod["metadata"]["labels"] = json!({"mesh": label});
            pod["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
            server.apply(&pod);
        }
        let daemon = Daemon::start(&server, &["--label-selector", "mesh=on"]);
        until_out(&daemon, &mut chosen, 80, "15001");
        daemon.until("the other one is counted", || {
            let skipped = daemon.metric("redirect_pods{state=\"skipped\"}");
            (skipped == Some(1.0)).then_some(())
        });
        assert_eq!(out(&mut other, 80), "service");
    });
}

#[rstest]
fn dual_stack_pod_is_captured_in_both_families() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut scene = Scene::new();
        let to = scene.address(V6, To::Service(80));
        let mut pod = object(&scene.pod, &[]);
        server.apply(&pod);
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        assert_eq!(scene.app.dial(&Dial::new(V6, to)).outcome(), "service");
        pod["spec"]["containers"][1]["env"] =
            json!([{"name": "ISTIO_DUAL_STACK", "value": "true"}]);
        server.apply(&pod);
        daemon.until("IPv6 is captured", || {
            (scene.app.dial(&Dial::new(V6, to)).outcome() == "15001").then_some(())
        });
    });
}

#[rstest]
fn daemon_that_cannot_run_says_why() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let fails = |command: &mut std::process::Command, words: &str| {
            let output = finish(command);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success() && said.contains(words), "{said}");
        };
        let file = std::env::temp_dir().join(format!("no-socket-{}", std::process::id()));
        fs::write(&file, "").unwrap();
        fails(
            &mut Daemon::command(&file, free_port(), &server),
            "no socket",
        );
        fs::remove_file(&file).unwrap();
        let free = Daemon::free_socket();
        let mut nobody = Daemon::command(&free, free_port(), &server);
        fails(nobody.env_remove("NODE_NAME"), "--node-name");
        let mut alone = loader::redirect();
        alone.args(["daemon", "--node-name", "n", "--metrics", "127.0.0.1:0"]);
        fails(alone.arg("--socket").arg(&free), "--kubeconfig");
        for (flag, value) in [
            ("--resync", "0s"),
            ("--label-selector", "a in b"),
            ("--metrics", "15014"),
            ("--proxy-identity", "gid"),
        ] {
            fails(
                Daemon::command(&free, free_port(), &server).args([flag, value]),
                flag,
            );
        }
        let mut away = loader::redirect();
        away.args([
            "daemon",
            "--node-name",
            "n",
            "--kubeconfig",
            "/no/such/file",
        ]);
        fails(&mut away, "/no/such/file");
        // With nothing wrong it runs.
        Daemon::start_at(&free, &server, &[]).until_ready();
    });
}
