//! Messages of `runtime.v1`, with the fields that are needed. Field numbers are those of Kubernetes' `api.proto`.

use std::{collections::HashMap, path::Path};

use prost::Message;

use super::super::PodRequest;

#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(string, tag = "3")]
    pub log_directory: String,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxSandboxSecurityContext>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxSandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
    #[prost(message, optional, tag = "2")]
    selinux_options: Option<SeLinuxOption>,
    #[prost(message, optional, tag = "9")]
    seccomp: Option<SecurityProfile>,
    #[prost(message, optional, tag = "10")]
    apparmor: Option<SecurityProfile>,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
}

/// `NamespaceMode`: the pod has one, each container has one, the node's.
const POD: i32 = 0;
const CONTAINER: i32 = 1;
const NODE: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct SeLinuxOption {
    #[prost(string, tag = "1")]
    user: String,
    #[prost(string, tag = "2")]
    role: String,
    #[prost(string, tag = "3")]
    kind: String,
    #[prost(string, tag = "4")]
    level: String,
}

#[derive(Clone, PartialEq, Message)]
struct SecurityProfile {
    #[prost(int32, tag = "1")]
    profile_type: i32,
}

/// `SecurityProfile.ProfileType`
const RUNTIME_DEFAULT: i32 = 0;
const UNCONFINED: i32 = 1;

/// A container to be made.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    /// In the place of the image's `ENTRYPOINT`.
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    /// In the place of the image's `CMD`.
    #[prost(string, repeated, tag = "4")]
    pub args: Vec<String>,
    #[prost(message, repeated, tag = "6")]
    envs: Vec<KeyValue>,
    /// What of the host it sees.
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    /// Below the sandbox's directory.
    #[prost(string, tag = "11")]
    pub log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainerConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint32, tag = "2")]
    attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// A file or directory of the host in a container.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    /// Where it is seen.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// What it is.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Whether it cannot be written.
    #[prost(bool, tag = "3")]
    pub readonly: bool,
    /// `MountPropagation`; 0 means private.
    #[prost(int32, tag = "5")]
    pub propagation: i32,
}

impl Mount {
    /// `PROPAGATION_HOST_TO_CONTAINER`
    pub const HOST_TO_CONTAINER: i32 = 1;

    /// The same path inside and outside.
    pub fn of_host(path: &Path, readonly: bool) -> Self {
        Self {
            container_path: path.display().to_string(),
            host_path: path.display().to_string(),
            readonly,
            propagation: 0,
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainerConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxContainerSecurityContext>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxContainerSecurityContext {
    #[prost(message, optional, tag = "1")]
    capabilities: Option<Capability>,
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
    #[prost(message, optional, tag = "4")]
    selinux_options: Option<SeLinuxOption>,
    #[prost(message, optional, tag = "5")]
    run_as_user: Option<Int64Value>,
    #[prost(bool, tag = "7")]
    readonly_rootfs: bool,
    #[prost(bool, tag = "11")]
    no_new_privs: bool,
    #[prost(message, optional, tag = "12")]
    run_as_group: Option<Int64Value>,
    #[prost(string, repeated, tag = "13")]
    masked_paths: Vec<String>,
    #[prost(string, repeated, tag = "14")]
    readonly_paths: Vec<String>,
    #[prost(message, optional, tag = "15")]
    seccomp: Option<SecurityProfile>,
    #[prost(message, optional, tag = "16")]
    apparmor: Option<SecurityProfile>,
}

#[derive(Clone, PartialEq, Message)]
struct Capability {
    #[prost(string, repeated, tag = "1")]
    add_capabilities: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    drop_capabilities: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Int64Value {
    #[prost(int64, tag = "1")]
    value: i64,
}

/// What a kubelet has the runtime hide from every container (`ProcMount: Default`).
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What a container may do, in Kubernetes' words. The default is what a pod gets that says nothing.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// `hostNetwork`
    pub host_network: bool,
    /// `hostPID`
    pub host_pid: bool,
    /// `runAsUser`
    pub user: Option<i64>,
    /// `runAsGroup`
    pub group: Option<i64>,
    /// `capabilities.add`
    pub add: Vec<String>,
    /// `capabilities.drop`
    pub drop: Vec<String>,
    /// `allowPrivilegeEscalation: false`
    pub no_new_privileges: bool,
    /// `readOnlyRootFilesystem`
    pub read_only_root: bool,
    /// `seccompProfile: {type: RuntimeDefault}`
    pub seccomp: bool,
    /// `appArmorProfile: {type: Unconfined}`
    pub without_apparmor: bool,
    /// `seLinuxOptions`: user, role, type and level
    pub selinux: Option<[String; 4]>,
}

impl Security {
    fn namespaces(&self) -> Option<NamespaceOption> {
        let network = if self.host_network { NODE } else { POD };
        let pid = if self.host_pid { NODE } else { CONTAINER };
        Some(NamespaceOption { network, pid })
    }

    fn selinux(&self) -> Option<SeLinuxOption> {
        let [user, role, kind, level] = self.selinux.clone()?;
        Some(SeLinuxOption {
            user,
            role,
            kind,
            level,
        })
    }

    fn seccomp(&self) -> Option<SecurityProfile> {
        let profile_type = if self.seccomp {
            RUNTIME_DEFAULT
        } else {
            UNCONFINED
        };
        Some(SecurityProfile { profile_type })
    }

    fn apparmor(&self) -> Option<SecurityProfile> {
        let profile_type = UNCONFINED;
        self.without_apparmor
            .then_some(SecurityProfile { profile_type })
    }

    fn of_sandbox(&self) -> LinuxSandboxSecurityContext {
        LinuxSandboxSecurityContext {
            namespace_options: self.namespaces(),
            selinux_options: self.selinux(),
            seccomp: self.seccomp(),
            apparmor: self.apparmor(),
        }
    }

    fn of_container(&self) -> LinuxContainerSecurityContext {
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: self.add.clone(),
                drop_capabilities: self.drop.clone(),
            }),
            namespace_options: self.namespaces(),
            selinux_options: self.selinux(),
            run_as_user: self.user.map(|value| Int64Value { value }),
            readonly_rootfs: self.read_only_root,
            no_new_privs: self.no_new_privileges,
            run_as_group: self.group.map(|value| Int64Value { value }),
            masked_paths: texts(&MASKED),
            readonly_paths: texts(&READ_ONLY),
            seccomp: self.seccomp(),
            apparmor: self.apparmor(),
        }
    }
}

impl PodSandboxConfig {
    /// What a kubelet would say of the pod.
    pub fn new(pod: &PodRequest, directory: &Path) -> Self {
        let log_directory = directory.join("logs").join(&pod.name);
        Self {
            metadata: Some(PodSandboxMetadata {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                namespace: pod.namespace.clone(),
            }),
            log_directory: log_directory.display().to_string(),
            annotations: pod.annotations.clone(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: pod.cgroup_parent.clone(),
                security_context: Some(pod.security.of_sandbox()),
            }),
        }
    }
}

impl ContainerConfig {
    /// A container of that image, as often restarted.
    pub fn new(name: &str, attempt: u32, image: &str, security: &Security) -> Self {
        Self {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt,
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
            log_path: format!("{name}-{attempt}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(security.of_container()),
            }),
            ..Self::default()
        }
    }

    /// With an environment variable.
    pub fn variable(&mut self, key: &str, value: &str) {
        self.envs.push(KeyValue {
            key: key.to_owned(),
            value: value.to_owned(),
        });
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    pub config: Option<PodSandboxConfig>,
}

/// Several messages have nothing but an id, as their first field.
#[derive(Clone, PartialEq, Message)]
pub struct Id {
    #[prost(string, tag = "1")]
    pub id: String,
}

/// `StopContainer`
#[derive(Clone, PartialEq, Message)]
pub struct IdAndTimeout {
    #[prost(string, tag = "1")]
    pub id: String,
    /// Seconds until SIGKILL.
    #[prost(int64, tag = "2")]
    pub timeout: i64,
}

/// A question for a status.
#[derive(Clone, PartialEq, Message)]
pub struct IdAndVerbose {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(bool, tag = "2")]
    pub verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct CreateContainer {
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<ContainerStatus>,
    #[prost(map = "string, string", tag = "2")]
    pub info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatus {
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
}

/// `CONTAINER_EXITED`
pub const EXITED: i32 = 2;

#[derive(Clone, PartialEq, Message)]
pub struct SandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<SandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SandboxStatus {
    #[prost(message, optional, tag = "5")]
    pub network: Option<SandboxNetwork>,
}

#[derive(Clone, PartialEq, Message)]
pub struct SandboxNetwork {
    #[prost(string, tag = "1")]
    pub ip: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Status {
    #[prost(bool, tag = "1")]
    pub verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<RuntimeStatus>,
    #[prost(map = "string, string", tag = "2")]
    pub info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    pub conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
pub struct RuntimeCondition {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(bool, tag = "2")]
    pub status: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct Nothing {}

#[derive(Clone, PartialEq, Message)]
pub struct Sandboxes {
    #[prost(message, repeated, tag = "1")]
    pub items: Vec<Id>,
}
