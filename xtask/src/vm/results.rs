//! What was found on a kernel, kept beside the documentation, where calls on several machines add to it: an emulator takes more
//! than an hour for all tests, and one that was mended should not cost another.

use std::collections::BTreeMap;
use std::fs;
use std::iter::Sum;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use walkdir::WalkDir;

use super::kernel::Kernel;
use super::report::Verdict;
use crate::cargo;
use crate::test::{Skips, Tally};

/// Where they are, a file for each kernel.
const FOLDER: &str = "docs/kernel-support";
/// What `redirect` is made of.
const SOURCES: &[&str] = &[
    "Cargo.lock",
    "redirect-common/Cargo.toml",
    "redirect-common/src",
    "redirect-ebpf/Cargo.toml",
    "redirect-ebpf/src",
    "redirect-user/Cargo.toml",
    "redirect-user/build.rs",
    "redirect-user/src",
];

/// What a test program found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub tally: Tally,
    /// The lines of the tests that were skipped.
    pub skipped: Vec<String>,
    /// Whether those that failed passed when each ran alone.
    #[serde(default)]
    pub passed_alone: bool,
}

impl Found {
    /// Whether something began, and all that began has ended.
    pub fn is_complete(&self) -> bool {
        !self.tally.found_nothing() && self.tally.is_complete()
    }

    fn is_good(&self) -> bool {
        self.is_complete() && (self.passed_alone || self.tally.failures().is_empty())
    }
}

impl<'a> Sum<&'a Self> for Found {
    fn sum<I: Iterator<Item = &'a Self>>(all: I) -> Self {
        let mut sum = Self::default();
        for found in all {
            sum.tally.add(&found.tally);
            sum.skipped.extend(found.skipped.iter().cloned());
        }
        sum
    }
}

/// What test programs found on a kernel, each when it ran last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Results {
    /// As `uname -r` tells it.
    release: String,
    /// SHA-256 of what `redirect` is made of: what was found with another one does not count.
    redirect: String,
    programs: BTreeMap<String, Found>,
}

impl Results {
    /// Those of this kernel and this `redirect`.
    pub fn read(kernel: &Kernel) -> Result<Self> {
        let nothing = Self {
            release: kernel.release().unwrap_or_default(),
            redirect: hash(&cargo::workspace()?.root, SOURCES)?,
            programs: BTreeMap::new(),
        };
        let text = fs::read(path(kernel)?).unwrap_or_default();
        // A file of another version of this program tells nothing.
        let known: Self = serde_json::from_slice(&text).unwrap_or_default();
        let is_of_these =
            (&known.release, &known.redirect) == (&nothing.release, &nothing.redirect);
        Ok(if is_of_these { known } else { nothing })
    }

    /// Enters what was found now; a program that did not end, or skipped what it may not, has no result any more.
    /// Others may have done the same since this was read.
    pub fn update(kernel: &Kernel, found: BTreeMap<String, Found>, skips: &Skips) -> Result<Self> {
        let mut results = Self::read(kernel)?;
        for (name, found) in found {
            if found.is_complete() && found.skipped.iter().all(|line| skips.allows(line)) {
                results.programs.insert(name, found);
            } else {
                results.programs.remove(&name);
            }
        }
        let path = path(kernel)?;
        let text = serde_json::to_string_pretty(&results)? + "\n";
        fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(results)
    }

    /// Whether all tests of this program passed.
    pub fn passed(&self, program: &str) -> bool {
        self.programs.get(program).is_some_and(Found::is_good)
    }

    /// All of it in one.
    pub fn sum(&self) -> Found {
        self.programs.values().sum()
    }

    /// What it is of, if there are `all` of these test programs.
    pub fn of(&self, all: &[String]) -> String {
        if all.iter().all(|name| self.programs.contains_key(name)) {
            "all".to_owned()
        } else {
            format!("{} of {} test programs", self.programs.len(), all.len())
        }
    }

    /// What that makes of the kernel.
    pub fn verdict(&self) -> Verdict {
        let failures = |of: fn(&Found) -> bool| -> Vec<String> {
            let found = self.programs.values().filter(|found| of(found));
            found
                .flat_map(|found| found.tally.failures().iter().cloned())
                .collect()
        };
        let (failed, alone) = (
            failures(|found| !found.passed_alone),
            failures(|found| found.passed_alone),
        );
        if !failed.is_empty() {
            Verdict::Failed(failed.join(", "))
        } else if !alone.is_empty() {
            Verdict::PassedAlone(alone)
        } else {
            Verdict::Passed
        }
    }
}

fn path(kernel: &Kernel) -> Result<PathBuf> {
    let file = format!("{FOLDER}/{}.json", kernel.file_name());
    Ok(cargo::workspace()?.root.join(file))
}

/// SHA-256 of these files' and directories' names and contents, in hexadecimal digits: the same on every machine.
fn hash(root: &Path, sources: &[&str]) -> Result<String> {
    let mut digest = Sha256::new();
    for source in sources {
        for entry in WalkDir::new(root.join(source)).sort_by_file_name() {
            let entry = entry?;
            if !entry.file_type().is_file() {
                continue;
            }
            let name = entry.path().strip_prefix(root)?.display().to_string();
            let content = fs::read(entry.path())?;
            // With lengths, or the end of one could be the beginning of the next.
            digest.update(format!("{name} {}\n", content.len()));
            digest.update(content);
        }
    }
    let digits = digest.finalize();
    Ok(digits.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lines: &[&str], passed_alone: bool) -> Found {
        let mut found = Found {
            passed_alone,
            ..Found::default()
        };
        for line in lines {
            found.tally.read(line);
        }
        found
    }

    fn results(programs: &[(&str, Found)]) -> Results {
        let programs = programs.iter();
        Results {
            programs: programs
                .map(|(name, found)| ((*name).to_owned(), found.clone()))
                .collect(),
            ..Results::default()
        }
    }

    #[test]
    fn hash_is_of_names_and_contents_wherever_they_are() {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for folder in &folders {
            fs::create_dir(folder.path().join("src")).unwrap();
            fs::write(folder.path().join("src/a.rs"), "a").unwrap();
        }
        let [one, other] = folders
            .each_ref()
            .map(|folder| move || hash(folder.path(), &["src"]).unwrap());
        let before = one();
        assert_eq!(before, other());
        fs::write(folders[0].path().join("src/a.rs"), "b").unwrap();
        fs::rename(
            folders[1].path().join("src/a.rs"),
            folders[1].path().join("src/b.rs"),
        )
        .unwrap();
        assert_ne!(one(), before);
        assert_ne!(other(), before);
        assert!(hash(folders[0].path(), &["nothing"]).is_err());
    }

    #[test]
    fn results_of_several_calls_make_one_verdict() {
        let good = found(
            &[
                "running 2 tests",
                "test result: ok. 2 passed; 0 failed; 0 ignored",
            ],
            false,
        );
        let bad = [
            "running 2 tests",
            "test a ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored",
        ];
        let all = ["outbound", "dns"].map(str::to_owned);
        let half = results(&[("outbound", good.clone())]);
        assert!(half.passed("outbound") && !half.passed("dns"));
        assert_eq!(half.of(&all), "1 of 2 test programs");
        assert_eq!(half.verdict(), Verdict::Passed);
        let failed = results(&[("outbound", good.clone()), ("dns", found(&bad, false))]);
        assert!(!failed.passed("dns"));
        assert_eq!(failed.of(&all), "all");
        assert_eq!(failed.verdict(), Verdict::Failed("a".to_owned()));
        assert_eq!(
            failed.sum().tally.to_string(),
            "3 passed, 1 failed, 0 ignored"
        );
        let alone = results(&[("outbound", good), ("dns", found(&bad, true))]);
        assert!(alone.passed("dns"));
        assert_eq!(alone.verdict(), Verdict::PassedAlone(vec!["a".to_owned()]));
        // Broken off.
        let unfinished = results(&[("dns", found(&["running 2 tests"], false))]);
        assert!(!unfinished.passed("dns"));
    }
}
