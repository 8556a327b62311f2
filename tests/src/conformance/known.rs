//! Where redirect differs from iptables and is known to. docs/behaviour.md has the same list, and a test compares the two.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    attempt::{Attempt, Origin},
    observe::{
        CLIENT_LOCAL, CLIENT_ORIGINAL, CLIENT_ORIGINAL6, CLIENT_PEER, LATER, LATER_ECHO, Line,
        OUTCOME, REPLIED, SERVER_LOCAL, SERVER_PEER, SERVER_SIZED, SERVER_SIZED6,
    },
    place::Place,
    setting::{AGENT, Agent, Proxy, Setting as PodSetting},
    world::LATER_LINE,
};
use crate::{
    options::{DNS_PROXY_PORT, SELF_MARK, TPROXY_MARK},
    protocol::{Family, Setting, Transport},
};

/// An attempt and all that was seen of it.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The pods' options and proxy.
    pub setting: &'a PodSetting,
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
        explanation: "are never reset by attach, by a change of options, or by detach. With iptables conntrack begins or ceases to look at them, and resets them; with TPROXY their packets may be dropped.",
        applies: |case, line| {
            let kept = case.redirect(LATER_ECHO) == LATER_LINE;
            let reset = case.line(LATER_ECHO).is_some_and(|line| {
                line.iptables == "ECONNRESET"
                    || case.setting.options.tproxy && line.iptables == "EAGAIN"
            });
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
        explanation: "is what the proxy sees, always. With iptables the second of two connections with one source port gets another one where both end at one listener; on Linux 6.1 it is lost.",
        applies: |case, line| {
            let real = case.redirect(CLIENT_LOCAL);
            line.what == SERVER_PEER
                && case.attempt.transport == Transport::Tcp
                && endpoint(&line.redirect) == endpoint(real)
                && endpoint(&line.iptables).0 == endpoint(real).0
        },
    },
    Known {
        name: "The agent sees a slot address",
        explanation: "in place of the pod's as the sender of a query from a UDP socket that is not connected. It answers there as to any other.",
        applies: |case, line| {
            let (shown, port) = endpoint(&line.redirect);
            line.what == SERVER_PEER
                && case.attempt.transport == Transport::Udp
                && is_slot(shown)
                && port == endpoint(&line.iptables).1
        },
    },
    Known {
        name: "The agent sees a loopback address",
        explanation: "in place of the pod's as the sender of a query from a UDP socket that the client has bound to a port, also to one of the kernel's choice, and connected.",
        applies: |case, line| {
            let (shown, port) = endpoint(&line.redirect);
            line.what == SERVER_PEER
                && case.attempt.transport == Transport::ConnectedUdp
                && case.redirect(OUTCOME) == AGENT
                && matches!(case.attempt.source, Some((Place::Any, _)))
                && ["127.0.0.1", "::1"].contains(&shown)
                && port == endpoint(&line.iptables).1
        },
    },
    Known {
        name: "The agent may be anybody,",
        explanation: "and bind the wildcard address. With iptables its UDP answers are found only if it has a proxy id and answers from loopback.",
        applies: |case, line| {
            let lost = case.line(OUTCOME).is_some_and(|line| {
                line.redirect == AGENT && line.iptables == "connected, then EAGAIN"
            });
            let untranslated =
                line.what == REPLIED && endpoint(&line.iptables).1 == DNS_PROXY_PORT.to_string();
            case.attempt.transport != Transport::Tcp
                && !case.setting.agent_has_proxy_id()
                && (lost || untranslated)
        },
    },
    Known {
        name: "Without an agent,",
        explanation: "a connected UDP socket gets `ECONNREFUSED`; with iptables it waits in vain. One that is not connected waits, also if it asked to be told of errors (`IP_RECVERR`); with iptables it is told.",
        applies: |case, line| {
            line.what == OUTCOME
                && case.setting.agent == Agent::Nowhere
                && match case.attempt.transport {
                    Transport::Tcp => false,
                    Transport::ConnectedUdp => {
                        line.iptables == "connected, then EAGAIN"
                            && line.redirect == "connected, then ECONNREFUSED"
                    }
                    Transport::Udp => {
                        line.iptables == "connected, then ECONNREFUSED"
                            && line.redirect == "connected, then EAGAIN"
                    }
                }
        },
    },
    Known {
        name: "TPROXY connections without a listener",
        explanation: "that would be captured are refused at once, if the kernel finds no listener. With iptables their packets are dropped, also if the proxy listens on `::1`: its calls to its own pod are looked for at `::6`.",
        applies: |case, _| {
            let at_loopback = case.setting.proxy == Proxy::Loopback
                && case.attempt.from.is_pod()
                && !case.attempt.family.is_ipv4();
            case.setting.options.tproxy
                && case.attempt.transport == Transport::Tcp
                && case.line(OUTCOME).is_some_and(|line| {
                    line.iptables == "TimedOut" && (line.redirect == "ECONNREFUSED" || at_loopback)
                })
        },
    },
    Known {
        name: "Connections from outside to one of several addresses of the pod",
        explanation: "reach a proxy on any of them, and its `getsockname` shows the one that was called. With iptables both are about the first address of the interface.",
        applies: |case, line| {
            // The kernel keeps IPv4 addresses in the order they were added in, and IPv6 ones in the reverse.
            let aimed_at = match case.attempt.to {
                Place::Own | Place::Second if case.attempt.family.is_ipv4() => Place::Own,
                Place::Own | Place::Second => Place::Second,
                other => other,
            };
            // REDIRECT aims at the first address of the interface that the packet came by.
            let aimed_at = if case.attempt.from == Origin::Machine {
                Place::Gateway
            } else {
                aimed_at
            };
            let dropped = case.setting.options.tproxy
                && case
                    .line(OUTCOME)
                    .is_some_and(|line| line.iptables == "TimedOut");
            let bound = case.setting.proxy == Proxy::PodAddress
                && aimed_at != Place::Own
                && case
                    .line(OUTCOME)
                    .is_some_and(|line| line.iptables == "ECONNREFUSED" || dropped);
            let shown = line.what == SERVER_LOCAL
                && case.attempt.to != aimed_at
                && endpoint(&line.redirect).0 == endpoint(case.redirect(CLIENT_PEER)).0
                && endpoint(&line.redirect).1 == endpoint(&line.iptables).1;
            !case.attempt.from.is_pod() && (bound || shown)
        },
    },
    Known {
        name: "Marked connections that leave the pod in TPROXY mode",
        explanation: "are routed as unmarked ones are: with the mark of `-t` they get no answer, or another one. With iptables the route of `-r` makes the destination local.",
        applies: |case, _| {
            let own = [Place::Own, Place::Second, Place::Other, Place::Any];
            let options = &case.setting.options;
            options.tproxy
                && !options.include_inbound.is_empty()
                && case.attempt.from.is_pod()
                && case.attempt.mark == TPROXY_MARK
                && !own.contains(&case.attempt.to)
        },
    },
    Known {
        name: "Marked connections from `::1` to the pod's own address in TPROXY mode",
        explanation: "get no answer where nobody listens, as without capture: the kernel sends its reset out of the pod. With iptables the mark of `-t` brings the reset back.",
        applies: |case, line| {
            let own = [Place::Own, Place::Second, Place::Other];
            let attempt = case.attempt;
            case.setting.options.tproxy
                && attempt.from.is_pod()
                && attempt.family == Family::V6
                && attempt.mark == TPROXY_MARK
                && own.contains(&attempt.to)
                && matches!(attempt.source, Some((Place::Localhost, _)))
                && (line.iptables.as_str(), line.redirect.as_str()) == ("ECONNREFUSED", "TimedOut")
        },
    },
    Known {
        name: "Connections with mark 1338 in TPROXY mode",
        explanation: "that are captured on their way out reach their listener, always. With iptables they reach 15006 where `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR` leaves 127.0.0.1 out: redirected there, they look like the proxy's calls to its own pod.",
        applies: |case, line| {
            let options = &case.setting.options;
            let inbound = options.inbound_listener().to_string();
            let elsewhere = [options.outbound_listener().to_string(), AGENT.to_owned()];
            line.what == OUTCOME
                && options.tproxy
                && case.attempt.from.is_pod()
                && case.attempt.family.is_ipv4()
                && case.attempt.mark == SELF_MARK
                && !options.is_loopback(Ipv4Addr::LOCALHOST)
                && [inbound.as_str(), "TimedOut"].contains(&line.iptables.as_str())
                && elsewhere.contains(&line.redirect)
        },
    },
    Known {
        name: "A marked source that is not the pod's, in TPROXY mode,",
        explanation: "gets its answer by the mark of `-t` alone. With iptables the answer is routed without it first, and gets lost if there is no route to that source, or if the proxy answers from 127.0.0.1.",
        applies: |case, _| {
            case.setting.options.tproxy
                && case.attempt.liberty == Some(Setting::Transparent)
                && case.attempt.has_foreign_source()
                && case.attempt.mark == TPROXY_MARK
                && case
                    .line(OUTCOME)
                    .is_some_and(|line| line.iptables == "TimedOut")
        },
    },
    Known {
        name: "An IPv4 source that is not the pod's, bound by `IP_FREEBIND`,",
        explanation: "is refused with the error of the destination's route, if that has one. With iptables it is refused with `ENETUNREACH`, whatever the destination.",
        applies: |case, line| {
            line.what == OUTCOME
                && case.attempt.family.is_ipv4()
                && case.attempt.liberty == Some(Setting::Freebind)
                && case.attempt.has_foreign_source()
                && line.iptables == "ENETUNREACH"
                && ["EHOSTUNREACH", "EACCES"].contains(&line.redirect.as_str())
        },
    },
];

/// Address and port of what a line shows, without the IPv4-in-IPv6 mapping; a port that the kernel drew has no number.
fn endpoint(text: &str) -> (&str, &str) {
    let (address, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let address = address.trim_matches(['[', ']']);
    (address.strip_prefix("::ffff:").unwrap_or(address), port)
}

/// Whether an address is one of 127.128.0.0/20 or 100::/116, each of which stands for a socket and a server.
fn is_slot(address: &str) -> bool {
    match address.parse() {
        Ok(IpAddr::V4(ip)) => u32::from(ip) >> 12 == u32::from(Ipv4Addr::new(127, 128, 0, 0)) >> 12,
        Ok(IpAddr::V6(ip)) => {
            let first = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0);
            u128::from(ip) >> 12 == u128::from(first) >> 12
        }
        Err(_) => false,
    }
}

/// The difference that accounts for a line, if one does.
pub fn known(case: Case<'_>, line: &Line) -> Option<&'static Known> {
    KNOWN.iter().find(|known| (known.applies)(case, line))
}
