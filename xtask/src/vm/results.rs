//! What was found on a kernel, kept beside the documentation, where calls on several machines add to it: an emulator takes more
//! than an hour for all tests, and one that was mended should not cost another.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::iter::Sum;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::keep;
use super::kernel::Kernel;
use super::programs::Programs;
use super::report::Verdict;
use crate::cargo;
use crate::test::{Skips, Tally};

/// Where they are, a file for each kernel.
const FOLDER: &str = "docs/kernel-support";

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
    pub fn read(kernel: &Kernel, programs: &Programs) -> Result<Self> {
        let nothing = Self {
            release: kernel.release().unwrap_or_default(),
            redirect: programs.sources.clone(),
            programs: BTreeMap::new(),
        };
        let path = path(kernel)?;
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            other => other.with_context(|| format!("cannot read {}", path.display()))?,
        };
        // A file of another version of this program tells nothing.
        let mut known: Self = serde_json::from_slice(&text).unwrap_or_default();
        known
            .programs
            .retain(|name, _| programs.all_tests.contains(name));
        let is_of_these =
            (&known.release, &known.redirect) == (&nothing.release, &nothing.redirect);
        Ok(if is_of_these { known } else { nothing })
    }

    /// Enters what was found now; a program of which nothing is to be kept, or that skipped what it may not, has no result any
    /// more. Others may have done the same since this was read.
    pub fn update(
        kernel: &Kernel,
        programs: &Programs,
        found: BTreeMap<String, Option<Found>>,
        skips: &Skips,
    ) -> Result<Self> {
        let _lock = keep::lock()?;
        let mut results = Self::read(kernel, programs)?;
        for (name, found) in found {
            match found.filter(|found| skips.forbidden(&found.skipped).is_empty()) {
                Some(found) => results.programs.insert(name, found),
                None => results.programs.remove(&name),
            };
        }
        let text = serde_json::to_string_pretty(&results)? + "\n";
        keep::write(&path(kernel)?, &text)?;
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
