//! Tests that could not run here. A skip nobody allowed is a failure: silence must not look like success.
//!
//! A test that skips appends one line `SKIP <test>: <what the probe found>` to the file named by `REDIRECT_SKIP_LOG`.
//! `tests/allowed-skips.txt` lists test names, one a line, `#` starts a comment.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

pub const LOG_VARIABLE: &str = "REDIRECT_SKIP_LOG";
/// Begins each line.
pub const LINE_START: &str = "SKIP ";
pub const ALLOWED_FILE: &str = "tests/allowed-skips.txt";

pub struct Skips {
    log: NamedTempFile,
    allowed: BTreeSet<String>,
}

impl Skips {
    pub fn new(root: &Path) -> Result<Self> {
        let file: PathBuf = root.join(ALLOWED_FILE);
        let text = match fs::read_to_string(&file) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            other => other.with_context(|| format!("cannot read {}", file.display()))?,
        };
        Ok(Self {
            log: NamedTempFile::new()?,
            allowed: allowed(&text),
        })
    }

    pub fn log(&self) -> &Path {
        self.log.path()
    }

    /// The lines of allowed and of forbidden skips.
    pub fn collect(&self) -> Result<(Vec<String>, Vec<String>)> {
        let text = fs::read_to_string(self.log.path()).context("cannot read the log of skips")?;
        let lines = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(str::to_owned);
        Ok(lines.partition(|line| self.allows(line)))
    }

    /// Those of the lines that are about tests that may not be skipped.
    pub fn forbidden<'a>(&self, lines: &'a [String]) -> Vec<&'a str> {
        let lines = lines.iter().map(String::as_str);
        lines.filter(|line| !self.allows(line)).collect()
    }

    /// Whether the test that a line of the log is about may be skipped.
    fn allows(&self, line: &str) -> bool {
        self.allowed.contains(test_name(line))
    }
}

fn allowed(text: &str) -> BTreeSet<String> {
    let names = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim());
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// `SKIP a::b::c: no kprobes` is about `a::b::c`: the name ends at the first colon followed by a blank.
fn test_name(line: &str) -> &str {
    let line = line.strip_prefix(LINE_START).unwrap_or(line);
    line.split_once(": ").map_or(line, |(name, _)| name).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_line_names_its_test() {
        assert_eq!(test_name("SKIP inbound::v6: no sk_lookup"), "inbound::v6");
        assert_eq!(test_name("SKIP alone"), "alone");
    }

    #[test]
    fn allowed_list_ignores_comments_and_blanks() {
        let names = allowed("# why\n\ninbound::v6   # old kernels\n");
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["inbound::v6"]);
    }
}
