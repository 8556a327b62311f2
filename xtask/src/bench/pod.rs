//! A pod of one kind with its peer and its processes; everything goes when it is dropped.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use redirect_tests::iptables::rules;
use redirect_tests::options::Options;

use super::agent::Work;
use super::{APP_PORT, INBOUND_PORT, Kind, Measure, OUTBOUND_PORT, PEER_IP, POD_IP, PROXY_ID};
use crate::preflight;
use crate::ui;

/// What both kinds of capture are given.
const CAPTURE: Options = Options {
    include_cidrs: "*",
    include_inbound: "*",
    uids: "1337",
    // The pod has no IPv6 address.
    ipv6: false,
    ..Options::BARE
};

/// Dropped from first to last: processes, then what captures them, then where they were.
pub struct Pod {
    kind: Kind,
    client: Process,
    peer_client: Process,
    _proxy: Process,
    _application: Process,
    _attached: Option<Attached>,
    cgroup: Cgroup,
    namespace: Namespace,
    _peer: Namespace,
}

impl Pod {
    pub fn create(kind: Kind, cgroup2: &Path, redirect: &Path) -> Result<Self> {
        let name = format!("redirect-bench-{}-{}", std::process::id(), kind.name());
        let namespace = Namespace::create(name.clone())?;
        let peer = Namespace::create(format!("{name}-peer"))?;
        join(&namespace, &peer)?;
        let cgroup = Cgroup::create(cgroup2.join(&name))?;
        let attached = match kind {
            Kind::Direct => None,
            Kind::Redirect => Some(Attached::attach(redirect, &cgroup, &namespace)?),
            Kind::IptablesNft | Kind::IptablesLegacy => {
                apply_rules(kind, &namespace)?;
                None
            }
        };
        // The client on one CPU, the server on the other, for every kind.
        let cpus = thread::available_parallelism()?.get();
        let (client_cpu, server_cpu) = (0, usize::from(cpus > 1));
        let ports = format!("{OUTBOUND_PORT},{INBOUND_PORT}");
        let serve = ["--listen", &ports];
        let proxy = Process::start(&namespace, Some(&cgroup), server_cpu, PROXY_ID, &serve)?;
        let silent = ["--silent", &APP_PORT.to_string()];
        let application = Process::start(&namespace, Some(&cgroup), server_cpu, 0, &silent)?;
        let client = Process::start(&namespace, Some(&cgroup), client_cpu, 0, &[])?;
        let peer_client = Process::start(&peer, None, client_cpu, 0, &[])?;
        let mut pod = Self {
            kind,
            client,
            peer_client,
            _proxy: proxy,
            _application: application,
            _attached: attached,
            cgroup,
            namespace,
            _peer: peer,
        };
        for measure in [Measure::OutboundConnect, Measure::InboundConnect] {
            let reached = pod.run(measure, Work::RoundTrip(1));
            reached.with_context(|| format!("{}: the proxy is not reached", measure.name()))?;
        }
        Ok(pod)
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn place(&self) -> String {
        let namespace = self.namespace.path();
        format!("{} {}", namespace.display(), self.cgroup.0.display())
    }

    pub fn run(&mut self, measure: Measure, work: Work) -> Result<u64> {
        let client = match measure {
            Measure::InboundConnect => &mut self.peer_client,
            _ => &mut self.client,
        };
        let order = work.order(measure.target(self.kind));
        let answer = client.ask(&order);
        let answer = answer.with_context(|| format!("{}: {}", self.kind.name(), order.trim()))?;
        answer.parse().context("a client's answer is no number")
    }
}

/// Two ends of a veth pair, both called eth0, as in a pod.
pub(super) fn join(inside: &Namespace, outside: &Namespace) -> Result<()> {
    let (inside, outside) = (&inside.0, &outside.0);
    ip(&format!(
        "link add eth0 netns {inside} type veth peer name eth0 netns {outside}"
    ))?;
    for (namespace, address) in [(inside, POD_IP), (outside, PEER_IP)] {
        ip(&format!("-n {namespace} address add {address}/24 dev eth0"))?;
        ip(&format!("-n {namespace} link set lo up"))?;
        ip(&format!("-n {namespace} link set eth0 up"))?;
    }
    ip(&format!("-n {inside} route add default via {PEER_IP}"))
}

fn restore(kind: Kind) -> Option<PathBuf> {
    preflight::find_program(&format!("{}-restore", kind.name()))
}

pub fn has_restore(kind: Kind) -> bool {
    restore(kind).is_some()
}

pub(super) fn apply_rules(kind: Kind, namespace: &Namespace) -> Result<()> {
    let program = restore(kind).context("no iptables-restore")?;
    // Not `ip netns exec`: that mounts another /sys.
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.path().display()))
        .arg(program)
        .arg("--noflush");
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let written = stdin.write_all(rules(&CAPTURE, false).as_bytes());
    drop(stdin);
    let status = child.wait()?;
    written?;
    if !status.success() {
        bail!("`{}` failed ({status})", ui::describe(&command));
    }
    Ok(())
}

fn ip(arguments: &str) -> Result<()> {
    run(Command::new("ip").args(arguments.split(' ')))
}

fn run(command: &mut Command) -> Result<()> {
    let text = ui::describe(command);
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run `{text}`"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("`{text}` failed: {}", complaint.trim());
    }
    Ok(())
}

pub(super) struct Namespace(String);

impl Namespace {
    pub(super) fn create(name: String) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        Ok(Self(name))
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("netns delete {}", self.0)) {
            ui::warn(&format!("namespace {} stays behind: {error}", self.0));
        }
    }
}

pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("cannot make cgroup {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes that were just killed hold the cgroup for a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        ui::warn(&format!("cgroup {} stays behind", self.0.display()));
    }
}

pub(super) struct Attached {
    redirect: PathBuf,
    cgroup: PathBuf,
}

impl Attached {
    pub(super) fn attach(redirect: &Path, cgroup: &Cgroup, namespace: &Namespace) -> Result<Self> {
        // Before the attempt: one that fails half way is undone too.
        let attached = Self {
            redirect: redirect.to_owned(),
            cgroup: cgroup.0.clone(),
        };
        let mut command = Command::new(redirect);
        command.args(["attach", "--cgroup"]).arg(&cgroup.0);
        command.arg("--netns").arg(namespace.path());
        command.args(CAPTURE.arguments());
        run(&mut command)?;
        Ok(attached)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut command = Command::new(&self.redirect);
        command.args(["detach", "--cgroup"]).arg(&self.cgroup);
        if let Err(error) = run(&mut command) {
            ui::warn(&format!("{error:#}"));
        }
    }
}

/// This program again, as an agent.
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    fn start(
        namespace: &Namespace,
        cgroup: Option<&Cgroup>,
        cpu: usize,
        id: u32,
        job: &[&str],
    ) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("bench-agent")
            .arg("--netns")
            .arg(namespace.path());
        command.args(["--cpu", &cpu.to_string(), "--id", &id.to_string()]);
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(&cgroup.0);
        }
        command.args(job);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start an agent")?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut process = Self {
            child,
            stdin: stdin.context("no stdin")?,
            stdout: BufReader::new(stdout.context("no stdout")?),
        };
        if process.answer()? != "ready" {
            bail!("an agent did not become ready");
        }
        Ok(process)
    }

    fn ask(&mut self, order: &str) -> Result<String> {
        self.stdin.write_all(order.as_bytes())?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? == 0 {
            bail!("an agent has ended");
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
