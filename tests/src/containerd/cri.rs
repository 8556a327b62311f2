//! The few calls of the container runtime interface (`runtime.v1.RuntimeService`) that a pod's life takes, with the fields they need.

use std::{collections::HashMap, path::Path};

use prost::Message;
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::PodRequest;

/// A client.
pub struct Cri(Grpc<Channel>);

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
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    mounts: Vec<Mount>,
    #[prost(string, tag = "11")]
    log_path: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct Mount {
    #[prost(string, tag = "1")]
    container_path: String,
    #[prost(string, tag = "2")]
    host_path: String,
    #[prost(bool, tag = "3")]
    readonly: bool,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

/// Several messages have nothing but an id, as their first field.
#[derive(Clone, PartialEq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerStatus {
    #[prost(int32, tag = "3")]
    state: i32,
}

/// `CONTAINER_EXITED`
const EXITED: i32 = 2;

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeCondition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct Sandboxes {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Id>,
}

impl PodSandboxConfig {
    /// What a kubelet would say of the pod.
    pub fn new(pod: &PodRequest, directory: &Path) -> Self {
        let log_directory = directory.join("logs").join(&pod.name);
        Self {
            metadata: Some(PodSandboxMetadata {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                namespace: "shop".to_owned(),
            }),
            log_directory: log_directory.display().to_string(),
            annotations: pod.annotations.clone(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: pod.cgroup_parent.clone(),
            }),
        }
    }
}

impl ContainerConfig {
    /// A container that sees those directories of the host, read-only.
    pub fn new(name: &str, image: &str, command: &[&str], host: &[&str], log_path: &str) -> Self {
        let mount = |path: &&str| Mount {
            container_path: (*path).to_owned(),
            host_path: (*path).to_owned(),
            readonly: true,
        };
        Self {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            mounts: host.iter().map(mount).collect(),
            log_path: log_path.to_owned(),
        }
    }
}

impl Cri {
    /// Connects when first used. Within a runtime.
    pub fn new(socket: &Path) -> Self {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
        Self(Grpc::new(endpoint.connect_lazy()))
    }

    async fn call<Q, A>(&mut self, method: &str, request: Q) -> Result<A, String>
    where
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
    {
        self.0.ready().await.map_err(|error| error.to_string())?;
        let path = PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}")).unwrap();
        let codec = ProstCodec::<Q, A>::default();
        match self.0.unary(Request::new(request), path, codec).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(format!("{method}: {}", status.message())),
        }
    }

    /// Its conditions and whether they hold.
    pub async fn status(&mut self) -> Result<Vec<(String, bool)>, String> {
        let answer: StatusResponse = self.call("Status", Status { verbose: false }).await?;
        let conditions = answer.status.unwrap_or_default().conditions;
        Ok(conditions
            .into_iter()
            .map(|condition| (condition.kind, condition.status))
            .collect())
    }

    /// The network configuration as it has read it.
    pub async fn config(&mut self) -> Result<String, String> {
        let answer: StatusResponse = self.call("Status", Status { verbose: true }).await?;
        Ok(answer.info.get("cniconfig").cloned().unwrap_or_default())
    }

    /// The sandbox's id.
    pub async fn run_sandbox(&mut self, config: PodSandboxConfig) -> Result<String, String> {
        let config = Some(config);
        let answer: Id = self.call("RunPodSandbox", RunPodSandbox { config }).await?;
        Ok(answer.id)
    }

    /// The container's id.
    pub async fn start_container(
        &mut self,
        sandbox: &str,
        config: ContainerConfig,
        sandbox_config: PodSandboxConfig,
    ) -> Result<String, String> {
        let request = CreateContainer {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let created: Id = self.call("CreateContainer", request).await?;
        let _: Nothing = self.call("StartContainer", created.clone()).await?;
        Ok(created.id)
    }

    /// Whether the container has come to its end.
    pub async fn has_exited(&mut self, container: &str) -> Result<bool, String> {
        let id = container.to_owned();
        let answer: ContainerStatusResponse = self.call("ContainerStatus", Id { id }).await?;
        Ok(answer.status.unwrap_or_default().state == EXITED)
    }

    /// Stops and removes.
    pub async fn remove_sandbox(&mut self, sandbox: &str) -> Result<(), String> {
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let id = sandbox.to_owned();
            let _: Nothing = self.call(method, Id { id }).await?;
        }
        Ok(())
    }

    /// Stops and removes all that there are.
    pub async fn remove_all(&mut self) -> Result<(), String> {
        let all: Sandboxes = self.call("ListPodSandbox", Nothing {}).await?;
        for sandbox in all.items {
            self.remove_sandbox(&sandbox.id).await?;
        }
        Ok(())
    }
}
