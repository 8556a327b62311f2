//! What became of each kernel, for people on the terminal and in the documentation.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::Table;

use super::keep;
use super::kernel::{self, Kernel};
use super::qemu::{End, Ended};
use super::results::Found;
use crate::cargo;

/// One for every kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All that was to run has run, and succeeded.
    Passed,
    /// The same, but some tests failed beside others and succeeded alone.
    PassedAlone(Vec<String>),
    /// A kernel below the oldest supported one was refused in words, and nothing was left behind.
    Refused,
    /// The programs did not load, or a command failed.
    Failed(String),
    /// The kernel itself went wrong.
    Kernel(String),
    /// It did not end in time.
    TimedOut(String),
    /// There is no such kernel to boot.
    NotThere(String),
}

impl Verdict {
    /// From how the guest ended; a job that was done is not looked into.
    pub fn of(ended: &Ended) -> Self {
        let running = ended
            .console
            .running()
            .map(|name| format!(" in {name}"))
            .unwrap_or_default();
        match (ended.console.fatal(), &ended.end) {
            (Some((disaster, line)), _) => Self::Kernel(format!("{disaster:?}{running}: {line}")),
            (_, End::BootLimit) => Self::TimedOut(format!(
                "did not boot: {}",
                ended
                    .console
                    .tail
                    .last()
                    .map_or("nothing on the console", |line| line)
            )),
            (_, End::JobLimit) => Self::TimedOut(format!("stopped{running}")),
            (_, End::PoweredOff) if ended.console.is_done() => Self::Passed,
            (_, End::PoweredOff) => {
                Self::Kernel(format!("stopped{running}: {}", ended.console.last_words()))
            }
        }
    }

    /// Whether this is how it should be.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Passed | Self::PassedAlone(_) | Self::Refused)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => formatter.write_str("passed"),
            Self::PassedAlone(tests) => {
                write!(formatter, "passed, these only alone: {}", tests.join(", "))
            }
            Self::Refused => formatter.write_str("refused"),
            Self::Failed(what) => write!(formatter, "failed: {what}"),
            Self::Kernel(what) => write!(formatter, "kernel: {what}"),
            Self::TimedOut(what) => write!(formatter, "timed out: {what}"),
            Self::NotThere(why) => write!(formatter, "not booted: {why}"),
        }
    }
}

/// A line of the table.
pub struct Row {
    pub kernel: String,
    /// As `uname -r` tells it.
    pub release: String,
    /// The hash of the sources of the `redirect` that ran there.
    pub sources: String,
    /// Whether every program loaded and attached; None if that was not seen.
    pub loads: Option<bool>,
    /// What the tests found.
    pub found: Found,
    /// Which of all tests those are.
    pub of: String,
    pub verdict: Verdict,
    pub boot: Option<Duration>,
    pub took: Duration,
}

const HEADER: [&str; 7] = [
    "kernel",
    "release",
    "redirect",
    "loads and attaches",
    "tests",
    "skipped",
    "verdict",
];

impl Row {
    /// Of a kernel that no more is known of.
    pub fn new(kernel: String, verdict: Verdict) -> Self {
        Self {
            kernel,
            release: String::new(),
            sources: String::new(),
            loads: None,
            found: Found::default(),
            of: String::new(),
            verdict,
            boot: None,
            took: Duration::ZERO,
        }
    }

    /// Of a kernel that is here.
    pub fn of(kernel: &Kernel, sources: &str, verdict: Verdict) -> Self {
        Self {
            release: kernel.release().unwrap_or_default(),
            sources: sources.to_owned(),
            ..Self::new(kernel.name.clone(), verdict)
        }
    }

    fn cells(&self) -> [String; 7] {
        let loads = match self.loads {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not seen",
        };
        let tests = if self.found.tally.found_nothing() {
            "none run".to_owned()
        } else {
            format!("{} ({})", self.found.tally, self.of)
        };
        [
            self.kernel.clone(),
            self.release.clone(),
            self.sources.chars().take(SHOWN).collect(),
            loads.to_owned(),
            tests,
            self.found.skipped.len().to_string(),
            self.verdict.to_string(),
        ]
    }
}

/// So many digits of a hash tell builds apart.
const SHOWN: usize = 8;

/// For the terminal.
pub fn print(rows: &[Row]) {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(HEADER.iter().copied().chain(["boot", "in all"]));
    for row in rows {
        let boot = row.boot.map_or_else(String::new, seconds);
        table.add_row(row.cells().into_iter().chain([boot, seconds(row.took)]));
    }
    anstream::println!("{table}");
}

fn seconds(time: Duration) -> String {
    format!("{:.0} s", time.as_secs_f32())
}

const DOCUMENT: &str = "docs/kernel-support.md";
const BEGIN: &str = "<!-- written by `cargo xtask vm test --table` -->\n";
const END: &str = "<!-- end -->\n";

/// Replaces these kernels' lines of the table in the documentation; what was known of one that was not booted stays.
pub fn write_document(rows: &[Row]) -> Result<()> {
    let path = cargo::workspace()?.root.join(DOCUMENT);
    let _lock = keep::lock()?;
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let booted = rows
        .iter()
        .filter(|row| !matches!(row.verdict, Verdict::NotThere(_)));
    let lines = booted.map(|row| line(&row.cells())).collect();
    let text = replace(&text, lines)
        .with_context(|| format!("{DOCUMENT} has no place for the table: {BEGIN}{END}"))?;
    keep::write(&path, &text)
}

/// The same with the line of the kernel that this machine runs, on which all tests have run with the `redirect` of these sources.
pub fn write_own_row(sources: &str, found: Found, verdict: Verdict) -> Result<()> {
    let release = nix::sys::utsname::uname()?;
    let release = release.release().to_string_lossy();
    let (major, minor) = kernel::version_of(&release)
        .with_context(|| format!("uname -r: {release} has no version"))?;
    write_document(&[Row {
        release: release.into_owned(),
        sources: sources.to_owned(),
        loads: verdict.is_good().then_some(true),
        found,
        of: "all, on a machine".to_owned(),
        ..Row::new(format!("{major}.{minor}"), verdict)
    }])
}

fn line(cells: &[String]) -> String {
    let cells: Vec<String> = cells
        .iter()
        .map(|cell| cell.replace('|', "\\|").replace('\n', " "))
        .collect();
    format!("| {} |\n", cells.join(" | "))
}

fn replace(text: &str, lines: Vec<String>) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (old, after) = rest.split_once(END)?;
    let old = old.lines().skip(2).map(|line| format!("{line}\n"));
    let mut by_kernel: BTreeMap<Vec<u32>, String> = BTreeMap::new();
    for line in old.chain(lines) {
        by_kernel.insert(kernel_of(&line), line);
    }
    let mut table = line(&HEADER.map(str::to_owned)) + &line(&HEADER.map(|_| "---".to_owned()));
    table.extend(by_kernel.into_values());
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

/// The numbers of a line's first cell, which order lines.
fn kernel_of(line: &str) -> Vec<u32> {
    let cell = line.split('|').nth(1).unwrap_or_default();
    cell.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::console::Console;

    fn ended(end: End, lines: &[&str]) -> Ended {
        let mut console = Console::default();
        for line in lines {
            console.read(line);
        }
        Ended {
            end,
            console,
            boot: None,
        }
    }

    #[test]
    fn one_verdict_for_every_end() {
        let done = ["redirect-vm: started", "redirect-vm: done"];
        assert_eq!(Verdict::of(&ended(End::PoweredOff, &done)), Verdict::Passed);
        let silent = ended(End::PoweredOff, &["redirect-vm: started"]);
        assert!(matches!(Verdict::of(&silent), Verdict::Kernel(_)));
        let panic = ["redirect-vm: begin x", "Kernel panic - not syncing: oops"];
        let Verdict::Kernel(text) = Verdict::of(&ended(End::PoweredOff, &panic)) else {
            panic!("a panic is the kernel's");
        };
        assert!(text.starts_with("Panic in x: "), "{text}");
        let stall = ["rcu: INFO: rcu_preempt detected stalls", done[0], done[1]];
        assert_eq!(
            Verdict::of(&ended(End::PoweredOff, &stall)),
            Verdict::Passed
        );
        let slow = ended(End::JobLimit, &["redirect-vm: begin scale"]);
        assert_eq!(
            Verdict::of(&slow).to_string(),
            "timed out: stopped in scale"
        );
        assert!(!Verdict::of(&ended(End::BootLimit, &[])).is_good());
    }

    #[test]
    fn lines_of_a_document_are_replaced_by_kernel_and_others_stay() {
        let table = |lines: &[&str]| {
            let header =
                line(&HEADER.map(str::to_owned)) + &line(&HEADER.map(|_| "---".to_owned()));
            format!("a\n{BEGIN}{header}{}{END}b\n", lines.concat())
        };
        let old = table(&["| 6.1 | x |\n", "| 6.12 | y |\n"]);
        let new = vec!["| 6.12 | z |\n".to_owned(), "| 5.10 | w |\n".to_owned()];
        assert_eq!(
            replace(&old, new),
            Some(table(&[
                "| 5.10 | w |\n",
                "| 6.1 | x |\n",
                "| 6.12 | z |\n"
            ]))
        );
        assert_eq!(replace("no place", Vec::new()), None);
    }
}
