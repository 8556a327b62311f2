//! What a kubelet makes of a DaemonSet's pod when it asks the container runtime for it.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{Capabilities, Container, HTTPGetAction, PodSpec, SecurityContext},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    api_server::{ApiServer, ServiceAccount},
    containerd::{ContainerConfig, Mount, PodRequest, Security, node::Node},
    http,
    kubernetes::NODE,
};

/// What of a container is translated here.
const TRANSLATED: [&str; 6] = [
    "args",
    "env",
    "image",
    "name",
    "securityContext",
    "volumeMounts",
];
/// What is the kubelet's own business, or the scheduler's.
const FOR_OTHERS: [&str; 4] = ["livenessProbe", "ports", "readinessProbe", "resources"];

/// A pod of a DaemonSet.
pub struct DaemonPod {
    spec: PodSpec,
    namespace: String,
    name: String,
    host_paths: HashMap<String, PathBuf>,
    account: Option<ServiceAccount>,
}

impl DaemonPod {
    /// One of that name.
    pub fn new(daemon_set: &DaemonSet, name: &str) -> Self {
        let spec = daemon_set.spec.template.spec.clone().unwrap();
        let mut host_paths = HashMap::new();
        for volume in spec.volumes.iter().flatten() {
            let host = volume.host_path.as_ref().expect("a hostPath");
            match host.type_.as_deref() {
                Some("Directory") => assert!(Path::new(&host.path).is_dir(), "{}", host.path),
                Some("DirectoryOrCreate") => {}
                other => panic!("volume {}: {other:?}", volume.name),
            }
            host_paths.insert(volume.name.clone(), PathBuf::from(&host.path));
        }
        Self {
            spec,
            namespace: daemon_set.metadata.namespace.clone().unwrap(),
            name: name.to_owned(),
            host_paths,
            account: None,
        }
    }

    /// With what it needs to call that server, whose network namespace the caller is in.
    pub fn calling(mut self, server: &ApiServer) -> Self {
        assert!(self.spec.service_account_name.is_some());
        self.account = Some(server.serve_pods_of(&self.namespace));
        self
    }

    /// With another directory of the host for a volume.
    pub fn volume(mut self, name: &str, path: &Path) -> Self {
        let was = self.host_paths.insert(name.to_owned(), path.to_owned());
        assert!(was.is_some(), "no volume {name}");
        self
    }

    /// The pod's sandbox. Its cgroup is made, and the directories that are to be created.
    pub fn request(&self, node: &Node) -> PodRequest {
        for path in self.host_paths.values() {
            fs::create_dir_all(path).unwrap();
        }
        let request = node.pod(&self.name);
        PodRequest {
            namespace: self.namespace.clone(),
            annotations: HashMap::new(),
            security: self.security(),
            ..request
        }
    }

    /// A container's description by its name.
    pub fn container(&self, name: &str) -> &Container {
        let init = self.spec.init_containers.iter().flatten();
        let mut all = init.chain(&self.spec.containers);
        let found = all.find(|container| container.name == name);
        found.unwrap_or_else(|| panic!("no container {name}"))
    }

    /// Names of the containers in the order of their start, those that end before the others first.
    pub fn names(&self) -> [Vec<&str>; 2] {
        let init = self.spec.init_containers.as_deref().unwrap_or_default();
        [init, &self.spec.containers].map(|all| all.iter().map(|one| one.name.as_str()).collect())
    }

    /// What the runtime is asked for: a container as the manifest has it, as often restarted.
    pub fn config(&self, name: &str, attempt: u32) -> ContainerConfig {
        let container = self.container(name);
        let fields = serde_json::to_value(container).unwrap();
        for field in fields.as_object().unwrap().keys() {
            let known = TRANSLATED.iter().chain(&FOR_OTHERS);
            assert!(
                known.clone().any(|one| one == field),
                "container {name}: {field} would be ignored here"
            );
        }
        let security = self.security_of(container);
        let image = container.image.as_deref().unwrap();
        let mut config = ContainerConfig::new(name, attempt, image, &security);
        config.args = container.args.clone().unwrap_or_default();
        for variable in container.env.iter().flatten() {
            let value = self.value_of(variable);
            config.variable(&variable.name, value);
            for argument in &mut config.args {
                *argument = argument.replace(&format!("$({})", variable.name), value);
            }
        }
        if let Some(account) = &self.account {
            for (name, value) in account.environment() {
                config.variable(name, &value);
            }
            config.mounts.push(Mount {
                container_path: ServiceAccount::MOUNT_POINT.to_owned(),
                ..Mount::of_host(account.directory(), true)
            });
        }
        for mount in container.volume_mounts.iter().flatten() {
            let propagation = match mount.mount_propagation.as_deref() {
                None => 0,
                Some("HostToContainer") => Mount::HOST_TO_CONTAINER,
                Some(other) => panic!("container {name}: {other}"),
            };
            config.mounts.push(Mount {
                container_path: mount.mount_path.clone(),
                host_path: self.host_paths[&mount.name].display().to_string(),
                readonly: mount.read_only.unwrap_or(false),
                propagation,
            });
        }
        config
    }

    fn value_of(&self, variable: &k8s_openapi::api::core::v1::EnvVar) -> &str {
        let source = variable.value_from.as_ref().expect("valueFrom");
        match source.field_ref.as_ref().map(|of| of.field_path.as_str()) {
            Some("spec.nodeName") => NODE,
            Some("metadata.namespace") => &self.namespace,
            other => panic!("{}: {other:?}", variable.name),
        }
    }

    /// What the pod says for all of its containers.
    fn security(&self) -> Security {
        let context = self.spec.security_context.clone().unwrap_or_default();
        let labels = context.se_linux_options.map(|labels| {
            [labels.user, labels.role, labels.type_, labels.level].map(Option::unwrap_or_default)
        });
        Security {
            host_network: self.spec.host_network.unwrap_or(false),
            host_pid: self.spec.host_pid.unwrap_or(false),
            seccomp: match context.seccomp_profile {
                Some(profile) if profile.type_ == "RuntimeDefault" => true,
                other => panic!("seccompProfile: {other:?}"),
            },
            without_apparmor: match context.app_armor_profile {
                Some(profile) if profile.type_ == "Unconfined" => true,
                other => panic!("appArmorProfile: {other:?}"),
            },
            selinux: labels,
            ..Security::default()
        }
    }

    fn security_of(&self, container: &Container) -> Security {
        let SecurityContext {
            allow_privilege_escalation,
            capabilities,
            privileged: None,
            read_only_root_filesystem,
            run_as_user,
            app_armor_profile: None,
            proc_mount: None,
            run_as_group: None,
            run_as_non_root: None,
            se_linux_options: None,
            seccomp_profile: None,
            windows_options: None,
        } = container.security_context.clone().unwrap()
        else {
            panic!(
                "{}: more than is translated here: {:?}",
                container.name, container.security_context
            );
        };
        let Capabilities { add, drop } = capabilities.unwrap_or_default();
        Security {
            user: run_as_user,
            add: add.unwrap_or_default(),
            drop: drop.unwrap_or_default(),
            no_new_privileges: allow_privilege_escalation == Some(false),
            read_only_root: read_only_root_filesystem == Some(true),
            ..self.security()
        }
    }

    /// Whether a container's readiness probe succeeds, as a kubelet in this network namespace would find.
    pub fn is_ready(&self, name: &str) -> bool {
        let probe = self.container(name).readiness_probe.as_ref();
        let get = probe.and_then(|probe| probe.http_get.as_ref());
        get_status(get.expect("httpGet")).is_some_and(|status| (200..400).contains(&status))
    }
}

fn get_status(probe: &HTTPGetAction) -> Option<u16> {
    let IntOrString::Int(port) = probe.port else {
        panic!("{:?}", probe.port);
    };
    let server = (probe.host.as_deref().unwrap(), u16::try_from(port).unwrap());
    let (status, _) = http::get(server, probe.path.as_deref().unwrap())?;
    Some(status)
}
