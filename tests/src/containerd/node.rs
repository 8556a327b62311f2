//! A node as far as a test of pods needs one: a container runtime, cgroups as a kubelet makes them, and a service outside.

use std::{collections::HashMap, path::Path, process::Command};

use serde_json::{Value, json};

use super::{Containerd, PodRequest, Security, V1Cgroups};
use crate::{
    actor::Actor,
    cgroup::{Cgroup, mount_point},
    cni::NAME,
    kubernetes::{NODE, STATUS},
    loader::{finish, redirect},
    namespace::{Namespace, errors},
    pod::SERVICE4,
    protocol::{Greeting, Identity, Listen},
    scene::SERVICE,
};

/// A script that calls the service and says who answered.
pub const DIAL: &str = "exec 3<>/dev/tcp/203.0.113.10/80 && head -n 1 <&3";

/// A runtime, and a service outside that its pods can reach.
pub struct Node {
    /// The runtime.
    pub containerd: Containerd,
    _outside: Actor,
    /// The network namespace of the node and of all that is outside of pods.
    pub world: Namespace,
    /// What a kubelet calls `kubepods`.
    pub pods: Cgroup,
    _leftovers: V1Cgroups,
}

impl Node {
    /// A new one; those of a test program that run at once need different numbers.
    pub fn new(number: u8) -> Self {
        let name = format!("rd-{}-node-{number}", std::process::id());
        let world = Namespace::new(&name);
        world.ip(&format!("addr add {SERVICE4}/32 dev lo"));
        let mut outside = Actor::start(&world.path(), None, Identity::ROOT);
        outside.listen(Listen::new(SERVICE, ([0, 0, 0, 0], 80).into()));
        Self {
            containerd: Containerd::start(&world, &format!("10.77.{number}.0/24")),
            _outside: outside,
            world,
            pods: Cgroup::new(&name),
            _leftovers: V1Cgroups::of(&name),
        }
    }

    /// A pod of the mesh in the namespace `shop`, and its cgroup as a kubelet makes it before the sandbox.
    pub fn pod(&self, name: &str) -> PodRequest {
        let cgroup = self.pods.child(&format!("pod{}", uid(name)));
        let below = cgroup.strip_prefix(mount_point()).unwrap();
        PodRequest {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: uid(name),
            cgroup_parent: Path::new("/").join(below).display().to_string(),
            annotations: HashMap::from([(STATUS.to_owned(), "{}".to_owned())]),
            security: Security::default(),
        }
    }

    /// Installs the plugin by the program's own installer.
    pub fn install(&mut self, socket: &Path, more: &[&str]) {
        let mut install = self.installer("install");
        let output = finish(install.arg("--socket").arg(socket).args(more));
        assert!(output.status.success(), "{}", errors(&output));
        self.containerd.wait_for_plugin(NAME);
    }

    /// A call of the installer.
    pub fn installer(&self, command: &str) -> Command {
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
pub fn uid(pod: &str) -> String {
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

/// Who answered, as the container's log has it.
pub fn greeting(log: &str) -> Greeting {
    let line = log
        .lines()
        .find_map(|line| line.split_once(" stdout F ").map(|(_, text)| text))
        .unwrap_or_else(|| panic!("nobody answered: {log}"));
    serde_json::from_str(line).unwrap()
}

/// As Istio's injector leaves it, with its CNI setting.
pub fn object(pod: &PodRequest) -> Value {
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
