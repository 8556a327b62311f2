//! Hours of load: connections of every kind, and many that are held, while pods are attached, detached, upgraded and
//! given other policies, while loaders are killed and the proxy is restarted, all of it at random.
//!
//! A run is a sequence of rounds. In each one all processes make their calls while the events drawn for it happen; then
//! everything rests, and is looked at: every connection has to have ended where the policy of that moment sends it, the
//! connections held have to be alive, the counters have to add up, and nothing may be left behind. Whatever is random
//! comes from the seed and the number of the round.

pub mod cast;
pub mod draw;
pub mod event;
pub mod history;
pub mod leaks;
pub mod policy;
pub mod report;
mod rest;
pub mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    thread,
    time::{Duration, Instant},
};

use crate::{
    bpffs,
    loader::OtherBuild,
    options::Options,
    play::{Call, Ends, Part, Play, Played, Then},
    protocol::{Answer, Request},
};
use cast::{Cast, Note};
use draw::{Calls, Drawn, Event, Kind, Round, Size, chosen};
use leaks::Kernel;
use policy::{CLOSED, Caller, ROUTES};
use report::Report;
use verdict::{Tally, judge};

/// Callers of one process that make short calls, and that converse.
const CALLERS: (usize, usize) = (4, 6);
/// How long a caller rests after a short call, in microseconds.
const REST_US: u64 = 8_000;
/// Callers that open connections to be held.
const HOLDING: usize = 8;
/// Of the connections to be held, one in so many is made before the pod is attached.
const BEFORE: usize = 10;
/// Of the connections held, one in so many is renewed in a round.
const RENEWED: usize = 50;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Everything random comes from here.
    pub seed: u64,
    /// How long.
    pub time: Duration,
    /// How many connections are held, in all pods together.
    pub held: usize,
    /// How many pods there are.
    pub pods: usize,
    /// Length of a round, in milliseconds.
    pub round_ms: u64,
    /// Nothing happens to the pods once they are attached.
    pub calm: bool,
    /// What the loader is given in place of a policy's options. Anything but the same has to be noticed.
    pub distortion: fn(Options) -> Options,
    /// Done to each pod in the middle of each round but the first two, without the check's knowledge. It has to be noticed.
    pub meddle: fn(&mut Cast),
}

impl Plan {
    /// A run of that length.
    pub fn new(seed: u64, time: Duration) -> Self {
        Self {
            seed,
            time,
            held: 10_000,
            pods: 2,
            round_ms: 5_000,
            calm: false,
            distortion: |options| options,
            meddle: |_| (),
        }
    }

    fn size(&self) -> Size {
        Size {
            pods: self.pods,
            round_ms: self.round_ms,
            renewed: self.held / self.pods / RENEWED,
        }
    }

    fn command(&self) -> String {
        format!(
            "cargo xtask soak --seed {} --minutes {} --held {} --pods {}",
            self.seed,
            self.time.as_secs().div_ceil(60),
            self.held,
            self.pods
        )
    }
}

/// Runs a plan, in a BPF file system of its own. `progress` sees the report after each round, and may end the run.
pub fn run(plan: &Plan, progress: &mut (dyn FnMut(&Report) -> ControlFlow<()> + Send)) -> Report {
    let other = OtherBuild::new();
    bpffs::private(|| Soak::new(plan, &other).run(progress))
}

struct Soak<'a> {
    plan: &'a Plan,
    other: &'a OtherBuild,
    casts: Vec<Cast>,
    tallies: Vec<Tally>,
    /// The attachment whose counters were looked at last, and what they said.
    counters: Vec<Option<(u32, BTreeMap<String, u64>)>>,
    kernel: Kernel,
    report: Report,
    begun: Instant,
}

impl<'a> Soak<'a> {
    fn new(plan: &'a Plan, other: &'a OtherBuild) -> Self {
        let begun = Instant::now();
        Self {
            plan,
            other,
            casts: (0..plan.pods).map(|_| Cast::new()).collect(),
            tallies: vec![Tally::default(); plan.pods],
            counters: vec![None; plan.pods],
            kernel: Kernel::default(),
            report: Report {
                seed: plan.seed,
                command: plan.command(),
                ..Report::default()
            },
            begun,
        }
    }

    fn run(mut self, progress: &mut dyn FnMut(&Report) -> ControlFlow<()>) -> Report {
        loop {
            let number = self.report.rounds;
            let mut round = Round::draw(self.plan.seed, number, self.plan.size());
            if self.plan.calm {
                round.events.clear();
            }
            match number {
                // Negative control: every connection ends where it was sent.
                0 => round.events.clear(),
                1 => round
                    .events
                    .splice(0..0, self.everywhere(ATTACH))
                    .for_each(drop),
                _ => (),
            }
            self.round(&round);
            self.report.took = self.begun.elapsed();
            let go_on = progress(&self.report).is_continue();
            let enough = self.report.took > self.plan.time && self.report.rounds > 2;
            if enough || !go_on || self.report.is_enough() {
                break;
            }
        }
        self.end();
        self.report.took = self.begun.elapsed();
        self.report
    }

    fn everywhere(&self, kind: Kind) -> Vec<Event> {
        let event = |pod| Event {
            at_ms: 0,
            pod,
            kind,
        };
        (0..self.plan.pods).map(event).collect()
    }

    /// One round, and then rest.
    fn round(&mut self, round: &Round) {
        self.renew(round);
        self.play(round);
        self.rest();
        self.report.rounds += 1;
    }

    /// Closes some of the connections held, and opens as many as are missing.
    fn renew(&mut self, round: &Round) {
        let share = self.plan.held / self.plan.pods;
        // The first round is not attached, and the second one becomes so.
        let target = if self.report.rounds < 2 {
            share / BEFORE
        } else {
            share
        };
        for index in 0..self.casts.len() {
            self.release(index, round);
            let cast = &mut self.casts[index];
            let may_be_held = |drawn: &&Drawn| ROUTES[drawn.route].to.port() != CLOSED;
            let missing = target.saturating_sub(cast.held.len());
            let places = round.held.iter().filter(may_be_held).cycle().take(missing);
            let mut wanted: BTreeMap<Caller, Vec<Drawn>> = BTreeMap::new();
            for place in places {
                let then = Then::Hold(cast.number());
                let caller = ROUTES[place.route].caller;
                wanted
                    .entry(caller)
                    .or_default()
                    .push(Drawn { then, ..*place });
            }
            for (caller, drawn) in &wanted {
                let play = Play {
                    parts: vec![part(cast, drawn, HOLDING, None)],
                };
                let holder = cast.holders.get_mut(caller).unwrap();
                holder.order(&Request::Play(play));
            }
            for (caller, drawn) in &wanted {
                let played = played(self.casts[index].holders[caller].receive());
                self.judge(index, &[drawn], &played);
            }
            self.report.held = self.report.held.max(self.held());
        }
    }

    fn held(&self) -> usize {
        self.casts.iter().map(|cast| cast.held.len()).sum()
    }

    fn release(&mut self, index: usize, round: &Round) {
        let cast = &mut self.casts[index];
        let keys: Vec<(Caller, u32)> = cast.held.keys().copied().collect();
        let mut numbers: BTreeMap<Caller, BTreeSet<u32>> = BTreeMap::new();
        for index in chosen(&round.renewed, keys.len()) {
            let (caller, number) = keys[index];
            numbers.entry(caller).or_default().insert(number);
            cast.held.remove(&keys[index]);
        }
        for (caller, numbers) in numbers {
            let holder = cast.holders.get_mut(&caller).unwrap();
            assert!(matches!(
                holder.request(&Request::Release(numbers)),
                Answer::Done
            ));
        }
    }

    /// All processes make their calls while the events happen.
    fn play(&mut self, round: &Round) {
        let begun = Instant::now();
        for (cast, calls) in self.casts.iter_mut().zip(&round.calls) {
            for Calls {
                caller,
                shorts,
                talks,
            } in calls
            {
                let play = Play {
                    parts: vec![
                        part(cast, shorts, CALLERS.0, Some(self.plan.round_ms)),
                        part(cast, talks, CALLERS.1, Some(self.plan.round_ms / 2)),
                    ],
                };
                let actor = cast.callers.get_mut(caller).unwrap();
                actor.order(&Request::Play(play));
            }
        }
        for event in &round.events {
            sleep_until(begun + Duration::from_millis(event.at_ms));
            let number = self.report.rounds;
            self.report
                .schedule
                .push(format!("round {number}  {event}"));
            let name = name(event.kind);
            *self.report.events.entry(name).or_default() += 1;
            let cast = &mut self.casts[event.pod];
            let result = event::happen(cast, event.kind, self.other, self.plan.distortion);
            if let Err(why) = result {
                self.report.wrong(event.pod, &why);
            }
        }
        // All is attached by then.
        if self.report.rounds > 1 {
            sleep_until(begun + Duration::from_millis(self.plan.round_ms / 2));
            self.casts.iter_mut().for_each(self.plan.meddle);
        }
        for (index, calls) in round.calls.iter().enumerate() {
            for Calls {
                caller,
                shorts,
                talks,
            } in calls
            {
                let played = played(self.casts[index].callers[caller].receive());
                self.judge(index, &[shorts, talks], &played);
            }
        }
    }

    fn judge(&mut self, index: usize, parts: &[&Vec<Drawn>], played: &[Played]) {
        for one in played {
            let drawn = parts[one.call.0][one.call.1];
            let verdict = judge(&self.casts[index], &drawn, one, &mut self.tallies[index]);
            let report = &mut self.report;
            report.connections += 1;
            *report.manners.entry(manner(drawn.then)).or_default() += 1;
            let who = one.dialed.outcome().split('#').next().unwrap_or_default();
            *report.outcomes.entry(who.to_owned()).or_default() += 1;
            match verdict {
                Ok(verdict) => {
                    report.excused += u64::from(verdict.excused);
                    if let (Then::Hold(number), Some(server), Ok(())) =
                        (drawn.then, verdict.server, &one.afterwards)
                    {
                        let note = Note {
                            ends: Ends::of(&one.dialed),
                            life: verdict.life,
                            server,
                        };
                        let caller = ROUTES[drawn.route].caller;
                        self.casts[index].held.insert((caller, number), note);
                    }
                }
                Err(why) => {
                    let route = ROUTES[drawn.route];
                    let what = format!(
                        "{:?} to {:?}, {:?}, {:?}:\n      {why}",
                        route.caller, route.to, drawn.family, drawn.then
                    );
                    report.wrong(index, &what);
                }
            }
        }
    }

    fn happen(&mut self, event: Event) {
        let cast = &mut self.casts[event.pod];
        let result = event::happen(cast, event.kind, self.other, self.plan.distortion);
        if let Err(why) = result {
            self.report.wrong(event.pod, &why);
        }
    }
}

/// Istio's own policy, by this build, to the end.
const ATTACH: Kind = Kind::Attach {
    policy: Some(0),
    other_build: false,
    killed_us: None,
};

fn part(cast: &Cast, drawn: &[Drawn], callers: usize, for_ms: Option<u64>) -> Part {
    let calls: Vec<Call> = drawn.iter().map(|drawn| cast.call(drawn)).collect();
    Part {
        calls,
        callers,
        for_ms,
        rest_us: REST_US,
    }
}

fn played(answer: Answer) -> Vec<Played> {
    match answer {
        Answer::Played(played) => played,
        other => panic!("{other:?}"),
    }
}

fn sleep_until(time: Instant) {
    thread::sleep(time.saturating_duration_since(Instant::now()));
}

const fn manner(then: Then) -> &'static str {
    match then {
        Then::Close => "short",
        Then::Reset => "reset",
        Then::HalfClose => "half-closed",
        Then::Abandon => "aborted",
        Then::Converse { .. } => "long",
        Then::Hold(_) => "held",
    }
}

const fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Attach {
            killed_us: Some(_), ..
        } => "attach killed",
        Kind::Attach {
            other_build: true, ..
        } => "upgrade",
        Kind::Attach { .. } => "attach",
        Kind::Detach { killed_us: Some(_) } => "detach killed",
        Kind::Detach { killed_us: None } => "detach",
        Kind::Restart { .. } => "proxy restarted",
        Kind::Handover => "proxy handed over",
        Kind::Retire => "former proxy ended",
    }
}
