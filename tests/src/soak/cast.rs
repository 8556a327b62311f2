//! A pod under load: who connects, who holds, who serves, and the proxy, process by process.

use std::collections::BTreeMap;

use super::{
    draw::Drawn,
    history::{History, Outage, State},
    policy::{APP_PORTS, Caller, PROXY_PORTS, ROUTES, SERVICE_PORTS},
};
use crate::{
    actor::Actor,
    loader,
    play::{Call, Ends, Then, now},
    pod::Pod,
    protocol::{Dial, Identity, Listen, Manner},
    scene::{APP, Lands, SERVICE, wildcards},
};

/// A machine that is busy with other things answers late, and that is not what is tested.
const PATIENCE_MS: u64 = 20_000;

/// A process of the proxy.
pub struct Generation {
    /// Its number, which its listeners' names end in.
    pub number: u32,
    /// The process.
    pub actor: Actor,
    /// Whether it has not closed its listeners.
    pub listens: bool,
    /// How many descriptors it has without any connection.
    idle_descriptors: usize,
}

/// A connection that is held.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// What its ends told at first.
    pub ends: Ends,
    /// The attachment it was made in.
    pub life: Option<u32>,
    /// Who holds its other end.
    pub server: Server,
}

/// Who has accepted a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Server {
    /// The application.
    App,
    /// The service outside.
    Service,
    /// That process of the proxy.
    Proxy(u32),
}

/// A pod and its cast.
pub struct Cast {
    /// Its connecting processes.
    pub callers: BTreeMap<Caller, Actor>,
    /// Those that hold connections.
    pub holders: BTreeMap<Caller, Actor>,
    /// The application's server.
    pub app: Actor,
    /// The service outside.
    pub service: Actor,
    /// Living processes of the proxy; the last one listens.
    pub proxies: Vec<Generation>,
    /// Descriptors of [`Self::steady`] without any connection.
    idle_descriptors: Vec<usize>,
    idle_proxy: Option<usize>,
    /// The connections held.
    pub held: BTreeMap<(Caller, u32), Note>,
    /// How the pod was captured.
    pub history: History,
    /// Whether the other build of the loader has attached it last.
    pub other_build: bool,
    generations: u32,
    numbers: u32,
    retransmitted: u64,
    /// The pod.
    pub pod: Pod,
}

impl Cast {
    /// A pod that is not attached, where all listen and nobody has connected.
    pub fn new() -> Self {
        let pod = Pod::new();
        let start = |role: &str, caller: Caller| match caller.identity() {
            Some(identity) => {
                Actor::start(&pod.netns.path(), Some(pod.cgroup.child(role)), identity)
            }
            None => Actor::start(&pod.peer.path(), None, Identity::ROOT),
        };
        let all = |role| Caller::ALL.map(|caller| (caller, start(role, caller)));
        let (mut app, mut service) = (start("app", Caller::App), start("", Caller::Outside));
        listen(&mut app, APP, &APP_PORTS, 1);
        listen(&mut service, SERVICE, &SERVICE_PORTS, 1);
        let mut cast = Self {
            callers: all("callers").into(),
            holders: all("holders").into(),
            app,
            service,
            proxies: Vec::new(),
            idle_descriptors: Vec::new(),
            idle_proxy: None,
            held: BTreeMap::new(),
            history: History::new(),
            other_build: false,
            generations: 0,
            numbers: 0,
            retransmitted: 0,
            pod,
        };
        cast.start_proxy();
        cast.idle_descriptors = cast.steady().map(descriptors).collect();
        cast
    }

    /// The processes that live as long as the pod.
    pub fn steady(&self) -> impl Iterator<Item = &Actor> {
        let callers = self.callers.values().chain(self.holders.values());
        callers.chain([&self.app, &self.service])
    }

    /// Starts another process of the proxy, beside those that are there.
    pub fn start_proxy(&mut self) {
        self.generations += 1;
        let number = self.generations;
        let cgroup = Some(self.pod.cgroup.child("proxy"));
        let mut actor = Actor::start(&self.pod.netns.path(), cgroup, Identity::PROXY);
        for port in PROXY_PORTS {
            // The group is shared by processes: a plain socket could not join.
            listen(&mut actor, &format!("{port}#{number}"), &[port], 2);
        }
        // Later ones have connections as soon as they listen.
        let idle_descriptors = *self.idle_proxy.get_or_insert_with(|| descriptors(&actor));
        self.proxies.push(Generation {
            number,
            actor,
            listens: true,
            idle_descriptors,
        });
    }

    /// Kills all processes of the proxy.
    pub fn kill_proxies(&mut self) {
        for generation in self.proxies.drain(..) {
            self.history.death(generation.number);
            drop(generation.actor);
        }
    }

    /// Kills those processes of the proxy that have closed their listeners.
    pub fn retire(&mut self) {
        for generation in self
            .proxies
            .extract_if(.., |generation| !generation.listens)
        {
            self.history.death(generation.number);
            drop(generation.actor);
        }
    }

    /// Starts another process of the proxy, and closes the listeners of the one before.
    pub fn hand_over(&mut self) {
        self.retire();
        self.start_proxy();
        let begun = now();
        let before = self.proxies.len() - 1;
        for generation in &mut self.proxies[..before] {
            for port in PROXY_PORTS {
                let name = format!("{port}#{}", generation.number);
                generation.actor.unlisten(&name);
            }
            generation.listens = false;
            // Listeners are gone from what it has while idle.
            generation.idle_descriptors -= PROXY_PORTS.len() * 2 * LISTENER_DESCRIPTORS;
        }
        self.history.outage(begun, Outage::Handover);
    }

    /// What was drawn, as a call in this pod.
    pub fn call(&self, drawn: &Drawn) -> Call {
        let route = &ROUTES[drawn.route];
        let mut dial = Dial::new(drawn.family, route.to.address(&self.pod, drawn.family));
        dial = dial.timeout_ms(PATIENCE_MS);
        dial.bind = route.attempt(Lands::Direct).bind;
        dial.reset = drawn.then == Then::Reset;
        Call {
            dial,
            then: drawn.then,
        }
    }

    /// A number for another connection that is held.
    pub fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// How many descriptors a process of [`Self::steady`] has too many, or too few; with its place there.
    pub fn stray_descriptors(&self) -> Vec<String> {
        let by_holder = |caller: &Caller| self.held.keys().filter(|key| key.0 == *caller).count();
        let by_server = |server| {
            self.held
                .values()
                .filter(|note| note.server == server)
                .count()
        };
        let callers = Caller::ALL
            .iter()
            .map(|caller| (format!("caller {caller:?}"), 0));
        let holders = Caller::ALL
            .iter()
            .map(|caller| (format!("holder {caller:?}"), by_holder(caller)));
        let servers = [Server::App, Server::Service]
            .map(|server| (format!("server {server:?}"), by_server(server)));
        let steady = callers
            .chain(holders)
            .chain(servers)
            .zip(self.steady().zip(&self.idle_descriptors))
            .map(|((name, held), (actor, idle))| (name, actor, idle + held));
        let proxies = self.proxies.iter().map(|generation| {
            let Generation {
                number,
                actor,
                idle_descriptors,
                ..
            } = generation;
            let held = by_server(Server::Proxy(*number));
            (format!("proxy {number}"), actor, idle_descriptors + held)
        });
        steady
            .chain(proxies)
            .filter(|(_, actor, wanted)| descriptors(actor) != *wanted)
            .map(|(name, actor, wanted)| {
                format!(
                    "{name} has {} descriptors, not {wanted}",
                    descriptors(actor)
                )
            })
            .collect()
    }

    /// The processes in the pod's namespace, without the proxy.
    pub fn inside(&self) -> impl Iterator<Item = (String, &Actor)> {
        let callers = self
            .callers
            .iter()
            .map(|(caller, actor)| (format!("caller {caller:?}"), actor));
        let holders = self
            .holders
            .iter()
            .map(|(caller, actor)| (format!("holder {caller:?}"), actor));
        let all = callers
            .chain(holders)
            .chain([("app".to_owned(), &self.app)]);
        all.filter(|(name, _)| !name.ends_with("Outside"))
    }

    /// How many segments were sent again, by the pod and to it, since the last time.
    pub fn retransmitted(&mut self) -> u64 {
        let ends = [&self.pod.netns, &self.pod.peer];
        let all = ends.map(|end| end.enter(retransmitted)).iter().sum();
        all - std::mem::replace(&mut self.retransmitted, all)
    }

    /// Whether it is attached, as far as that is known.
    pub fn is_attached(&self) -> Option<bool> {
        let settled = self.history.settled()?;
        Some(settled != State::Detached)
    }
}

impl Default for Cast {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Cast {
    fn drop(&mut self) {
        // Whatever a failure has left of it.
        if self.history.current() != [State::Detached] {
            drop(loader::detach(self.pod.cgroup.path()));
        }
    }
}

/// A multiplexed listener is held twice: by whoever accepts, and by whoever closes it.
const LISTENER_DESCRIPTORS: usize = 2 * 2;

fn listen(actor: &mut Actor, who: &str, ports: &[u16], sockets: usize) {
    for port in ports {
        for at in wildcards(*port) {
            let listen = Listen::new(who, at).manner(Manner::Multiplex);
            actor.listen(listen.reuseport(sockets));
        }
    }
}

fn descriptors(actor: &Actor) -> usize {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", actor.pid()));
    entries.map_or(0, Iterator::count)
}

/// `RetransSegs` of this thread's network namespace.
fn retransmitted() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    // A line of names, then one of values.
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut both = names.split(' ').zip(values.split(' '));
    let (_, value) = both.find(|(name, _)| *name == "RetransSegs").unwrap();
    value.parse().unwrap()
}
