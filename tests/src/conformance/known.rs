//! Where redirect differs from iptables and is known to. docs/behaviour.md has the same list, and a test compares the two.

use super::{
    attempt::Attempt,
    observe::{
        CLIENT_LOCAL, CLIENT_ORIGINAL, CLIENT_ORIGINAL6, CLIENT_PEER, LATER, LATER_ECHO, Line,
        OUTCOME, SERVER_LOCAL, SERVER_PEER, SERVER_SIZED, SERVER_SIZED6,
    },
    place::Place,
    setting::{Proxy, Setting},
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
        explanation: "are never reset by attach, by a change of options, or by detach. With iptables conntrack begins or ceases to look at them, and resets them.",
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
        explanation: "answers for IPv6 too. With iptables it fails with `ENOENT`, since conntrack does not look at IPv6 then.",
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
        explanation: "comes back with the length of the address: eBPF programs are shown one page. With iptables the length stays the caller's.",
        applies: |case, line| {
            let address = |text: &str| text.split_once(", ").map(|(address, _)| address.to_owned());
            [SERVER_SIZED, SERVER_SIZED6].contains(&line.what)
                && case.attempt.length.is_some_and(|length| length > 4096)
                && address(&line.iptables) == address(&line.redirect)
        },
    },
    Known {
        name: "The client's source port",
        explanation: "is what the proxy sees, always. With iptables the second of two connections with one source port gets another one where both end at one listener.",
        applies: |case, line| {
            let real = case.redirect(CLIENT_LOCAL);
            line.what == SERVER_PEER
                && case.attempt.transport == Transport::Tcp
                && endpoint(&line.redirect) == endpoint(real)
                && endpoint(&line.iptables).0 == endpoint(real).0
        },
    },
    Known {
        name: "Connections from outside to one of several addresses of the pod",
        explanation: "reach a proxy on any of them, and its `getsockname` shows the one that was called. With iptables both are about the first address of the interface.",
        applies: |case, line| {
            // The kernel keeps IPv4 addresses in the order they were added in, and IPv6 ones in the reverse.
            let first = if case.attempt.family.is_ipv4() {
                Place::Own
            } else {
                Place::Second
            };
            let another = [Place::Own, Place::Second, Place::Other].contains(&case.attempt.to)
                && case.attempt.to != first;
            let bound = case.setting.proxy == Proxy::PodAddress
                && case
                    .line(OUTCOME)
                    .is_some_and(|line| line.iptables == "ECONNREFUSED");
            let shown = line.what == SERVER_LOCAL
                && endpoint(&line.redirect).0 == endpoint(case.redirect(CLIENT_PEER)).0
                && endpoint(&line.redirect).1 == endpoint(&line.iptables).1;
            case.attempt.from.is_none() && another && (bound || shown)
        },
    },
];

/// Address and port of what a line shows, without the IPv4-in-IPv6 mapping; a port that the kernel drew has no number.
fn endpoint(text: &str) -> (&str, &str) {
    let (address, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let address = address.trim_matches(['[', ']']);
    (address.strip_prefix("::ffff:").unwrap_or(address), port)
}

/// The difference that accounts for a line, if one does.
pub fn known(case: Case<'_>, line: &Line) -> Option<&'static Known> {
    KNOWN.iter().find(|known| (known.applies)(case, line))
}
