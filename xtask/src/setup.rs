//! Installs what is missing. Every step looks first, so a second run only looks.

mod apt;
mod bpf_linker;
mod envoy;
mod rust_src;

use anyhow::Result;

use crate::ui::{self, Mark};

pub use apt::install as install_packages;
pub use envoy::binary as envoy_binary;

/// What a step found or did, in words for its line.
enum Done {
    Already(String),
    Installed(String),
}

pub fn run() -> Result<()> {
    ui::heading("setup");
    report("packages", apt::run()?);
    report("rust-src", rust_src::run()?);
    report("bpf-linker", bpf_linker::run()?);
    // The demo has a built-in proxy to fall back on, so a machine without Envoy is no failure.
    match envoy::run() {
        Ok(done) => report("envoy", done),
        Err(error) => ui::step(
            Mark::Warn,
            "envoy",
            &format!("not available, the built-in proxy serves instead: {error:#}"),
        ),
    }
    Ok(())
}

fn report(name: &str, done: Done) {
    match done {
        Done::Already(detail) => ui::step(Mark::Ok, name, &detail),
        Done::Installed(detail) => ui::step(Mark::Did, name, &detail),
    }
}
