//! `cargo xtask test`: formatting, lints, then every test, and one summary at the end.

mod skips;
mod tally;

use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::ui::{self, Mark};
use crate::vm::{self, Found, Verdict};
use crate::{cargo, fuzz, preflight, setup};
pub use skips::{LINE_START as SKIP, LOG_VARIABLE as SKIP_LOG, Skips};
pub use tally::Tally;

/// The crate whose tests make namespaces and attach programs.
const KERNEL_TESTS: &str = "redirect-tests";
const KERNEL_TESTS_STEP: &str = "kernel tests";

#[derive(Args)]
pub struct Options {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// How many kernel-level tests run at once: they share the machine's global state
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// Write this machine's kernel into docs/kernel-support.md
    #[arg(long, conflicts_with = "filter")]
    table: bool,
}

/// So many kernel-level tests that fail may be the machine's fault: whether they are is seen when each runs alone. More are ours.
const AGAIN_AT_MOST: usize = 3;

/// What one step came to, for the summary.
struct Outcome {
    name: &'static str,
    mark: Mark,
    took: Duration,
    detail: String,
    tally: Tally,
}

impl Outcome {
    fn passed(&self) -> bool {
        self.mark != Mark::Fail
    }
}

pub fn run(options: &Options) -> Result<()> {
    preflight::check("test")?;
    setup::run()?;
    let skips = Skips::new(&cargo::workspace()?.root)?;
    // Before the build: the sources may change while tests run.
    let sources = options.table.then(vm::hash_of_sources).transpose()?;

    // Every step runs even after one has failed: one run then shows all there is to mend.
    let mut outcomes = vec![
        step("format", fmt()?)?,
        step("lints", clippy()?)?,
        step("eBPF lints", clippy_ebpf()?)?,
        step("tests", unit_tests(options, &skips)?)?,
        step("build", build()?)?,
        step("build of another map layout", cargo::build_other_layout()?)?,
        step("image", image()?)?,
    ];
    // Except these: they run the built programs, and the last build's would answer for this one's.
    let mut builds = outcomes.iter().filter(|o| o.name.starts_with("build"));
    let built = builds.all(Outcome::passed);
    if built {
        let filters: Vec<&str> = options.filter.as_deref().into_iter().collect();
        let first = step(
            KERNEL_TESTS_STEP,
            kernel_tests(options.threads, &filters, &skips)?,
        )?;
        outcomes.extend(run_failed_alone(first, &skips)?);
    } else {
        outcomes.push(not_run(KERNEL_TESTS_STEP, "not run: the build failed"));
    }
    outcomes.push(skip_outcome(&skips)?);
    if let Some(sources) = sources.filter(|_| built) {
        let (found, verdict) = found(&outcomes, &skips)?;
        vm::write_own_row(&sources, found, verdict)?;
    }

    ui::heading("summary");
    for outcome in &outcomes {
        ui::step(
            outcome.mark,
            outcome.name,
            &format!("{:>6.1} s  {}", outcome.took.as_secs_f32(), outcome.detail),
        );
    }
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|o| !o.passed())
        .map(|o| o.name)
        .collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn fmt() -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.args(["fmt", "--all", "--check"]);
    Ok(command)
}

fn clippy() -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.args([
        "clippy",
        "--workspace",
        "--exclude",
        cargo::EBPF_CRATE,
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    Ok(command)
}

/// The eBPF crate is linted as it is built: for the BPF target, with `core` from source on a stable compiler.
fn clippy_ebpf() -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.args([
        "clippy",
        "--package",
        cargo::EBPF_CRATE,
        "-Z",
        "build-std=core",
        "--target",
        "bpfel-unknown-none",
    ]);
    // Its own directory: other RUSTFLAGS in a shared one would rebuild everything each time.
    command
        .arg("--target-dir")
        .arg(cargo::workspace()?.target.join("ebpf-clippy"));
    command.args(["--", "-D", "warnings"]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env(
        "RUSTFLAGS",
        format!("--cfg bpf_target_arch=\"{}\"", std::env::consts::ARCH),
    );
    Ok(command)
}

/// `cargo test` alone would not build the `redirect` program that kernel tests call.
fn build() -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.arg("build");
    Ok(command)
}

/// For the test of the DaemonSet's pod. By cargo: the build has replaced this program's file.
fn image() -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.args(["xtask", "image"]);
    Ok(command)
}

fn unit_tests(options: &Options, skips: &Skips) -> Result<Command> {
    let mut command = test_command(skips)?;
    if std::env::var_os(fuzz::CASES).is_none() {
        command.env(fuzz::CASES, fuzz::CASES_IN_TESTS);
    }
    command.args([
        "--workspace",
        "--exclude",
        cargo::EBPF_CRATE,
        "--exclude",
        KERNEL_TESTS,
        "--no-fail-fast",
        "--",
    ]);
    command.args(&options.filter);
    Ok(command)
}

fn kernel_tests(threads: u32, filters: &[&str], skips: &Skips) -> Result<Command> {
    let mut command = test_command(skips)?;
    command.args(["--package", KERNEL_TESTS, "--no-fail-fast", "--"]);
    command
        .arg(format!("--test-threads={threads}"))
        .args(filters);
    Ok(command)
}

/// Runs the few tests that have failed once more, one after the other. If they pass then, that they failed is a warning.
fn run_failed_alone(mut first: Outcome, skips: &Skips) -> Result<Vec<Outcome>> {
    let failures = first.tally.failures();
    let few = (1..=AGAIN_AT_MOST).contains(&failures.len()) && first.tally.is_complete();
    if first.passed() || !few {
        return Ok(vec![first]);
    }
    let names: Vec<&str> = failures.iter().map(String::as_str).collect();
    let mut command = kernel_tests(1, &names, skips)?;
    command.arg("--exact");
    let alone = step("the failed ones alone", command)?;
    if alone.passed() && alone.tally.passed() >= names.len() as u64 {
        ui::warn(&format!(
            "failed, and passed when run alone: {}",
            names.join(", ")
        ));
        first.mark = Mark::Warn;
    }
    Ok(vec![first, alone])
}

/// What the kernel-level tests make of this machine's kernel.
fn found(outcomes: &[Outcome], skips: &Skips) -> Result<(Found, Verdict)> {
    let tests = outcomes.iter().find(|o| o.name == KERNEL_TESTS_STEP);
    let tests = tests.context("the kernel-level tests have not run")?;
    let (allowed, forbidden) = skips.collect()?;
    let failures = tests.tally.failures().to_vec();
    let verdict = match tests.mark {
        _ if !forbidden.is_empty() => Verdict::Failed(forbidden.join(", ")),
        Mark::Fail => Verdict::Failed(failures.join(", ")),
        Mark::Warn => Verdict::PassedAlone(failures),
        _ => Verdict::Passed,
    };
    let found = Found {
        tally: tests.tally.clone(),
        skipped: allowed,
        ..Found::default()
    };
    Ok((found, verdict))
}

fn test_command(skips: &Skips) -> Result<Command> {
    let mut command = cargo::at_root()?;
    command.arg("test").env(skips::LOG_VARIABLE, skips.log());
    let envoy = setup::envoy_binary()?;
    if envoy.is_file() {
        command.env("REDIRECT_ENVOY", envoy);
    }
    Ok(command)
}

/// Runs a command with its output passed on line by line, and reads cargo's "test result:" lines in passing.
fn step(name: &'static str, mut command: Command) -> Result<Outcome> {
    ui::heading(name);
    ui::command(&command);
    if std::io::stdout().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let started = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut tally = Tally::default();
    let output = child.stdout.take().context("cargo has no output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        anstream::println!("{line}");
        tally.read(&anstream::adapter::strip_str(&line).to_string());
    }
    let status = child.wait()?;
    let detail = if tally.found_nothing() {
        String::new()
    } else {
        tally.to_string()
    };
    Ok(Outcome {
        name,
        mark: mark(status.success()),
        took: started.elapsed(),
        detail,
        tally,
    })
}

fn not_run(name: &'static str, why: &str) -> Outcome {
    Outcome {
        name,
        mark: Mark::Fail,
        took: Duration::ZERO,
        detail: why.to_owned(),
        tally: Tally::default(),
    }
}

fn mark(passed: bool) -> Mark {
    if passed { Mark::Ok } else { Mark::Fail }
}

fn skip_outcome(skips: &Skips) -> Result<Outcome> {
    let (allowed, forbidden) = skips.collect()?;
    for skip in &forbidden {
        ui::warn(&format!(
            "skipped, and not listed in {}: {skip}",
            skips::ALLOWED_FILE
        ));
    }
    Ok(Outcome {
        name: "skips",
        mark: mark(forbidden.is_empty()),
        took: Duration::ZERO,
        detail: format!("{} allowed, {} not", allowed.len(), forbidden.len()),
        tally: Tally::default(),
    })
}
