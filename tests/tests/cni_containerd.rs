//! The CNI plugin under a real container runtime: what a pod's very first connection meets.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use redirect_tests::{
    actor::Actor,
    api_server::ApiServer,
    bpffs,
    cgroup::mount_point,
    cni::{NAME, NoDaemon, StubDaemon},
    containerd::{
        Containerd,
        node::{DIAL, Node, greeting, object, uid},
    },
    daemon::Daemon,
    loader::{detach, finish, redirect},
    namespace::errors,
    options::Options,
    pod::SERVICE4,
    protocol::{Identity, Listen},
    scene::SERVICE,
    skip,
};
use serde_json::json;

/// What a daemon does, in short: finds the pod's cgroup by its UID, which has to be there by then, and attaches to it.
fn attaching(pods: PathBuf) -> StubDaemon {
    StubDaemon::new(move |request| {
        let text = |name: &str| request[name].as_str().unwrap_or_default();
        let uid = request["pod"]["uid"].as_str().unwrap_or_default();
        let cgroup = pods.join(format!("pod{uid}"));
        let has_containers = fs::read_dir(&cgroup).is_ok_and(|entries| {
            let mut kinds = entries.flatten().flat_map(|entry| entry.file_type());
            kinds.any(|kind| kind.is_dir())
        });
        if text("op") == "add" && has_containers {
            return "{\"error\":\"a container came first\",\"retry\":false}\n".to_owned();
        }
        let mut command = redirect();
        let output = match text("op") {
            "add" => finish(
                command
                    .args(["attach", "--netns", text("netns"), "--cgroup"])
                    .arg(&cgroup)
                    .args(Options::ISTIO.arguments()),
            ),
            _ => return "{\"result\":\"ok\"}\n".to_owned(),
        };
        let answer = if output.status.success() {
            json!({ "result": "captured" })
        } else {
            json!({ "error": errors(&output), "retry": true })
        };
        format!("{answer}\n")
    })
}

#[test]
fn first_connection_of_a_pods_first_process_is_captured() {
    if let Some(missing) = Containerd::missing() {
        skip!("{missing}");
    }
    bpffs::private(first_connection);
}

fn first_connection() {
    let mut node = Node::new(1);

    let before = node.pod("before");
    let sandbox = node.containerd.run(&before).unwrap();
    let log = node.containerd.script(&sandbox, "app", DIAL);
    assert_eq!(greeting(&log).who, SERVICE, "control: without the plugin");
    node.containerd.remove(sandbox).unwrap();

    let daemon = attaching(node.pods.path().to_owned());
    node.install(&daemon.socket(), &[]);
    let pod = node.pod("cart-0");
    let cgroup = mount_point().join(pod.cgroup_parent.trim_start_matches('/'));
    let sandbox = node.containerd.run(&pod).unwrap();
    let asked = daemon.asked();
    let [add] = &asked[..] else {
        panic!("{asked:?}");
    };
    assert_eq!(add["op"], "add");
    let named = json!({ "namespace": "shop", "name": "cart-0", "uid": uid("cart-0") });
    assert_eq!(add["pod"], named);
    if let Some(told) = add["cgroup_parent"].as_str() {
        assert_eq!(told, pod.cgroup_parent);
    }
    assert_eq!(add["annotations"], json!(pod.annotations));

    let netns = Path::new(add["netns"].as_str().unwrap());
    let mut proxy = Actor::start(
        netns,
        Some(cgroup.join("proxy-of-test")).inspect(|path| {
            fs::create_dir(path).unwrap();
        }),
        Identity::PROXY,
    );
    proxy.listen(Listen::new("15001", ([0, 0, 0, 0], 15001).into()));
    let greeting = greeting(&node.containerd.script(&sandbox, "app", DIAL));
    assert_eq!(greeting.who, "15001");
    assert_eq!(
        greeting.original.address,
        Some((SERVICE4, 80).into()),
        "SO_ORIGINAL_DST"
    );

    drop(proxy);
    let log = node.containerd.script(&sandbox, "without-proxy", DIAL);
    assert!(log.contains("Connection refused"), "{log}");

    // The runtime makes the pod's cgroup only with its first container: at ADD there is what the kubelet has made.
    let stray = node.pod("stray");
    fs::remove_dir(node.pods.path().join(format!("pod{}", uid("stray")))).unwrap();
    let error = node.containerd.run(&stray).unwrap_err();
    assert!(
        error.contains("cgroup") && error.contains("does not exist"),
        "{error}"
    );

    node.containerd.remove(sandbox).unwrap();
    let ops: Vec<_> = daemon.asked().iter().map(|one| one["op"].clone()).collect();
    assert_eq!(ops.iter().filter(|op| *op == "add").count(), 1, "{ops:?}");
    assert!(ops.iter().any(|op| op == "del"), "{ops:?}");
    assert!(detach(&cgroup).status.success());
}

#[test]
fn pod_does_not_start_while_the_daemon_is_away_unless_it_may_fail_open() {
    if let Some(missing) = Containerd::missing() {
        skip!("{missing}");
    }
    let mut node = Node::new(2);
    let none = NoDaemon::new();
    node.install(&none.socket(), &[]);
    let pod = node.pod("cart-1");
    let error = node.containerd.run(&pod).unwrap_err();
    assert!(
        error.contains(NAME) && error.contains("does not run"),
        "{error}"
    );
    assert_eq!(none.failed_open(), 0);

    node.install(&none.socket(), &["--fail-open"]);
    node.containerd.wait_for_plugin("failOpen");
    let sandbox = node.containerd.run(&pod).unwrap();
    assert_eq!(none.failed_open(), 1);
    let log = node.containerd.script(&sandbox, "app", DIAL);
    assert_eq!(greeting(&log).who, SERVICE);
    // The plugin gone, the pod goes all the same.
    let output = finish(&mut node.installer("uninstall"));
    assert!(output.status.success(), "{}", errors(&output));
    node.containerd.wait_for_network();
    node.containerd.remove(sandbox).unwrap();
}

#[test]
fn daemon_captures_a_pod_before_its_first_container_and_keeps_it_from_starting_if_it_cannot() {
    if let Some(missing) = Containerd::missing() {
        skip!("{missing}");
    }
    bpffs::private(plugin_and_daemon);
}

fn plugin_and_daemon() {
    let mut node = Node::new(3);
    let server = ApiServer::start();
    let daemon = Daemon::start(&server, &[]);
    daemon.until_ready();
    node.install(daemon.socket(), &[]);

    let pod = node.pod("cart-2");
    server.apply(&object(&pod));
    let sandbox = node.containerd.run(&pod).unwrap();
    let log = node.containerd.script(&sandbox, "app", DIAL);
    assert!(
        log.contains("Connection refused"),
        "captured, and no proxy yet: {log}"
    );
    node.containerd.remove(sandbox).unwrap();

    let other = node.pod("other");
    let mut outside = object(&other);
    outside["spec"]["containers"].as_array_mut().unwrap().pop();
    server.apply(&outside);
    let sandbox = node.containerd.run(&other).unwrap();
    let log = node.containerd.script(&sandbox, "app", DIAL);
    assert_eq!(greeting(&log).who, SERVICE, "not of the mesh");
    node.containerd.remove(sandbox).unwrap();

    let mut wrong = node.pod("wrong");
    wrong.annotations.insert(
        "traffic.sidecar.istio.io/includeInboundPorts".to_owned(),
        "x".to_owned(),
    );
    server.apply(&object(&wrong));
    let error = node.containerd.run(&wrong).unwrap_err();
    assert!(error.contains("includeInboundPorts"), "{error}");
}
