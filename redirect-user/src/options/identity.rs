//! Users and groups: ids, ranges of ids, names.

use super::error::Entry;
use super::ranges::{IdRange, Scope, merge_ids};
use super::setting::{entries, number};

pub(super) const USERS: &str = "uids 0-4294967294, ranges LOW-HIGH, and user names";
pub(super) const GROUPS: &str = "gids 0-4294967294, ranges LOW-HIGH, and group names";
pub(super) const GROUPS_OR_ALL: &str =
    "gids 0-4294967294, ranges LOW-HIGH, group names, or * for all";

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    User,
    Group,
}

/// A comma list in the order given. `lookup` resolves names of that kind.
pub(super) fn id_list(
    text: &str,
    kind: Kind,
    lookup: &dyn Fn(&str) -> Option<u32>,
) -> Result<Vec<IdRange>, Entry> {
    entries(text)
        .map(|entry| id_range(entry, kind, lookup))
        .collect()
}

/// As [`id_list`], and not empty.
pub(super) fn proxy_ids(
    text: &str,
    kind: Kind,
    lookup: &dyn Fn(&str) -> Option<u32>,
) -> Result<Vec<IdRange>, Entry> {
    let ids = id_list(text, kind, lookup)?;
    if ids.is_empty() {
        // Without one, the proxy's own connections would be captured again and again.
        return Err(Entry::new(text, "names nobody"));
    }
    Ok(ids)
}

/// A set of groups, or `*`.
pub(super) fn group_scope(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<u32>,
) -> Result<Scope<IdRange>, Entry> {
    if text.trim() == "*" {
        return Ok(Scope::All);
    }
    if entries(text).any(|entry| entry == "*") {
        return Err(Entry::new("*", "must stand alone"));
    }
    Ok(Scope::Listed(group_set(text, lookup)?))
}

/// A set of groups, merged.
pub(super) fn group_set(
    text: &str,
    lookup: &dyn Fn(&str) -> Option<u32>,
) -> Result<Vec<IdRange>, Entry> {
    Ok(merge_ids(id_list(text, Kind::Group, lookup)?))
}

fn id_range(
    entry: &str,
    kind: Kind,
    lookup: &dyn Fn(&str) -> Option<u32>,
) -> Result<IdRange, Entry> {
    let noun = match kind {
        Kind::User => "user",
        Kind::Group => "group",
    };
    // Names have "-" too (istio-proxy); a name of digits only would be read as a number.
    let numeric = entry
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'-');
    let range = match entry.split_once('-') {
        Some((low, high)) if numeric => id(low).zip(id(high)),
        None if numeric => id(entry).map(|id| (id, id)),
        _ => {
            let id =
                lookup(entry).ok_or_else(|| Entry::new(entry, format!("is not a known {noun}")))?;
            return Ok(IdRange {
                first: id,
                last: id,
            });
        }
    };
    match range {
        Some((first, last)) if first > last => Err(Entry::new(
            entry,
            "is a range whose low end is above its high end",
        )),
        Some((first, last)) => Ok(IdRange { first, last }),
        None => Err(Entry::new(
            entry,
            format!("is not a {noun} id or a range of them"),
        )),
    }
}

/// 4294967295 is "no id" to the kernel.
fn id(text: &str) -> Option<u32> {
    number(text).filter(|id| *id != u32::MAX)
}
