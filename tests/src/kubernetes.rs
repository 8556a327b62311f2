//! Pods as the Kubernetes API tells them, and cgroups as the kubelet makes them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    cgroup::{Cgroup, mount_point},
    pod::Pod,
};

/// The node that the daemon under test keeps.
pub const NODE: &str = "node-1";
/// Where the injector leaves its mark.
pub const STATUS: &str = "sidecar.istio.io/status";

/// How a node's kubelet names and nests cgroups.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// The cgroupfs driver; a pod of class Guaranteed.
    CgroupfsGuaranteed,
    /// The cgroupfs driver; a pod of class Burstable.
    CgroupfsBurstable,
    /// The systemd driver; a pod of class Burstable.
    SystemdBurstable,
    /// The systemd driver; a pod of class BestEffort.
    SystemdBestEffort,
    /// A node that is a container, as with kind.
    Nested,
}

impl Layout {
    fn path(self, uid: &str) -> String {
        let slice = uid.replace('-', "_");
        match self {
            Self::CgroupfsGuaranteed => format!("kubepods/pod{uid}"),
            Self::CgroupfsBurstable => format!("kubepods/burstable/pod{uid}"),
            Self::SystemdBurstable => format!(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice"
            ),
            Self::SystemdBestEffort => format!(
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice"
            ),
            Self::Nested => format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{slice}.slice"
            ),
        }
    }
}

/// What a container is given to see of cgroups.
#[derive(Clone, Copy, Debug)]
pub enum View {
    /// The node's, by a mount of the node's `/sys/fs/cgroup`.
    Node,
    /// Its own.
    Own,
}

/// A call of a program by a container of a node that is a container itself, as in kind: each has a cgroup namespace, and nobody
/// sees what is above the node's cgroup.
pub fn on_node_in_container(node: &Path, view: View, program: &Command) -> Command {
    const SCRIPT: &str = r#"
        echo $$ >"$NODE/cgroup.procs"
        exec unshare --cgroup --mount sh -ec '
            umount -l "$TOP" && mount -t cgroup2 none "$TOP"
            mkdir -p "$TOP/container" && echo $$ >"$TOP/container/cgroup.procs"
            exec unshare --cgroup sh -ec "
                $MOUNT
                exec \"\$@\"" sh "$@"' sh "$@""#;
    let mut command = Command::new("sh");
    command.args(["-ec", SCRIPT, "sh"]);
    command.env("NODE", node).env("TOP", mount_point());
    command.env(
        "MOUNT",
        match view {
            View::Node => "",
            View::Own => "umount -l $TOP && mount -t cgroup2 none $TOP",
        },
    );
    command.arg(program.get_program()).args(program.get_args());
    command
}

/// The uid that the pod's cgroup is named after.
pub fn uid(pod: &Pod) -> String {
    let name = pod
        .cgroup
        .path()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let (_, uid) = name.rsplit_once("pod").unwrap();
    uid.trim_end_matches(".slice").replace('_', "-")
}

/// Moves the pod's cgroup to where that kubelet would have it. Nothing may be in it yet.
pub fn laid_out(mut pod: Pod, layout: Layout) -> Pod {
    let path = layout.path(&uid(&pod));
    let (parents, _) = path.rsplit_once('/').unwrap();
    fs::create_dir_all(pod.above.path().join(parents)).unwrap();
    pod.cgroup = Cgroup::below(&pod.above, &path);
    pod
}

/// The pod's object after injection, with a native name and these annotations besides.
pub fn object(pod: &Pod, annotations: &[(&str, &str)]) -> Value {
    object_of(pod.netns.name(), &uid(pod), annotations)
}

/// The same, of a pod with that name and uid.
pub fn object_of(name: &str, uid: &str, annotations: &[(&str, &str)]) -> Value {
    let mut all = serde_json::Map::new();
    all.insert(STATUS.to_owned(), json!("{}"));
    for (name, value) in annotations {
        all.insert((*name).to_owned(), json!(value));
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "annotations": all, "labels": {}},
        "spec": {
            "nodeName": NODE,
            "containers": [
                {"name": "app", "image": "app"},
                {"name": "istio-proxy", "image": "proxy", "args": ["proxy", "sidecar"],
                 "securityContext": {"runAsUser": 1337, "runAsGroup": 1337}},
            ],
        },
        "status": {"phase": "Running"},
    })
}

/// How a container runtime names what it makes for a container.
#[derive(Clone, Copy, Debug)]
pub enum Runtime {
    /// containerd with the cgroupfs driver.
    ContainerdCgroupfs,
    /// containerd with the systemd driver.
    ContainerdSystemd,
    /// CRI-O with the systemd driver: a monitor beside each container has a scope of its own.
    CrioSystemd,
}

/// A container of a pod: its id, and its cgroup below the pod's.
#[derive(Debug)]
pub struct Container {
    /// As the pod's status has it.
    pub id: String,
    /// Its cgroup's directory.
    pub cgroup: PathBuf,
}

impl Container {
    /// Makes the pod's container with this number.
    pub fn new(pod: &Pod, runtime: Runtime, number: u32) -> Self {
        let bare = format!("{:056x}{number:08x}", std::process::id());
        let (scheme, directory) = match runtime {
            Runtime::ContainerdCgroupfs => ("containerd", bare.clone()),
            Runtime::ContainerdSystemd => ("containerd", format!("cri-containerd-{bare}.scope")),
            Runtime::CrioSystemd => {
                pod.cgroup.child(&format!("crio-conmon-{bare}.scope"));
                ("cri-o", format!("crio-{bare}.scope"))
            }
        };
        Self {
            id: format!("{scheme}://{bare}"),
            cgroup: pod.cgroup.child(&directory),
        }
    }

    /// Its status while it runs, under the name of a container of the pod.
    pub fn running(&self, name: &str) -> Value {
        self.status(
            name,
            &json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}),
        )
    }

    /// Its status after its end.
    pub fn ended(&self, name: &str) -> Value {
        self.status(name, &json!({"terminated": {"exitCode": 1}}))
    }

    fn status(&self, name: &str, state: &Value) -> Value {
        json!({"name": name, "image": "", "imageID": "", "ready": true, "restartCount": 0,
               "containerID": self.id, "state": state})
    }
}
