//! What a run came to, as text.

use std::{collections::BTreeMap, fmt};

use super::observe::Line;

/// A difference that nobody has declared deliberate, as small as it could be made.
#[derive(Debug)]
pub struct Difference {
    /// The run's seed and the number of the option set.
    pub seed: u64,
    /// Counted from 0.
    pub set: u64,
    /// The command line and environment of redirect.
    pub options: String,
    /// Where the proxy listens.
    pub proxy: String,
    /// The connection, in words.
    pub attempt: String,
    /// Both pods, line by line.
    pub lines: Vec<Line>,
    /// The names of the lines that disagree, and are not known to.
    pub unknown: Vec<&'static str>,
    /// What it looked like as found, and when it was made small; others that look like this are counted only.
    pub looks: Vec<Vec<String>>,
    /// How many attempts of the run showed the same lines.
    pub seen: u64,
    /// It was there once, but not when the attempt was made again.
    pub unsteady: bool,
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Attempts made in both pods.
    pub attempts: u64,
    /// Option sets they were made under.
    pub sets: u64,
    /// Attempts with deliberate differences, by the difference's name.
    pub known: BTreeMap<&'static str, u64>,
    /// Who answered in the iptables pod, or which error came.
    pub outcomes: BTreeMap<String, u64>,
    /// What is left.
    pub differences: Vec<Difference>,
}

impl Report {
    /// Whether both pods always did the same, but for deliberate differences.
    pub fn agrees(&self) -> bool {
        self.differences.is_empty()
    }

    /// Counts a difference that looks like one that is reported. False if none does.
    pub(super) fn count_again(&mut self, looks: &Vec<String>) -> bool {
        let known = self
            .differences
            .iter_mut()
            .find(|difference| difference.looks.contains(looks));
        known.map(|difference| difference.seen += 1).is_some()
    }

    /// The same for one that has been made small: from now on, what it looked like before is recognised too.
    pub(super) fn merge(&mut self, looks: &[String], small: &Vec<String>) -> bool {
        let merged = self.count_again(small);
        if merged
            && let Some(difference) = self
                .differences
                .iter_mut()
                .find(|difference| difference.looks.contains(small))
        {
            difference.looks.push(looks.to_vec());
        }
        merged
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for difference in &self.differences {
            writeln!(f, "{difference}")?;
        }
        writeln!(
            f,
            "{} attempts under {} option sets",
            self.attempts, self.sets
        )?;
        writeln!(f, "\nwho answered, or the error")?;
        counts(
            f,
            self.outcomes
                .iter()
                .map(|(name, count)| (name.as_str(), *count)),
        )?;
        writeln!(f, "\ndeliberate differences (docs/behaviour.md)")?;
        counts(f, self.known.iter().map(|(name, count)| (*name, *count)))?;
        writeln!(f, "\nother differences: {}", self.differences.len())
    }
}

fn counts<'a>(
    f: &mut fmt::Formatter<'_>,
    counts: impl Iterator<Item = (&'a str, u64)>,
) -> fmt::Result {
    for (name, count) in counts {
        writeln!(f, "  {count:>7}  {name}")?;
    }
    Ok(())
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steadiness = if self.unsteady {
            ", not seen again when repeated"
        } else {
            ""
        };
        writeln!(
            f,
            "difference in {} attempts (seed {}, option set {}{steadiness}): {}",
            self.seen,
            self.seed,
            self.set,
            self.unknown.join("; ")
        )?;
        writeln!(f, "  options  {}", self.options)?;
        writeln!(f, "  proxy    {}", self.proxy)?;
        writeln!(f, "  attempt  {}", self.attempt)?;
        let rows: Vec<[&str; 3]> = std::iter::once(["", "iptables", "redirect"])
            .chain(
                self.lines
                    .iter()
                    .map(|line| [line.what, line.iptables.as_str(), line.redirect.as_str()]),
            )
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        for row in &rows {
            let [what, iptables, redirect] = row;
            let mark = if self.unknown.contains(what) {
                '>'
            } else {
                ' '
            };
            let text = format!("  {mark} {what:<first$}  {iptables:<second$}  {redirect}");
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}
