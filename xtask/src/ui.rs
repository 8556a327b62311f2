//! What a person sees: headings, one line per step, and a spinner while a quiet command works.
//!
//! Colour and spinner appear only on a terminal: `anstream` and `indicatif` look for one.

use std::io::{Read as _, Seek as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use wait_timeout::ChildExt as _;

pub const BOLD: Style = Style::new().bold();
pub const GOOD: Style = AnsiColor::Green.on_default().bold();
pub const BAD: Style = AnsiColor::Red.on_default().bold();
pub const NOTE: Style = AnsiColor::Yellow.on_default();
pub const FAINT: Style = Style::new().dimmed();

pub fn heading(text: &str) {
    anstream::println!("\n{BOLD}== {text}{BOLD:#}");
}

/// One aligned line: `  ok    rust-src     already there`.
pub fn step(mark: Mark, name: &str, detail: &str) {
    let (style, word) = match mark {
        Mark::Ok => (GOOD, "ok"),
        Mark::Did => (GOOD, "done"),
        Mark::Warn => (NOTE, "warn"),
        Mark::Fail => (BAD, "FAIL"),
    };
    anstream::println!("  {style}{word:<5}{style:#} {name:<14} {detail}");
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    Ok,
    Did,
    Warn,
    Fail,
}

pub fn warn(text: &str) {
    anstream::println!("  {NOTE}warn{NOTE:#}  {text}");
}

/// Prints the command line that is about to run with its output visible.
pub fn command(command: &Command) {
    anstream::println!("{FAINT}$ {}{FAINT:#}", describe(command));
}

/// Runs a command with its output held back; on failure the end of that output is in the error.
///
/// The deadline matters: on a machine without network some downloads hang instead of failing.
pub fn run_quietly(label: &str, command: &mut Command, limit: Duration) -> Result<()> {
    let spinner = ProgressBar::new_spinner().with_message(label.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    let outcome = run_with_deadline(command, limit);
    spinner.finish_and_clear();
    outcome
}

fn run_with_deadline(command: &mut Command, limit: Duration) -> Result<()> {
    let text = describe(command);
    // A file, not a pipe: nobody has to drain it while the deadline is being watched.
    let mut log = tempfile::tempfile().context("no temporary file for a command's output")?;
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start `{text}`"))?;
    let Some(status) = child.wait_timeout(limit)? else {
        child.kill().ok();
        child.wait().ok();
        bail!("`{text}` did not finish within {} s", limit.as_secs());
    };
    if status.success() {
        return Ok(());
    }
    let mut output = String::new();
    log.rewind()?;
    log.read_to_string(&mut output).ok();
    let lines: Vec<&str> = output.lines().collect();
    let tail = lines[lines.len().saturating_sub(12)..].join("\n    ");
    bail!(
        "`{text}` failed ({status}) after {:.1} s\n    {tail}",
        started.elapsed().as_secs_f32()
    )
}

pub fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// A seed for what is random, another one each second.
pub fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
