//! The CNI plugin under a real container runtime: what a pod's very first connection meets.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use redirect_tests::{
    actor::Actor,
    api_server::ApiServer,
    bpffs,
    cgroup::{Cgroup, mount_point},
    cni::{NAME, NoDaemon, StubDaemon},
    containerd::{Containerd, PodRequest, V1Cgroups},
    daemon::Daemon,
    kubernetes::NODE,
    loader::{detach, finish, redirect},
    namespace::{Namespace, errors},
    options::Options,
    pod::SERVICE4,
    protocol::{Greeting, Identity, Listen},
    scene::SERVICE,
    skip,
};
use serde_json::json;

/// The first thing that the pod's first process does.
const DIAL: &str = "exec 3<>/dev/tcp/203.0.113.10/80 && head -n 1 <&3";

/// A runtime, and a service outside that its pods can reach.
struct Node {
    containerd: Containerd,
    _outside: Actor,
    _world: Namespace,
    pods: Cgroup,
    _leftovers: V1Cgroups,
}

impl Node {
    fn new(number: u8) -> Self {
        let name = format!("rd-{}-node-{number}", std::process::id());
        let world = Namespace::new(&name);
        world.ip(&format!("addr add {SERVICE4}/32 dev lo"));
        let mut outside = Actor::start(&world.path(), None, Identity::ROOT);
        outside.listen(Listen::new(SERVICE, ([0, 0, 0, 0], 80).into()));
        Self {
            containerd: Containerd::start(&world, &format!("10.77.{number}.0/24")),
            _outside: outside,
            _world: world,
            pods: Cgroup::new(&name),
            _leftovers: V1Cgroups::of(&name),
        }
    }

    /// A pod, and its cgroup as a kubelet makes it before the sandbox.
    fn pod(&self, name: &str) -> PodRequest {
        let cgroup = self.pods.child(&format!("pod{}", uid(name)));
        let below = cgroup.strip_prefix(mount_point()).unwrap();
        PodRequest {
            name: name.to_owned(),
            uid: uid(name),
            cgroup_parent: Path::new("/").join(below).display().to_string(),
            annotations: HashMap::from([("sidecar.istio.io/status".to_owned(), "{}".to_owned())]),
        }
    }

    /// By the program's own installer.
    fn install(&mut self, socket: &Path, more: &[&str]) {
        let mut install = self.installer("install");
        let output = finish(install.arg("--socket").arg(socket).args(more));
        assert!(output.status.success(), "{}", errors(&output));
        self.containerd.wait_for_plugin(NAME);
    }

    fn installer(&self, command: &str) -> Command {
        let mut redirect = redirect();
        redirect.args(["cni", command]);
        redirect
            .arg("--cni-conf-dir")
            .arg(&self.containerd.conf_dir);
        redirect.arg("--cni-bin-dir").arg(&self.containerd.bin_dir);
        redirect
    }
}

/// One that Kubernetes might give to the pod of that name in this run.
fn uid(pod: &str) -> String {
    let mut digits = format!("{:08x}", std::process::id());
    digits.extend(pod.bytes().map(|byte| format!("{byte:02x}")));
    digits += &"0".repeat(32);
    let digit = |range| &digits[range];
    [
        digit(0..8),
        digit(8..12),
        digit(12..16),
        digit(16..20),
        digit(20..32),
    ]
    .join("-")
}

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

/// Who answered, as the container's log has it.
fn greeting(log: &str) -> Greeting {
    let line = log
        .lines()
        .find_map(|line| line.split_once(" stdout F ").map(|(_, text)| text))
        .unwrap_or_else(|| panic!("nobody answered: {log}"));
    serde_json::from_str(line).unwrap()
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

/// As Istio's injector leaves it, with its CNI setting.
fn object(pod: &PodRequest) -> serde_json::Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "shop", "name": pod.name, "uid": pod.uid, "annotations": pod.annotations },
        "spec": { "nodeName": NODE, "containers": [
            { "name": "app", "image": "app" },
            { "name": "istio-proxy", "image": "proxy", "args": ["proxy", "sidecar"] },
        ]},
        "status": { "phase": "Pending" },
    })
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
