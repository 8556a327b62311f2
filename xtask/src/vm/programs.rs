//! What is built here and run there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use tempfile::TempDir;

use super::image::Image;
use super::sources;
use crate::{cargo, setup, ui};

/// Where the guest has the tests; they look for the programs they call in the directories above.
pub const TESTS: &str = "/vm/deps";
const REDIRECT: &str = "redirect";
const PROGRAMS: &[&str] = &[REDIRECT, "actor"];
/// This program, as the guest's first process.
const INIT: &str = "xtask";
/// What tests read of the workspace, at the same path as here.
const FOLDERS: &[&str] = &["deploy", "docs", "tests/src/conformance/resolv"];
/// These ask nothing of the kernel that others do not ask, and need what a guest does not have: Helm, kubectl, the image, and for a
/// container runtime's time limits a processor.
const NOT_FOR_GUESTS: &[&str] = &["chart", "cni_containerd", "daemon_set"];
/// It has some size: only for the tests of this name.
const ENVOY: &str = "envoy";

/// One of cargo's messages, as far as it is of use here.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// What was built, copied: so that every guest of a call runs the same, whatever is built meanwhile.
pub struct Programs {
    folder: TempDir,
    /// SHA-256 of the sources that `redirect` was built of: they may change while guests run.
    pub sources: String,
    /// Names of the test programs.
    pub tests: Vec<String>,
    /// Names of all there are, wanted or not.
    pub all_tests: Vec<String>,
}

impl Programs {
    /// Builds redirect, and all kernel-level tests if wanted.
    pub fn build(with_tests: bool) -> Result<Self> {
        if with_tests {
            Self::build_with_tests(&[])
        } else {
            Self::build_redirect()
        }
    }

    fn build_redirect() -> Result<Self> {
        let sources = sources::hash()?;
        cargo::build(false)?;
        let programs = Self {
            folder: folder()?,
            sources,
            tests: Vec::new(),
            all_tests: Vec::new(),
        };
        let redirect = cargo::built_binary(false)?;
        for name in PROGRAMS {
            programs.take(&redirect.with_file_name(name), name)?;
        }
        programs.take(&std::env::current_exe()?, INIT)?;
        Ok(programs)
    }

    /// The same, with those of the kernel-level tests that are wanted; all, if none is named.
    pub fn build_with_tests(wanted: &[String]) -> Result<Self> {
        let mut programs = Self::build_redirect()?;
        let mut command = cargo::build_other_layout()?;
        ui::command(&command);
        if !command.status().context("cannot run cargo")?.success() {
            bail!("{} does not build", cargo::OTHER_LAYOUT);
        }
        let other = cargo::built_binary(false)?.with_file_name(cargo::OTHER_LAYOUT);
        programs.take(&other, cargo::OTHER_LAYOUT)?;
        let mut command = cargo::at_root()?;
        command.args(["test", "--no-run", "--package=redirect-tests"]);
        ui::command(&command);
        command.arg("--message-format=json-render-diagnostics");
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        if !output.status.success() {
            bail!("the tests do not build ({})", output.status);
        }
        let mut tests = tests(&String::from_utf8_lossy(&output.stdout));
        // Cargo tells them in the order in which they were built.
        tests.sort();
        let is_one = |name: &&String| tests.iter().all(|(test, _)| test != *name);
        if let Some(unknown) = wanted.iter().find(is_one) {
            let names: Vec<&str> = tests.iter().map(|(name, _)| name.as_str()).collect();
            bail!("--test {unknown}: allowed are {}", names.join(", "));
        }
        programs.all_tests = tests.iter().map(|(name, _)| name.clone()).collect();
        for (name, path) in tests {
            if wanted.is_empty() || wanted.contains(&name) {
                programs.take(&path, &name)?;
                programs.tests.push(name);
            }
        }
        Ok(programs)
    }

    /// Without symbols: all of it stays in the guest's memory.
    fn take(&self, program: &Path, name: &str) -> Result<()> {
        cargo::strip(program, &self.folder.path().join(name))
    }

    /// Adds them to a guest's files.
    pub fn add_to(&self, image: &mut Image) -> Result<()> {
        let here = |name: &str| self.folder.path().join(name);
        image.add_as(&here(INIT), "/xtask")?;
        image.add_as(&here(REDIRECT), "/usr/bin/redirect")?;
        for name in &self.tests {
            image.add_as(&here(name), &format!("{TESTS}/{name}"))?;
        }
        if !self.tests.is_empty() {
            for name in PROGRAMS.iter().chain([&cargo::OTHER_LAYOUT]) {
                image.add_as(&here(name), &format!("/vm/{name}"))?;
            }
            for folder in FOLDERS {
                image.add_folder(&cargo::workspace()?.root.join(folder))?;
            }
            // If it is missing, its tests are skipped, which is told.
            let envoy = setup::envoy_binary()?;
            if envoy.is_file() && self.tests.iter().any(|name| name == ENVOY) {
                image.add_as(&envoy, "/vm/envoy/envoy")?;
            }
        }
        Ok(())
    }
}

/// A directory named after this process, which goes with the value. Those of others that were killed are removed.
fn folder() -> Result<TempDir> {
    const PREFIX: &str = "programs-";
    let parent = super::folder()?;
    for entry in fs::read_dir(&parent)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-'));
        if let Some((pid, _)) = pid
            && !Path::new("/proc").join(pid).exists()
        {
            // Another call may be removing it too.
            fs::remove_dir_all(entry.path()).ok();
        }
    }
    let prefix = format!("{PREFIX}{}-", process::id());
    let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
    folder.context("cannot make a directory for programs")
}

/// Names and paths of the test programs among what cargo has built.
fn tests(messages: &str) -> Vec<(String, PathBuf)> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| message.profile.as_ref().is_some_and(|profile| profile.test))
        .filter_map(|message| {
            let target = message.target?;
            // The library's and the actor's own tests need no kernel.
            let wanted = target.kind.iter().any(|kind| kind == "test")
                && !NOT_FOR_GUESTS.contains(&target.name.as_str());
            wanted.then_some((target.name, message.executable?))
        })
        .collect()
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn test_programs_are_taken_from_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"outbound","kind":["test"]},"profile":{"test":true},"executable":"/t/outbound-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"chart","kind":["test"]},"profile":{"test":true},"executable":"/t/chart-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"actor","kind":["bin"]},"profile":{"test":false},"executable":"/t/actor"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"redirect_tests","kind":["lib"]},"profile":{"test":true},"executable":"/t/lib-2"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let wanted = vec![("outbound".to_owned(), PathBuf::from("/t/outbound-1"))];
        assert_eq!(tests(messages), wanted);
    }
}
