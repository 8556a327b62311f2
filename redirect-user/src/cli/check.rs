//! `redirect check`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;
use comfy_table::{Cell, Color, Table, presets};

use super::Format;
use crate::check::{Level, Report, Subject, check};
use crate::observe::cgroup::Cgroup;
use crate::observe::netns::NetworkNamespace;
use crate::output::say;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// A pod's cgroup, to look for other programs on the way to it
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// A pod's network namespace, to look for Istio's iptables rules and other sk_lookup programs in
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// A process of the pod: its network namespace and, without --cgroup, its cgroup
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,
    /// A table for people, or JSON for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

impl CheckArgs {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let cgroup = match (&self.cgroup, self.pid) {
            (Some(path), _) => Some(Cgroup::open(path).context("--cgroup")?),
            (None, Some(pid)) => Some(Cgroup::of_process(pid).context("--pid")?),
            (None, None) => None,
        };
        let netns = match (&self.netns, self.pid) {
            (Some(path), _) => Some(NetworkNamespace::open(path).context("--netns")?),
            (None, Some(pid)) => Some(NetworkNamespace::of_process(pid).context("--pid")?),
            (None, None) => None,
        };
        let report = check(&Subject { cgroup, netns });
        match self.output {
            Format::Json => say(serde_json::to_string_pretty(&report)?)?,
            Format::Table => say(text(&report))?,
        }
        Ok(ExitCode::from(u8::from(!report.ready)))
    }
}

fn text(report: &Report) -> String {
    let mut table = Table::new();
    // Where colours are not shown, `say` takes them away.
    table.load_preset(presets::NOTHING).enforce_styling();
    for finding in &report.findings {
        let level = match finding.level {
            Level::Ok => Cell::new("ok").fg(Color::DarkGreen),
            Level::Note => Cell::new("note"),
            Level::Warning => Cell::new("warning").fg(Color::DarkYellow),
            Level::Bad => Cell::new("BAD").fg(Color::DarkRed),
        };
        table.add_row([level, Cell::new(&finding.what), Cell::new(&finding.detail)]);
    }
    let verdict = if report.ready {
        "pods can be captured here"
    } else {
        "pods cannot be captured here as it is"
    };
    format!("{}\n{verdict}", table.trim_fmt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Finding;

    #[test]
    fn colours_take_no_room_in_the_table() {
        let findings = [Level::Ok, Level::Note, Level::Warning, Level::Bad].map(|level| Finding {
            what: "what".to_owned(),
            level,
            detail: "detail".to_owned(),
        });
        let coloured = text(&Report {
            ready: false,
            findings: findings.to_vec(),
        });
        let plain = anstream::adapter::strip_str(&coloured).to_string();
        assert_ne!(plain, coloured);
        assert_eq!(
            plain.lines().collect::<Vec<_>>(),
            [
                " ok       what  detail",
                " note     what  detail",
                " warning  what  detail",
                " BAD      what  detail",
                "pods cannot be captured here as it is",
            ]
        );
    }
}
