//! The source of Rust's library, which `-Z build-std=core` compiles for the BPF target.
//!
//! rustup has it as a component. Where rustup cannot fetch it, Debian's package of exactly the same version serves.

mod debian;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::Done;
use crate::preflight::find_program;
use crate::{cargo, ui};

const LIBRARY: &str = "lib/rustlib/src/rust/library";
/// On a machine without network rustup hangs rather than fails.
const RUSTUP_LIMIT: Duration = Duration::from_secs(60);

pub fn run() -> Result<Done> {
    let library = PathBuf::from(rustc(&["--print", "sysroot"])?).join(LIBRARY);
    if library.join("core/Cargo.toml").is_file() {
        return Ok(Done::Already(library.display().to_string()));
    }
    // "rustc 1.95.0 (59807616e 2026-04-14)"
    let text = rustc(&["--version"])?;
    let version = text
        .split(' ')
        .nth(1)
        .with_context(|| format!("cannot read rustc's version out of {text:?}"))?;

    type Way<'a> = (&'a str, &'a dyn Fn() -> Result<()>);
    let debian: Way = ("Debian", &|| debian::fetch(version, &library));
    let rustup: Way = ("rustup", &from_rustup);
    let on_debian = Path::new("/etc/debian_version").exists() && find_program("apt-get").is_some();
    let ways = if on_debian {
        [debian, rustup]
    } else {
        [rustup, debian]
    };

    let mut failures = Vec::new();
    for (name, way) in ways {
        match way() {
            Ok(()) if library.join("core/Cargo.toml").is_file() => {
                return Ok(Done::Installed(format!(
                    "{version} from {name}, at {}",
                    library.display()
                )));
            }
            Ok(()) => failures.push(format!("{name}: nothing arrived at {}", library.display())),
            Err(error) => failures.push(format!("{name}: {error:#}")),
        }
    }
    bail!(
        "rust-src {version} is missing: run `rustup component add rust-src`; tried\n  {}",
        failures.join("\n  ")
    )
}

/// What rustc calls this machine: `x86_64-unknown-linux-gnu`.
pub fn host_triple() -> Result<String> {
    rustc(&["--print", "host-tuple"])
}

fn rustc(args: &[&str]) -> Result<String> {
    let mut command = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let output = command
        .args(args)
        .output()
        .context("cannot run rustc: install Rust with rustup")?;
    if !output.status.success() {
        bail!("rustc {} failed", args.join(" "));
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn from_rustup() -> Result<()> {
    let program = find_program("rustup").context("no rustup here")?;
    let mut command = Command::new(program);
    command
        .args(["component", "add", "rust-src"])
        .env("PATH", cargo::path_with_cargo_bin());
    ui::run_quietly("rustup component add rust-src", &mut command, RUSTUP_LIMIT)
}
