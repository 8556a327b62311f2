//! What TPROXY needs of a pod's network namespace, made and taken back: Envoy dials the application
//! from the client's own address, and the answers have to stay in the pod.
//!
//! Such connections carry the mark of `-t`. A rule sends marked packets to the table of `-r`, where
//! everything is local; two sysctls let the answers, and resets, carry the mark of what they answer.
//! Only what was not there before is made, and only that is taken back.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use serde::{Deserialize, Serialize};

use crate::observe::netlink::Netlink;
use crate::observe::netns::NetworkNamespace;
use crate::observe::proc;
use crate::options::{Mode, Policy, Scope};
use crate::record::Notes;

/// `LOOPBACK_IFINDEX` of the kernel (`include/net/flow.h`).
const LOOPBACK_INTERFACE: u32 = 1;
/// Follows the network namespace of the thread that opens a file below.
const SYSCTLS: &str = "/proc/sys/net";
const ON: &str = "1";

/// Accepted sockets take the mark of their SYN, in both families.
const ACCEPT: &str = "ipv4/tcp_fwmark_accept";
/// Packets without a socket, such as resets, take the mark of what they answer.
const REFLECT: [&str; 2] = ["ipv4/fwmark_reflect", "ipv6/fwmark_reflect"];

/// Something made in a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// `ip rule add fwmark MARK lookup TABLE`
    Rule {
        /// IPv6, else IPv4.
        ipv6: bool,
        /// `-t`
        mark: u32,
        /// `-r`
        table: u32,
    },
    /// `ip route add local default dev lo table TABLE`
    Route {
        /// IPv6, else IPv4.
        ipv6: bool,
        /// `-r`
        table: u32,
    },
    /// A sysctl set to 1.
    Sysctl {
        /// Below `/proc/sys/net`.
        path: String,
        /// What it was.
        before: String,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = |ipv6: &bool| if *ipv6 { "-6" } else { "-4" };
        match self {
            Self::Rule { ipv6, mark, table } => {
                write!(f, "ip {} rule fwmark {mark} lookup {table}", family(ipv6))
            }
            Self::Route { ipv6, table } => write!(
                f,
                "ip {} route local default dev lo table {table}",
                family(ipv6)
            ),
            Self::Sysctl { path, .. } => write!(f, "sysctl net/{path}"),
        }
    }
}

/// What a policy needs that is not there, or is there because of `ours`: the changes made before.
pub(crate) fn plan(
    netns: &NetworkNamespace,
    policy: &Policy,
    ipv6: bool,
    ours: &[Change],
) -> Result<Vec<Change>> {
    let wanted = wanted(policy, ipv6);
    if wanted.is_empty() {
        return Ok(wanted);
    }
    inside(netns, |netlink| {
        let mut plan = Vec::new();
        for change in wanted {
            if let Some(known) = ours.iter().find(|known| known.is_same(&change)) {
                plan.push(known.clone());
            } else if !change.is_made(netlink)? {
                plan.push(change.with_state_before()?);
            }
        }
        Ok(plan)
    })
}

/// True if all is there that a policy needs, whoever made it.
pub(crate) fn is_complete(netns: &NetworkNamespace, policy: &Policy, ipv6: bool) -> Result<bool> {
    let mut complete = true;
    each(netns, &wanted(policy, ipv6), |change, netlink| {
        complete &= change.is_made(netlink)?;
        Ok(false)
    })?;
    Ok(complete)
}

/// Makes what is missing of `changes`. True if anything was.
pub(crate) fn make(netns: &NetworkNamespace, changes: &[Change]) -> Result<bool> {
    each(netns, changes, |change, netlink| {
        let missing = !change.is_made(netlink)?;
        if missing {
            change
                .make(netlink)
                .with_context(|| format!("adding {change}"))?;
        }
        Ok(missing)
    })
}

/// Takes back what is there of `changes`, the last first.
pub(crate) fn take_back(netns: &NetworkNamespace, changes: &[Change]) -> Result<()> {
    let changes: Vec<_> = changes.iter().rev().cloned().collect();
    each(netns, &changes, |change, netlink| {
        let there = change.is_made(netlink)?;
        if there {
            change
                .take_back(netlink)
                .with_context(|| format!("removing {change}"))?;
        }
        Ok(there)
    })
    .map(drop)
}

/// Takes back what the notes say was made. The path of the namespace may have gone with the process
/// that it named: any other process in there will do. One that `may_be_gone` is not missed.
pub(crate) fn take_back_noted(notes: &Notes, may_be_gone: bool) -> Result<()> {
    if notes.changes.is_empty() {
        return Ok(());
    }
    let by_process = || {
        proc::pids()
            .into_iter()
            .filter(|pid| proc::namespace_inode(*pid, "net") == Some(notes.netns_inode))
            .find_map(|pid| {
                NetworkNamespace::of_process(pid)
                    .ok()
                    .filter(|netns| notes.is_of(netns))
            })
    };
    match notes.namespace().or_else(by_process) {
        Some(netns) => take_back(&netns, &notes.changes),
        None if may_be_gone => Ok(()),
        None => {
            let left: Vec<_> = notes.changes.iter().map(ToString::to_string).collect();
            tracing::warn!(
                "network namespace {} is not to be found: what TPROXY needed stays there: {}",
                notes.netns,
                left.join(", ")
            );
            Ok(())
        }
    }
}

/// As Istio: nothing without inbound ports.
fn wanted(policy: &Policy, ipv6: bool) -> Vec<Change> {
    let Mode::Tproxy { mark, table } = policy.mode else {
        return Vec::new();
    };
    if policy.inbound_ports == Scope::Listed(Vec::new()) {
        return Vec::new();
    }
    let sysctl = |path: &str| Change::Sysctl {
        path: path.to_owned(),
        before: String::new(),
    };
    let mut wanted = vec![sysctl(ACCEPT)];
    for (ipv6, reflect) in [false, true]
        .into_iter()
        .zip(REFLECT)
        .take(1 + usize::from(ipv6))
    {
        wanted.push(sysctl(reflect));
        // The route first: a rule without it would send marked packets out of the pod.
        wanted.push(Change::Route { ipv6, table });
        wanted.push(Change::Rule { ipv6, mark, table });
    }
    wanted
}

fn each(
    netns: &NetworkNamespace,
    changes: &[Change],
    mut work: impl FnMut(&Change, &Netlink) -> Result<bool> + Send,
) -> Result<bool> {
    if changes.is_empty() {
        return Ok(false);
    }
    inside(netns, |netlink| {
        let mut any = false;
        for change in changes {
            any |= work(change, netlink)?;
        }
        Ok(any)
    })
}

fn inside<T: Send>(
    netns: &NetworkNamespace,
    work: impl FnOnce(&Netlink) -> Result<T> + Send,
) -> Result<T> {
    netns
        .run_inside(|| work(&Netlink::open(NETLINK_ROUTE).context("opening a netlink socket")?))?
        .with_context(|| format!("network namespace {netns}"))
}

impl Change {
    /// Apart from what was there before.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sysctl { path, .. }, Self::Sysctl { path: other, .. }) => path == other,
            _ => self == other,
        }
    }

    fn with_state_before(self) -> Result<Self> {
        Ok(match self {
            Self::Sysctl { path, .. } => Self::Sysctl {
                before: read_sysctl(&path)?,
                path,
            },
            other => other,
        })
    }

    fn is_made(&self, netlink: &Netlink) -> Result<bool> {
        match self {
            Self::Rule { ipv6, mark, table } => {
                let mut request = RuleMessage::default();
                request.header.family = family(*ipv6);
                let request = RouteNetlinkMessage::GetRule(request);
                let made = netlink.dump(&request, |made: &mut bool, answer| {
                    *made |= matches!(answer, RouteNetlinkMessage::NewRule(rule) if sends_marked(&rule, *mark, *table));
                });
                made.context("reading the rules")
            }
            Self::Route { ipv6, table } => {
                let mut request = RouteMessage::default();
                request.header.address_family = family(*ipv6);
                let request = RouteNetlinkMessage::GetRoute(request);
                let made = netlink.dump(&request, |made: &mut bool, answer| {
                    *made |= matches!(answer, RouteNetlinkMessage::NewRoute(route) if is_all_local(&route, *table));
                });
                made.context("reading the routes")
            }
            Self::Sysctl { path, .. } => Ok(read_sysctl(path)? == ON),
        }
    }

    fn make(&self, netlink: &Netlink) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        match self {
            Self::Rule { ipv6, mark, table } => {
                let rule = RouteNetlinkMessage::NewRule(rule(*ipv6, *mark, *table));
                netlink.change(&rule, flags)
            }
            Self::Route { ipv6, table } => {
                let route = RouteNetlinkMessage::NewRoute(route(*ipv6, *table));
                netlink.change(&route, flags)
            }
            Self::Sysctl { path, .. } => fs::write(Path::new(SYSCTLS).join(path), ON),
        }
    }

    fn take_back(&self, netlink: &Netlink) -> io::Result<()> {
        match self {
            Self::Rule { ipv6, mark, table } => {
                let rule = RouteNetlinkMessage::DelRule(rule(*ipv6, *mark, *table));
                netlink.change(&rule, 0)
            }
            Self::Route { ipv6, table } => {
                let route = RouteNetlinkMessage::DelRoute(route(*ipv6, *table));
                netlink.change(&route, 0)
            }
            Self::Sysctl { path, before } => fs::write(Path::new(SYSCTLS).join(path), before),
        }
    }
}

fn rule(ipv6: bool, mark: u32, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(ipv6);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::FwMark(mark), RuleAttribute::Table(table)];
    message
}

fn route(ipv6: bool, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ipv6);
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    message.attributes = vec![
        RouteAttribute::Table(table),
        RouteAttribute::Oif(LOOPBACK_INTERFACE),
    ];
    message
}

fn family(ipv6: bool) -> AddressFamily {
    if ipv6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

fn read_sysctl(path: &str) -> Result<String> {
    let path = Path::new(SYSCTLS).join(path);
    let value = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(value.trim_end().to_owned())
}

/// A rule for all packets with this very mark.
fn sends_marked(rule: &RuleMessage, mark: u32, table: u32) -> bool {
    let (mut marks, mut leads, mut conditions) = (false, false, 0);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::FwMark(own) => marks = *own == mark,
            RuleAttribute::Table(own) => leads = *own == table,
            RuleAttribute::FwMask(u32::MAX)
            | RuleAttribute::Priority(_)
            | RuleAttribute::Protocol(_)
            | RuleAttribute::SuppressPrefixLen(_)
            | RuleAttribute::SuppressIfGroup(_)
            | RuleAttribute::Other(_) => {}
            _ => conditions += 1,
        }
    }
    marks
        && leads
        && conditions == 0
        && rule.header.action == RuleAction::ToTable
        && !rule.header.flags.contains(RuleFlags::Invert)
}

/// A route that makes every destination a local one.
fn is_all_local(route: &RouteMessage, table: u32) -> bool {
    let has = |wanted: RouteAttribute| route.attributes.contains(&wanted);
    route.header.kind == RouteType::Local
        && route.header.destination_prefix_length == 0
        && has(RouteAttribute::Table(table))
        && has(RouteAttribute::Oif(LOOPBACK_INTERFACE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing::TestNamespace;

    fn policy() -> Policy {
        Policy {
            mode: Mode::Tproxy {
                mark: 1337,
                table: 133,
            },
            inbound_ports: Scope::All,
            ..Policy::default()
        }
    }

    /// What the kernel itself finds for a marked packet to anywhere.
    fn marked_is_local(pod: &TestNamespace) -> bool {
        let answers = pod.open().run_inside(|| {
            ["192.0.2.77", "2001:db8:77::1"].map(|to| {
                let output = std::process::Command::new("ip")
                    .args(["route", "get", to, "mark", "1337"])
                    .output()
                    .unwrap();
                String::from_utf8(output.stdout).unwrap()
            })
        });
        let answers = answers.unwrap();
        let local = answers.iter().filter(|text| text.starts_with("local"));
        assert_ne!(local.clone().count(), 1, "{answers:?}");
        local.count() == 2
    }

    fn sysctls(pod: &TestNamespace) -> [String; 3] {
        let read = || [ACCEPT, REFLECT[0], REFLECT[1]].map(|path| read_sysctl(path).unwrap());
        pod.open().run_inside(read).unwrap()
    }

    #[test]
    fn what_was_made_is_taken_back() {
        let pod = TestNamespace::new();
        let netns = pod.open();
        let plan = plan(&netns, &policy(), true, &[]).unwrap();
        assert_eq!(plan.len(), 7, "{plan:?}");
        assert!(!marked_is_local(&pod));
        assert!(make(&netns, &plan).unwrap());
        assert!(marked_is_local(&pod));
        assert_eq!(sysctls(&pod), ["1", "1", "1"]);
        assert!(!make(&netns, &plan).unwrap());
        take_back(&netns, &plan).unwrap();
        take_back(&netns, &plan).unwrap();
        assert!(!marked_is_local(&pod));
        assert_eq!(sysctls(&pod), ["0", "0", "0"]);
    }

    #[test]
    fn what_was_there_stays() {
        let pod = TestNamespace::new();
        let netns = pod.open();
        for family in ["-4", "-6"] {
            pod.ip(&format!("{family} rule add fwmark 1337 lookup 133"));
            pod.ip(&format!(
                "{family} route add local default dev lo table 133"
            ));
        }
        let set = || fs::write(Path::new(SYSCTLS).join(ACCEPT), ON).unwrap();
        netns.run_inside(set).unwrap();
        let plan = plan(&netns, &policy(), true, &[]).unwrap();
        assert_eq!(plan.len(), 2, "{plan:?}");
        make(&netns, &plan).unwrap();
        take_back(&netns, &plan).unwrap();
        assert!(marked_is_local(&pod));
        assert_eq!(sysctls(&pod), ["1", "0", "0"]);
    }

    #[test]
    fn similar_rules_do_not_count() {
        let pod = TestNamespace::new();
        let netns = pod.open();
        for rule in [
            "fwmark 1338 lookup 133",
            "fwmark 1337 lookup 134",
            "fwmark 1337/0xfff lookup 133",
            "not fwmark 1337 lookup 133",
            "fwmark 1337 to 192.0.2.0/24 lookup 133",
            "fwmark 1337 iif lo lookup 133",
        ] {
            pod.ip(&format!("rule add {rule}"));
        }
        pod.ip("route add unreachable default table 133 metric 9");
        let plan = plan(&netns, &policy(), false, &[]).unwrap();
        assert_eq!(plan.len(), 4, "{plan:?}");
        make(&netns, &plan).unwrap();
        for change in &plan {
            let there = inside(&netns, |netlink| change.is_made(netlink)).unwrap();
            assert!(there, "{change}");
        }
        assert!(is_complete(&netns, &policy(), false).unwrap());
        take_back(&netns, &plan[..1]).unwrap();
        assert!(!is_complete(&netns, &policy(), false).unwrap());
    }

    #[test]
    fn changes_made_before_stay_ours() {
        let pod = TestNamespace::new();
        let netns = pod.open();
        let first = plan(&netns, &policy(), false, &[]).unwrap();
        make(&netns, &first).unwrap();
        assert_eq!(plan(&netns, &policy(), false, &[]).unwrap(), []);
        assert_eq!(plan(&netns, &policy(), false, &first).unwrap(), first);
    }

    #[test]
    fn nothing_is_needed_without_tproxy_or_inbound_ports() {
        let redirect = Policy {
            mode: Mode::Redirect,
            ..policy()
        };
        assert_eq!(wanted(&redirect, true), []);
        let outbound_only = Policy {
            inbound_ports: Scope::Listed(Vec::new()),
            ..policy()
        };
        assert_eq!(wanted(&outbound_only, true), []);
    }
}
