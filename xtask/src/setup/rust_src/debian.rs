//! Debian's rust-src package, fetched without touching the machine's own apt configuration or state.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use super::archive::Source;
use crate::ui;

/// The suite whose rust-src follows current stable releases.
const SUITE: &str = "trixie-backports";
const APT_LIMIT: Duration = Duration::from_secs(180);

/// Puts the library of exactly this rustc at `library`.
pub fn fetch(version: &str, library: &Path) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let apt = PrivateApt::new(scratch.path(), &Source::of_this_machine()?)?;
    ui::run_quietly(
        "apt-get update (private)",
        apt.command("apt-get").args(["-q", "update"]),
        APT_LIMIT,
    )?;

    let output = apt
        .command("apt-cache")
        .args(["madison", "rust-src"])
        .output()?;
    let listing = String::from_utf8_lossy(&output.stdout);
    let package = matching_version(&listing, version)
        .ok_or_else(|| anyhow!("{SUITE} has no rust-src {version}: {:?}", listing.trim()))?;

    let mut download = apt.command("apt-get");
    download
        .args(["-q", "download", &format!("rust-src={package}")])
        .current_dir(scratch.path());
    ui::run_quietly("downloading rust-src (45 MB)", &mut download, APT_LIMIT)?;

    let deb = fs::read_dir(scratch.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get download left no package")?;
    let tree = scratch.path().join("tree");
    ui::run_quietly(
        "unpacking rust-src",
        Command::new("dpkg-deb").arg("-x").arg(deb).arg(&tree),
        APT_LIMIT,
    )?;
    put_in_place(
        &tree.join(format!("usr/src/rustc-{version}/library")),
        library,
    )
}

/// Copies beside the goal and renames: a copy that was cut short must never look complete.
fn put_in_place(source: &Path, library: &Path) -> Result<()> {
    if !source.is_dir() {
        bail!("the package has no {}", source.display());
    }
    let parent = library
        .parent()
        .context("the library has no parent directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let partial = parent.join("library.partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    // `cp -a` keeps the tree's links; they point inside it.
    ui::run_quietly(
        "copying rust-src",
        Command::new("cp").arg("-a").arg(source).arg(&partial),
        APT_LIMIT,
    )?;
    if library.exists() {
        fs::remove_dir_all(library)?;
    }
    fs::rename(&partial, library)
        .with_context(|| format!("cannot put the library at {}", library.display()))
}

/// Which line of `apt-cache madison` has this rustc: `rust-src | 1.95.0+dfsg1-2~bpo13+1 | …`.
fn matching_version<'a>(listing: &'a str, rustc: &str) -> Option<&'a str> {
    listing
        .lines()
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .find(|package| {
            package
                .strip_prefix(rustc)
                .is_some_and(|rest| rest.starts_with(['+', '-', '~']))
        })
}

/// apt with its own list of sources and its own state, in a temporary directory.
struct PrivateApt {
    options: Vec<String>,
}

impl PrivateApt {
    fn new(folder: &Path, source: &Source) -> Result<Self> {
        let path = |name: &str| folder.join(name).display().to_string();
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let signed_by = source
            .signed_by
            .as_deref()
            .map(|key| format!("[signed-by={key}] "))
            .unwrap_or_default();
        fs::write(
            folder.join("sources.list"),
            format!("deb {signed_by}{} {SUITE} main\n", source.uri),
        )?;
        let settings = [
            ("Dir::Etc::sourcelist", path("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::State::lists", path("lists")),
            ("Dir::Cache", path("cache")),
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        Ok(Self {
            options: settings
                .map(|(key, value)| format!("-o{key}={value}"))
                .to_vec(),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_version_must_be_exactly_rustcs() {
        let listing = " rust-src | 1.95.1+dfsg1-1 | x\n rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m trixie-backports/main\n";
        assert_eq!(
            matching_version(listing, "1.95.0"),
            Some("1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(matching_version(listing, "1.9"), None);
        assert_eq!(matching_version(listing, "1.95"), None);
    }
}
