//! The two pods, alike but for who captures, and the processes in them.

use std::{
    collections::BTreeMap,
    slice,
    time::{Duration, Instant},
};

use super::{
    attempt::{Attempt, Origin},
    observe::{Line, OUTCOME, Seen, compare},
    place::{self, Place},
    setting::{AGENT, Setting},
};
use crate::{
    actor::Actor,
    iptables::{self, Variant},
    loader,
    machine::Machine,
    options::{DNS_PROXY_PORT, Options},
    pod::Pod,
    protocol::{Answer, Dialed, Family, Identity, Listen, Request, Start},
    scene::{APP, PORTS, PROXY_PORTS, SERVICE, wildcards},
};

/// Ports of the application and of the service beside [`PORTS`].
const MORE_PORTS: [u16; 11] = [
    78, 79, 1022, 1023, 1024, 8001, 8009, 9001, 15108, 61_000, 65_534,
];
/// Ports of the service only: where a pod has its proxy.
const MORE_PROXY_PORTS: [u16; 4] = [15101, 15106, 61_001, DNS_PROXY_PORT];
/// How long new links may take.
const WARM_UP: Duration = Duration::from_secs(10);
/// What is sent over a connection that was made before attach.
pub const LATER_LINE: &str = "still there";

/// Both pods.
pub struct World {
    iptables: Side,
    redirect: Side,
    /// A third pod, attached all the time: the programs then stay loaded, which takes longer than all else.
    anchor: Pod,
    variant: Variant,
    /// What the redirect pod is given in place of the options, to see that it is noticed.
    distortion: fn(Options) -> Options,
    attached: bool,
}

impl World {
    /// Two pods that nobody captures yet.
    pub fn new(variant: Variant, distortion: fn(Options) -> Options) -> Self {
        let anchor = Pod::new();
        loader::attach(&anchor, &Options::ISTIO);
        let mut world = Self {
            iptables: Side::new(),
            redirect: Side::new(),
            anchor,
            variant,
            distortion,
            attached: false,
        };
        world.warm_up();
        world
    }

    /// Waits until the pods and their peers know each other's link addresses: new IPv6 links take a second.
    fn warm_up(&mut self) {
        let deadline = Instant::now() + WARM_UP;
        for attempt in first_attempts() {
            loop {
                let lines = self.repeat(&attempt);
                let answered = lines.iter().any(|line| {
                    line.what == OUTCOME
                        && line.iptables == line.redirect
                        && [APP, SERVICE].contains(&line.redirect.as_str())
                });
                if answered {
                    break;
                }
                assert!(Instant::now() < deadline, "{attempt:?}: {lines:?}");
            }
        }
    }

    /// The addresses, which are those of both.
    pub fn pod(&self) -> &Pod {
        &self.redirect.pod
    }

    /// Which iptables captures one of them.
    pub const fn variant(&self) -> Variant {
        self.variant
    }

    /// Takes on a setting and makes every attempt in both pods.
    pub fn play(&mut self, setting: &Setting, attempts: &[Attempt]) -> Vec<Vec<Line>> {
        let before = attempts.iter().any(|attempt| attempt.before);
        if setting.fresh || before {
            self.detach();
        }
        for side in [&mut self.iptables, &mut self.redirect] {
            side.close_proxy();
            if !setting.late {
                side.open_proxy(setting);
            }
        }
        let early = self.make(attempts, |attempt| attempt.before);
        self.attach(&setting.options);
        if setting.late {
            self.iptables.open_proxy(setting);
            self.redirect.open_proxy(setting);
        }
        let late = self.make(attempts, |attempt| !attempt.before);
        attempts
            .iter()
            .enumerate()
            .zip(early.into_iter().zip(late))
            .map(|((index, attempt), (early, late))| {
                let [iptables, redirect] = match (early, late) {
                    (Some([iptables, redirect]), _) => [
                        self.iptables.again(attempt, index, iptables),
                        self.redirect.again(attempt, index, redirect),
                    ],
                    (None, late) => seen(late.unwrap()),
                };
                compare(attempt, &iptables, &redirect)
            })
            .collect()
    }

    /// Makes one attempt in both pods at once, under the setting that is in force.
    pub fn repeat(&mut self, attempt: &Attempt) -> Vec<Line> {
        let mut made = self.make(slice::from_ref(attempt), |_| true);
        let [iptables, redirect] = seen(made.swap_remove(0).unwrap());
        compare(attempt, &iptables, &redirect)
    }

    /// Makes those that `are_due`, in both pods at once, and one process's beside another's. Those made before attach are
    /// kept open.
    fn make(
        &mut self,
        attempts: &[Attempt],
        are_due: fn(&Attempt) -> bool,
    ) -> Vec<Option<[Dialed; 2]>> {
        for side in [&mut self.iptables, &mut self.redirect] {
            for (index, attempt) in attempts.iter().enumerate() {
                if are_due(attempt) {
                    let mut dial = attempt.dial(&side.pod);
                    dial.keep = attempt.before.then(|| name(index));
                    side.dialer(attempt).order(&Request::Dial(dial));
                }
            }
        }
        let mut answer = |attempt: &Attempt| {
            [&mut self.iptables, &mut self.redirect].map(|side| {
                match side.dialer(attempt).receive() {
                    Answer::Dialed(dialed) => *dialed,
                    Answer::Failed(error) => Dialed {
                        error: Some(error),
                        ..Dialed::new()
                    },
                    other => panic!("{attempt:?}: {other:?}"),
                }
            })
        };
        // Each process answers in the order in which it was asked.
        attempts
            .iter()
            .map(|attempt| are_due(attempt).then(|| answer(attempt)))
            .collect()
    }

    fn attach(&mut self, options: &Options) {
        if self.attached {
            iptables::flush(&self.iptables.pod, self.variant);
        }
        self.attached = true;
        iptables::apply(&self.iptables.pod, options, self.variant);
        loader::attach(&self.redirect.pod, &(self.distortion)(*options));
    }

    fn detach(&mut self) {
        if std::mem::take(&mut self.attached) {
            iptables::flush(&self.iptables.pod, self.variant);
            let output = loader::detach(self.redirect.pod.cgroup.path());
            assert!(
                output.status.success(),
                "detach: {}",
                crate::namespace::errors(&output)
            );
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The rules go with their namespace; attachments would stay until the next attach.
        for pod in [&self.redirect.pod, &self.anchor] {
            drop(loader::detach(pod.cgroup.path()));
        }
    }
}

fn seen(made: [Dialed; 2]) -> [Seen; 2] {
    made.map(|dialed| Seen {
        dialed,
        later: None,
    })
}

/// What a connection made before attach is kept as.
fn name(index: usize) -> String {
    format!("before-{index}")
}

/// Over each link, in each direction and family.
fn first_attempts() -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for (from, places) in [
        (
            Origin::Pod(Identity::APP),
            [Place::Service, Place::Peer, Place::OtherPeer],
        ),
        (Origin::Peer, [Place::Own, Place::Second, Place::Other]),
        (
            Origin::Machine,
            [Place::Service, Place::Gateway, Place::Own],
        ),
    ] {
        for family in [Family::V4, Family::V6] {
            for to in places {
                attempts.push(Attempt::plain(from.clone(), family, to, 80));
            }
        }
    }
    attempts
}

/// One pod and its processes, which go before it.
struct Side {
    dialers: BTreeMap<(Origin, bool), Actor>,
    proxy: Actor,
    proxy_names: Vec<String>,
    _app: Actor,
    _service: Actor,
    machine: Machine,
    pod: Pod,
}

impl Side {
    fn new() -> Self {
        let pod = place::pod();
        let machine = place::machine(&pod);
        let inside = |role: &str, identity: Identity| {
            Actor::start(&pod.netns.path(), Some(pod.cgroup.child(role)), identity)
        };
        let proxy = Actor::start_as(Start {
            cgroup: Some(pod.cgroup.child("proxy")),
            netns: pod.netns.path(),
            // For transparent listeners.
            net_admin: true,
            identity: Identity::PROXY,
        });
        let mut app = inside("app", Identity::APP);
        let mut service = Actor::start(&pod.peer.path(), None, Identity::ROOT);
        let open = |actor: &mut Actor, name: &str, port: u16| {
            for address in wildcards(port) {
                actor.listen(Listen::new(name, address));
                actor.listen(Listen::new(name, address).udp());
            }
        };
        for port in PORTS.into_iter().chain(MORE_PORTS) {
            open(&mut app, APP, port);
            open(&mut service, SERVICE, port);
        }
        for port in PROXY_PORTS.into_iter().chain(MORE_PROXY_PORTS) {
            open(&mut service, SERVICE, port);
        }
        Self {
            dialers: BTreeMap::new(),
            proxy,
            proxy_names: Vec::new(),
            _app: app,
            _service: service,
            machine,
            pod,
        }
    }

    fn open_proxy(&mut self, setting: &Setting) {
        for port in setting.proxy_ports() {
            for mut listen in setting.proxy.listeners(&self.pod, port) {
                // iptables' TPROXY reaches only such ones.
                listen.transparent = setting.options.tproxy;
                self.proxy.listen(listen);
            }
            self.proxy_names.push(port.to_string());
        }
        for listen in setting.agent.listeners() {
            self.proxy.listen(listen);
        }
        self.proxy_names.push(AGENT.to_owned());
    }

    fn close_proxy(&mut self) {
        for name in self.proxy_names.drain(..) {
            self.proxy.unlisten(&name);
        }
    }

    /// The process that makes this attempt.
    fn dialer(&mut self, attempt: &Attempt) -> &mut Actor {
        let (pod, machine) = (&self.pod, &self.machine);
        let key = (attempt.from.clone(), attempt.is_privileged());
        self.dialers.entry(key).or_insert_with(|| {
            let (netns, cgroup, identity) = match &attempt.from {
                Origin::Pod(identity) => {
                    let cgroup = pod.cgroup.child("others");
                    (pod.netns.path(), Some(cgroup), identity.clone())
                }
                Origin::Peer => (pod.peer.path(), None, Identity::APP),
                Origin::Machine => (machine.netns.path(), None, Identity::APP),
            };
            Actor::start_as(Start {
                cgroup,
                netns,
                net_admin: attempt.is_privileged(),
                identity,
            })
        })
    }

    /// Looks again at a connection made before attach, and ends it.
    fn again(&mut self, attempt: &Attempt, index: usize, dialed: Dialed) -> Seen {
        if dialed.local.is_none() {
            return Seen {
                dialed,
                later: None,
            };
        }
        let (dialer, name) = (self.dialer(attempt), name(index));
        let echo = dialer.ask(&name, LATER_LINE);
        let later = dialer.look(&name);
        dialer.hang(&name);
        Seen {
            dialed,
            later: Some((echo, later)),
        }
    }
}
