//! The daemon as a whole: its settings, its tasks, its end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::decision::Rules;
use super::http::{self, Shown};
use super::keeper::{Keeper, Pulse, Work};
use super::metrics::Metrics;
use super::pods::{self, Pods};
use super::reports::{self, Reports};
use super::socket::{Server, Socket};
use crate::observe::mounts;
use crate::pins::Claim;

/// How the daemon runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the node, as in `spec.nodeName` of its pods.
    pub node: String,
    /// How to reach the Kubernetes API; None for what a pod is given.
    pub kubeconfig: Option<PathBuf>,
    /// Where the CNI plugin asks.
    pub socket: PathBuf,
    /// Where metrics and health are served.
    pub metrics: SocketAddr,
    /// Who is captured.
    pub rules: Rules,
    /// How often everything is looked at again.
    pub resync: Duration,
    /// How long the Kubernetes API may be silent before it is called again.
    pub api_timeout: Duration,
}

/// Runs until SIGTERM or SIGINT; everything stays captured.
pub fn run(settings: Settings) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the event loop")?;
    let result = runtime.block_on(serve(settings));
    // Connections under way are not waited for: whoever is at the other end asks again.
    runtime.shutdown_background();
    result
}

async fn serve(settings: Settings) -> Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    mounts::node()?;
    let _claim = Claim::new()?;
    let client = client(&settings).await?;
    let listener = TcpListener::bind(settings.metrics)
        .await
        .with_context(|| format!("--metrics: listening on {}", settings.metrics))?;
    let socket = Socket::bind(&settings.socket)?;

    let (metrics, pods) = (Arc::new(Metrics::new()), Arc::new(Pods::default()));
    let pulse = Arc::new(Pulse::default());
    let (reports, reported) = Reports::new(metrics.clone());
    let (work, to_do) = mpsc::channel();
    let keeper = Keeper::new(
        settings.rules.clone(),
        settings.resync,
        pods.clone(),
        metrics.clone(),
        reports,
        pulse.clone(),
    );
    let (ended, mut end) = oneshot::channel::<()>();
    let thread = std::thread::Builder::new()
        .name("keeper".to_owned())
        .spawn(move || {
            let _ended = ended;
            keeper.run(&to_do);
        })
        .context("starting the keeper")?;

    let server = Server {
        client: client.clone(),
        pods: pods.clone(),
        rules: settings.rules.clone(),
        work: work.clone(),
        pulse: pulse.clone(),
        metrics: metrics.clone(),
    };
    let shown = Shown {
        metrics: metrics.clone(),
        pulse,
        work: work.clone(),
    };
    let changes = work.clone();
    tracing::info!(
        node = settings.node,
        socket = %settings.socket.display(),
        metrics = %settings.metrics,
        "serving"
    );
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
        _ = &mut end => bail!("the keeper has ended"),
        () = socket.serve(server) => bail!("the socket has ended"),
        served = http::serve(listener, shown) => served.context("serving metrics")?,
        () = pods::follow(client.clone(), &settings.node, &pods, &metrics, move |change| {
            // Fails only when the keeper has ended, which is noticed above.
            let _ = changes.send(Work::Changed(change));
        }) => bail!("the watch has ended"),
        () = reports::write(client, &settings.node, reported, &metrics) => bail!("nobody reports"),
    }
    tracing::info!("ending; what is captured stays captured");
    drop(socket);
    if work.send(Work::Stop).is_ok() {
        let _ended = end.await;
    }
    if thread.join().is_err() {
        bail!("the keeper has panicked");
    }
    Ok(())
}

async fn client(settings: &Settings) -> Result<Client> {
    let mut config = match &settings.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)
                .with_context(|| format!("--kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("--kubeconfig {}", path.display()))?
        }
        None => Config::incluster().context(
            "--kubeconfig: missing, and this is no pod with a service account: allowed is a file, or none in a pod",
        )?,
    };
    config.connect_timeout = Some(settings.api_timeout);
    config.read_timeout = Some(settings.api_timeout);
    config.reset_reader_on_write = true;
    Client::try_from(config).context("making the Kubernetes client")
}
