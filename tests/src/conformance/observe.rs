//! What both ends saw of one attempt, line by line, so that two pods can be compared.

use std::net::SocketAddr;

use super::attempt::Attempt;
use crate::protocol::{Dialed, Probe};

/// The error of `connect`, or of waiting for who answers.
pub const OUTCOME: &str = "who answered";
/// `getsockname` in the client.
pub const CLIENT_LOCAL: &str = "client: getsockname";
/// `getpeername` in the client.
pub const CLIENT_PEER: &str = "client: getpeername";
/// `SO_ORIGINAL_DST` in the client.
pub const CLIENT_ORIGINAL: &str = "client: original dst, SOL_IP";
/// `SO_ORIGINAL_DST` in the client, IPv6.
pub const CLIENT_ORIGINAL6: &str = "client: original dst, SOL_IPV6";
/// Where an answer over UDP came from.
pub const REPLIED: &str = "client: reply from";
/// `getpeername` in the server, or the sender of the datagram.
pub const SERVER_PEER: &str = "server: getpeername";
/// `getsockname` in the server, or the address that the datagram was sent to.
pub const SERVER_LOCAL: &str = "server: getsockname";
/// `SO_ORIGINAL_DST` in the server.
pub const SERVER_ORIGINAL: &str = "server: original dst, SOL_IP";
/// `SO_ORIGINAL_DST` in the server, IPv6.
pub const SERVER_ORIGINAL6: &str = "server: original dst, SOL_IPV6";
/// The same with another buffer size.
pub const SERVER_SIZED: &str = "server: sized query, SOL_IP";
/// The same, IPv6.
pub const SERVER_SIZED6: &str = "server: sized query, SOL_IPV6";
/// A line sent over a connection made before attach, and its echo.
pub const LATER_ECHO: &str = "after attach: echo";
/// `getsockname` of that connection.
pub const LATER_LOCAL: &str = "after attach: getsockname";
/// `getpeername` of that connection.
pub const LATER_PEER: &str = "after attach: getpeername";
/// `SO_ORIGINAL_DST` of that connection.
pub const LATER_ORIGINAL: &str = "after attach: original dst, SOL_IP";
/// `SO_ORIGINAL_DST` of that connection, IPv6.
pub const LATER_ORIGINAL6: &str = "after attach: original dst, SOL_IPV6";

/// All that is seen after attach.
pub const LATER: [&str; 5] = [
    LATER_ECHO,
    LATER_LOCAL,
    LATER_PEER,
    LATER_ORIGINAL,
    LATER_ORIGINAL6,
];

/// What was seen of an attempt in one pod.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When it was made.
    pub dialed: Dialed,
    /// Once more after attach: the echo of a line, or an error, and the client's view.
    pub later: Option<(Result<String, String>, Dialed)>,
}

/// One observation in both pods.
#[derive(Clone, Debug)]
pub struct Line {
    /// What was observed.
    pub what: &'static str,
    /// In the pod captured by iptables.
    pub iptables: String,
    /// In the pod captured by redirect.
    pub redirect: String,
}

impl Line {
    /// Whether the pods disagree.
    pub fn differs(&self) -> bool {
        self.iptables != self.redirect
    }
}

/// Both pods side by side.
pub fn compare(attempt: &Attempt, iptables: &Seen, redirect: &Seen) -> Vec<Line> {
    let (iptables, redirect) = (lines(attempt, iptables), lines(attempt, redirect));
    iptables
        .into_iter()
        .zip(redirect)
        .map(|((what, iptables), (_, redirect))| Line {
            what,
            iptables,
            redirect,
        })
        .filter(|line| !(line.iptables.is_empty() && line.redirect.is_empty()))
        .collect()
}

/// Always the same lines in the same order; empty where there was nothing to see.
fn lines(attempt: &Attempt, seen: &Seen) -> Vec<(&'static str, String)> {
    let dialed = &seen.dialed;
    let greeting = dialed.greeting.as_ref();
    // The kernel draws this one anew each time, so only its being the same everywhere can be compared.
    let drawn = dialed
        .local
        .map(|local| local.port())
        .filter(|_| attempt.has_ephemeral_port());
    let address = |address: Option<SocketAddr>| match address {
        Some(address) if Some(address.port()) == drawn => {
            let text = SocketAddr::new(address.ip(), 0).to_string();
            format!("{}:(drawn)", text.trim_end_matches(":0"))
        }
        Some(address) => address.to_string(),
        None => String::new(),
    };
    let probe = |probe: Option<&Probe>| match probe {
        Some(Probe {
            errno: Some(errno), ..
        }) => errno.clone(),
        Some(probe) => format!("{}, {} bytes", address(probe.address), probe.length),
        None => String::new(),
    };
    let outcome = match &dialed.error {
        Some(error) if dialed.local.is_some() => format!("connected, then {error}"),
        _ => dialed.outcome().to_owned(),
    };
    let sized = dialed.probes.first();
    let mut lines = vec![
        (OUTCOME, outcome),
        (CLIENT_LOCAL, address(dialed.local)),
        (CLIENT_PEER, address(dialed.peer)),
        (CLIENT_ORIGINAL, probe(dialed.original.as_ref())),
        (CLIENT_ORIGINAL6, probe(dialed.original6.as_ref())),
        (REPLIED, address(dialed.replied)),
        (SERVER_PEER, address(greeting.map(|greeting| greeting.peer))),
        (
            SERVER_LOCAL,
            address(greeting.map(|greeting| greeting.local)),
        ),
        (
            SERVER_ORIGINAL,
            probe(greeting.map(|greeting| &greeting.original)),
        ),
        (
            SERVER_ORIGINAL6,
            probe(greeting.map(|greeting| &greeting.original6)),
        ),
        (SERVER_SIZED, probe(sized.map(|(_, original, _)| original))),
        (
            SERVER_SIZED6,
            probe(sized.map(|(_, _, original6)| original6)),
        ),
    ];
    let (echo, later) = match &seen.later {
        Some((Ok(echo), later)) => (echo.clone(), Some(later)),
        Some((Err(error), later)) => (error.clone(), Some(later)),
        None => (String::new(), None),
    };
    lines.extend([
        (LATER_ECHO, echo),
        (LATER_LOCAL, address(later.and_then(|later| later.local))),
        (LATER_PEER, address(later.and_then(|later| later.peer))),
        (
            LATER_ORIGINAL,
            probe(later.and_then(|later| later.original.as_ref())),
        ),
        (
            LATER_ORIGINAL6,
            probe(later.and_then(|later| later.original6.as_ref())),
        ),
    ]);
    lines
}
