//! `cargo xtask conformance`: the long run of the differential test against iptables.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use redirect_tests::conformance::{self, News, Plan, report::Report};
use redirect_tests::iptables::Variant;

use crate::ui::{self, Mark};
use crate::{cargo, preflight, setup};

/// Between lines of progress where there is no terminal.
const PAUSE: Duration = Duration::from_secs(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[derive(Args)]
pub struct Options {
    /// Connections to make, each in both pods
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    attempts: u64,
    /// Where everything random comes from [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Leave out the option sets before this one
    #[arg(long, value_name = "N", default_value_t = 0)]
    first_set: u64,
    /// Make only this attempt of that option set, counted from 0
    #[arg(
        long,
        value_name = "N",
        requires = "first_set",
        conflicts_with = "attempts"
    )]
    attempt: Option<usize>,
    /// Compare with this one only [default: both, in turn]
    #[arg(long, value_name = "nft|legacy", value_parser = variant)]
    iptables: Option<Variant>,
}

pub fn run(options: &Options) -> Result<()> {
    preflight::check("conformance")?;
    setup::run()?;
    cargo::build(false)?;
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))?;

    ui::heading("conformance");
    let seed = options.seed.unwrap_or_else(ui::new_seed);
    let mut plan = Plan::new(seed, options.attempts);
    plan.first_set = options.first_set;
    if options.attempt.is_some() {
        (plan.only, plan.attempts) = (options.attempt, 1);
    }
    if let Some(variant) = options.iptables {
        plan.variants = vec![variant];
    }
    plan.variants.retain(|variant| {
        let works = variant.works();
        if !works {
            ui::warn(&format!("iptables-{} does not work here", variant.name()));
        }
        works
    });
    if plan.variants.is_empty() {
        bail!("no iptables to compare with: install it, and boot a kernel with netfilter");
    }
    ui::step(Mark::Ok, "seed", &seed.to_string());

    let mut progress = Progress::new(plan.attempts);
    let report = conformance::run(&plan, &mut |news| match news {
        News::Found(difference) => {
            progress
                .bar
                .suspend(|| anstream::println!("\n{difference}"));
            continue_unless_interrupted()
        }
        News::SetDone(report) => progress.show(report),
    });
    progress.bar.finish_and_clear();
    anstream::println!("\n{}", report.summary());
    if !report.agrees() {
        bail!("redirect and iptables disagree (seed {seed})");
    }
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}

fn variant(name: &str) -> Result<Variant, String> {
    [Variant::Nft, Variant::Legacy]
        .into_iter()
        .find(|variant| variant.name() == name)
        .ok_or_else(|| "allowed are nft and legacy".to_owned())
}

fn continue_unless_interrupted() -> ControlFlow<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

struct Progress {
    bar: ProgressBar,
    started: Instant,
    printed: Instant,
}

impl Progress {
    fn new(attempts: u64) -> Self {
        let style =
            ProgressStyle::with_template("{bar:30} {human_pos} of {human_len}, {msg}, {eta} left");
        let bar = ProgressBar::new(attempts)
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            started: Instant::now(),
            printed: Instant::now(),
        }
    }

    fn show(&mut self, report: &Report) -> ControlFlow<()> {
        let rate = report.attempts as f64 / self.started.elapsed().as_secs_f64();
        let message = format!(
            "{} option sets, {rate:.0}/s, {} differences",
            report.sets,
            report.differences.len()
        );
        if self.bar.is_hidden() && self.printed.elapsed() > PAUSE {
            anstream::println!("  {} attempts, {message}", report.attempts);
            self.printed = Instant::now();
        }
        self.bar.set_position(report.attempts);
        self.bar.set_message(message);
        continue_unless_interrupted()
    }
}
