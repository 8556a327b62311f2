//! `cargo xtask soak`: the long run of the load test.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use redirect_tests::soak::{self, Plan, report::Report};

use crate::ui::{self, Mark};
use crate::{cargo, preflight, setup};

/// Between lines of progress where there is no terminal.
const PAUSE: Duration = Duration::from_secs(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[derive(Args)]
pub struct Options {
    /// How long connections are made
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=10_080))]
    minutes: u64,
    /// Where everything random comes from [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Connections that are held open, in all pods together
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    held: usize,
    /// Pods
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = pods)]
    pods: usize,
}

fn pods(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(pods @ 1..=64) => Ok(pods),
        _ => Err("expected 1 to 64 pods".to_owned()),
    }
}

pub fn run(options: &Options) -> Result<()> {
    preflight::check("soak")?;
    setup::run()?;
    cargo::build(false)?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))?;

    ui::heading("soak");
    let seed = options.seed.unwrap_or_else(ui::new_seed);
    let mut plan = Plan::new(seed, Duration::from_secs(options.minutes * 60));
    plan.held = options.held;
    plan.pods = options.pods;
    ui::step(Mark::Ok, "seed", &seed.to_string());

    let mut progress = Progress::new(plan.time);
    let report = soak::run(&plan, &mut |report| progress.show(report));
    progress.bar.finish_and_clear();
    anstream::println!("\n{report}");
    if !report.is_clean() {
        bail!("not as it should be (seed {seed})");
    }
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

struct Progress {
    bar: ProgressBar,
    printed: Instant,
    /// How many violations have been shown.
    shown: usize,
}

impl Progress {
    fn new(time: Duration) -> Self {
        let style = ProgressStyle::with_template("{bar:30} {pos} of {len} s, {msg}");
        let bar = ProgressBar::new(time.as_secs())
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            printed: Instant::now(),
            shown: 0,
        }
    }

    fn show(&mut self, report: &Report) -> ControlFlow<()> {
        let message = format!(
            "{} rounds, {} connections, {} events, {} violations",
            report.rounds,
            report.connections,
            report.events.values().sum::<u64>(),
            report.violations.len()
        );
        for violation in &report.violations[self.shown..] {
            self.bar.suspend(|| ui::warn(violation));
        }
        self.shown = report.violations.len();
        if self.bar.is_hidden() && self.printed.elapsed() > PAUSE {
            anstream::println!("  {:>5} s, {message}", report.took.as_secs());
            self.printed = Instant::now();
        }
        self.bar.set_position(report.took.as_secs());
        self.bar.set_message(message);
        if INTERRUPTED.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}
