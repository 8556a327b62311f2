//! Called as a CNI plugin is: by that name, or as `redirect cni`; and its installer.

use std::ffi::{OsStr, OsString};
use std::io::stdin;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use crate::cni::install::{self, Installation, Settings, State};
use crate::cni::{self, NAME};
use crate::options::process_env;
use crate::output::say;

pub(super) const ABOUT: &str = "Without a command it is a CNI plugin, for container runtimes: CNI_* variables and a network \
                                configuration on standard input.";

#[derive(Debug, Args)]
pub(super) struct CniArgs {
    #[command(subcommand)]
    command: Option<CniCommand>,
}

#[derive(Debug, Subcommand)]
enum CniCommand {
    /// Put the plugin into this node's CNI directories, as the last of the first network
    /// configuration; waits until there is one
    Install(InstallArgs),
    /// Take the plugin out of them again
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct Directories {
    /// Where container runtimes look for network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// Where container runtimes look for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
}

#[derive(Debug, Args)]
struct InstallArgs {
    #[command(flatten)]
    directories: Directories,
    /// The network configuration to be inserted into, in place of the first one
    #[arg(long, value_name = "FILE")]
    conf_name: Option<String>,
    /// Where the daemon listens, if not at the usual place
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Let pods start uncaptured while the daemon is away or fails
    #[arg(long)]
    fail_open: bool,
    /// Kubernetes namespaces that are left alone [default: kube-system]
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    exclude_namespaces: Option<Vec<String>>,
    /// The daemon's own Kubernetes namespace
    #[arg(long, value_name = "NAMESPACE")]
    pod_namespace: Option<String>,
    /// Stay, and put it back whenever others have changed the directories, until SIGINT or SIGTERM
    #[arg(long)]
    watch: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    #[command(flatten)]
    directories: Directories,
    /// Leave the program: some runtimes still call it for pods that were there before
    #[arg(long)]
    keep_binary: bool,
}

/// A program called redirect-cni needs no subcommand.
pub(super) fn by_name(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let called = arguments
        .first()
        .and_then(|path| Path::new(path).file_name());
    if called == Some(OsStr::new(NAME)) {
        arguments.insert(1, "cni".into());
    }
    arguments
}

impl CniArgs {
    pub(super) fn execute(self) -> Result<ExitCode> {
        match self.command {
            None => Ok(plugin()),
            Some(CniCommand::Install(args)) => args.execute(),
            Some(CniCommand::Uninstall(args)) => args.execute(),
        }
    }
}

fn answered(answer: &str, code: ExitCode) -> ExitCode {
    say(answer).map_or(ExitCode::FAILURE, |()| code)
}

fn plugin() -> ExitCode {
    match cni::run(&process_env, &mut stdin()) {
        Ok(result) if result.is_empty() => ExitCode::SUCCESS,
        Ok(result) => answered(&result, ExitCode::SUCCESS),
        Err(error) => answered(&error, ExitCode::FAILURE),
    }
}

impl InstallArgs {
    fn execute(self) -> Result<ExitCode> {
        if let Some(socket) = self.socket.as_deref().filter(|path| !path.is_absolute()) {
            anyhow::bail!("--socket {}: allowed: an absolute path", socket.display());
        }
        let installation = Installation {
            conf_dir: self.directories.cni_conf_dir,
            bin_dir: self.directories.cni_bin_dir,
            conf_name: self.conf_name,
            program: std::env::current_exe().context("finding this program")?,
            settings: Settings {
                socket: self.socket,
                fail_open: self.fail_open,
                exclude_namespaces: self.exclude_namespaces,
                pod_namespace: self.pod_namespace,
            },
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            if self.watch {
                let signals = signals()?;
                scope.spawn(|| wait_for(signals, &stop));
            }
            let mut failed = Ok(());
            install::keep(&installation, &stop, |outcome| match outcome {
                Ok(State::Waiting(why)) => eprintln!("redirect: waiting: {why}"),
                Ok(State::Inserted(file) | State::Unchanged(file)) => {
                    let what = match outcome {
                        Ok(State::Inserted(_)) => "inserted into",
                        _ => "unchanged in",
                    };
                    // It goes on, heard or not.
                    let _ = say(format_args!("{what} {}", file.display()));
                    stop.fetch_or(!self.watch, Ordering::Relaxed);
                }
                Err(error) if self.watch => eprintln!("redirect: {}", super::describe(error)),
                Err(error) => {
                    failed = Err(anyhow::anyhow!(super::describe(error)));
                    stop.store(true, Ordering::Relaxed);
                }
            });
            failed.map(|()| ExitCode::SUCCESS)
        })
    }
}

type Signals = (tokio::runtime::Runtime, [tokio::signal::unix::Signal; 2]);

fn signals() -> Result<Signals> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    let guard = runtime.enter();
    let signals = [
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    ];
    drop(guard);
    Ok((runtime, signals))
}

fn wait_for((runtime, [mut interrupted, mut terminated]): Signals, stop: &AtomicBool) {
    runtime.block_on(async {
        tokio::select! {
            _ = interrupted.recv() => {}
            _ = terminated.recv() => {}
        }
    });
    stop.store(true, Ordering::Relaxed);
}

impl UninstallArgs {
    fn execute(self) -> Result<ExitCode> {
        let Directories {
            cni_conf_dir,
            cni_bin_dir,
        } = &self.directories;
        install::uninstall(cni_conf_dir, cni_bin_dir, self.keep_binary)?;
        say(format_args!(
            "removed from {} and {}",
            cni_conf_dir.display(),
            cni_bin_dir.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
