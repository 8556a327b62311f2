//! What a dry run says: the policy in words, and what would be done with it. Only reads.

use std::fmt::Write as _;

use anyhow::Result;

use super::{own_namespace, own_pod};
use crate::attach::captures_ipv6;
use crate::options::{Change, Dns, IstioIptables, Mode, Policy, Scope};

/// Fails where the call itself would, as far as that can be told by looking.
pub(super) fn of(call: &IstioIptables) -> Result<String> {
    let mut text = String::from("dry run: nothing is changed\n");
    let netns = own_namespace()?;
    let mut rows = vec![("network namespace", netns.name().to_owned())];
    match call.change {
        Change::Attach => {
            rows.push(("would attach", own_pod()?.to_string()));
            rows.extend(words(&call.policy, captures_ipv6(&call.policy, &netns)?));
        }
        Change::Detach => rows.push(("would detach", own_pod()?.to_string())),
        Change::None => rows.push(("would attach", "nothing (--skip-rule-apply)".to_owned())),
    }
    if let Some(validation) = call.validation {
        let what = format!("with port {} for {:?}", validation.port, validation.timeout);
        rows.push(("would validate", what));
    }
    for (name, value) in rows {
        writeln!(text, "{name:<20} {value}")?;
    }
    Ok(text)
}

fn words(policy: &Policy, ipv6: bool) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("as flags", policy.to_string()),
        (
            "proxy",
            format!(
                "port {} for outbound, {} for inbound connections",
                policy.outbound_port, policy.inbound_port
            ),
        ),
        (
            "proxy's ids",
            format!(
                "users {}; groups {}",
                list(&policy.proxy_uids),
                list(&policy.proxy_gids)
            ),
        ),
        (
            "outbound captured",
            format!(
                "destinations {}; ports {}",
                scope(&policy.include_outbound_cidrs),
                list(&policy.include_outbound_ports)
            ),
        ),
        (
            "outbound excluded",
            format!(
                "destinations {}; ports {}",
                list(&policy.exclude_outbound_cidrs),
                list(&policy.exclude_outbound_ports)
            ),
        ),
        (
            "inbound captured",
            match &policy.inbound_ports {
                Scope::All => format!(
                    "all ports except {} and {}",
                    list(&policy.exclude_inbound_ports),
                    policy.tunnel_port
                ),
                listed => format!("ports {} except {}", scope(listed), policy.tunnel_port),
            },
        ),
        (
            "groups captured",
            match &policy.owner_groups {
                Scope::All => format!("all except {}", list(&policy.owner_groups_exclude)),
                listed => scope(listed),
            },
        ),
        ("loopback", policy.loopback.to_string()),
        (
            "ipv6",
            if ipv6 { "captured" } else { "not captured" }.to_owned(),
        ),
        (
            "mode",
            match policy.mode {
                Mode::Redirect => "REDIRECT".to_owned(),
                Mode::Tproxy { mark, table } => format!("TPROXY, mark {mark}, table {table}"),
            },
        ),
        (
            "dns",
            match &policy.dns {
                Dns::Off => "not captured".to_owned(),
                Dns::Servers(servers) => format!("captured to {}", list(servers)),
                Dns::All => "captured to any server".to_owned(),
            },
        ),
    ];
    for (name, interfaces) in [
        ("interfaces excluded", &policy.exclude_interfaces),
        ("interfaces outbound", &policy.virtual_interfaces),
    ] {
        if !interfaces.is_empty() {
            rows.push((name, list(interfaces)));
        }
    }
    rows
}

fn scope<T: std::fmt::Display>(scope: &Scope<T>) -> String {
    match scope {
        Scope::All => "all".to_owned(),
        Scope::Listed(items) => list(items),
    }
}

fn list(items: &[impl ToString]) -> String {
    if items.is_empty() {
        return "none".to_owned();
    }
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(",")
}
