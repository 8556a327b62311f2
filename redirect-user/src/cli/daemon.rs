//! `redirect daemon`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::kernel::{self, Task};
use crate::node::api::DEFAULT_SOCKET;
use crate::node::daemon::{self, Settings};
use crate::node::decision::{LabelSelector, ProxyBy, Rules};

#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    /// This node's name in Kubernetes
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: String,
    /// How to reach the Kubernetes API [default: the service account of the pod this runs in]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where the CNI plugin asks
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:15014")]
    metrics: SocketAddr,
    /// Namespaces whose pods are left alone
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    exclude_namespaces: Vec<String>,
    /// Name of the proxy's container
    #[arg(long, value_name = "NAME", default_value = "istio-proxy")]
    proxy_container: String,
    /// What makes a connection the proxy's
    #[arg(long, value_name = "IDENTITY", value_enum, default_value_t = ProxyBy::Uid)]
    proxy_identity: ProxyBy,
    /// Capture the pods with these labels, in the place of those that Istio's injector has marked
    #[arg(long, value_name = "SELECTOR")]
    label_selector: Option<LabelSelector>,
    /// How often to look at everything again
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = pause)]
    resync: Duration,
    /// How long the Kubernetes API may be silent before it is called again
    #[arg(long, value_name = "TIME", default_value = "75s", value_parser = pause)]
    api_timeout: Duration,
    /// Lines for people, or one JSON object per line for programs
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// How the daemon logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

fn pause(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(pause) if pause >= Duration::from_secs(1) => Ok(pause),
        _ => Err("allowed are times of 1s and more, such as 30s or 5m".to_owned()),
    }
}

impl DaemonArgs {
    pub(super) fn log_format(&self) -> LogFormat {
        self.log_format
    }

    pub(super) fn execute(self) -> Result<ExitCode> {
        kernel::require(Task::AnyPod)?;
        daemon::run(Settings {
            node: self.node_name,
            kubeconfig: self.kubeconfig,
            socket: self.socket,
            metrics: self.metrics,
            rules: Rules {
                exclude_namespaces: self.exclude_namespaces,
                proxy_container: self.proxy_container,
                selector: self.label_selector,
                proxy_by: self.proxy_identity,
            },
            resync: self.resync,
            api_timeout: self.api_timeout,
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
