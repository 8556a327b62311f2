//! Debian packages of any suite, fetched without touching the machine's own apt configuration or state.

mod archive;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::ui;
use archive::Source;

const APT_LIMIT: Duration = Duration::from_secs(180);

/// apt with its own list of sources and its own state, in a directory that is removed with this value.
pub struct PrivateApt {
    folder: tempfile::TempDir,
    suite: &'static str,
    options: Vec<String>,
}

impl PrivateApt {
    /// Reads the index of one suite, from the archive that this machine uses.
    pub fn of_suite(suite: &'static str) -> Result<Self> {
        let source = Source::of_this_machine()?;
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.path().join(name))?;
        }
        let signed_by = source
            .signed_by
            .as_deref()
            .map(|key| format!("[signed-by={key}] "))
            .unwrap_or_default();
        fs::write(
            folder.path().join("sources.list"),
            format!("deb {signed_by}{} {suite} main\n", source.uri),
        )?;
        let settings = [
            ("Dir::Etc::sourcelist", path("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".to_owned()),
            ("Dir::State::lists", path("lists")),
            // What is installed here is not what the suite has.
            ("Dir::State::status", "/dev/null".to_owned()),
            ("Dir::Cache", path("cache")),
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        let options = settings
            .map(|(key, value)| format!("-o{key}={value}"))
            .to_vec();
        let apt = Self {
            folder,
            suite,
            options,
        };
        ui::run_quietly(
            &format!("reading the index of Debian {suite}"),
            apt.command("apt-get").args(["-q", "update"]),
            APT_LIMIT,
        )?;
        Ok(apt)
    }

    /// The suite's name.
    pub fn suite(&self) -> &'static str {
        self.suite
    }

    /// What `apt-cache` answers about this suite.
    pub fn cache(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command("apt-cache");
        let output = command.args(arguments).output()?;
        if !output.status.success() {
            bail!(
                "`{}` failed ({}): {}",
                ui::describe(&command),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Downloads a package, `NAME` or `NAME=VERSION`, and unpacks it; answers with the tree, which is the same for all.
    pub fn fetch(&self, package: &str) -> Result<PathBuf> {
        let mut download = self.command("apt-get");
        download
            .args(["-q", "download", package])
            .current_dir(self.folder.path());
        ui::run_quietly(&format!("downloading {package}"), &mut download, APT_LIMIT)?;
        let deb = fs::read_dir(self.folder.path())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
            .context("apt-get download left no package")?;
        let tree = self.folder.path().join("tree");
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(&deb).arg(&tree);
        ui::run_quietly(&format!("unpacking {package}"), &mut unpack, APT_LIMIT)?;
        // So that the next one is the only one again.
        fs::remove_file(deb)?;
        Ok(tree)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }
}

/// Copies beside the goal and renames: a copy that was cut short must never look complete.
pub fn put_in_place(source: &Path, goal: &Path) -> Result<()> {
    let parent = goal.parent().context("the goal has no parent directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let partial = goal.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    // `cp -a` keeps the tree's links.
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(source).arg(&partial);
    ui::run_quietly(
        &format!("copying to {}", goal.display()),
        &mut copy,
        APT_LIMIT,
    )?;
    if goal.exists() {
        fs::remove_dir_all(goal)?;
    }
    fs::rename(&partial, goal).with_context(|| format!("cannot make {}", goal.display()))
}
