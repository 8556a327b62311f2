//! `cargo xtask vm`: other kernels, booted under qemu with this machine's own build and programs.

mod console;
mod cpio;
mod elf;
mod image;
mod init;
mod job;
mod keep;
mod kernel;
mod modules;
mod programs;
mod qemu;
mod report;
mod results;
mod sources;
mod test;

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use crate::cargo;
use crate::ui::{self, Mark};
use image::Image;
use job::{GuestCommand, Job};
use kernel::{Kernel, Wanted};
use programs::Programs;
use qemu::{Accelerator, Ended, Guest, Size};

pub use init::run as init;
pub use kernel::version_of;
pub use report::{Verdict, write_own_row};
pub use results::Found;
pub use sources::hash as hash_of_sources;

/// What is booted where nothing else is said.
const DEFAULT_KERNEL: &str = "6.12";

#[derive(Subcommand)]
pub enum Task {
    /// Run a command in a guest: with redirect, iptables and ip there
    Run(Run),
    /// A shell in a guest; `exit` ends it
    Shell(Shell),
    /// Load the programs and run the kernel-level tests on each kernel
    Test(test::Options),
}

#[derive(Args)]
pub struct Run {
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    limit: Limit,
    /// The kernel: a version that Debian packages, such as 6.12, or the path of an image
    #[arg(long, value_name = "KERNEL", default_value = DEFAULT_KERNEL)]
    kernel: Wanted,
    /// Carry the kernel-level tests too, in /vm/deps
    #[arg(long)]
    tests: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Args)]
pub struct Shell {
    #[command(flatten)]
    machine: Machine,
    /// The kernel: a version that Debian packages, such as 6.12, or the path of an image
    #[arg(long, value_name = "KERNEL", default_value = DEFAULT_KERNEL)]
    kernel: Wanted,
    /// Carry the kernel-level tests too, in /vm/deps
    #[arg(long)]
    tests: bool,
}

/// What the guest runs on.
#[derive(Args)]
pub struct Machine {
    /// What runs the guest; kvm where it works, if not given
    #[arg(long, value_enum)]
    accelerator: Option<Accelerator>,
    /// CPUs and memory in MiB
    #[arg(long, value_name = "CPUS,MIB", default_value = "2,3072")]
    size: Size,
}

/// How long its job may take.
#[derive(Args)]
pub struct Limit {
    /// Seconds of wall-clock time that a guest's job may take
    #[arg(long, value_name = "SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    limit: u64,
}

impl Task {
    /// Does it; the exit code is the command's own.
    pub fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Run(run) => run.run(),
            Self::Shell(shell) => shell.run(),
            Self::Test(options) => test::run(options),
        }
    }
}

impl Run {
    fn run(&self) -> Result<ExitCode> {
        let job = Job {
            commands: vec![GuestCommand::new("command", &self.command)],
        };
        let programs = Programs::build(self.tests)?;
        let kernel = self.kernel.get()?;
        let ended = self.machine.boot(
            &self.limit,
            &kernel,
            Image::new()?,
            &job,
            &programs,
            |line| println!("{line}"),
        )?;
        match ended.console.status("command") {
            Some(status) if ended.console.fatal().is_none() => {
                Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
            }
            _ => bail!("{}: {}", kernel.name, Verdict::of(&ended)),
        }
    }
}

impl Shell {
    fn run(&self) -> Result<ExitCode> {
        // It owns the terminal, so that Ctrl-C and job control work.
        let shell = ["setsid", "--ctty", "--wait", "--", "bash", "-i"].map(str::to_owned);
        let job = Job {
            commands: vec![GuestCommand::new("shell", &shell)],
        };
        let programs = Programs::build(self.tests)?;
        let kernel = self.kernel.get()?;
        self.machine
            .with_guest(&kernel, Image::new()?, &job, &programs, |guest| {
                guest.interact()
            })?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Machine {
    /// Builds the image, boots, and waits for the end; each line of the job's output goes to `output`.
    fn boot(
        &self,
        limit: &Limit,
        kernel: &Kernel,
        image: Image,
        job: &Job,
        programs: &Programs,
        output: impl FnMut(&str),
    ) -> Result<Ended> {
        let mut output = output;
        let limit = Duration::from_secs(limit.limit);
        let ended = self.with_guest(kernel, image, job, programs, |guest| {
            guest.run(limit, &mut output)
        })?;
        if let Some((_, line)) = &ended.console.disaster {
            ui::warn(line);
        }
        Ok(ended)
    }

    fn with_guest<T>(
        &self,
        kernel: &Kernel,
        mut image: Image,
        job: &Job,
        programs: &Programs,
        work: impl FnOnce(&Guest) -> Result<T>,
    ) -> Result<T> {
        let accelerator = qemu::accelerator(self.accelerator, kernel)?;
        programs.add_to(&mut image)?;
        let modules = match &kernel.modules {
            Some(folder) => {
                let (modules, missing) = modules::in_load_order(folder)?;
                if !missing.is_empty() {
                    let detail = format!("{} has no module {}", kernel.name, missing.join(", "));
                    ui::step(Mark::Warn, "modules", &detail);
                }
                modules
            }
            None => Vec::new(),
        };
        image.set_job(modules, job)?;
        // It has no name: if this is killed, nothing is left.
        let initramfs = tempfile::tempfile_in(folder()?)?;
        image.write(&initramfs)?;
        let by_descriptor = format!("/proc/{}/fd/{}", process::id(), initramfs.as_raw_fd());
        // Other calls may boot the same kernel meanwhile.
        let log = format!("console-{}-{}.log", kernel.file_name(), process::id());
        let log = folder()?.join(log);
        let guest = Guest {
            log: &log,
            kernel,
            initramfs: Path::new(&by_descriptor),
            accelerator,
            size: self.size,
        };
        work(&guest)
    }
}

/// Where all of this is kept.
fn folder() -> Result<PathBuf> {
    let folder = cargo::workspace()?.target.join("vm");
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}
