//! `cargo xtask demo`: a pod, a peer, a real Envoy, real requests, and a table of where each one went.
//!
//! Three lists of requests are sent: before `redirect attach`, while the pod is captured, and after `redirect detach`.
//! The first and the last are the negative control: the same calls, and nothing may reach the proxy.

mod access_log;
mod client;
mod envoy;
mod pod;
mod process;
mod proxy;
mod report;
mod scenario;
mod server;
mod teardown;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand, ValueEnum};

use crate::ui::{self, Mark};
use crate::{cargo, preflight, setup};
use pod::Pod;
use process::Running;
use report::Row;
use scenario::{Origin, Request};
use teardown::Teardown;

/// Istio's own numbers: the user, and the ports of the two listeners.
const PROXY_ID: u32 = 1337;
const APP_ID: u32 = 1000;
const OUTBOUND_PORT: u16 = 15001;
const INBOUND_PORT: u16 = 15006;

const POD_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PEER_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Stands for something outside the mesh (TEST-NET-3, RFC 5737).
const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// A service address behind which the proxy chooses the pod itself.
const OWN_SERVICE_IP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
const APP_PORT: u16 = 8080;
/// Excluded from inbound capture, as Istio does for health checks.
const HEALTH_PORT: u16 = 15020;

/// What the injector passes by default.
const ISTIO_FLAGS: [&str; 10] = [
    "-i",
    "*",
    "-b",
    "*",
    "-d",
    "15090,15021,15020",
    "-u",
    "1337",
    "-g",
    "1337",
];

#[derive(Args)]
pub struct Options {
    /// Use this program instead of building `redirect`
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Build and use the release profile
    #[arg(long)]
    release: bool,
    /// Which proxy serves the pod; `auto` is Envoy where there is one
    #[arg(long, value_enum, default_value = "auto")]
    proxy: ProxyChoice,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProxyChoice {
    Auto,
    Envoy,
    Builtin,
}

/// This program again, as a process in the pod.
#[derive(Subcommand)]
pub enum Inside {
    #[command(name = "demo-client", hide = true)]
    Client { to: SocketAddr },
    #[command(name = "demo-server", hide = true)]
    Server {
        name: String,
        addresses: Vec<SocketAddr>,
    },
    #[command(name = "demo-proxy", hide = true)]
    Proxy,
}

impl Inside {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Client { to } => client::print_one(to),
            Self::Server { name, addresses } => server::serve_forever(&name, &addresses),
            Self::Proxy => proxy::serve_forever(),
        }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let cgroup2 = preflight::check("demo")?;
    setup::run()?;
    let redirect = redirect_program(options)?;
    teardown::sweep_leftovers(&cgroup2, &redirect);
    let guard = Teardown::new(&cgroup2, &redirect).armed()?;
    let stage = Stage::set(guard.teardown())?;

    let mut rows = stage.send_all(&scenario::control("before attach"), Vec::new);

    ui::heading("attach");
    attach(&stage.pod, &redirect)?;
    let proxy = stage.start_proxy(options.proxy)?;

    let requests = scenario::captured();
    let lines = requests.iter().map(|r| r.route.proxied_times()).sum();
    rows.extend(stage.send_all(&requests, || access_log::wait_for(&proxy, lines)));

    ui::heading("redirect status");
    let status = run_shown(Command::new(&redirect).arg("status"));

    ui::heading("detach");
    let mut detach = Command::new(&redirect);
    run_shown(detach.args(["detach", "--cgroup"]).arg(stage.pod.cgroup()))?;
    guard.detached();
    let log = access_log::wait_for(&proxy, lines);
    rows.extend(stage.send_all(&scenario::control("after detach"), || {
        access_log::wait_for(&proxy, lines)
    }));

    ui::heading(&format!("access log of {}", proxy.name()));
    for line in &log {
        anstream::println!("{}", line.text());
    }
    ui::heading("summary");
    report::print(&rows);
    let failed = rows.iter().filter(|row| !row.is_ok()).count();
    if failed > 0 {
        bail!("{failed} of {} connections went wrong", rows.len());
    }
    if log.len() != lines {
        bail!(
            "the proxy accepted {} connections, and should have {lines}",
            log.len()
        );
    }
    status?;
    let verdict = format!("all {} connections went where they should", rows.len());
    ui::step(Mark::Ok, "demo", &verdict);
    Ok(())
}

fn redirect_program(options: &Options) -> Result<PathBuf> {
    if let Some(path) = &options.binary {
        let missing = || format!("no program at {}", path.display());
        return path.canonicalize().with_context(missing);
    }
    ui::heading("build");
    cargo::build(options.release)?;
    cargo::built_binary(options.release)
}

/// The pod with its app, the peer with its server, and the program that plays the clients.
struct Stage {
    pod: Pod,
    this: PathBuf,
    shared: PathBuf,
    _app: Running,
}

impl Stage {
    fn set(names: &Teardown) -> Result<Self> {
        ui::heading("pod");
        // Programs that run as other users must be where those can reach them: /root and target/ may be closed.
        let shared = names.shared.clone();
        fs::create_dir(&shared).with_context(|| format!("cannot make {}", shared.display()))?;
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o755))?;
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        let this = process::reachable_by_all(&this, &shared)?;

        let pod = Pod::create(names)?;
        let place = format!("{POD_IP} in namespace {}", pod.namespace());
        ui::step(Mark::Did, "pod", &place);
        ui::step(Mark::Did, "cgroup", &pod.cgroup().display().to_string());

        pod.in_peer(|| server::start("peer", &[SocketAddr::from((SERVICE_IP, 80))]))??;
        let peer = format!("{PEER_IP}, and a remote service on {SERVICE_IP}:80");
        ui::step(Mark::Did, "peer", &peer);

        let mut serve = pod.command(APP_ID, &this);
        serve.args(["demo-server", "app"]);
        serve.args([APP_PORT, HEALTH_PORT].map(|port| format!("0.0.0.0:{port}")));
        let app = Running::start("the app", &mut serve)?;
        let ready = pod.wait_for_listeners(&[APP_PORT, HEALTH_PORT]);
        ready.with_context(|| app.complaint())?;
        let listening = format!("uid {APP_ID}, on ports {APP_PORT} and {HEALTH_PORT}");
        ui::step(Mark::Did, "app", &listening);
        Ok(Self {
            pod,
            this,
            shared,
            _app: app,
        })
    }

    /// Sends every request, then reads the log once and judges them all by it.
    fn send_all(&self, requests: &[Request], log: impl Fn() -> Vec<access_log::Line>) -> Vec<Row> {
        let seen: Vec<_> = requests.iter().map(|r| self.send(r)).collect();
        let log = log();
        let pairs = requests.iter().zip(seen);
        pairs
            .map(|(r, seen)| report::judge(r, seen, &log))
            .collect()
    }

    /// Makes one connection from where the request says, and returns what its client saw.
    fn send(&self, request: &Request) -> Result<client::Seen> {
        match request.from {
            Origin::App => self.send_from_pod(APP_ID, request.to),
            Origin::Proxy => self.send_from_pod(PROXY_ID, request.to),
            Origin::Peer => self.pod.in_peer(|| client::connect(request.to))?,
        }
    }

    fn send_from_pod(&self, id: u32, to: SocketAddr) -> Result<client::Seen> {
        let mut command = self.pod.command(id, &self.this);
        command.args(["demo-client", &to.to_string()]);
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout)
            .context("the client's report is not what was expected")
    }

    fn start_proxy(&self, choice: ProxyChoice) -> Result<Running> {
        ui::heading("proxy");
        let proxy = self.choose_proxy(choice)?;
        let ready = self.pod.wait_for_listeners(&[OUTBOUND_PORT, INBOUND_PORT]);
        ready.with_context(|| proxy.complaint())?;
        let listening =
            format!("uid {PROXY_ID}, on {OUTBOUND_PORT} (outbound) and {INBOUND_PORT} (inbound)");
        ui::step(Mark::Did, proxy.name(), &listening);
        Ok(proxy)
    }

    fn choose_proxy(&self, choice: ProxyChoice) -> Result<Running> {
        let envoy = setup::envoy_binary()?;
        match choice {
            ProxyChoice::Envoy if !envoy.is_file() => {
                bail!("there is no Envoy at {}", envoy.display())
            }
            ProxyChoice::Envoy => return envoy::start(&self.pod, &envoy, &self.shared),
            ProxyChoice::Auto if envoy.is_file() => {
                return envoy::start(&self.pod, &envoy, &self.shared);
            }
            ProxyChoice::Auto => ui::warn(
                "no Envoy on this machine: the small built-in transparent proxy serves instead",
            ),
            ProxyChoice::Builtin => {}
        }
        Running::start(
            "built-in proxy",
            self.pod.command(PROXY_ID, &self.this).arg("demo-proxy"),
        )
    }
}

fn attach(pod: &Pod, redirect: &Path) -> Result<()> {
    let mut attach = Command::new(redirect);
    attach.args(["attach", "--cgroup"]).arg(pod.cgroup());
    attach
        .arg("--netns")
        .arg(pod.namespace_path())
        .args(ISTIO_FLAGS);
    run_shown(&mut attach)
}

fn run_shown(command: &mut Command) -> Result<()> {
    ui::command(command);
    let text = ui::describe(command);
    let status = command.stdin(Stdio::null()).status();
    let status = status.with_context(|| format!("cannot run `{text}`"))?;
    if !status.success() {
        bail!("`{text}` failed ({status})");
    }
    Ok(())
}
