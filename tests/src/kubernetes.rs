//! Pods as the Kubernetes API tells them, and cgroups as the kubelet makes them.

use std::fs;

use serde_json::{Value, json};

use crate::{cgroup::Cgroup, pod::Pod};

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
    let uid = uid(pod);
    let mut all = serde_json::Map::new();
    all.insert(STATUS.to_owned(), json!("{}"));
    for (name, value) in annotations {
        all.insert((*name).to_owned(), json!(value));
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": pod.netns.name(), "uid": uid, "annotations": all, "labels": {}},
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
