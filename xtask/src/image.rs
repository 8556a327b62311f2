//! `cargo xtask image`: the image of `deploy/Containerfile`, built without a container engine and without a network.
//!
//! The Containerfile's first stage is this program again, with `--root`: so there is one description of what the image holds.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::preflight::find_program;
use crate::ui::{self, Mark};
use crate::{cargo, setup};

/// As Kubernetes knows it.
const NAME: &str = concat!("redirect:", env!("CARGO_PKG_VERSION"));
const CONTAINERFILE: &str = "deploy/Containerfile";
/// The stage of the Containerfile in whose place the root is put that was made here.
const STAGE: &str = "build";
/// The directory below that stage's root which becomes the image's.
const STAGE_ROOT: &str = "out";
/// Nothing is fetched; the archive has a few megabytes.
const BUILDAH_LIMIT: Duration = Duration::from_secs(300);

#[derive(Args)]
pub struct Options {
    /// Where the archive is written [default: image/redirect.tar in the target directory]
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    output: Option<PathBuf>,
    /// Only lay out the image's root in this directory, which must not exist: no image
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<()> {
    if let Some(root) = &options.root {
        setup::for_build()?;
        return lay_out(root);
    }
    let output = match &options.output {
        Some(output) => output.clone(),
        None => archive()?,
    };
    // If something fails, an old image must not be tested in the new one's place.
    match fs::remove_file(&output) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).context(format!("cannot remove the old {}", output.display()));
        }
        _ => setup::for_build()?,
    }
    let folder = output
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Beside the archive, as only a rename on one file system is all or nothing.
    let scratch = tempfile::tempdir_in(folder)?;
    let context = scratch.path().join("context");
    fs::create_dir(&context)?;
    lay_out(&context.join(STAGE_ROOT))?;

    ui::heading("image");
    buildah_is_there()?;
    let archive = scratch.path().join("redirect.tar");
    pack(&context, scratch.path(), &archive)?;
    fs::rename(&archive, &output)
        .with_context(|| format!("cannot put the image at {}", output.display()))?;
    let size = fs::metadata(&output)?.len() / (1024 * 1024);
    let detail = format!("{NAME}, {size} MiB, in {}", output.display());
    ui::step(Mark::Did, "image", &detail);
    Ok(())
}

/// Where the image is, once it has been built: tests look for it there.
fn archive() -> Result<PathBuf> {
    Ok(cargo::workspace()?.target.join("image/redirect.tar"))
}

/// All that the image holds.
fn lay_out(root: &Path) -> Result<()> {
    ui::heading("build");
    let program = build()?;
    let bin = root.join("usr/bin");
    fs::create_dir(root).with_context(|| format!("cannot make {}", root.display()))?;
    for folder in [&bin, &root.join("run"), &root.join("var")] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    // Runtimes name network namespaces by either path.
    symlink("/run", root.join("var/run"))?;
    let installed = bin.join("redirect");
    cargo::strip(&program, &installed)?;
    fs::set_permissions(&installed, Permissions::from_mode(0o755))?;
    ui::step(Mark::Did, "root", &root.display().to_string());
    Ok(())
}

/// The program for the image. Static: the plugin runs on the host, whose C library may be older than the one here, or missing.
fn build() -> Result<PathBuf> {
    let host = setup::host_triple()?;
    let mut command = cargo::at_root()?;
    command.args(["build", "--locked", "--release", "--package=redirect-user"]);
    command.args(["--bin=redirect", "--target", &host]);
    // With --target, the flag reaches the program only, and neither build scripts nor macros.
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    ui::command(&command);
    let status = command.status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the build failed ({status})");
    }
    let program = cargo::workspace()?
        .target
        .join(host)
        .join("release/redirect");
    if !program.is_file() {
        bail!("the build left no program at {}", program.display());
    }
    Ok(program)
}

fn buildah_is_there() -> Result<()> {
    if let Some(path) = find_program("buildah") {
        ui::step(Mark::Ok, "buildah", &path.display().to_string());
        return Ok(());
    }
    setup::install_packages(&["buildah"])?;
    ui::step(Mark::Did, "buildah", "installed");
    Ok(())
}

/// Runs the Containerfile's last stage on what is in `context`, and writes an archive that every container engine can read.
fn pack(context: &Path, scratch: &Path, archive: &Path) -> Result<()> {
    let buildah = || {
        let mut command = Command::new("buildah");
        // Nothing of this machine's own images is read or left. Files are copied, so that nothing has to be mounted.
        command.arg("--root").arg(scratch.join("storage"));
        command.arg("--runroot").arg(scratch.join("state"));
        command.args(["--storage-driver", "vfs"]);
        command
    };
    let containerfile = cargo::workspace()?.root.join(CONTAINERFILE);
    let mut build = buildah();
    build.args(["build", "--isolation", "chroot", "--build-context"]);
    build.arg(format!("{STAGE}={}", context.display()));
    build.arg("-f").arg(containerfile);
    build.args(["-t", NAME]).arg(context);
    ui::run_quietly("buildah build", &mut build, BUILDAH_LIMIT)?;
    let mut push = buildah();
    push.args(["push", NAME]);
    push.arg(format!("docker-archive:{}:{NAME}", archive.display()));
    ui::run_quietly("buildah push", &mut push, BUILDAH_LIMIT)
}
