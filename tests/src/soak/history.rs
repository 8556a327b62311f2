//! What a pod's capture was at any time, as far as that can be known: while something changes, the old or the new holds.

use std::collections::BTreeMap;

use crate::play::now;

/// How a pod is captured.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum State {
    /// Not at all.
    Detached,
    /// By a policy.
    Attached {
        /// Which attachment this is: counters and steered ports last from attach to detach.
        life: u32,
        /// Index of the policy.
        policy: usize,
    },
}

impl State {
    /// Which attachment.
    pub const fn life(self) -> Option<u32> {
        match self {
            Self::Detached => None,
            Self::Attached { life, .. } => Some(life),
        }
    }
}

#[derive(Clone, Debug)]
struct Period {
    from: u64,
    states: Vec<State>,
    /// A detachment has begun: nothing is emulated from some moment on.
    ending: bool,
}

/// Why a captured connection may fail for a while.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outage {
    /// No proxy listens, or one has been killed.
    Killed,
    /// A proxy has closed its listeners while another one listens: connections in its queue are reset.
    Handover,
}

/// The history of one pod. Times are those of [`now`].
#[derive(Clone, Debug)]
pub struct History {
    periods: Vec<Period>,
    outages: Vec<(u64, u64, Outage)>,
    deaths: BTreeMap<u32, u64>,
    lives: u32,
    /// Whether the last attachment began where nothing was left of another.
    fresh: bool,
}

impl History {
    /// Begins with a pod that is not attached.
    pub fn new() -> Self {
        Self {
            periods: vec![Period {
                from: 0,
                states: vec![State::Detached],
                ending: false,
            }],
            outages: Vec::new(),
            deaths: BTreeMap::new(),
            lives: 0,
            fresh: true,
        }
    }

    fn last(&self) -> &Period {
        &self.periods[self.periods.len() - 1]
    }

    /// What may be the case now.
    pub fn current(&self) -> &[State] {
        &self.last().states
    }

    /// What is the case now, if that is known.
    pub fn settled(&self) -> Option<State> {
        match self.current() {
            [state] => Some(*state),
            _ => None,
        }
    }

    /// Attaching, or changing to, that policy begins.
    pub fn attaching(&mut self, policy: usize) -> State {
        let ending = self.last().ending;
        let living = self.current().iter().find_map(|state| state.life());
        let life = match living {
            Some(life) if !ending => life,
            // What a detachment that was cut short has left of the counters is not known.
            _ => {
                self.fresh = !ending;
                self.lives += 1;
                self.lives
            }
        };
        let state = State::Attached { life, policy };
        self.change(state, ending);
        state
    }

    /// Whether the counters of the last attachment began with nothing.
    pub const fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Detaching begins.
    pub fn detaching(&mut self) {
        self.change(State::Detached, true);
    }

    fn change(&mut self, state: State, ending: bool) {
        let mut states = self.current().to_vec();
        if !states.contains(&state) {
            states.push(state);
        }
        self.periods.push(Period {
            from: now(),
            states,
            ending,
        });
    }

    /// The change that was begun is done.
    pub fn done(&mut self, state: State) {
        self.periods.push(Period {
            from: now(),
            states: vec![state],
            ending: false,
        });
    }

    /// Something happened to the proxy from `from` until now.
    pub fn outage(&mut self, from: u64, kind: Outage) {
        self.outages.push((from, now(), kind));
    }

    /// That process of the proxy is about to be killed.
    pub fn death(&mut self, generation: u32) {
        self.deaths.insert(generation, now());
    }

    /// Whether that process of the proxy was killed by then.
    pub fn died_by(&self, generation: u32, time: u64) -> bool {
        self.deaths.get(&generation).is_some_and(|at| *at <= time)
    }

    fn during(&self, from: u64, until: u64) -> impl Iterator<Item = &Period> {
        let ends = self.periods.iter().skip(1).map(|next| next.from);
        let periods = self.periods.iter().zip(ends.chain([u64::MAX]));
        periods
            .filter(move |(period, end)| period.from <= until && *end >= from)
            .map(|(period, _)| period)
    }

    /// What may have been the case at some moment between these.
    pub fn possible(&self, from: u64, until: u64) -> Vec<State> {
        let states = self.during(from, until).flat_map(|period| &period.states);
        let mut states: Vec<State> = states.copied().collect();
        states.sort();
        states.dedup();
        states
    }

    /// Whether a detachment was under way at some moment between these.
    pub fn ending(&self, from: u64, until: u64) -> bool {
        self.during(from, until).any(|period| period.ending)
    }

    /// What happened to the proxy between these.
    pub fn outages(&self, from: u64, until: u64) -> impl Iterator<Item = Outage> {
        let overlap = move |outage: &&(u64, u64, Outage)| outage.0 <= until && outage.1 >= from;
        self.outages.iter().filter(overlap).map(|outage| outage.2)
    }

    /// Forgets what was over before `time`.
    pub fn forget_before(&mut self, time: u64) {
        let over = |next: &Period| next.from < time;
        let keep = self.periods.iter().skip(1).take_while(|next| over(next));
        let gone = keep.count();
        self.periods.drain(..gone);
        self.outages.retain(|(_, until, _)| *until >= time);
    }
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_a_policy_changes_the_old_or_the_new_one_holds() {
        let mut history = History::new();
        let first = history.attaching(0);
        let begun = now();
        history.done(first);
        let attached = now();
        let second = history.attaching(1);
        let changing = now();
        history.done(second);
        let changed = now();
        assert_eq!(history.possible(begun, begun), [State::Detached, first]);
        assert_eq!(history.possible(attached, attached), [first]);
        assert_eq!(history.possible(changing, changing), [first, second]);
        assert_eq!(history.possible(changed, changed), [second]);
        assert_eq!(history.possible(attached, changed), [first, second]);
        assert!(!history.ending(0, changed));
        assert_eq!((first.life(), second.life()), (Some(1), Some(1)));
        history.forget_before(changed);
        assert_eq!(history.possible(changed, changed), [second]);
    }

    #[test]
    fn what_a_killed_loader_has_left_is_not_known() {
        let mut history = History::new();
        let first = history.attaching(0);
        history.done(first);
        history.detaching();
        assert_eq!(history.settled(), None);
        let again = history.attaching(0);
        assert_eq!(again.life(), Some(2));
        assert!(!history.is_fresh());
        let during = now();
        history.done(again);
        assert!(history.ending(during, during));
        assert_eq!(history.settled(), Some(again));
        assert!(!history.ending(now(), now()));
    }
}
