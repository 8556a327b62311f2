//! Builds the eBPF object that the library embeds.

use std::hash::{DefaultHasher, Hasher as _};
use std::path::Path;
use std::process::{Command, exit};
use std::{env, fs};

use anyhow::{Context, Result};
use aya_build::{Package, Toolchain};

fn main() -> Result<()> {
    // aya-build asks for build-std on a stable compiler only if its own environment says so.
    if env::var_os("RUSTC_BOOTSTRAP").is_none_or(|value| value != "1") {
        let status = Command::new(env::current_exe()?)
            .env("RUSTC_BOOTSTRAP", "1")
            // aya-build shows every line of the inner cargo as a warning.
            .env("CARGO_TERM_QUIET", "true")
            .status()?;
        exit(status.code().unwrap_or(1));
    }
    println!("cargo:rerun-if-changed=../redirect-common/src");
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".into());
    let features: &[&str] = if env::var_os("CARGO_FEATURE_OTHER_LAYOUT").is_some() {
        &["other-layout"]
    } else {
        &[]
    };
    aya_build::build_ebpf(
        [Package {
            name: "redirect-ebpf",
            root_dir: concat!(env!("CARGO_MANIFEST_DIR"), "/../redirect-ebpf"),
            features,
            ..Default::default()
        }],
        Toolchain::Custom(&toolchain),
    )
    .context("building redirect-ebpf; `cargo xtask setup` installs rust-src and bpf-linker")?;
    name_build()
}

/// Names the programs by their contents, here and not at run time: hashing a megabyte takes as long
/// as half of an attach.
fn name_build() -> Result<()> {
    let object = Path::new(&env::var("OUT_DIR")?).join("redirect-ebpf");
    let mut hash = DefaultHasher::new();
    hash.write(&fs::read(object)?);
    println!("cargo:rustc-env=REDIRECT_BUILD={:016x}", hash.finish());
    Ok(())
}
