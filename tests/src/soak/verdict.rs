//! Whether a connection ended where it had to, and what it adds to the counters.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::{
    cast::{Cast, Server},
    draw::Drawn,
    history::{Outage, State},
    policy::{CLOSED, Caller, POLICIES, ROUTES},
};
use crate::{
    backend::Backend,
    judge::Judge,
    options::Options,
    play::{CHANGED, Played, Then},
    protocol::Dialed,
    scene::{APP, Lands, SERVICE},
};

/// A captured connection that finds no proxy.
const NO_LISTENER: &str = "no-proxy-listener";
/// A connection that is reset may leave so many segments behind that find no socket: a program cannot tell
/// them from the first one of a connection, so they are decided upon and counted.
const STRAYS: u64 = 4;
/// And so many that are not reset, in any round: an acknowledgement may be sent twice, and then come after its connection has gone.
const STRAYS_OF_A_ROUND: u64 = 3;
/// How a connection fails whose proxy is away.
const BROKEN: [&str; 4] = ["ECONNREFUSED", "ECONNRESET", "UnexpectedEof", "EPIPE"];
/// What shutdown() says of a connection that has just been reset.
const SHUT_AFTER_RESET: &str = "ENOTCONN";

/// What came of a connection that is as it should be.
pub struct Verdict {
    /// Who has it.
    pub server: Option<Server>,
    /// The attachment it was made in, if that is known.
    pub life: Option<u32>,
    /// Whether its proxy was away.
    pub excused: bool,
}

/// What a pod's counters may say, from the connections made since they were last looked at.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    lives: BTreeMap<u32, Bounds>,
    strays: u64,
    /// Strays of the time before: the last of them may come late.
    earlier: u64,
    broken: u64,
}

/// At least and at most so many connections, by rule.
#[derive(Clone, Debug, Default)]
struct Bounds {
    least: BTreeMap<&'static str, u64>,
    most: BTreeMap<&'static str, u64>,
}

fn is_inbound(label: &str) -> bool {
    label.starts_with("inbound-")
}

impl Tally {
    /// Where the counters of that attachment, less what they were, say something else.
    pub fn differences(&self, life: u32, counted: &BTreeMap<String, u64>) -> Vec<String> {
        let bounds = self.lives.get(&life).cloned().unwrap_or_default();
        let mut labels: BTreeSet<&str> = bounds.most.keys().copied().collect();
        labels.extend(counted.keys().map(String::as_str));
        let get = |of: &BTreeMap<&'static str, u64>, label| of.get(label).copied().unwrap_or(0);
        labels
            .into_iter()
            .filter_map(|label| {
                let is = counted.get(label).copied().unwrap_or(0);
                let least = get(&bounds.least, label);
                let more = match label {
                    NO_LISTENER => self.broken,
                    _ if is_inbound(label) => self.strays + self.earlier + STRAYS_OF_A_ROUND,
                    _ => 0,
                };
                let most = get(&bounds.most, label) + more;
                let fits = (least..=most).contains(&is);
                (!fits).then(|| format!("{label} counts {is} connections, not {least} to {most}"))
            })
            .collect()
    }

    /// To go on with once the counters have been compared.
    pub fn next(&self) -> Self {
        Self {
            earlier: self.strays,
            ..Self::default()
        }
    }

    /// Whether that attachment's counters can say one thing only, but for strays of any round.
    pub fn is_exact(&self, life: u32) -> bool {
        self.is_exact_of(life, |_| true) && self.strays + self.earlier + self.broken == 0
    }

    /// The same of those counters that nothing is counted by which comes late.
    pub fn is_exact_outbound(&self, life: u32) -> bool {
        self.is_exact_of(life, |label| !is_inbound(label)) && self.broken == 0
    }

    fn is_exact_of(&self, life: u32, counts: fn(&str) -> bool) -> bool {
        let Some(bounds) = self.lives.get(&life) else {
            return false;
        };
        let mut labels = bounds.most.iter().filter(|(label, _)| counts(label));
        labels.all(|(label, most)| bounds.least.get(label) == Some(most))
    }

    /// So many connections have been closed all at once: the last segment of each may come after it has gone.
    pub const fn released(&mut self, connections: usize) {
        self.strays += connections as u64;
    }

    /// So many segments were sent again: one may have come after its connection had gone.
    pub const fn retransmitted(&mut self, segments: u64) {
        self.strays += segments;
    }

    /// A connection that was there has been broken off.
    pub fn broken(&mut self) {
        self.strays += STRAYS;
        self.broken += STRAYS;
    }

    fn add(&mut self, drawn: &Drawn, fits: &BTreeSet<(Option<u32>, &'static str)>, broken: bool) {
        for (life, label) in fits {
            let Some(life) = life else { continue };
            let bounds = self.lives.entry(*life).or_default();
            *bounds.most.entry(label).or_default() += 1;
            // While the proxy goes, another packet than the first one may have been answered.
            if fits.len() == 1 && !broken {
                *bounds.least.entry(label).or_default() += 1;
            }
        }
        if broken {
            self.broken();
        } else if matches!(drawn.then, Then::Reset | Then::Abandon) {
            self.strays += STRAYS;
        }
    }
}

/// Judges one call. An error tells what is wrong.
pub fn judge(
    cast: &Cast,
    drawn: &Drawn,
    played: &Played,
    tally: &mut Tally,
) -> Result<Verdict, String> {
    let states = cast.history.possible(played.began, played.greeted);
    let mut wrong = Vec::new();
    let mut fits: BTreeSet<(Option<u32>, &'static str)> = BTreeSet::new();
    let (dialed, server) = named(&played.dialed);
    let broken = broken(cast, played, server);
    for state in states {
        let (lands, label) = expected(state, drawn);
        let verdict = if drawn.then == Then::Abandon {
            played.dialed.error.clone().map_or(Ok(()), Err)
        } else if lands != Lands::Direct && dialed.greeting.is_none() && broken {
            Ok(())
        } else {
            ends(cast, drawn, played, &dialed, state)
        };
        match verdict {
            Ok(()) => drop(fits.insert((state.life(), label))),
            Err(why) => wrong.push(format!("{state:?}, {lands:?}: {why}")),
        }
    }
    tally.add(drawn, &fits, broken);
    if fits.is_empty() {
        return Err(wrong.join("\n      "));
    }
    if let Err(why) = &played.afterwards {
        let excused = if why.starts_with(CHANGED) {
            let states = cast.history.possible(played.began, played.ended);
            let lives: BTreeSet<_> = states.iter().map(|state| state.life()).collect();
            lives.len() > 1 || cast.history.ending(played.began, played.ended)
        } else {
            let died = |number| cast.history.died_by(number, played.ended);
            (BROKEN.contains(&why.as_str()) || why == SHUT_AFTER_RESET)
                && matches!(server, Some(Server::Proxy(number)) if died(number))
        };
        if !excused {
            return Err(format!("answered by {server:?}, afterwards: {why}"));
        }
        tally.broken();
    }
    let mut lives = fits.iter().map(|(life, _)| *life);
    let life = lives.next().flatten();
    Ok(Verdict {
        server,
        life: lives.all(|other| other == life).then_some(life).flatten(),
        excused: broken,
    })
}

/// Where a connection ends, and what counts it.
fn expected(state: State, drawn: &Drawn) -> (Lands, &'static str) {
    match state {
        State::Detached => (Lands::Direct, ""),
        State::Attached { policy, .. } => {
            POLICIES[policy].expected(&ROUTES[drawn.route], drawn.family)
        }
    }
}

fn options_in(state: State) -> &'static Options {
    match state {
        State::Detached => &Options::ISTIO,
        State::Attached { policy, .. } => &POLICIES[policy].options,
    }
}

/// Whether capture may have changed between REDIRECT and TPROXY while that call was made.
fn changes_mode(cast: &Cast, played: &Played) -> bool {
    let states = cast.history.possible(played.began, played.greeted);
    let attached = states.iter().filter(|state| **state != State::Detached);
    let modes: BTreeSet<bool> = attached.map(|state| options_in(*state).tproxy).collect();
    modes.len() > 1
}

/// Compares both ends with what they are to see in that state.
fn ends(
    cast: &Cast,
    drawn: &Drawn,
    played: &Played,
    dialed: &Dialed,
    state: State,
) -> Result<(), String> {
    let route = &ROUTES[drawn.route];
    let (lands, _) = expected(state, drawn);
    if lands == Lands::Direct && route.to.port() == CLOSED {
        return if dialed.outcome() == "ECONNREFUSED" {
            Ok(())
        } else {
            Err(format!("nobody listens there, and it ends {dialed:?}"))
        };
    }
    let options = options_in(state);
    let judge = Judge {
        pod: &cast.pod,
        options,
        attached: (state != State::Detached).then_some(Backend::Redirect),
    };
    let to: SocketAddr = route.to.address(&cast.pod, drawn.family);
    let see = |lands| judge.judge(dialed, to, &route.attempt(lands));
    let Err(why) = see(lands) else { return Ok(()) };
    if changes_mode(cast, played) && route.caller == Caller::Outside {
        // Taken as the first packet found it, and shown as the end of the handshake did.
        let in_other_mode = match lands {
            Lands::Inbound => Some(Lands::InPlace),
            Lands::InPlace => Some(Lands::Inbound),
            Lands::Direct | Lands::Outbound => None,
        };
        if in_other_mode.is_some_and(|lands| see(lands).is_ok()) {
            return Ok(());
        }
    }
    if cast.history.ending(played.began, played.greeted) {
        // Nothing is emulated any more: only where it ended can be told.
        let excused = match lands {
            Lands::Direct => why.starts_with("SO_ORIGINAL_DST is None"),
            Lands::Outbound => dialed.outcome() == options.outbound_listener().to_string(),
            Lands::Inbound | Lands::InPlace => {
                dialed.outcome() == options.inbound_listener().to_string()
            }
        };
        if excused {
            return Ok(());
        }
    }
    Err(format!("{why}\n      {dialed:?}"))
}

/// The proxy's processes have names of their own; the check of a connection knows ports.
fn named(dialed: &Dialed) -> (Dialed, Option<Server>) {
    let mut dialed = dialed.clone();
    let Some(greeting) = &mut dialed.greeting else {
        return (dialed, None);
    };
    let server = match greeting.who.split_once('#') {
        Some((port, number)) => {
            let number = number.parse().unwrap();
            greeting.who = port.to_owned();
            Some(Server::Proxy(number))
        }
        None if greeting.who == APP => Some(Server::App),
        None if greeting.who == SERVICE => Some(Server::Service),
        None => None,
    };
    (dialed, server)
}

/// Whether it has failed in a way and at a time when the proxy was away.
fn broken(cast: &Cast, played: &Played, server: Option<Server>) -> bool {
    let Some(error) = played.dialed.error.as_deref() else {
        return false;
    };
    if server.is_some() || !BROKEN.contains(&error) {
        return false;
    }
    let mut outages = cast.history.outages(played.began, played.greeted);
    outages.any(|outage| outage == Outage::Killed || error != "ECONNREFUSED")
}
