//! Ports and lists of ports, read as iptables' `--dport` reads them.

use super::error::Entry;
use super::names::Names;
use super::ranges::{PortRange, Scope, merge_ports};
use super::setting::{entries, number};

pub(super) const PORT: &str = "1-65535";
pub(super) const PORTS: &str =
    "0-65535, ranges LOW-HIGH or LOW:HIGH, and service names of /etc/services";
pub(super) const PORTS_OR_ALL: &str =
    "0-65535, ranges LOW-HIGH or LOW:HIGH, service names of /etc/services, or * for all";

/// The port of a listener.
pub(super) fn listening_port(text: &str) -> Result<u16, Entry> {
    let text = text.trim();
    match number(text).and_then(|port| u16::try_from(port).ok()) {
        Some(port) if port > 0 => Ok(port),
        _ => Err(Entry::new(text, "is not a port to listen on")),
    }
}

/// A comma list of ports, merged.
pub(super) fn port_list(text: &str, names: &dyn Names) -> Result<Vec<PortRange>, Entry> {
    let ranges: Result<_, _> = entries(text)
        .map(|entry| port_range(entry, names))
        .collect();
    Ok(merge_ports(ranges?))
}

/// As [`port_list`], or `*`.
pub(super) fn port_scope(text: &str, names: &dyn Names) -> Result<Scope<PortRange>, Entry> {
    if text.trim() == "*" {
        return Ok(Scope::All);
    }
    if entries(text).any(|entry| entry == "*") {
        return Err(Entry::new("*", "must stand alone"));
    }
    Ok(Scope::Listed(port_list(text, names)?))
}

fn port_range(entry: &str, names: &dyn Names) -> Result<PortRange, Entry> {
    // A service name may contain "-" (http-alt), so only digits make that a range. ":" is iptables' own, with either end open.
    let (first, last) = if let Some((low, high)) = entry.split_once(':').filter(|_| entry != ":") {
        let end = |text: &str, open: u16| {
            if text.is_empty() {
                Some(open)
            } else {
                port(text, names)
            }
        };
        (end(low, 0), end(high, u16::MAX))
    } else if let Some((low, high)) = entry
        .split_once('-')
        .filter(|_| !entry.contains(char::is_alphabetic))
    {
        (port(low, names), port(high, names))
    } else {
        let port = port(entry, names);
        (port, port)
    };
    match (first, last) {
        (Some(first), Some(last)) if first > last => Err(Entry::new(
            entry,
            "is a range whose low end is above its high end",
        )),
        (Some(first), Some(last)) => Ok(PortRange { first, last }),
        _ if entry.contains([':', '-']) && !entry.starts_with('-') => {
            Err(Entry::new(entry, "is not a port or a range of ports"))
        }
        _ => Err(Entry::new(entry, "is not a port")),
    }
}

fn port(text: &str, names: &dyn Names) -> Option<u16> {
    let text = text.trim();
    if text.starts_with(|c: char| c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_digit())
    {
        number(text).and_then(|port| u16::try_from(port).ok())
    } else {
        names.tcp_service(text)
    }
}
