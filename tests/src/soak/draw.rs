//! All that is random: the events of a round and the calls made in it. Each round is drawn from the seed and its number.

use std::fmt::{Display, Formatter, Result};

use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::policy::{Caller, POLICIES, ROUTES};
use crate::{play::Then, protocol::Family};

/// Something that happens to a pod.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Milliseconds after the round began.
    pub at_ms: u64,
    /// Which pod.
    pub pod: usize,
    /// What.
    pub kind: Kind,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Attach, or change the policy. Another build upgrades the programs too.
    Attach {
        /// Index of the policy; `None` keeps it.
        policy: Option<usize>,
        /// By the other build of the loader.
        other_build: bool,
        /// The loader is killed after so many microseconds.
        killed_us: Option<u64>,
    },
    /// Detach.
    Detach {
        /// The loader is killed after so many microseconds.
        killed_us: Option<u64>,
    },
    /// The proxy is killed, and started again after so many milliseconds.
    Restart {
        /// Milliseconds.
        gap_ms: u64,
    },
    /// Another process of the proxy takes over, and the one before closes its listeners.
    Handover,
    /// A process of the proxy that has closed its listeners is killed.
    Retire,
}

impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let Self { at_ms, pod, kind } = self;
        write!(f, "{at_ms:>6} ms  pod {pod}  ")?;
        let killed = |f: &mut Formatter<'_>, killed_us: Option<u64>| match killed_us {
            Some(after) => write!(f, ", killed after {after} us"),
            None => Ok(()),
        };
        match *kind {
            Kind::Attach {
                policy,
                other_build,
                killed_us,
            } => {
                let policy = policy.map_or("as it is", |policy| POLICIES[policy].name);
                let by = if other_build {
                    " by the other build"
                } else {
                    ""
                };
                write!(f, "attach: {policy}{by}")?;
                killed(f, killed_us)
            }
            Kind::Detach { killed_us } => {
                write!(f, "detach")?;
                killed(f, killed_us)
            }
            Kind::Restart { gap_ms } => write!(f, "proxy killed, started after {gap_ms} ms"),
            Kind::Handover => write!(f, "proxy handed over to another process"),
            Kind::Retire => write!(f, "former proxy killed"),
        }
    }
}

/// A connection, in terms of the pod.
#[derive(Clone, Copy, Debug)]
pub struct Drawn {
    /// Index of the route.
    pub route: usize,
    /// The kind of socket.
    pub family: Family,
    /// What is done with it.
    pub then: Then,
}

/// What one caller of a pod does.
#[derive(Clone, Debug)]
pub struct Calls {
    /// Who.
    pub caller: Caller,
    /// Connections that end at once.
    pub shorts: Vec<Drawn>,
    /// Conversations.
    pub talks: Vec<Drawn>,
}

/// Everything random of one round.
#[derive(Clone, Debug)]
pub struct Round {
    /// In the order in which they happen.
    pub events: Vec<Event>,
    /// For each pod and caller.
    pub calls: Vec<Vec<Calls>>,
    /// Which of the connections held are closed, and opened anew.
    pub renewed: Vec<Index>,
    /// Where the connections that are to be held go; taken in turn.
    pub held: Vec<Drawn>,
}

/// How much is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Pods.
    pub pods: usize,
    /// Length of a round.
    pub round_ms: u64,
    /// How many connections held are renewed in a round.
    pub renewed: usize,
}

impl Round {
    /// The round of that number.
    pub fn draw(seed: u64, number: u64, size: Size) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        let config = Config {
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner =
            TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        round(size).new_tree(&mut runner).unwrap().current()
    }
}

fn round(size: Size) -> impl Strategy<Value = Round> {
    // Some rounds without resets: their counters can be exact.
    let manners = prop_oneof![
        1 => Just(vec![Then::Close, Then::HalfClose]),
        2 => Just(vec![Then::Close, Then::HalfClose, Then::Reset, Then::Abandon]),
    ];
    let calls = manners.prop_flat_map(move |manners| {
        let of = |caller| {
            (shorts(caller, manners.clone()), talks(caller, size)).prop_map(
                move |(shorts, talks)| Calls {
                    caller,
                    shorts,
                    talks,
                },
            )
        };
        vec(Vec::from(Caller::ALL.map(of)), size.pods)
    });
    (
        vec(beginning(), size.pods),
        // Every third round or so is left alone after that.
        prop_oneof![1 => Just(Vec::new()), 2 => vec(event(size), 1..6)],
        calls,
        vec(any::<Index>(), size.renewed),
        vec(held(), 60),
    )
        .prop_map(|(beginnings, mut events, calls, renewed, held)| {
            let beginnings = beginnings.into_iter().enumerate();
            events.extend(beginnings.filter_map(|(pod, kind)| {
                Some(Event {
                    at_ms: 0,
                    pod,
                    kind: kind?,
                })
            }));
            events.sort_by_key(|event| event.at_ms);
            Round {
                events,
                calls,
                renewed,
                held,
            }
        })
}

/// Most rounds begin with pods that are attached, whatever the one before has left.
fn beginning() -> impl Strategy<Value = Option<Kind>> {
    let kind = (0..POLICIES.len()).prop_map(|policy| Kind::Attach {
        policy: Some(policy),
        other_build: false,
        killed_us: None,
    });
    prop::option::weighted(0.7, kind)
}

/// No call of the loader takes much longer, so that the kill comes at any moment of it.
const LOADER_US: u64 = 120_000;

fn event(size: Size) -> impl Strategy<Value = Event> {
    let killed = || 0..LOADER_US;
    let policy = || prop_oneof![1 => Just(None), 4 => (0..POLICIES.len()).prop_map(Some)];
    let attach = (
        policy(),
        prop::bool::weighted(0.3),
        prop::option::weighted(0.25, killed()),
    );
    let kind = prop_oneof![
        10 => attach.prop_map(|(policy, other_build, killed_us)| Kind::Attach {
            policy,
            other_build,
            killed_us,
        }),
        3 => prop::option::weighted(0.3, killed()).prop_map(|killed_us| Kind::Detach { killed_us }),
        2 => (0u64..300).prop_map(|gap_ms| Kind::Restart { gap_ms }),
        2 => Just(Kind::Handover),
        1 => Just(Kind::Retire),
    ];
    (0..size.round_ms, 0..size.pods, kind).prop_map(|(at_ms, pod, kind)| Event { at_ms, pod, kind })
}

fn shorts(caller: Caller, manners: Vec<Then>) -> impl Strategy<Value = Vec<Drawn>> {
    vec(drawn(caller, select(manners)), 64)
}

fn talks(caller: Caller, size: Size) -> impl Strategy<Value = Vec<Drawn>> {
    let longest = size.round_ms / 2;
    let then = (2u32..6).prop_flat_map(move |lines| {
        (10..longest / u64::from(lines))
            .prop_map(move |pause_ms| Then::Converse { lines, pause_ms })
    });
    vec(drawn(caller, then), 16)
}

fn drawn(caller: Caller, then: impl Strategy<Value = Then>) -> impl Strategy<Value = Drawn> {
    let routes: Vec<usize> = (0..ROUTES.len())
        .filter(|route| ROUTES[*route].caller == caller)
        .collect();
    let route =
        select(routes).prop_flat_map(|route| (Just(route), select(ROUTES[route].families())));
    (route, then).prop_map(|((route, family), then)| Drawn {
        route,
        family,
        then,
    })
}

fn held() -> impl Strategy<Value = Drawn> {
    select(&Caller::ALL[..]).prop_flat_map(|caller| drawn(caller, Just(Then::Close)))
}

/// Which of `count` things are chosen, each once.
pub fn chosen(indexes: &[Index], count: usize) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let mut chosen: Vec<usize> = indexes.iter().map(|index| index.index(count)).collect();
    chosen.sort_unstable();
    chosen.dedup();
    chosen
}
