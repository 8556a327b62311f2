//! All that a loader or daemon may change.

use std::collections::BTreeSet;

use crate::{bpffs::State, differences::differences, scene::Scene, surroundings};

/// What is there at some time.
pub struct Traces {
    state: State,
    /// Of each pod.
    surroundings: Vec<BTreeSet<String>>,
}

impl Traces {
    /// As it is now, with these pods.
    pub fn read<'a>(scenes: impl IntoIterator<Item = &'a Scene>) -> Self {
        let surroundings = scenes.into_iter();
        Self {
            state: State::read(),
            surroundings: surroundings
                .map(|scene| surroundings::of(&scene.pod.netns))
                .collect(),
        }
    }

    /// The differences to what is wanted, in words; none if equal.
    pub fn differences(&self, wanted: &Self) -> Vec<String> {
        let mut found = self.state.differences(&wanted.state);
        for (ours, theirs) in self.surroundings.iter().zip(&wanted.surroundings) {
            found.extend(differences(ours, theirs, |line| (*line).clone()));
        }
        found
    }
}
