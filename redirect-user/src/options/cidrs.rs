//! CIDRs, read as Go's `netip.ParsePrefix` reads them, with host bits masked.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::error::Entry;
use super::ranges::Scope;
use super::setting::{entries, number};

pub(super) const CIDRS: &str = "CIDRs such as 10.0.0.0/8 or fd00::/8";
pub(super) const CIDRS_OR_ALL: &str = "CIDRs such as 10.0.0.0/8 or fd00::/8, or * for all";
pub(super) const LOOPBACK: &str = "IPv4 CIDRs within 127.0.0.0/8, with a prefix length of 8-32";

/// A CIDR list of `-i`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Included {
    pub(super) scope: Scope<IpNet>,
    /// An entry's address, before masking, is loopback: Istio's test.
    pub(super) loopback: bool,
}

/// A comma list of CIDRs, or `*`.
pub(super) fn cidr_scope(text: &str) -> Result<Included, Entry> {
    if text.trim() == "*" {
        return Ok(Included {
            scope: Scope::All,
            loopback: false,
        });
    }
    if entries(text).any(|entry| entry == "*") {
        return Err(Entry::new("*", "must stand alone"));
    }
    let nets = parse_list(text)?;
    let loopback = nets.iter().any(|net| net.addr().is_loopback());
    Ok(Included {
        scope: Scope::Listed(canonical(nets)),
        loopback,
    })
}

/// A comma list of CIDRs, masked, sorted, each once.
pub(super) fn cidr_list(text: &str) -> Result<Vec<IpNet>, Entry> {
    parse_list(text).map(canonical)
}

/// The loopback CIDR, masked.
pub(super) fn loopback_cidr(text: &str) -> Result<Ipv4Net, Entry> {
    let text = text.trim();
    match cidr(text)? {
        IpNet::V4(net) if !net.addr().is_loopback() => {
            Err(Entry::new(text, "is not a loopback CIDR"))
        }
        IpNet::V4(net) if net.prefix_len() < 8 => {
            Err(Entry::new(text, "covers more than loopback"))
        }
        IpNet::V4(net) => Ok(net.trunc()),
        IpNet::V6(_) => Err(Entry::new(text, "is not an IPv4 CIDR")),
    }
}

fn parse_list(text: &str) -> Result<Vec<IpNet>, Entry> {
    entries(text).map(cidr).collect()
}

fn canonical(nets: Vec<IpNet>) -> Vec<IpNet> {
    let mut nets: Vec<_> = nets.iter().map(IpNet::trunc).collect();
    nets.sort_unstable();
    nets.dedup();
    nets
}

/// One CIDR, host bits kept.
fn cidr(entry: &str) -> Result<IpNet, Entry> {
    let Some((address, prefix)) = entry.split_once('/') else {
        return Err(match entry.parse::<IpAddr>() {
            Ok(address) => Entry::new(
                entry,
                format!(
                    "has no prefix length (did you mean {}?)",
                    IpNet::from(address)
                ),
            ),
            Err(_) => Entry::new(entry, "is not a CIDR"),
        });
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return Err(Entry::new(entry, "is not a CIDR"));
    };
    // An IPv6 rule never sees these: the traffic of a mapped socket is IPv4.
    if let IpAddr::V6(v6) = address
        && v6.to_ipv4_mapped().is_some()
    {
        return Err(Entry::new(
            entry,
            "is an IPv4-mapped address, to be written as IPv4",
        ));
    }
    number(prefix)
        .and_then(|bits| u8::try_from(bits).ok())
        .and_then(|bits| IpNet::new(address, bits).ok())
        .ok_or_else(|| {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            Entry::new(entry, format!("has a prefix length that is not 0-{bits}"))
        })
}
