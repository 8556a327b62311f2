//! Booting a kernel under qemu, and watching it until it ends.

use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use wait_timeout::ChildExt as _;

use super::console::Console;
use super::job;
use super::kernel::Kernel;
use crate::cargo;
use crate::preflight::find_program;
use crate::setup;
use crate::ui::{self, Mark};

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// An emulator, some ten times slower.
    Tcg,
}

/// A guest's size.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub cpus: u32,
    pub memory_mib: u32,
}

/// Until the job begins, at most; an emulator on a crowded machine takes a while.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// A kernel that is told to panic at once has done so by then, if kvm works.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// Between the last mark and the end of qemu.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);

/// So many lines wait to be read; then the guest waits.
const LINES: usize = 1024;

/// Everything from a panic to a lock-up ends the guest, and is told on the console. What guards against other users of the
/// processor and against freed memory is off, and programs are always at the same addresses: an emulator can then use again
/// what it has translated.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 loglevel=5 printk.devkmsg=on panic=-1 oops=panic \
                                softlockup_panic=1 hung_task_panic=1 mitigations=off norandmaps nokaslr \
                                init_on_alloc=0 audit=0 rcupdate.rcu_expedited=1 rdinit=/xtask -- vm-init";

/// Why a guest ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// By itself; whether its job was done is on the console.
    PoweredOff,
    /// Killed: the job had not begun in time.
    BootLimit,
    /// Killed: the job was not done in time.
    JobLimit,
}

/// A guest that has ended.
#[derive(Debug)]
pub struct Ended {
    pub end: End,
    pub console: Console,
    pub boot: Option<Duration>,
}

enum Event {
    Console(String),
    Output(String),
    ConsoleClosed,
}

/// The accelerator to use: the one asked for, else kvm where a kernel boots with it.
pub fn accelerator(asked: Option<Accelerator>, kernel: &Kernel) -> Result<Accelerator> {
    if let Some(asked) = asked {
        return Ok(asked);
    }
    if !Path::new("/dev/kvm").exists() {
        return Ok(Accelerator::Tcg);
    }
    // Tried once per boot of this machine: where kvm hangs, each trial takes until its deadline.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let file = cargo::workspace()?.target.join("vm/accelerator");
    let known = fs::read_to_string(&file).unwrap_or_default();
    match known.strip_prefix(&boot) {
        Some("kvm") => return Ok(Accelerator::Kvm),
        Some("tcg") => return Ok(Accelerator::Tcg),
        _ => {}
    }
    let started = Instant::now();
    let works = kvm_works(kernel)?;
    // One that failed at once may be this kernel's fault, and costs nothing to repeat.
    if works || started.elapsed() >= PROBE_LIMIT {
        fs::write(&file, boot + if works { "kvm" } else { "tcg" })?;
    }
    Ok(if works {
        Accelerator::Kvm
    } else {
        Accelerator::Tcg
    })
}

/// Boots with nothing to run: the kernel panics for want of a root, and qemu ends.
fn kvm_works(kernel: &Kernel) -> Result<bool> {
    let mut command = qemu(
        kernel,
        Accelerator::Kvm,
        Size {
            cpus: 1,
            memory_mib: 512,
        },
    )?;
    command.args(["-serial", "null", "-append", "panic=-1"]);
    let tried = ui::run_quietly("trying kvm", &mut command, PROBE_LIMIT);
    Ok(tried.is_ok())
}

fn qemu(kernel: &Kernel, accelerator: Accelerator, size: Size) -> Result<Command> {
    const NAME: &str = "qemu-system-x86_64";
    if find_program(NAME).is_none() {
        setup::install_packages(&["qemu-system-x86"])?;
    }
    let program = find_program(NAME)
        .with_context(|| format!("no {NAME}: install it with this system's package manager"))?;
    // A killed xtask must not leave a guest behind.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ]);
    command.args(["-machine", "q35", "-m", &format!("{}M", size.memory_mib)]);
    command.args(["-smp", &size.cpus.to_string()]);
    let (accelerator, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm", "host".to_owned()),
        // One thread for all of the guest's CPUs: with one for each, a CPU may keep the translation of a breakpoint that
        // another one is replacing, as the kernel does whenever a static key changes, and the guest ends in an Oops.
        Accelerator::Tcg => ("tcg,thread=single", emulated_cpu(kernel)),
    };
    command.args(["-accel", accelerator, "-cpu", &cpu]);
    command.arg("-kernel").arg(&kernel.image);
    Ok(command)
}

/// Without what is only slower to emulate: five levels of page tables, guards that change with every look into a program's
/// memory, copying byte by byte, and registers that are saved at each switch between tasks.
const EMULATED_CPU: &str =
    "max,la57=off,smap=off,smep=off,umip=off,pku=off,erms=off,fsrm=off,xsave=off,avx=off,avx2=off";

/// qemu 7.2 garbles the flags of an unlocked cmpxchg16b, on which the kernel's allocator was built until Linux 7.0: now and
/// then it ended in a double fault. Since then socket storage cannot be allocated without that instruction.
fn emulated_cpu(kernel: &Kernel) -> String {
    if kernel.version().is_some_and(|version| version >= (7, 0)) {
        EMULATED_CPU.to_owned()
    } else {
        format!("{EMULATED_CPU},cx16=off")
    }
}

/// A guest to be booted.
pub struct Guest<'a> {
    pub kernel: &'a Kernel,
    pub initramfs: &'a Path,
    pub accelerator: Accelerator,
    pub size: Size,
    /// Where the console's lines are kept.
    pub log: &'a Path,
}

impl Guest<'_> {
    fn command(&self) -> Result<Command> {
        let mut command = qemu(self.kernel, self.accelerator, self.size)?;
        command.arg("-initrd").arg(self.initramfs);
        command.args(["-append", KERNEL_ARGUMENTS]);
        // The console is qemu's standard error, so that it cannot mix with what the job writes.
        command.args([
            "-chardev",
            "file,id=console,path=/dev/stderr",
            "-serial",
            "chardev:console",
        ]);
        command.args([
            "-chardev",
            "stdio,id=terminal,signal=off,mux=on",
            "-serial",
            "chardev:terminal",
        ]);
        Ok(command)
    }

    /// Runs it to its end; the job may take as long as `limit`, and each line of its output goes to `output`.
    pub fn run(&self, limit: Duration, mut output: impl FnMut(&str)) -> Result<Ended> {
        let mut child = self
            .command()?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run qemu")?;
        let (events, received) = sync_channel(LINES);
        follow(child.stderr.take(), events.clone(), Event::Console, true);
        follow(child.stdout.take(), events, Event::Output, false);
        let ended = self.watch(&received, limit, &mut output);
        child.kill().ok();
        child.wait()?;
        // What was on its way when the guest ended.
        while let Ok(event) = received.recv_timeout(Duration::from_secs(1)) {
            if let Event::Output(line) = event {
                output(&line);
            }
        }
        ended
    }

    fn watch(
        &self,
        received: &Receiver<Event>,
        limit: Duration,
        output: &mut impl FnMut(&str),
    ) -> Result<Ended> {
        let spinner = ProgressBar::new_spinner().with_message(format!(
            "booting {} ({:?})",
            self.kernel.name, self.accelerator
        ));
        spinner.enable_steady_tick(Duration::from_millis(100));
        let (mut console, mut boot) = (Console::default(), None);
        let mut log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log)
            .with_context(|| format!("cannot make {}", self.log.display()))?;
        let started = Instant::now();
        let mut deadline = started + BOOT_LIMIT;
        let end = loop {
            match receive(received, deadline) {
                Ok(Event::Output(line)) => output(&line),
                Ok(Event::ConsoleClosed) | Err(RecvTimeoutError::Disconnected) => {
                    break End::PoweredOff;
                }
                Ok(Event::Console(line)) => {
                    writeln!(log, "{line}")?;
                    if !console.read(&line) {
                        continue;
                    }
                    match console.marks.last() {
                        Some(job::Mark::Started) => {
                            spinner.finish_and_clear();
                            boot = Some(started.elapsed());
                            deadline = Instant::now() + limit;
                        }
                        Some(job::Mark::Done) => deadline = Instant::now() + POWER_OFF_LIMIT,
                        Some(job::Mark::Trouble(text)) => ui::warn(text),
                        _ => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) if boot.is_none() => break End::BootLimit,
                // All that was asked for is done.
                Err(RecvTimeoutError::Timeout) if console.is_done() => {
                    break End::PoweredOff;
                }
                Err(RecvTimeoutError::Timeout) => break End::JobLimit,
            }
        };
        spinner.finish_and_clear();
        Ok(Ended { end, console, boot })
    }

    /// Gives the guest's terminal to this one, until it ends. An error if that was not of its own accord.
    pub fn interact(&self) -> Result<()> {
        ui::step(
            Mark::Ok,
            "shell",
            "`exit` ends it; Ctrl-a x ends the guest whatever state it is in",
        );
        let mut child: Child = self
            .command()?
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run qemu")?;
        let (events, received) = sync_channel(LINES);
        follow(child.stderr.take(), events, Event::Console, true);
        let mut console = Console::default();
        let boot = Instant::now() + BOOT_LIMIT;
        let trouble = loop {
            let event = if console.is_started() {
                received.recv().map_err(RecvTimeoutError::from)
            } else {
                receive(&received, boot)
            };
            match event {
                Ok(Event::Console(line)) => console.read(&line),
                Err(RecvTimeoutError::Timeout) => break Some("it did not boot".to_owned()),
                Ok(_) | Err(RecvTimeoutError::Disconnected) => {
                    break (!console.is_started()).then(|| console.last_words());
                }
            };
            if let Some((_, line)) = console.fatal() {
                break Some(line.clone());
            }
        };
        // qemu has to set the terminal back.
        let pid = Pid::from_raw(child.id().cast_signed());
        kill(pid, Signal::SIGTERM).ok();
        if child.wait_timeout(POWER_OFF_LIMIT)?.is_none() {
            child.kill().ok();
            child.wait()?;
        }
        match trouble {
            Some(what) => bail!("{}: {what}", self.kernel.name),
            None => Ok(()),
        }
    }
}

/// The next event, unless it is too late: a guest that never stops writing has to end too.
fn receive(received: &Receiver<Event>, deadline: Instant) -> Result<Event, RecvTimeoutError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(RecvTimeoutError::Timeout);
    }
    received.recv_timeout(left)
}

/// Sends each line of a stream, without line ends and control characters at its end.
fn follow(
    stream: Option<impl Read + Send + 'static>,
    events: SyncSender<Event>,
    event: fn(String) -> Event,
    tell_end: bool,
) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if events.send(event(line.trim_end().to_owned())).is_err() {
                return;
            }
        }
        if tell_end {
            // Nobody listens any more: then nobody has to be told.
            let _ = events.send(Event::ConsoleClosed);
        }
    });
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (cpus, memory) = text.split_once(',')?;
            let size = Self {
                cpus: cpus.parse().ok()?,
                memory_mib: memory.parse().ok()?,
            };
            ((1..=64).contains(&size.cpus) && size.memory_mib >= 512).then_some(size)
        };
        parse().ok_or_else(|| {
            "allowed are 1 to 64 CPUs and at least 512 MiB, such as 2,2048".to_owned()
        })
    }
}
