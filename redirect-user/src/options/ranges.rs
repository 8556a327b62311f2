//! Ranges of ports and of ids, and sets that may be everything.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Ports `first` to `last`, both included, host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

/// User or group ids `first` to `last`, both included, as numbered in the pod's user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IdRange {
    /// Lowest id.
    pub first: u32,
    /// Highest id.
    pub last: u32,
}

/// Everything (`*`), or what is listed: an empty list is nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope<T> {
    /// `*`.
    All,
    /// Only these.
    Listed(Vec<T>),
}

impl<T> Scope<T> {
    /// The listed items; none for [`Scope::All`].
    pub fn listed(&self) -> &[T] {
        match self {
            Self::All => &[],
            Self::Listed(items) => items,
        }
    }

    /// True for `*`.
    pub fn is_all(&self) -> bool {
        matches!(self, Self::All)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_range(f, self.first.into(), self.last.into())
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_range(f, self.first, self.last)
    }
}

/// `*`, or the items with commas between them; an empty list is the empty string.
impl<T: fmt::Display> fmt::Display for Scope<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Listed(items) => items.iter().enumerate().try_for_each(|(index, item)| {
                let comma = if index == 0 { "" } else { "," };
                write!(f, "{comma}{item}")
            }),
        }
    }
}

fn write_range(f: &mut fmt::Formatter<'_>, first: u32, last: u32) -> fmt::Result {
    if first == last {
        write!(f, "{first}")
    } else {
        write!(f, "{first}-{last}")
    }
}

/// Sorted, with overlapping and adjacent ranges merged: equal sets become equal lists.
pub(super) fn merge_ports(ranges: Vec<PortRange>) -> Vec<PortRange> {
    let wide = ranges
        .iter()
        .map(|range| (range.first.into(), range.last.into()));
    // Both ends came from a u16.
    merge(wide.collect())
        .into_iter()
        .map(|(first, last)| PortRange {
            first: first as u16,
            last: last as u16,
        })
        .collect()
}

/// As [`merge_ports`]. Not for proxy UIDs and GIDs, whose order has a meaning.
pub(super) fn merge_ids(ranges: Vec<IdRange>) -> Vec<IdRange> {
    let pairs = ranges.iter().map(|range| (range.first, range.last));
    merge(pairs.collect())
        .into_iter()
        .map(|(first, last)| IdRange { first, last })
        .collect()
}

fn merge(mut ranges: Vec<(u32, u32)>) -> Vec<(u32, u32)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(open) if first <= open.1.saturating_add(1) => open.1 = open.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}
