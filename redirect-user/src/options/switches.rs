//! Booleans and choices.

use super::error::Entry;

pub(super) const BOOLEAN: &str = "true and false";
pub(super) const IPV6: &str = "auto, on and off";

/// What `--ipv6` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ipv6Choice {
    Auto,
    On,
    Off,
}

/// Go's `strconv.ParseBool`, and the empty string for false: Istio falls back to that.
pub(crate) fn boolean(text: &str) -> Result<bool, Entry> {
    match text.trim() {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(Entry::new(text, "is not a boolean")),
    }
}

pub(super) fn ipv6(text: &str) -> Result<Ipv6Choice, Entry> {
    match text.trim() {
        "auto" => Ok(Ipv6Choice::Auto),
        "on" => Ok(Ipv6Choice::On),
        "off" => Ok(Ipv6Choice::Off),
        _ => Err(Entry::new(text, "is not an IPv6 setting")),
    }
}
