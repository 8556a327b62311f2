//! Installs what is missing. Every step looks first, so a second run only looks.

mod apt;
mod bpf_linker;
mod envoy;
mod kubernetes;
mod python;
mod rust_src;

use anyhow::Result;

use crate::ui::{self, Mark};

pub use apt::install as install_packages;
pub use envoy::binary as envoy_binary;
pub use rust_src::host_triple;

/// What a step found or did, in words for its line.
enum Done {
    Already(String),
    Installed(String),
}

pub fn run() -> Result<()> {
    ui::heading("setup");
    report("packages", apt::run()?);
    toolchain()?;
    // The demo has a built-in proxy to fall back on, so a machine without Envoy is no failure.
    match envoy::run() {
        Ok(done) => report("envoy", done),
        Err(error) => ui::step(
            Mark::Warn,
            "envoy",
            &format!("not available, the built-in proxy serves instead: {error:#}"),
        ),
    }
    // Nor is one without these: the tests that need them say so.
    match kubernetes::run() {
        Ok(done) => report("kubernetes", done),
        Err(error) => ui::step(
            Mark::Warn,
            "kubernetes",
            &format!("no Helm and kubectl, some tests are skipped: {error:#}"),
        ),
    }
    Ok(())
}

/// Only what it takes to build the programs.
pub fn for_build() -> Result<()> {
    ui::heading("setup");
    toolchain()
}

fn toolchain() -> Result<()> {
    report("rust-src", rust_src::run()?);
    report("bpf-linker", bpf_linker::run()?);
    Ok(())
}

fn report(name: &str, done: Done) {
    match done {
        Done::Already(detail) => ui::step(Mark::Ok, name, &detail),
        Done::Installed(detail) => ui::step(Mark::Did, name, &detail),
    }
}
