//! Where redirect differs from iptables and is known to. docs/behaviour.md has the same list, and a test compares the two.

use std::net::SocketAddr;

use super::{
    attempt::Attempt,
    observe::{
        CLIENT_LOCAL, CLIENT_ORIGINAL, CLIENT_ORIGINAL6, CLIENT_PEER, LATER, LATER_ECHO, Line,
        OUTCOME, SERVER_LOCAL, SERVER_PEER, SERVER_SIZED, SERVER_SIZED6,
    },
    place::Place,
    setting::Setting,
    world::LATER_LINE,
};
use crate::protocol::{Family, Transport};

/// An attempt and all that was seen of it.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The pods' options and proxy.
    pub setting: &'a Setting,
    /// The connection.
    pub attempt: &'a Attempt,
    /// Both pods, line by line.
    pub lines: &'a [Line],
}

impl<'a> Case<'a> {
    fn line(&self, what: &str) -> Option<&'a Line> {
        self.lines.iter().find(|line| line.what == what)
    }

    /// What was seen in the redirect pod.
    fn redirect(&self, what: &str) -> &'a str {
        self.line(what).map_or("", |line| &line.redirect)
    }
}

/// One difference.
pub struct Known {
    /// What it is about, in the words of the documentation.
    pub name: &'static str,
    /// What redirect does, and what iptables does, in the words of the documentation.
    pub explanation: &'static str,
    /// Whether it accounts for a line in which the pods disagree.
    applies: fn(Case<'_>, &Line) -> bool,
}

/// All of them, in the order of the documentation.
pub const KNOWN: &[Known] = &[
    Known {
        name: "Established connections",
        explanation: "are left alone by attach. With iptables conntrack begins to look at them, and resets them.",
        applies: |case, line| {
            let kept = case.redirect(LATER_ECHO) == LATER_LINE;
            let reset = case
                .line(LATER_ECHO)
                .is_some_and(|line| line.iptables == "ECONNRESET");
            case.attempt.before && LATER.contains(&line.what) && kept && reset
        },
    },
    Known {
        name: "`SO_ORIGINAL_DST` where IPv6 is not captured",
        explanation: "answers for IPv6 connections too. With iptables it fails with `ENOENT`: nothing else needs conntrack.",
        applies: |case, line| {
            let own_end = [CLIENT_ORIGINAL, CLIENT_ORIGINAL6].contains(&line.what);
            let real = case.redirect(if own_end { CLIENT_PEER } else { SERVER_LOCAL });
            case.attempt.family == Family::V6
                && !case.setting.options.ipv6
                && line.iptables == "ENOENT"
                && line.redirect.starts_with(&format!("{real}, "))
        },
    },
    Known {
        name: "`SO_ORIGINAL_DST` with more than 4096 bytes",
        explanation: "comes back with the length of the address, since eBPF programs see one page. With iptables the length stays the caller's.",
        applies: |case, line| {
            let address = |text: &str| text.split_once(", ").map(|(address, _)| address.to_owned());
            [SERVER_SIZED, SERVER_SIZED6].contains(&line.what)
                && case.attempt.length.is_some_and(|length| length > 4096)
                && address(&line.iptables) == address(&line.redirect)
        },
    },
    Known {
        name: "The client's source port",
        explanation: "is always what the proxy sees. Conntrack gives the second of two connections with one source port and one listener another port.",
        applies: |case, line| {
            let real = case.redirect(CLIENT_LOCAL);
            line.what == SERVER_PEER
                && case.attempt.transport == Transport::Tcp
                && !case.attempt.has_ephemeral_port()
                && line.redirect == real
                && ip(&line.iptables) == ip(real)
        },
    },
];

fn ip(text: &str) -> Option<std::net::IpAddr> {
    text.parse().ok().map(|address: SocketAddr| address.ip())
}

/// The difference that accounts for a line, if one does.
pub fn known(case: Case<'_>, line: &Line) -> Option<&'static Known> {
    KNOWN.iter().find(|known| (known.applies)(case, line))
}
