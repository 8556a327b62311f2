//! What a reader gets to see.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redirect_common::dns::DNS_AGENT_PORT;
use redirect_common::log::{
    DECISION_BY_CONTAINER, DECISION_IN_PROXY_CONTAINER, Decision as Raw, NO_OWNER,
};
use redirect_common::verdict::{Action, Rule};
use serde::{Serialize, Serializer};

/// Something that a program told.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A trouble.
    Message(Message),
    /// What became of a connection.
    Decision(Decision),
}

/// A message in words.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// When it was read, at most a tenth of a second after it happened.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The cgroups attached in the network namespace: one, but for `redirect run`.
    pub cgroups: Vec<PathBuf>,
    /// Network namespace cookie.
    pub netns_cookie: Option<u64>,
    /// `warn`.
    pub level: String,
    /// The message.
    pub text: String,
}

/// What was decided about a connection, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    /// When.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// The cgroups attached in the network namespace: one, but for `redirect run`.
    pub cgroups: Vec<PathBuf>,
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Who connects.
    pub source: IpAddr,
    /// None while the kernel has not chosen it: outbound connections are decided before.
    pub source_port: Option<u16>,
    /// Where the connection is meant to go.
    pub destination: SocketAddr,
    /// The user who created the socket, as the kernel counts; outbound only.
    pub uid: Option<u32>,
    /// The group, likewise.
    pub gid: Option<u32>,
    /// Whether the socket was created in the proxy's container; None where the proxy is known by its ids.
    pub in_proxy_container: Option<bool>,
    /// The rule's name: that of its counter.
    pub rule: String,
    /// What became of the connection.
    pub action: Outcome,
    /// The proxy's port that it goes to, if captured.
    pub proxy_port: Option<u16>,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Sent to the proxy.
    Captured,
    /// Let alone.
    Passed,
    /// Nobody gets it.
    Refused,
}

impl Decision {
    /// Reads a program's record. `now_ns` is `CLOCK_MONOTONIC` at present.
    pub(super) fn new(raw: &Raw, now_ns: u64, cgroups: Vec<PathBuf>) -> Self {
        let rule = Rule::ALL
            .iter()
            .find(|rule| **rule as u32 == raw.rule)
            .copied();
        let label = rule.map_or_else(
            || format!("rule-{}", raw.rule),
            |rule| rule.label().to_owned(),
        );
        let owner = |id| (id != NO_OWNER).then_some(id);
        // A clock that was never set may be younger than the machine.
        let age = Duration::from_nanos(now_ns.saturating_sub(raw.time_ns));
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = UNIX_EPOCH + since_epoch.unwrap_or_default().saturating_sub(age);
        Self {
            time,
            cgroups,
            netns_cookie: raw.netns_cookie,
            direction: if label.starts_with("inbound-") {
                "inbound"
            } else {
                "outbound"
            },
            protocol: if i32::from(raw.protocol) == libc::IPPROTO_UDP {
                "udp"
            } else {
                "tcp"
            },
            source: raw.source.into(),
            source_port: (raw.source_port != 0).then_some(raw.source_port),
            destination: SocketAddr::new(raw.destination.into(), raw.port),
            uid: owner(raw.uid),
            gid: owner(raw.gid),
            in_proxy_container: (raw.flags & DECISION_BY_CONTAINER != 0)
                .then_some(raw.flags & DECISION_IN_PROXY_CONTAINER != 0),
            action: match rule.map(Rule::action) {
                _ if rule == Some(Rule::NoRoute) => Outcome::Refused,
                Some(Action::Pass) | None => Outcome::Passed,
                Some(_) => Outcome::Captured,
            },
            rule: label,
            proxy_port: match rule.map(Rule::action) {
                Some(Action::CaptureOutbound) => Some(raw.outbound_port),
                Some(Action::CaptureInbound | Action::CaptureInPlace) => Some(raw.inbound_port),
                Some(Action::CaptureDns) => Some(DNS_AGENT_PORT),
                Some(Action::Pass) | None => None,
            },
        }
    }
}

fn rfc3339<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&humantime::format_rfc3339_millis(*time))
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(message) => message.fmt(f),
            Self::Decision(decision) => decision.fmt(f),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        head(f, self.time, &self.cgroups)?;
        write!(f, "{} {}", self.level, self.text)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        head(f, self.time, &self.cgroups)?;
        match self.source_port {
            Some(port) => write!(f, "{}", SocketAddr::new(self.source, port))?,
            None => write!(f, "{}", self.source)?,
        }
        write!(f, " -> {}", self.destination)?;
        if self.protocol == "udp" {
            write!(f, " over UDP")?;
        }
        if let (Some(uid), Some(gid)) = (self.uid, self.gid) {
            write!(f, " by {uid}:{gid}")?;
        }
        match self.in_proxy_container {
            Some(true) => f.write_str(" in the proxy's container")?,
            Some(false) => f.write_str(" outside of the proxy's container")?,
            None => {}
        }
        match (self.action, self.proxy_port) {
            (Outcome::Captured, Some(port)) => write!(f, " captured to {port}")?,
            (Outcome::Captured, None) => write!(f, " captured")?,
            (Outcome::Passed, _) => write!(f, " passed")?,
            (Outcome::Refused, _) => write!(f, " refused")?,
        }
        write!(f, ": {}", self.rule)
    }
}

fn head(f: &mut fmt::Formatter<'_>, time: SystemTime, cgroups: &[PathBuf]) -> fmt::Result {
    write!(f, "{} ", humantime::format_rfc3339_millis(time))?;
    for cgroup in cgroups {
        write!(f, "{} ", cgroup.display())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn decision_older_than_the_clock_is_of_its_beginning() {
        let decision = Decision::new(&Raw::default(), u64::MAX, Vec::new());
        assert!(
            decision
                .to_string()
                .starts_with("1970-01-01T00:00:00.000Z ")
        );
    }

    fn told(rule: Rule, uid: u32) -> String {
        told_of(libc::IPPROTO_TCP, rule, uid)
    }

    fn told_of(protocol: i32, rule: Rule, uid: u32) -> String {
        line(raw(protocol, rule, uid))
    }

    fn raw(protocol: i32, rule: Rule, uid: u32) -> Raw {
        Raw {
            protocol: protocol as u16,
            time_ns: 1,
            source: IpAddr::from(Ipv4Addr::new(10, 0, 0, 2)).into(),
            destination: IpAddr::from(Ipv4Addr::new(203, 0, 113, 10)).into(),
            port: 80,
            rule: rule as u32,
            uid,
            gid: uid,
            outbound_port: 15001,
            inbound_port: 15006,
            ..Raw::default()
        }
    }

    fn line(raw: Raw) -> String {
        let line = Decision::new(&raw, 1, vec!["/pod".into()]).to_string();
        let (_time, line) = line.split_once(' ').expect("a time");
        line.to_owned()
    }

    #[test]
    fn decision_by_container_says_where_the_socket_was_made() {
        let by_container = |flags, rule| {
            line(Raw {
                flags: DECISION_BY_CONTAINER | flags,
                ..raw(libc::IPPROTO_TCP, rule, 1337)
            })
        };
        assert_eq!(
            by_container(0, Rule::IncludedCidr),
            "/pod 10.0.0.2 -> 203.0.113.10:80 by 1337:1337 outside of the proxy's container captured to 15001: outbound-captured"
        );
        assert_eq!(
            by_container(DECISION_IN_PROXY_CONTAINER, Rule::Proxy),
            "/pod 10.0.0.2 -> 203.0.113.10:80 by 1337:1337 in the proxy's container passed: outbound-proxy"
        );
    }

    #[test]
    fn decision_reads_as_a_line() {
        assert_eq!(
            told(Rule::IncludedCidr, 1000),
            "/pod 10.0.0.2 -> 203.0.113.10:80 by 1000:1000 captured to 15001: outbound-captured"
        );
        assert_eq!(
            told_of(libc::IPPROTO_UDP, Rule::Dns, 1000),
            "/pod 10.0.0.2 -> 203.0.113.10:80 over UDP by 1000:1000 captured to 15053: outbound-dns"
        );
        assert_eq!(
            told(Rule::NoRoute, NO_OWNER),
            "/pod 10.0.0.2 -> 203.0.113.10:80 refused: outbound-no-route"
        );
        assert_eq!(
            told(Rule::InboundPortExcluded, NO_OWNER),
            "/pod 10.0.0.2 -> 203.0.113.10:80 passed: inbound-port-excluded"
        );
    }
}

#[cfg(test)]
mod fuzz {
    use bytemuck::pod_read_unaligned;
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::config;

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_record_is_shown(bytes: [[u8; 16]; 5], rule in prop_oneof![any::<u32>(), 0..40_u32], now_ns: u64) {
            let mut raw: Raw = pod_read_unaligned(bytes.as_flattened());
            raw.rule = rule;
            let decision = Decision::new(&raw, now_ns, vec!["/pod".into()]);
            let json = serde_json::to_value(Event::Decision(decision.clone())).expect("JSON");
            prop_assert_eq!(&json["event"], "decision");
            let line = decision.to_string();
            prop_assert!(line.lines().count() == 1 && line.ends_with(&decision.rule), "{}", line);
            prop_assert_eq!(decision.proxy_port.is_some(), decision.action == Outcome::Captured);
        }
    }
}
