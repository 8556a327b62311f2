//! `redirect status` for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use comfy_table::{Table, presets};
use owo_colors::OwoColorize;

use crate::proxy::ProxyIdentity;
use crate::status::{Pod, Status};

/// All pods, with colours.
pub fn text(status: &Status) -> Result<String> {
    let mut out = format!("redirect {} (programs {})", status.version, status.build);
    if status.pods.is_empty() {
        write!(out, "\nno pod is attached")?;
    }
    for pod in &status.pods {
        write!(out, "\n\n{}", pod.cgroup.display().bold())?;
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        for (name, value) in rows(pod) {
            table.add_row([format!("  {name}"), value]);
        }
        write!(out, "\n{}", table.trim_fmt())?;
    }
    Ok(out)
}

fn rows(pod: &Pod) -> Vec<(&'static str, String)> {
    let capture = if pod.capturing {
        "on".green().to_string()
    } else {
        "incomplete: run `redirect attach` again".red().to_string()
    };
    let addresses = match pod.routes_current {
        Some(true) => "current".to_owned(),
        Some(false) => "changed since: run `redirect attach` again"
            .yellow()
            .to_string(),
        None => "unknown: the namespace cannot be found".to_owned(),
    };
    let mut rows = Vec::new();
    if let Some(pod) = &pod.pod {
        rows.push(("pod", format!("{}/{}", pod.namespace, pod.name)));
    }
    rows.extend([
        ("capture", capture),
        (
            "namespace",
            format!("{} (cookie {})", pod.netns, pod.netns_cookie),
        ),
        ("addresses", addresses),
        (
            "ipv6",
            if pod.ipv6 { "captured" } else { "not captured" }.to_owned(),
        ),
    ]);
    match &pod.virtual_interfaces {
        None => rows.push((
            "machines",
            "unknown: the namespace cannot be found".to_owned(),
        )),
        Some(patterns) => rows.extend(
            patterns
                .iter()
                .map(|pattern| ("machines", machines(pattern))),
        ),
    }
    for (port, count) in &pod.listeners {
        let value = match count {
            0 => format!("{port}: {}", "no listener".yellow()),
            1 => format!("{port}: 1 listener"),
            count => format!("{port}: {count} listeners"),
        };
        rows.push(("proxy", value));
    }
    rows.push(("proxy is", proxy(&pod.proxy)));
    rows.push(("policy", pod.policy.to_string()));
    rows.push((
        "attached by",
        format!("{} (programs {})", pod.version, pod.build),
    ));
    for (rule, count) in &pod.connections {
        rows.push(("connections", format!("{count:>8}  {rule}")));
    }
    rows
}

fn proxy(identity: &ProxyIdentity) -> String {
    match identity {
        ProxyIdentity::Uid => "whoever has a uid of -u or a gid of -g".to_owned(),
        ProxyIdentity::Container {
            container: Some(container),
        } => format!("container {}, whatever its uid and gid", container.id),
        ProxyIdentity::Container { container: None } => {
            format!("a container: {}", "not known yet, so nobody".yellow())
        }
    }
}

/// The interfaces of one pattern.
fn machines((pattern, interfaces): (&String, &BTreeMap<String, bool>)) -> String {
    if interfaces.is_empty() {
        return format!("{pattern}: {}", "no such interface".yellow());
    }
    let one = |(name, captured): (&String, &bool)| match captured {
        true => name.clone(),
        false => format!(
            "{name} {}",
            "not captured: run `redirect attach` again".yellow()
        ),
    };
    let all: Vec<_> = interfaces.iter().map(one).collect();
    format!("{pattern}: {}", all.join(", "))
}
