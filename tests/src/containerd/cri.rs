//! The few calls of the container runtime interface (`runtime.v1.RuntimeService`) that a pod's life takes.

mod messages;

use std::path::Path;

use prost::Message;
use serde_json::Value;
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

pub use messages::{ContainerConfig, Mount, PodSandboxConfig, Security};
use messages::{
    ContainerStatusResponse, CreateContainer, EXITED, Id, IdAndTimeout, IdAndVerbose, Nothing,
    RunPodSandbox, SandboxStatusResponse, Sandboxes, Status, StatusResponse,
};

/// A client.
pub struct Cri(Grpc<Channel>);

/// A container that has ended, or None while it runs.
pub type Exit = Option<i32>;

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

    /// How the container has ended.
    pub async fn exit(&mut self, container: &str) -> Result<Exit, String> {
        let status = self.container(container).await?.status.unwrap_or_default();
        Ok((status.state == EXITED).then_some(status.exit_code))
    }

    /// The container's process, as the runtime sees it.
    pub async fn pid(&mut self, container: &str) -> Result<u32, String> {
        let info = self.container(container).await?.info;
        let info = info.get("info").ok_or("containerd gives no pid")?;
        let info: Value = serde_json::from_str(info).map_err(|error| error.to_string())?;
        let pid = info["pid"].as_u64().ok_or("containerd gives no pid")?;
        u32::try_from(pid).map_err(|error| error.to_string())
    }

    async fn container(&mut self, id: &str) -> Result<ContainerStatusResponse, String> {
        let request = IdAndVerbose {
            id: id.to_owned(),
            verbose: true,
        };
        self.call("ContainerStatus", request).await
    }

    /// The sandbox's address.
    pub async fn address(&mut self, sandbox: &str) -> Result<String, String> {
        let request = IdAndVerbose {
            id: sandbox.to_owned(),
            verbose: false,
        };
        let answer: SandboxStatusResponse = self.call("PodSandboxStatus", request).await?;
        let network = answer.status.unwrap_or_default().network;
        Ok(network.unwrap_or_default().ip)
    }

    /// Ends a container, by SIGKILL after so many seconds.
    pub async fn stop_container(&mut self, container: &str, timeout: i64) -> Result<(), String> {
        let id = container.to_owned();
        let _: Nothing = self
            .call("StopContainer", IdAndTimeout { id, timeout })
            .await?;
        Ok(())
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
