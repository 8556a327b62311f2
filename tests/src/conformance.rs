//! The differential test: random options and connections, in two pods alike but for who captures.
//!
//! One pod is captured by redirect, the other by the rules that istio-iptables writes for the same options. The same
//! connection is made in both, and everything that either end can see of it is compared. Where the pods disagree, and
//! the difference is none of those in [`known`], connection and options are made as small as they can be
//! while the pods still disagree.
//!
//! Whatever is random comes from the seed and the number of the option set, so that one set can be had again alone.

pub mod attempt;
pub mod known;
pub mod observe;
pub mod place;
pub mod report;
pub mod setting;
pub mod world;

use std::{
    ops::ControlFlow,
    slice,
    time::{Duration, Instant},
};

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::{iptables::Variant, options::Options, patience::patience, protocol::Transport};
use attempt::{Attempt, attempts};
use known::{Case, known};
use observe::{Line, OUTCOME};
use report::{Difference, Repeats, Report};
use setting::{Setting, settings};
use world::World;

/// After so many option sets the pods are made anew, with the other variant of iptables.
const SETS_PER_WORLD: u64 = 40;
/// How long one difference may be shrunk.
const SHRINKING: Duration = Duration::from_secs(60);
/// A run ends after so many different differences.
const ENOUGH: usize = 12;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything random comes from here.
    pub seed: u64,
    /// The first option set; those before are left out.
    pub first_set: u64,
    /// Only this attempt of each option set, counted from 0.
    pub only: Option<usize>,
    /// How many attempts are made in all.
    pub attempts: u64,
    /// How many of them under each option set.
    pub attempts_per_set: u64,
    /// The variants of iptables to compare with, in turn.
    pub variants: Vec<Variant>,
    /// What the redirect pod is given in place of the options. Anything but the same has to be noticed.
    pub distortion: fn(Options) -> Options,
}

impl Plan {
    /// That many attempts, by both variants of iptables.
    pub fn new(seed: u64, attempts: u64) -> Self {
        Self {
            seed,
            first_set: 0,
            only: None,
            attempts,
            attempts_per_set: 50,
            variants: vec![Variant::Nft, Variant::Legacy],
            distortion: |options| options,
        }
    }

    /// The command that runs it, but for the distortion.
    pub fn command(&self) -> String {
        let Self {
            seed,
            first_set,
            attempts,
            ..
        } = self;
        let iptables = match self.variants[..] {
            [only] => format!(" --iptables {}", only.name()),
            _ => String::new(),
        };
        let count = match self.only {
            Some(only) => format!("--attempt {only}"),
            None => format!("--attempts {attempts}"),
        };
        format!("cargo xtask conformance --seed {seed}{iptables} --first-set {first_set} {count}")
    }
}

/// What is told while a plan runs.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// One more difference, as small as it could be made.
    Found(&'a Difference),
    /// An option set is done; the report so far.
    SetDone(&'a Report),
}

/// Whoever is told, and may end the run.
pub type Tell<'a> = dyn FnMut(News<'_>) -> ControlFlow<()> + 'a;

/// Runs a plan.
pub fn run(plan: &Plan, tell: &mut Tell<'_>) -> Report {
    let mut report = Report::default();
    let mut world: Option<World> = None;
    for set in plan.first_set.. {
        if report.attempts >= plan.attempts || report.differences.len() >= ENOUGH {
            break;
        }
        if set % SETS_PER_WORLD == 0 {
            world = None;
        }
        let world = world.get_or_insert_with(|| {
            let turn = usize::try_from(set / SETS_PER_WORLD).unwrap() % plan.variants.len();
            World::new(plan.variants[turn], plan.distortion)
        });
        let mut run = || {
            run_set(plan, set, world, &mut report, tell)?;
            tell(News::SetDone(&report))
        };
        if run().is_break() {
            break;
        }
    }
    report
}

fn run_set(
    plan: &Plan,
    set: u64,
    world: &mut World,
    report: &mut Report,
    tell: &mut Tell<'_>,
) -> ControlFlow<()> {
    // A tree that has been shrunk cannot be had back, but made again.
    let setting_tree = || settings().new_tree(&mut runner(plan.seed, set)).unwrap();
    let setting = setting_tree().current();
    let strategy = attempts(&setting);
    let mut runner = runner(plan.seed, set);
    let left = plan.attempts - report.attempts;
    let all = usize::try_from(left.min(plan.attempts_per_set)).unwrap();
    let (first, count) = plan.only.map_or((0, all), |only| (only, 1));
    // Those before are drawn too: each takes its share of what is random.
    let mut trees: Vec<_> = (0..first + count)
        .map(|_| strategy.new_tree(&mut runner).unwrap())
        .collect();
    let mut trees = trees.split_off(first);
    let made: Vec<Attempt> = trees.iter().map(ValueTree::current).collect();
    let results = world.play(&setting, &made);
    report.sets += 1;
    let mut found = Vec::new();
    for (index, lines) in results.into_iter().enumerate() {
        report.attempts += 1;
        count_outcome(report, &made[index], &lines);
        let sorted = sort(&setting, &made[index], &lines);
        for name in &sorted.known {
            *report.known.entry(name).or_default() += 1;
        }
        if !sorted.unknown.is_empty() {
            // Before anything is shrunk, since that takes other settings.
            let at_once = disagreement(&setting, &made[index], world.repeat(&made[index]));
            found.push((index, lines, sorted, at_once.is_some()));
        }
    }
    for (index, lines, sorted, at_once) in found {
        // What shows in the same way is most likely the same, and is shrunk once.
        let looks = looks(&lines, &sorted.unknown);
        if report.count_again(&looks) {
            continue;
        }
        let small = shrink(world, setting_tree(), &mut trees[index]);
        let repeats = match small {
            Some(_) => Repeats::Alone,
            None if at_once => Repeats::AtOnce,
            None => Repeats::Never,
        };
        let (setting, attempt, lines) =
            small.unwrap_or_else(|| (setting, made[index].clone(), lines));
        let unknown = sort(&setting, &attempt, &lines).unknown;
        let small = self::looks(&lines, &unknown);
        if report.merge(&looks, &small) {
            continue;
        }
        report.differences.push(Difference {
            looks: vec![looks, small],
            again: again(plan, set, first + index, world.variant(), repeats),
            words: attempt.words(world.pod()),
            setting,
            attempt,
            unknown,
            lines,
            seen: 1,
            repeats,
        });
        tell(News::Found(
            &report.differences[report.differences.len() - 1],
        ))?;
    }
    ControlFlow::Continue(())
}

/// What makes an attempt again: alone if that shows the difference, else with all that was done to its pods before.
fn again(plan: &Plan, set: u64, attempt: usize, variant: Variant, repeats: Repeats) -> Plan {
    let alone = repeats == Repeats::Alone || plan.only.is_some();
    let first_set = if alone {
        set
    } else {
        plan.first_set.max(set - set % SETS_PER_WORLD)
    };
    Plan {
        first_set,
        only: alone.then_some(attempt),
        attempts: if alone {
            1
        } else {
            (set - first_set + 1) * plan.attempts_per_set
        },
        variants: vec![variant],
        ..plan.clone()
    }
}

fn runner(seed: u64, set: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&set.to_le_bytes());
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

fn count_outcome(report: &mut Report, attempt: &Attempt, lines: &[Line]) {
    let protocol = if attempt.transport == Transport::Tcp {
        "TCP"
    } else {
        "UDP"
    };
    let outcome = lines.iter().find(|line| line.what == OUTCOME);
    let outcome = outcome.map_or("", |line| line.iptables.as_str());
    *report
        .outcomes
        .entry(format!("{protocol} {outcome}"))
        .or_default() += 1;
}

/// The lines that disagree: names of deliberate differences, and of lines that none of them accounts for.
#[derive(Default)]
struct Sorted {
    known: Vec<&'static str>,
    unknown: Vec<&'static str>,
}

fn sort(setting: &Setting, attempt: &Attempt, lines: &[Line]) -> Sorted {
    let mut sorted = Sorted::default();
    let case = Case {
        setting,
        attempt,
        lines,
    };
    for line in lines.iter().filter(|line| line.differs()) {
        match known(case, line) {
            Some(known) if sorted.known.contains(&known.name) => (),
            Some(known) => sorted.known.push(known.name),
            None => sorted.unknown.push(line.what),
        }
    }
    sorted
}

/// What a difference looks like: addresses aside, so that it can be recognised.
fn looks(lines: &[Line], unknown: &[&str]) -> Vec<String> {
    let kind = |value: &str| {
        if value.contains(':') {
            "an address".to_owned()
        } else {
            value.to_owned()
        }
    };
    let lines = lines.iter().filter(|line| unknown.contains(&line.what));
    lines
        .map(|line| {
            format!(
                "{} ({} with iptables, {} with redirect)",
                line.what,
                kind(&line.iptables),
                kind(&line.redirect)
            )
        })
        .collect()
}

/// Makes attempt and setting smaller while the pods still disagree. `None` if they do not disagree again.
fn shrink(
    world: &mut World,
    mut setting: impl ValueTree<Value = Setting>,
    attempt: &mut impl ValueTree<Value = Attempt>,
) -> Option<(Setting, Attempt, Vec<Line>)> {
    let deadline = Instant::now() + patience(SHRINKING);
    // Detached before, so that nothing is left of the sets before.
    let fresh = |setting: &Setting| Setting {
        fresh: true,
        ..*setting
    };
    let alone = |world: &mut World, setting: &Setting, attempt: &Attempt| {
        let lines = world.play(setting, slice::from_ref(attempt)).swap_remove(0);
        disagreement(setting, attempt, lines)
    };
    let (mut setting_now, mut attempt_now) = (fresh(&setting.current()), attempt.current());
    let mut lines = alone(world, &setting_now, &attempt_now)?;
    // The attempt first: another one under the same options costs little.
    descend(attempt, deadline, |smaller| {
        let found = if smaller.before {
            alone(world, &setting_now, smaller)
        } else {
            disagreement(&setting_now, smaller, world.repeat(smaller))
        };
        found
            .map(|found| (attempt_now, lines) = (smaller.clone(), found))
            .is_some()
    });
    descend(&mut setting, deadline, |smaller| {
        let smaller = fresh(smaller);
        let found = alone(world, &smaller, &attempt_now);
        found
            .map(|found| (setting_now, lines) = (smaller, found))
            .is_some()
    });
    Some((setting_now, attempt_now, lines))
}

/// The lines, if any of them is an unknown difference.
fn disagreement(setting: &Setting, attempt: &Attempt, lines: Vec<Line>) -> Option<Vec<Line>> {
    (!sort(setting, attempt, &lines).unknown.is_empty()).then_some(lines)
}

/// Walks a tree down towards the smallest value for which `fails` holds.
fn descend<T: ValueTree>(
    tree: &mut T,
    deadline: Instant,
    mut fails: impl FnMut(&T::Value) -> bool,
) {
    let mut more = tree.simplify();
    while more && Instant::now() < deadline {
        more = if fails(&tree.current()) {
            tree.simplify()
        } else {
            tree.complicate()
        };
    }
}
