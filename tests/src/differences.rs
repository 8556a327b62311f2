//! What differs between two sets, in words.

use std::collections::BTreeSet;

/// What is there beside what is wanted, and what is wanted and not there; none if equal.
pub fn differences<T: Ord>(
    ours: impl IntoIterator<Item = T>,
    wanted: impl IntoIterator<Item = T>,
    name: impl Fn(&T) -> String,
) -> Vec<String> {
    let ours: BTreeSet<T> = ours.into_iter().collect();
    let wanted: BTreeSet<T> = wanted.into_iter().collect();
    let left = ours.difference(&wanted);
    let missing = wanted.difference(&ours);
    left.map(|one| format!("left over: {}", name(one)))
        .chain(missing.map(|one| format!("missing: {}", name(one))))
        .collect()
}
