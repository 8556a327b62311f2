//! How inbound connections reach the proxy.

use serde::{Deserialize, Serialize};

use super::error::Entry;
use super::setting::number;

pub(super) const MODE: &str = "REDIRECT and TPROXY";
pub(super) const NUMBER: &str = "1-4294967295";

/// Istio's default for `-t`.
pub(super) const TPROXY_MARK: u32 = 1337;
/// Istio's default for `-r`.
pub(super) const TPROXY_TABLE: u32 = 133;

/// Interception mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The proxy's socket has the proxy's port; the original destination is asked for.
    #[default]
    Redirect,
    /// The proxy's socket has the original destination as its own address.
    Tproxy {
        /// `-t`: connections with this mark are not captured; not 0.
        mark: u32,
        /// `-r`: Istio's routing table for marked packets; not 0.
        table: u32,
    },
}

/// Whether TPROXY is asked for.
///
/// Istio reads everything else as REDIRECT, also a misspelled `tproxy` and `NONE`: none of those wants a REDIRECT.
pub(super) fn is_tproxy(text: &str) -> Result<bool, Entry> {
    match text.trim() {
        "TPROXY" => Ok(true),
        "" | "REDIRECT" => Ok(false),
        _ => Err(Entry::new(text, "is not an interception mode")),
    }
}

/// A mark: 0 is that of every packet that has none.
pub(super) fn mark(text: &str) -> Result<u32, Entry> {
    positive(text, "is not a mark")
}

/// A routing table: 0 is none (`RT_TABLE_UNSPEC`).
pub(super) fn table(text: &str) -> Result<u32, Entry> {
    positive(text, "is not a routing table")
}

fn positive(text: &str, problem: &str) -> Result<u32, Entry> {
    number(text.trim())
        .filter(|number| *number != 0)
        .ok_or_else(|| Entry::new(text, problem))
}
