//! What a run came to, as text.

use std::{collections::BTreeMap, fmt};

use super::{
    Plan,
    attempt::Attempt,
    known::KNOWN,
    observe::{LATER_ECHO, Line, OUTCOME},
    setting::Setting,
};
use crate::options::Options;

/// One attempt of so many may go wrong for reasons of time.
const UNSTEADY: u64 = 500;

/// A difference that nobody has declared deliberate, as small as it could be made.
#[derive(Debug)]
pub struct Difference {
    /// What makes the attempt again, and finds this.
    pub again: Plan,
    /// The pods' options and proxy.
    pub setting: Setting,
    /// The connection.
    pub attempt: Attempt,
    /// The same in words.
    pub words: String,
    /// Both pods, line by line.
    pub lines: Vec<Line>,
    /// The names of the lines that disagree, and are not known to.
    pub unknown: Vec<&'static str>,
    /// What it looked like as found, and when it was made small; others that look like this are counted only.
    pub looks: Vec<Vec<String>>,
    /// How many attempts of the run showed the same lines.
    pub seen: u64,
    /// When it was there again.
    pub repeats: Repeats,
}

/// Whether a difference is there again when the attempt is made again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Repeats {
    /// Also alone, in pods attached anew.
    Alone,
    /// Only at once, with all that came before.
    AtOnce,
    /// Not at all: perhaps the machine was too busy.
    Never,
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Attempts made in both pods.
    pub attempts: u64,
    /// Option sets they were made under.
    pub sets: u64,
    /// Attempts with known differences, by the difference's name.
    pub known: BTreeMap<&'static str, u64>,
    /// Who answered in the iptables pod, or which error came.
    pub outcomes: BTreeMap<String, u64>,
    /// What is left.
    pub differences: Vec<Difference>,
}

impl Report {
    /// Whether both pods did the same, but for known differences and a few answers that came too late: a busy machine
    /// makes these.
    pub fn agrees(&self) -> bool {
        let (late, others): (Vec<_>, Vec<_>) = self
            .differences
            .iter()
            .partition(|difference| difference.is_late());
        let late: u64 = late.iter().map(|difference| difference.seen).sum();
        others.is_empty() && late * UNSTEADY <= self.attempts
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

impl Report {
    /// The report without the details of each difference.
    pub fn summary(&self) -> impl fmt::Display {
        fmt::from_fn(|f| self.summarize(f))
    }

    fn summarize(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        writeln!(f, "\nknown differences (docs/behaviour.md)")?;
        let known = KNOWN.iter().map(|known| known.name);
        counts(
            f,
            known.map(|name| (name, self.known.get(name).copied().unwrap_or_default())),
        )?;
        writeln!(f, "\nother differences: {}", self.differences.len())?;
        for difference in &self.differences {
            let (seen, what) = (difference.seen, difference.title());
            writeln!(
                f,
                "  {seen:>7}  {what}\n           {}",
                difference.again.command()
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for difference in &self.differences {
            writeln!(f, "{difference}")?;
        }
        self.summarize(f)
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

impl Difference {
    /// Whether all there is to it is that somebody waited in vain, once.
    fn is_late(&self) -> bool {
        let waited = |line: &Line| {
            [&line.iptables, &line.redirect]
                .iter()
                .any(|seen| *seen == "TimedOut" || seen.ends_with("EAGAIN"))
        };
        let ends = [OUTCOME, LATER_ECHO];
        let mut lines = self.lines.iter();
        self.repeats == Repeats::Never
            && lines.any(|line| ends.contains(&line.what) && line.differs() && waited(line))
    }

    /// Which lines disagree, and whether it was seen again.
    fn title(&self) -> String {
        let steadiness = match self.repeats {
            Repeats::Alone => "",
            Repeats::AtOnce => " (only after the attempts before it)",
            Repeats::Never => " (not seen again when repeated)",
        };
        format!("{}{steadiness}", self.unknown.join("; "))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "difference: {}", self.title())?;
        writeln!(f, "  again    {}", self.again.command())?;
        let Setting {
            options,
            proxy,
            agent,
            late,
            ..
        } = &self.setting;
        writeln!(f, "  options  {}", command_line(options))?;
        let when = if *late { ", only after attach" } else { "" };
        writeln!(f, "  proxy    listens on {}{when}", proxy.words())?;
        writeln!(f, "  agent    listens on {}{when}", agent.words())?;
        writeln!(f, "  attempt  {}", self.words)?;
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

/// The options as they are typed.
fn command_line(options: &Options) -> String {
    let quoted = |word: &str| {
        if word.is_empty() || word.contains(['*', ' ']) {
            format!("'{word}'")
        } else {
            word.to_owned()
        }
    };
    let environment = options.environment();
    let environment = environment
        .iter()
        .map(|(name, value)| format!("{name}={}", quoted(value)));
    let arguments = options.arguments();
    let arguments = arguments.iter().map(|word| quoted(word));
    environment
        .chain(["redirect attach".to_owned()])
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}
