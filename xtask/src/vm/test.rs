//! `cargo xtask vm test`: the programs and the kernel-level tests, on one kernel after the other.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::slice;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use super::console::Console;
use super::image::Image;
use super::job::{GuestCommand, Job, TERMINAL};
use super::kernel::{Kernel, Wanted};
use super::programs::{Programs, TESTS};
use super::report::{self, Row, Verdict};
use super::results::{Found, Results};
use super::{Limit, Machine, qemu::Ended};
use crate::preflight::OLDEST_KERNEL;
use crate::test::{SKIP, SKIP_LOG, Skips};
use crate::{cargo, ui};

const LOAD: &str = "load";
/// So many tests that fail may be the emulator's fault: whether they are is seen when each runs alone.
const AGAIN_AT_MOST: usize = 10;
/// Begins the line before what a test program writes.
const RUNNING: &str = "     Running ";
/// Where the tests are told.
const SLOWNESS: &str = "REDIRECT_SLOWNESS";

#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    limit: Limit,
    /// A kernel, once for each: a version that Debian packages, or the path of an image
    #[arg(long = "kernel", value_name = "KERNEL", default_values = ["5.10", "6.1", "6.12", "6.18", "7.2"])]
    kernels: Vec<Wanted>,
    /// Only these test programs, such as outbound
    #[arg(long = "test", value_name = "NAME")]
    tests: Vec<String>,
    /// How many tests of a program run at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// How many times longer than usual the tests wait
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    slowness: u32,
    /// Keep what was found in docs/kernel-support, and write these kernels' lines of docs/kernel-support.md from it and what
    /// earlier calls found with the same `redirect`
    #[arg(long, conflicts_with = "filter")]
    table: bool,
    /// Leave out the test programs that are known from there to have passed with the same `redirect`
    #[arg(long, conflicts_with = "filter")]
    rest: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

impl Options {
    /// Which tests were to run.
    fn chosen(&self) -> String {
        let programs = match self.tests.join(", ") {
            all if all.is_empty() => "all".to_owned(),
            some => some,
        };
        match &self.filter {
            Some(filter) => format!("{programs}: `{filter}`"),
            None => programs,
        }
    }
}

/// What the job wrote.
#[derive(Default)]
struct Output {
    /// The test program that runs.
    current: Option<String>,
    by_program: BTreeMap<String, Found>,
}

impl Output {
    fn read(&mut self, line: &str) {
        if let Some(program) = line.strip_prefix(RUNNING) {
            self.current = program.rsplit('/').next().map(str::to_owned);
        }
        let Some(name) = &self.current else { return };
        let found = self.by_program.entry(name.clone()).or_default();
        found.tally.read(line);
        // Before it may stand the name of a test whose result is not there yet.
        if let Some((_, skip)) = line.split_once(SKIP) {
            found.skipped.push(format!("{SKIP}{skip}"));
        }
    }

    fn sum(&self) -> Found {
        self.by_program.values().sum()
    }

    /// The test programs that some tests failed of.
    fn with_failures(&self) -> Vec<String> {
        let programs = self.by_program.iter();
        let failed = programs.filter(|(_, found)| !found.tally.failures().is_empty());
        failed.map(|(name, _)| name.clone()).collect()
    }

    /// What is to be kept of these test programs, of those that have begun: nothing of one that did not end well, and nothing at
    /// all if the kernel went wrong.
    fn kept(&self, names: &[String], console: &Console) -> BTreeMap<String, Option<Found>> {
        let unexplained = self.unexplained(names, console);
        let begun = names.iter().filter(|name| console.has_begun(name));
        let kept = begun.map(|name| {
            let is_sound = console.fatal().is_none() && !unexplained.contains(name);
            let found = self.by_program.get(name).filter(|_| is_sound);
            (name.clone(), found.cloned())
        });
        kept.collect()
    }

    /// Those of these test programs that did not come to their end, or ended with a status that their tests do not explain.
    fn unexplained(&self, names: &[String], console: &Console) -> Vec<String> {
        let is_explained = |name: &&String| {
            let found = self.by_program.get(*name);
            let passed = console.status(name) == Some(0);
            found.is_some_and(|found| {
                found.is_complete() && passed == found.tally.failures().is_empty()
            })
        };
        let names = names.iter();
        names.filter(|name| !is_explained(name)).cloned().collect()
    }
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let mut images = options.kernels.iter().filter(|kernel| kernel.is_image());
    if let Some(image) = images.next()
        && (options.table || options.rest)
    {
        bail!(
            "--kernel {image}: nothing is kept of images; with --table or --rest, allowed are versions such as 6.12"
        );
    }
    let programs = Programs::build_with_tests(&options.tests)?;
    let mut rows = Vec::new();
    for wanted in &options.kernels {
        ui::heading(&format!("Linux {wanted}"));
        let row = match wanted.get() {
            Ok(kernel) if is_too_old(wanted) => refusal(options, &kernel, &programs)?,
            Ok(kernel) => one(options, &kernel, &programs)?,
            Err(why) => Row::new(wanted.to_string(), Verdict::NotThere(format!("{why:#}"))),
        };
        anstream::println!("{}: {}", row.kernel, row.verdict);
        // Each time: a run of many kernels is long, and may be broken off.
        if options.table {
            report::write_document(slice::from_ref(&row))?;
        }
        rows.push(row);
    }
    ui::heading("kernels");
    report::print(&rows);
    let good = rows.iter().all(|row| row.verdict.is_good());
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn is_too_old(wanted: &Wanted) -> bool {
    matches!(wanted, Wanted::Version(major, minor) if (*major, *minor) < OLDEST_KERNEL)
}

fn one(options: &Options, kernel: &Kernel, programs: &Programs) -> Result<Row> {
    let known = Results::read(kernel, programs)?;
    let is_wanted = |name: &&String| !(options.rest && known.passed(name));
    let names: Vec<String> = programs.tests.iter().filter(is_wanted).cloned().collect();
    if names.is_empty() {
        return Ok(Row {
            loads: Some(true),
            found: known.sum(),
            of: known.of(&programs.all_tests),
            ..Row::of(kernel, &programs.sources, known.verdict())
        });
    }
    let mut arguments = vec![format!("--test-threads={}", options.threads)];
    arguments.extend(options.filter.clone());
    let job = tests(options, &names, &arguments);
    let (ended, mut output, took) = boot(options, kernel, programs, job)?;
    let skips = Skips::new(&cargo::workspace()?.root)?;
    let verdict = judge(options, kernel, programs, &names, &ended, &output, &skips)?;
    let now = |verdict| Row {
        loads: ended.console.status(LOAD).map(|status| status == 0),
        boot: ended.boot,
        took,
        ..Row::of(kernel, &programs.sources, verdict)
    };
    if !options.table {
        return Ok(Row {
            found: output.sum(),
            of: options.chosen(),
            ..now(verdict)
        });
    }
    for found in output.by_program.values_mut() {
        found.passed_alone = matches!(verdict, Verdict::PassedAlone(_));
    }
    let kept = output.kept(&names, &ended.console);
    let known = Results::update(kernel, programs, kept, &skips)?;
    // What is wrong now comes first.
    let verdict = if verdict.is_good() {
        known.verdict()
    } else {
        verdict
    };
    Ok(Row {
        found: known.sum(),
        of: known.of(&programs.all_tests),
        ..now(verdict)
    })
}

/// What these test programs make of the kernel.
fn judge(
    options: &Options,
    kernel: &Kernel,
    programs: &Programs,
    names: &[String],
    ended: &Ended,
    output: &Output,
    skips: &Skips,
) -> Result<Verdict> {
    let verdict = Verdict::of(ended);
    if verdict != Verdict::Passed {
        return Ok(verdict);
    }
    let failed = |what: String| Ok(Verdict::Failed(what));
    let unexplained = output.unexplained(names, &ended.console);
    let found = output.sum();
    let failures = found.tally.failures();
    let forbidden = skips.forbidden(&found.skipped);
    if ended.console.status(LOAD) != Some(0) {
        failed("the programs do not load".to_owned())
    } else if !forbidden.is_empty() {
        failed(forbidden.join(", "))
    } else if !unexplained.is_empty() {
        failed(format!("did not end well: {}", unexplained.join(", ")))
    } else if found.tally.passed() == 0 && failures.is_empty() {
        failed("no test was chosen".to_owned())
    } else if failures.is_empty() {
        Ok(verdict)
    } else if failures.len() <= AGAIN_AT_MOST
        && pass_alone(
            options,
            kernel,
            programs,
            &output.with_failures(),
            failures,
            skips,
        )?
    {
        Ok(Verdict::PassedAlone(failures.to_vec()))
    } else {
        failed(failures.join(", "))
    }
}

/// Whether these tests of these programs pass one after the other, in a guest of their own.
fn pass_alone(
    options: &Options,
    kernel: &Kernel,
    programs: &Programs,
    names: &[String],
    failures: &[String],
    skips: &Skips,
) -> Result<bool> {
    ui::heading(&format!("Linux {}: the failed ones alone", kernel.name));
    let words = ["--test-threads=1", "--exact"].map(str::to_owned);
    let arguments = [&words, failures].concat();
    let job = tests(options, names, &arguments);
    let (ended, output, _) = boot(options, kernel, programs, job)?;
    let found = output.sum();
    Ok(Verdict::of(&ended) == Verdict::Passed
        && output.unexplained(names, &ended.console).is_empty()
        && skips.forbidden(&found.skipped).is_empty()
        && found.tally.failures().is_empty()
        && found.tally.passed() >= failures.len() as u64)
}

/// Loads and attaches, then runs these test programs with these arguments.
fn tests(options: &Options, names: &[String], arguments: &[String]) -> Job {
    // A pod that stays attached: loading takes an emulator ten seconds, and every test would begin with it.
    const SCRIPT: &str = "ip netns add keeper && ip -n keeper link set lo up && \
                          ip -n keeper link add eth0 type dummy && ip -n keeper link set eth0 up && \
                          ip -n keeper address add 192.0.2.1/24 dev eth0 && \
                          mkdir /sys/fs/cgroup/keeper && \
                          redirect attach --cgroup /sys/fs/cgroup/keeper --netns /run/netns/keeper";
    let load = GuestCommand {
        essential: true,
        ..shell(LOAD, SCRIPT)
    };
    let mut commands = vec![load];
    // What an earlier one has left running may not have ended its line.
    let run = format!("echo; echo '{RUNNING}'$0; exec $0 \"$@\"");
    commands.extend(names.iter().map(|name| {
        let program = ["sh", "-c", &run, &format!("{TESTS}/{name}")].map(str::to_owned);
        GuestCommand {
            environment: vec![
                (SKIP_LOG.to_owned(), TERMINAL.to_owned()),
                (SLOWNESS.to_owned(), options.slowness.to_string()),
            ],
            ..GuestCommand::new(name, &[&program, arguments].concat())
        }
    }));
    Job { commands }
}

/// A kernel that is too old is refused by every command that would change something, in one line that names what it lacks, and
/// nothing is attached, pinned or made afterwards.
fn refusal(options: &Options, kernel: &Kernel, programs: &Programs) -> Result<Row> {
    const SCRIPT: &str = "ip netns add pod && mkdir /sys/fs/cgroup/pod || exit 1; \
        traces() { find /sys/fs/cgroup /sys/fs/bpf -type d; find /sys/fs/bpf; ls /run/netns /run/redirect; }; \
        before=$(traces 2>&1); \
        for command in 'run -- true' 'attach --cgroup /sys/fs/cgroup/pod --netns /run/netns/pod' istio-iptables 'daemon --node-name node'; do \
            message=$(redirect $command 2>&1); status=$?; echo \"redirect $command: $status: $message\"; \
            [ $status = 1 ] && [ $(echo \"$message\" | grep -c '') = 1 ] && \
            echo \"$message\" | grep 'too old' | grep SO_NETNS_COOKIE | grep -q 'sockops and sockopt' || exit 1; \
        done; \
        redirect check; [ $? = 1 ] && [ \"$before\" = \"$(traces 2>&1)\" ]";
    let job = Job {
        commands: vec![shell(LOAD, SCRIPT)],
    };
    let (ended, _, took) = boot(options, kernel, programs, job)?;
    let verdict = match (Verdict::of(&ended), ended.console.status(LOAD)) {
        (Verdict::Passed, Some(0)) => Verdict::Refused,
        (Verdict::Passed, _) => Verdict::Failed("not refused as it should be".to_owned()),
        (other, _) => other,
    };
    Ok(Row {
        loads: Some(false),
        boot: ended.boot,
        took,
        ..Row::of(kernel, &programs.sources, verdict)
    })
}

fn boot(
    options: &Options,
    kernel: &Kernel,
    programs: &Programs,
    job: Job,
) -> Result<(Ended, Output, Duration)> {
    let started = Instant::now();
    let mut output = Output::default();
    let ended = options.machine.boot(
        &options.limit,
        kernel,
        Image::new()?,
        &job,
        programs,
        |line| {
            println!("{line}");
            output.read(line);
        },
    )?;
    Ok((ended, output, started.elapsed()))
}

fn shell(name: &str, script: &str) -> GuestCommand {
    GuestCommand::new(name, &["sh", "-c", script].map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(lines: &[&str], status: i32) -> (Output, Console) {
        let mut output = Output::default();
        let begin = format!("{RUNNING}/vm/deps/dns");
        for line in [&[begin.as_str()], lines].concat() {
            output.read(line);
        }
        let mut console = Console::default();
        console.read("redirect-vm: begin dns");
        console.read(&format!("redirect-vm: end dns {status}"));
        (output, console)
    }

    fn unexplained(lines: &[&str], status: i32) -> Vec<String> {
        let (output, console) = ended(lines, status);
        output.unexplained(&["dns".to_owned()], &console)
    }

    #[test]
    fn status_has_to_be_that_of_the_tests() {
        let passed = ["running 1 test", "test result: ok. 1 passed; 0 failed"];
        assert!(unexplained(&passed, 0).is_empty());
        assert_eq!(unexplained(&passed, 139), ["dns"]);
        let failed = [
            "running 1 test",
            "test a ... FAILED",
            "test result: FAILED. 0 passed; 1 failed",
        ];
        assert!(unexplained(&failed, 101).is_empty());
        assert_eq!(unexplained(&failed, 0), ["dns"]);
    }

    #[test]
    fn program_that_did_not_start_or_end_is_told() {
        assert_eq!(unexplained(&[], 127), ["dns"]);
        assert_eq!(unexplained(&[], 0), ["dns"]);
        assert_eq!(unexplained(&["running 2 tests"], 0), ["dns"]);
        let nothing = Output::default();
        let names = ["dns".to_owned()];
        assert_eq!(nothing.unexplained(&names, &Console::default()), names);
    }

    #[test]
    fn result_of_what_did_not_end_well_is_not_kept() {
        let names = ["dns", "outbound"].map(str::to_owned);
        let passed = ["running 1 test", "test result: ok. 1 passed; 0 failed"];
        let kept = |status, console_line: &str| {
            let (output, mut console) = ended(&passed, status);
            console.read(console_line);
            output.kept(&names, &console)
        };
        let sound = kept(0, "");
        // The other one has not begun: what was known of it before still is.
        assert_eq!(sound.keys().collect::<Vec<_>>(), ["dns"]);
        assert!(sound["dns"].is_some());
        assert_eq!(kept(139, "")["dns"], None);
        assert_eq!(kept(0, "BUG: scheduling while atomic")["dns"], None);
        let mut broken_off = Console::default();
        broken_off.read("redirect-vm: begin dns");
        assert_eq!(Output::default().kept(&names, &broken_off)["dns"], None);
    }

    #[test]
    fn skip_is_seen_wherever_it_is_told() {
        let skip = "SKIP envoy::a: no Envoy";
        let behind = format!("test envoy::b ... {skip}");
        let (output, _) = ended(&[skip, &behind, "test envoy::a ... ok"], 0);
        assert_eq!(output.sum().skipped, [skip, skip]);
    }
}
