//! The command line.

mod check;
mod cni;
mod daemon;
mod istio_iptables;
mod logging;
mod table;

use std::ffi::OsString;
use std::io::{ErrorKind, Write as _};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};

use self::daemon::DaemonArgs;
use crate::attach::{self, Request};
use crate::follow::{self, Wanted};
use crate::kernel::Task;
use crate::observe::cgroup::Cgroup;
use crate::observe::netns::NetworkNamespace;
use crate::options::{CaptureFlags, IstioIptablesFlags, OptionError, process_env};
use crate::output::say;
use crate::proxy::ProxyIdentity;
use crate::run::{self, NotStarted};
use crate::{detach, kernel, status};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage or a refused value; \
                          `run` ends with the command's own, 127 if it is not found, 126 if it cannot be run.";

/// Captures a pod's TCP traffic for its proxy, as istio-iptables does, with eBPF.
#[derive(Debug, Parser)]
#[command(name = "redirect", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Capture a pod's traffic, or change how it is captured; outlives this process
    Attach(Box<AttachArgs>),
    /// Let new connections of a pod go where they were meant to; established ones live on
    Detach(DetachArgs),
    /// Show what is attached and what it has done
    Status(StatusArgs),
    /// Tell whether this node can capture pods, and what is in the way; changes nothing
    Check(check::CheckArgs),
    /// Follow what happens: connections that are refused and, with --decisions, what becomes of
    /// each connection and by which rule; until Ctrl-C
    Log(LogArgs),
    /// Run a command with its outbound TCP captured, until it ends
    Run(Box<RunArgs>),
    /// Capture the pods of this Kubernetes node as they come and go, until SIGTERM; captured pods stay so
    Daemon(Box<DaemonArgs>),
    /// Capture the pod this runs in, as an init container in the place of istio-iptables
    #[command(after_help = istio_iptables::EXIT_CODES)]
    IstioIptables(Box<IstioIptablesFlags>),
    /// Tell the node's daemon about pods, as a CNI plugin
    #[command(after_help = cni::ABOUT)]
    Cni(cni::CniArgs),
}

#[derive(Debug, Args)]
struct AttachArgs {
    /// The pod's cgroup: a directory below the cgroup2 mount
    #[arg(long, value_name = "DIR", required_unless_present = "pid")]
    cgroup: Option<PathBuf>,
    /// The pod's network namespace, such as /run/netns/NAME
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "pid",
        required_unless_present = "pid"
    )]
    netns: Option<PathBuf>,
    /// A process of the pod: its network namespace and, without --cgroup, its cgroup
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
    #[command(flatten)]
    capture: CaptureFlags,
}

#[derive(Debug, Args)]
struct DetachArgs {
    /// The pod's cgroup
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with = "all",
        required_unless_present = "all"
    )]
    cgroup: Option<PathBuf>,
    /// Every pod of this machine
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// A table for people, or JSON for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
struct LogArgs {
    /// Only the pod with this cgroup
    #[arg(long, value_name = "DIR", conflicts_with = "pid")]
    cgroup: Option<PathBuf>,
    /// Only the pod of this process
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
    /// Every decision too, not only troubles
    #[arg(long)]
    decisions: bool,
    /// Lines for people, or one JSON object per line for programs
    #[arg(short, long, value_enum, default_value_t = LineFormat::Text)]
    output: LineFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LineFormat {
    Text,
    Json,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    capture: CaptureFlags,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let arguments = cni::by_name(istio_iptables::by_name(std::env::args_os().collect()));
    let codes = if istio_iptables::is_called(&arguments) {
        istio_iptables::CODES
    } else {
        CODES
    };
    match Cli::try_parse_from(arguments) {
        Ok(cli) => cli.execute().unwrap_or_else(|error| {
            report(&error);
            ExitCode::from((codes.of_error)(&error))
        }),
        Err(message) => {
            // Nothing is left to be said if that fails.
            let _ = message.print();
            // --help and --version are answered, not wrong.
            ExitCode::from(if message.use_stderr() { codes.usage } else { 0 })
        }
    }
}

/// How a call that failed ends.
struct Codes {
    /// The command line could not be parsed.
    usage: u8,
    /// Anything later.
    of_error: fn(&anyhow::Error) -> u8,
}

const CODES: Codes = Codes {
    usage: 2,
    of_error: exit_code,
};

/// 127 and 126 are what shells and `env` answer for a command that they cannot run.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<OptionError>() {
        return 2;
    }
    match error.downcast_ref::<NotStarted>() {
        Some(command) if command.source.kind() == ErrorKind::NotFound => 127,
        Some(_) => 126,
        None => 1,
    }
}

/// Says what went wrong, in one line.
fn report(error: &anyhow::Error) {
    eprintln!("redirect: {}", describe(error));
}

/// The error and its causes in one line; some errors quote their cause already.
fn describe(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match (text.is_empty(), text.contains(&cause)) {
            (true, _) => cause,
            (false, true) => text,
            (false, false) => format!("{text}: {cause}"),
        }
    })
}

impl Cli {
    fn execute(self) -> Result<ExitCode> {
        match &self.command {
            Subcommands::Daemon(args) => logging::of_the_daemon(args.log_format()),
            _ => logging::of_a_command(),
        }
        match self.command {
            Subcommands::Daemon(args) => args.execute(),
            Subcommands::Attach(args) => args.execute(),
            Subcommands::Detach(args) => args.execute(),
            Subcommands::Status(args) => args.execute(),
            Subcommands::Check(args) => args.execute(),
            Subcommands::Log(args) => args.execute(),
            Subcommands::Run(args) => args.execute(),
            Subcommands::IstioIptables(flags) => istio_iptables::execute(&flags),
            Subcommands::Cni(args) => args.execute(),
        }
    }
}

impl AttachArgs {
    fn execute(self) -> Result<ExitCode> {
        let policy = self.capture.validate(&process_env)?;
        kernel::require(Task::AnyPod)?;
        let netns = match (&self.netns, self.pid) {
            (Some(path), _) => NetworkNamespace::open(path).context("--netns")?,
            (None, Some(pid)) => NetworkNamespace::of_process(pid).context("--pid")?,
            (None, None) => bail!("--netns: missing; give --netns PATH or --pid PID"),
        };
        if netns.is_host()? {
            bail!(
                "{}: this is the host's own network namespace; allowed are those of pods (for a single command, use `redirect run`)",
                netns.name()
            );
        }
        let cgroup = match (&self.cgroup, self.pid) {
            (Some(path), _) => Cgroup::open(path).context("--cgroup")?,
            (None, Some(pid)) => Cgroup::of_process(pid).context("--pid")?,
            (None, None) => bail!("--cgroup: missing; give --cgroup DIR or --pid PID"),
        };
        if let Some(pid) = cgroup.outsiders(&netns)?.first() {
            bail!(
                "--cgroup {}: process {pid} in it is not in network namespace {}; give the cgroup and the namespace of one pod",
                cgroup.path().display(),
                netns.name()
            );
        }
        let name = cgroup.path().display().to_string();
        let outcome = attach::attach(&Request {
            cgroup,
            proxy_cgroup: None,
            netns,
            run_by: None,
            pod: None,
            policy,
            proxy: ProxyIdentity::Uid,
        })?;
        say(format_args!("{} {name}", outcome.label()))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl DetachArgs {
    fn execute(self) -> Result<ExitCode> {
        kernel::require(Task::AnyPod)?;
        match self.cgroup {
            Some(path) => {
                let cgroup = Cgroup::open(&path).context("--cgroup")?;
                if detach::detach(cgroup.id())? {
                    say(format_args!("detached {}", cgroup.path().display()))?;
                } else {
                    say(format_args!("not attached {}", cgroup.path().display()))?;
                }
            }
            None => match detach::detach_all()? {
                1 => say("detached 1 pod")?,
                count => say(format_args!("detached {count} pods"))?,
            },
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl StatusArgs {
    fn execute(self) -> Result<ExitCode> {
        kernel::require(Task::AnyPod)?;
        let status = status::status()?;
        match self.output {
            Format::Json => say(serde_json::to_string_pretty(&status)?)?,
            Format::Table => say(table::text(&status)?)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl LogArgs {
    fn execute(self) -> Result<ExitCode> {
        kernel::require(Task::AnyPod)?;
        let wanted = Wanted {
            netns_cookie: self.netns_cookie()?,
            decisions: self.decisions,
        };
        let mut failed = Ok(());
        follow::follow(wanted, |event| {
            let line = match self.output {
                LineFormat::Text => Ok(event.to_string()),
                LineFormat::Json => serde_json::to_string(event).map_err(Into::into),
            };
            match line.and_then(|line| writeln!(std::io::stdout(), "{line}")) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Err(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        match failed {
            // Whoever read the lines has enough of them.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            failed => failed.context("writing to standard output")?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn netns_cookie(&self) -> Result<Option<u64>> {
        if let Some(path) = &self.cgroup {
            let cgroup = Cgroup::open(path).context("--cgroup")?;
            let cookie = follow::cookie_of_cgroup(cgroup.id())?.with_context(|| {
                format!(
                    "--cgroup {}: not attached; allowed are those that `redirect status` shows",
                    path.display()
                )
            })?;
            return Ok(Some(cookie));
        }
        let Some(pid) = self.pid else {
            return Ok(None);
        };
        let netns = NetworkNamespace::of_process(pid).context("--pid")?;
        let cookie = netns.cookie()?;
        if !follow::is_attached(cookie)? {
            bail!(
                "--pid {pid}: nothing is attached in its network namespace {}; see `redirect status`",
                netns.name()
            );
        }
        Ok(Some(cookie))
    }
}

impl RunArgs {
    fn execute(self) -> Result<ExitCode> {
        let policy = self.capture.validate(&process_env)?;
        kernel::require(Task::AnyPod)?;
        let status = run::run(policy, &self.command)?;
        let code = status.code().unwrap_or(128 + signal(status));
        Ok(ExitCode::from(code as u8))
    }
}

fn signal(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.signal().unwrap_or(0)
}
