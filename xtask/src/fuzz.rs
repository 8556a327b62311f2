//! `cargo xtask fuzz`: the long run of the tests with random input.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::ui::{self, Mark};
use crate::{cargo, setup};

/// proptest reads the number of cases here.
pub const CASES: &str = "PROPTEST_CASES";
/// How many each test gets in `cargo xtask test`.
pub const CASES_IN_TESTS: &str = "2000";
/// proptest reads its seed here.
const SEED: &str = "PROPTEST_RNG_SEED";
/// Such tests live in modules of this name.
const MODULES: &str = "fuzz::";
/// Where they are.
const PACKAGES: [&str; 2] = ["redirect-common", "redirect-user"];

#[derive(Args)]
pub struct Options {
    /// Inputs for each test; those whose inputs take long get a tenth of them or less
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    cases: u32,
    /// Where everything random comes from [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

pub fn run(options: &Options) -> Result<()> {
    setup::run()?;
    ui::heading("fuzz");
    let seed = options.seed.unwrap_or_else(ui::new_seed);
    ui::step(Mark::Ok, "seed", &seed.to_string());
    let mut command = cargo::at_root()?;
    command.arg("test");
    for package in PACKAGES {
        command.arg("--package").arg(package);
    }
    // Overflow checks and debug assertions stay on, as they do not in a release build.
    for package in PACKAGES.into_iter().chain(["proptest"]) {
        let optimised = format!("profile.dev.package.{package}.opt-level=2");
        command.arg("--config").arg(optimised);
    }
    let filter = options.filter.as_deref().unwrap_or(MODULES);
    command.args(["--lib", "--tests", "--no-fail-fast", "--", filter]);
    command.env(CASES, options.cases.to_string());
    command.env(SEED, seed.to_string());
    ui::command(&command);
    let started = Instant::now();
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("a test failed: the input is above, `--seed {seed}` repeats the run");
    }
    let detail = format!(
        "{} inputs per test in {:.0} s",
        options.cases,
        started.elapsed().as_secs_f32()
    );
    ui::step(Mark::Ok, "fuzz", &detail);
    Ok(())
}
