//! Adds up what test programs write.

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    begun: u64,
    binaries: u64,
    failures: Vec<String>,
}

impl Tally {
    /// Takes a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`, and what comes before it.
    pub fn read(&mut self, line: &str) {
        if line.starts_with("running ") && line.contains(" test") {
            self.begun += 1;
        }
        let failure = line.strip_prefix("test ");
        if let Some(name) = failure.and_then(|line| line.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
        let Some(rest) = line.strip_prefix("test result: ") else {
            return;
        };
        self.binaries += 1;
        for part in rest.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }

    /// Adds what another one has.
    pub fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.begun += other.begun;
        self.binaries += other.binaries;
        self.failures.extend(other.failures.iter().cloned());
    }

    pub fn found_nothing(&self) -> bool {
        self.binaries == 0
    }

    /// How many tests passed.
    pub fn passed(&self) -> u64 {
        self.passed
    }

    /// Names of the tests that failed.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Whether every program that began its tests has told how they went.
    pub fn is_complete(&self) -> bool {
        self.begun == self.binaries && self.failed == self.failures.len() as u64
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} ignored",
            self.passed, self.failed, self.ignored
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_ends_without_a_word_is_noticed() {
        let mut tally = Tally::default();
        tally.read("running 2 tests");
        tally.read("test a::b ... FAILED");
        assert!(!tally.is_complete());
        tally.read("test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured");
        assert!(tally.is_complete());
        assert_eq!(tally.failures(), ["a::b"]);
        tally.read("running 1 test");
        assert!(!tally.is_complete());
    }

    #[test]
    fn result_lines_are_added_up() {
        let mut tally = Tally::default();
        tally.read("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s");
        tally.read("test decide::x ... ok");
        tally.read("test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s");
        assert_eq!(tally.to_string(), "5 passed, 1 failed, 1 ignored");
    }
}
