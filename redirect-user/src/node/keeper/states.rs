//! What became of each pod, and what is to be told about it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Keeper;
use crate::node::api::PodName;
use crate::node::decision::Skip;

/// How long the Kubernetes API may be behind the CNI plugin.
const API_LAG: Duration = Duration::from_secs(30);

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Its traffic is captured.
    Captured,
    /// It is left alone.
    Skipped(Skip),
    /// It has not got so far: what is missing.
    Waiting(&'static str),
    /// Its annotations cannot be read.
    Invalid(String),
    /// It could not be attached, or not be detached.
    Failed(String),
}

/// The states by name; metrics show each, also at zero.
const LABELS: [&str; 5] = ["captured", "skipped", "waiting", "invalid", "failed"];

impl State {
    pub(super) fn label(&self) -> &'static str {
        LABELS[match self {
            Self::Captured => 0,
            Self::Skipped(_) => 1,
            Self::Waiting(_) => 2,
            Self::Invalid(_) => 3,
            Self::Failed(_) => 4,
        }]
    }
}

/// A pod that has been looked at.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) name: PodName,
    pub(super) state: State,
    /// Errors in a row.
    failures: u32,
    /// What has been told of it last.
    told: Option<String>,
}

impl Known {
    pub(super) fn new(name: PodName, state: State) -> Self {
        Self {
            name,
            state,
            failures: 0,
            told: None,
        }
    }

    pub(super) fn enter(&mut self, state: State) {
        self.failures = match state {
            State::Failed(_) => self.failures.saturating_add(1),
            _ => 0,
        };
        if matches!(state, State::Captured | State::Skipped(_)) {
            self.told = None;
        }
        self.state = state;
    }

    /// How long to wait until the next attempt: twice as long after every error.
    pub(super) fn pause(&self, first: Duration, most: Duration) -> Duration {
        let doublings = self.failures.saturating_sub(1).min(16);
        first.saturating_mul(1 << doublings).min(most)
    }

    /// What is to be told of the pod now, if it has not been told before. An error is told once there are `after` in a row.
    pub(super) fn news(&mut self, after: u32) -> Option<String> {
        let note = match &self.state {
            State::Invalid(error) => error,
            State::Failed(error) if self.failures >= after => error,
            _ => return None,
        };
        if self.told.as_ref() == Some(note) {
            return None;
        }
        self.told = Some(note.clone());
        self.told.clone()
    }
}

impl Keeper {
    /// Brings the metrics of pods up to date.
    pub(super) fn count_pods(&self) {
        let mut states: BTreeMap<&'static str, i64> =
            LABELS.into_iter().map(|label| (label, 0)).collect();
        let (mut skipped, mut invalid) = (BTreeMap::new(), Vec::new());
        for known in self.known.values() {
            *states.entry(known.state.label()).or_default() += 1;
            match &known.state {
                State::Skipped(skip) => *skipped.entry(skip.label()).or_default() += 1,
                State::Invalid(_) => invalid.push(known.name.clone()),
                _ => {}
            }
        }
        self.metrics.set_pods(&states, &skipped, &invalid);
    }
}

/// Whether the API may not yet have told of a pod that the plugin has told of. While the API is silent it may: a pod
/// without processes, as between two images that are pulled, must not get out by that.
pub(super) fn may_be_behind(heard: Option<Instant>, added: Instant) -> bool {
    heard.is_none_or(|heard| heard < added + API_LAG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        let name = PodName {
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            uid: None,
        };
        Known::new(name, State::Waiting("a process"))
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_success() {
        let (first, most) = (Duration::from_millis(500), Duration::from_secs(30));
        let mut known = known();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            known.enter(State::Failed("no".to_owned()));
            pauses.push(known.pause(first, most).as_millis());
        }
        assert_eq!(
            pauses,
            [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]
        );
        known.enter(State::Captured);
        known.enter(State::Failed("no".to_owned()));
        assert_eq!(known.pause(first, most), first);
    }

    #[test]
    fn news_are_told_once_and_again_when_they_change_or_come_back() {
        let failed = || State::Failed("no".to_owned());
        let invalid = |text: &str| State::Invalid(text.to_owned());
        let mut known = known();
        for (state, expected) in [
            (failed(), None),
            (failed(), None),
            (failed(), Some("no")),
            (failed(), None),
            (invalid("bad"), Some("bad")),
            (invalid("bad"), None),
            (invalid("worse"), Some("worse")),
            (State::Waiting("x"), None),
            (invalid("worse"), None),
            (State::Captured, None),
            (invalid("worse"), Some("worse")),
        ] {
            known.enter(state.clone());
            assert_eq!(known.news(3).as_deref(), expected, "{state:?}");
        }
    }

    #[test]
    fn silent_api_is_behind_until_it_speaks_and_a_speaking_one_for_half_a_minute() {
        let added = Instant::now();
        let later = |seconds| Some(added + Duration::from_secs(seconds));
        assert!(may_be_behind(None, added));
        assert!(may_be_behind(Some(added), added));
        assert!(may_be_behind(later(29), added));
        assert!(!may_be_behind(later(30), added));
    }
}
