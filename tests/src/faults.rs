//! What a call of the loader leaves when it does not end as it should: killed after a call to the kernel that changes something, or
//! refused one. Every such call has its turn, but where many in a row are alike. Connections meet the old state or the new one, and
//! the next call puts everything right.

use std::{net::SocketAddr, process::Command};

use nix::errno::Errno;

use crate::{
    bpffs::Objects,
    loader::{attach_command, finish, redirect},
    machine::{Link, Machine},
    namespace::errors,
    options::Options,
    patience::amount,
    protocol::{Dial, Dialed, Family, Identity, Listen, canonical},
    scene::{Scene, To, wildcards},
    tracer::{self, Fault, MAKING, Traced},
    traces::Traces,
};

use Family::{Mapped, V4, V6};

/// More calls than this are sampled, but for the first and last of each kind in a row.
const MOST: u32 = 120;
/// So many at most on a slow machine.
const MOST_WHEN_SLOW: u32 = 3;
/// How often a call may end before the point at which it was to be killed.
const MOST_ENDED_EARLY: usize = 5;

/// Connections whose ends tell the policy: who dials (`None` is outside), how, and where to.
const DIALS: [(Option<Identity>, Family, To); 7] = [
    (Some(Identity::APP), V4, To::Service(80)),
    (Some(Identity::APP), V6, To::Service(80)),
    (Some(Identity::APP), Mapped, To::Service(443)),
    (Some(Identity::PROXY), V4, To::Service(80)),
    (Some(Identity::PROXY), V4, To::Own(8080)),
    (None, V4, To::Own(8080)),
    (None, V6, To::Own(8080)),
];

/// Who answers a fixed set of connections: five from the pod, by the application and the proxy, and two from outside; then two
/// from the virtual machine, if there is one. A proxy that sees the original destination as its own address has [`IN_PLACE`].
pub type Ends = &'static [&'static str];

const IN_PLACE: &str = " in place";

/// Without capture.
pub const DIRECT: Ends = &[
    "service", "service", "service", "service", "app", "app", "app",
];
/// Under [`Options::ISTIO`].
pub const ISTIO: Ends = &[
    "15001", "15001", "15001", "service", "15006", "15006", "15006",
];
/// Under [`OTHER_OPTIONS`].
pub const OTHER: Ends = &[
    "16001", "16001", "service", "service", "16006", "16006", "16006",
];

/// Another policy in every respect: ports, lists and what is captured.
pub const OTHER_OPTIONS: Options = Options {
    proxy_port: "16001",
    inbound_port: "16006",
    exclude_outbound: "443",
    exclude_cidrs: "192.0.2.0/24,198.18.0.0/15",
    ..Options::ISTIO
};

/// Under [`THIRD_OPTIONS`].
pub const THIRD: Ends = &[
    "15001", "15001", "service", "service", "15006", "15006", "15006",
];
/// What a third pod has.
pub const THIRD_OPTIONS: Options = Options {
    exclude_outbound: "443",
    ..Options::ISTIO
};

/// A pod whose proxy listens where all policies say.
pub fn scene() -> Scene {
    let mut scene = Scene::new();
    for port in [16001, 16006] {
        for at in wildcards(port) {
            scene.proxy.listen(Listen::new(&port.to_string(), at));
        }
    }
    scene
}

/// Who answers now. What both ends see has to fit it.
pub fn ends(scene: &mut Scene, machine: Option<&mut Machine>) -> Result<Vec<String>, String> {
    let mut met = Vec::new();
    for (from, family, to) in DIALS {
        let to = scene.address(family, to);
        let dial = Dial::new(family, to);
        let dialed = match &from {
            Some(identity) => scene.actor(identity).dial(&dial),
            None => scene.outside.dial(&dial),
        };
        met.push(end(to, &dialed)?);
    }
    if let Some(machine) = machine {
        for family in [V4, V6] {
            let to = scene.address(family, To::Service(80));
            met.push(end(to, &machine.actor.dial(&Dial::new(family, to)))?);
        }
    }
    Ok(met)
}

fn end(to: SocketAddr, dialed: &Dialed) -> Result<String, String> {
    let who = dialed.outcome();
    let Some(greeting) = &dialed.greeting else {
        return Err(format!("{to}: {who}"));
    };
    let original = if to.is_ipv4() {
        &greeting.original
    } else {
        &greeting.original6
    };
    let captured = who.starts_with('1');
    if dialed.peer.map(canonical) != Some(to)
        || captured && original.address.map(canonical) != Some(to)
    {
        return Err(format!("{to}: wrong addresses: {dialed:?}"));
    }
    let in_place = captured && canonical(greeting.local) == to;
    Ok(who.to_owned() + if in_place { IN_PLACE } else { "" })
}

/// Connections that stand for as long as they like.
const ESTABLISHED: [&str; 2] = ["out", "in"];

pub(crate) fn establish(scene: &mut Scene) {
    let (service, own) = (
        scene.address(V4, To::Service(80)),
        scene.address(V4, To::Own(8080)),
    );
    let out = scene.app.dial(&Dial::new(V4, service).keep("out"));
    let inward = scene.outside.dial(&Dial::new(V4, own).keep("in"));
    assert!(
        out.error.is_none() && inward.error.is_none(),
        "{out:?} {inward:?}"
    );
}

pub(crate) fn converse(scene: &mut Scene, text: &str) -> Result<(), String> {
    let [out, inward] = ESTABLISHED;
    for said in [scene.app.ask(out, text), scene.outside.ask(inward, text)] {
        if said.as_deref() != Ok(text) {
            return Err(format!(
                "an established connection says {said:?} to {text:?}"
            ));
        }
    }
    Ok(())
}

/// The call that attaches.
pub fn attach(scene: &Scene, options: &Options) -> Command {
    let mut command = attach_command(&scene.pod);
    command.args(options.arguments());
    command
}

/// The call that detaches.
pub fn detach(scene: &Scene) -> Command {
    let mut command = redirect();
    command
        .arg("detach")
        .arg("--cgroup")
        .arg(scene.pod.cgroup.path());
    command
}

/// Runs a call that has nothing to complain about.
pub fn succeed(command: &mut Command) -> Result<(), String> {
    let output = finish(command);
    if output.status.success() && output.stderr.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "{command:?}: {}: {}",
            output.status,
            errors(&output)
        ))
    }
}

/// One pod of a case, and what its connections may meet.
pub struct Cast {
    /// The pod.
    pub scene: Scene,
    /// Behind [`INTERFACE`], if the pod has one.
    machine: Option<Machine>,
    /// Before the call that suffers.
    old: Ends,
    /// After it, had it succeeded.
    new: Ends,
    /// After the call that repairs.
    repaired: Ends,
}

/// The interface of the pod's virtual machine.
pub const INTERFACE: &str = "vm0";
/// Captures that machine too.
pub const MACHINE_OPTIONS: Options = Options {
    virtual_interfaces: INTERFACE,
    ..Options::ISTIO
};

impl Cast {
    /// A pod of that many policies.
    pub fn new(old: Ends, new: Ends, repaired: Ends) -> Self {
        Self {
            scene: scene(),
            machine: None,
            old,
            new,
            repaired,
        }
    }

    /// Of a pod that the case is not about.
    pub fn bystander(ends: Ends) -> Self {
        Self::new(ends, ends, ends)
    }

    /// With a virtual machine in the pod.
    pub fn with_machine(mut self) -> Self {
        self.machine = Some(Machine::new(&self.scene.pod, INTERFACE, 1, Link::Plain));
        self
    }

    fn old_or_new(&self) -> Vec<Ends> {
        vec![self.old, self.new]
    }

    fn establish(&mut self) {
        establish(&mut self.scene);
        if let Some(machine) = &mut self.machine {
            let service = self.scene.address(V4, To::Service(80));
            let dialed = machine.actor.dial(&Dial::new(V4, service).keep("out"));
            assert!(dialed.error.is_none(), "{dialed:?}");
        }
    }

    fn converse(&mut self, text: &str) -> Result<(), String> {
        converse(&mut self.scene, text)?;
        // What has been captured of a machine needs its filters as long as it lasts.
        let lasts = self.old.last() == self.new.last() || self.old.last() == DIRECT.first();
        match &mut self.machine {
            Some(machine) if lasts => {
                let said = machine.actor.ask("out", text);
                (said.as_deref() == Ok(text)).then_some(()).ok_or_else(|| {
                    format!("an established connection of the machine says {said:?} to {text:?}")
                })
            }
            _ => Ok(()),
        }
    }
}

/// A situation, and the call of the loader that suffers in it.
pub struct Case<'a> {
    /// The pods; the first is the one that the call is about.
    pub casts: Vec<Cast>,
    /// Brings the machine from the rest state to the old one.
    pub prepare: &'a dyn Fn(&[Cast]),
    /// The call that suffers.
    pub command: &'a dyn Fn(&[Cast]) -> Command,
    /// The call after that.
    pub repair: &'a dyn Fn(&[Cast]) -> Command,
    /// Brings the machine back to the rest state.
    pub restore: &'a dyn Fn(&[Cast]),
}

/// What the loader's call suffers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Suffers {
    /// SIGKILL after one of its calls to the kernel.
    Kill,
    /// An error in the place of one of them.
    Refusal,
}

/// What the kernel says when it is asked too much or the caller may too little. Each call is refused with one of them, in turn.
const REFUSALS: [Errno; 4] = [Errno::ENOMEM, Errno::EPERM, Errno::ENOSPC, Errno::E2BIG];

impl Suffers {
    pub(crate) fn fault(self, point: usize) -> Fault {
        match self {
            Self::Kill => Fault::Kill { after: point },
            Self::Refusal => Fault::Refuse {
                call: point,
                error: REFUSALS[point % REFUSALS.len()],
            },
        }
    }

    /// Being killed when an object has been made is the same as being killed after the call before.
    pub(crate) fn minds(self, call: &str) -> bool {
        self == Self::Refusal || !MAKING.contains(&call)
    }
}

/// What came of the points so far.
#[derive(Debug, Default)]
struct Tally {
    /// Connections of its run left fewer entries to remove than those of the run that was counted.
    ended_early: usize,
    /// Calls that failed for what they were refused.
    failed: usize,
}

impl Case<'_> {
    fn traces(&self) -> Traces {
        Traces::read(self.casts.iter().map(|cast| &cast.scene))
    }

    /// Has the call suffer at every point, one after another, where `at` holds for the call to the kernel.
    pub fn endure(mut self, suffers: Suffers, at: fn(&str) -> bool) {
        let rest = self.traces();
        let resting = Objects::pinned();
        let wanted = self.undisturbed(self.repair, |cast| cast.repaired).1;
        let calls = self.undisturbed(self.command, |cast| cast.new).0;
        let points = points(&calls, |call| suffers.minds(call) && at(call));
        eprintln!("{suffers:?} at {} of {} calls", points.len(), calls.len());
        assert!(!points.is_empty(), "{calls:?}");
        let (mut wrong, mut tally) = (Vec::new(), Tally::default());
        for &point in &points {
            let fault = suffers.fault(point);
            let name = format!("{fault:?} of {}, {}", calls.len(), calls[point - 1]);
            let result = match suffers {
                Suffers::Kill => self.kill(fault, &mut tally),
                Suffers::Refusal => self.refuse(fault, &mut tally),
            };
            let mended = self.mend(&wanted);
            for error in [result, mended].into_iter().filter_map(Result::err) {
                wrong.push(format!("{name}: {error}"));
            }
            let used = Objects::pinned().without(&resting);
            (self.restore)(&self.casts);
            let left = self.traces().differences(&rest);
            if !left.is_empty() {
                wrong.push(format!("{name}, then removed: {}", left.join(", ")));
            }
            let alive = used.wait_until_freed();
            if !alive.is_empty() {
                wrong.push(format!("{name}, then removed: still loaded: {alive:?}"));
            }
            assert!(wrong.len() < 8, "and so on:\n{}", wrong.join("\n"));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        eprintln!("{suffers:?}: {tally:?} of {}", points.len());
        // In every case about half do at least. Of the three on a slow machine, one.
        assert!(
            suffers == Suffers::Kill
                || tally.failed * 3 > points.len()
                || points.len() == MOST_WHEN_SLOW as usize && tally.failed == 1,
            "hardly any call fails: {tally:?}"
        );
    }

    /// What a call does when nothing disturbs it: its calls to the kernel, and the state it leaves.
    fn undisturbed(
        &mut self,
        command: &dyn Fn(&[Cast]) -> Command,
        ends: fn(&Cast) -> Ends,
    ) -> (Vec<String>, Traces) {
        (self.prepare)(&self.casts);
        self.meet("before", |cast| vec![cast.old]).unwrap();
        let traced = tracer::run(&command(&self.casts), None);
        assert_eq!(traced.code, Some(0), "{}", traced.errors);
        self.meet("after", |cast| vec![ends(cast)]).unwrap();
        let state = self.traces();
        (self.restore)(&self.casts);
        (traced.calls, state)
    }

    fn suffer(&mut self, fault: Fault, tally: &mut Tally) -> Result<Traced, String> {
        (self.prepare)(&self.casts);
        self.casts.iter_mut().for_each(Cast::establish);
        let traced = tracer::run(&(self.command)(&self.casts), Some(fault));
        if !traced.struck {
            tally.ended_early += 1;
            if traced.code != Some(0) || tally.ended_early > MOST_ENDED_EARLY {
                return Err(format!("never came to it: {traced:?}"));
            }
        }
        Ok(traced)
    }

    fn kill(&mut self, fault: Fault, tally: &mut Tally) -> Result<(), String> {
        let traced = self.suffer(fault, tally)?;
        if traced.struck && traced.code.is_some() {
            return Err(format!("it ended: {:?} {}", traced.code, traced.errors));
        }
        self.meet("killed", Cast::old_or_new)
    }

    /// A call that fails says why in one line; one that can do without what it was refused succeeds.
    fn refuse(&mut self, fault: Fault, tally: &mut Tally) -> Result<(), String> {
        let traced = self.suffer(fault, tally)?;
        let errors = traced.errors;
        match traced.code {
            Some(0) => self.meet("refused", |cast| vec![cast.new]),
            Some(1) if errors.lines().count() == 1 && errors.starts_with("redirect: ") => {
                tally.failed += 1;
                self.meet("refused", Cast::old_or_new)
                    .map_err(|error| format!("{error}: {errors}"))
            }
            code => Err(format!("it ended: {code:?} {errors}")),
        }
    }

    fn mend(&mut self, wanted: &Traces) -> Result<(), String> {
        self.converse("disturbed")?;
        succeed(redirect().arg("status")).or_else(only_a_warning)?;
        succeed(&mut (self.repair)(&self.casts))?;
        let differences = self.traces().differences(wanted);
        if !differences.is_empty() {
            return Err(format!("repaired: {}", differences.join(", ")));
        }
        self.meet("repaired", |cast| vec![cast.repaired])?;
        self.converse("repaired")
    }

    fn converse(&mut self, when: &str) -> Result<(), String> {
        self.casts
            .iter_mut()
            .try_for_each(|cast| cast.converse(when))
    }

    /// Compares all connections with any of the ends that are allowed.
    fn meet(&mut self, when: &str, allowed: impl Fn(&Cast) -> Vec<Ends>) -> Result<(), String> {
        for cast in &mut self.casts {
            let allowed = allowed(cast);
            let met = ends(&mut cast.scene, cast.machine.as_mut())
                .map_err(|error| format!("{when}: {error}"))?;
            if !allowed.iter().any(|ends| met == **ends) {
                return Err(format!("{when}: {met:?}, allowed are {allowed:?}"));
            }
        }
        Ok(())
    }
}

/// Status says so where an attach was interrupted.
fn only_a_warning(error: String) -> Result<(), String> {
    if error.contains("exit status: 0") && error.contains("interrupted") {
        Ok(())
    } else {
        Err(error)
    }
}

/// Which calls are meant, counted from 1.
fn points(calls: &[String], meant: impl Fn(&str) -> bool) -> Vec<usize> {
    let step = calls.len().div_ceil(MOST as usize);
    let differs = |a: usize, b: usize| calls.get(a) != calls.get(b);
    let points: Vec<usize> = (0..calls.len())
        .filter(|&i| meant(&calls[i]))
        .filter(|&i| i % step == 0 || differs(i, i + 1) || i == 0 || differs(i, i - 1))
        .map(|i| i + 1)
        .collect();
    let most = amount(u32::MAX, MOST_WHEN_SLOW) as usize;
    let step = points.len().div_ceil(most).max(1);
    // From the middle of the first step: a call's first ones are not like most.
    points.into_iter().skip(step / 2).step_by(step).collect()
}

/// About so many of the calls that last, counted from 1, at equal distances, and the last one: what is done then is done.
pub fn sample(calls: &[String], most: u32) -> Vec<usize> {
    let lasting = (1..=calls.len()).filter(|point| Suffers::Kill.minds(&calls[point - 1]));
    let lasting: Vec<usize> = lasting.collect();
    let most = amount(most, MOST_WHEN_SLOW) as usize;
    let step = lasting.len().div_ceil(most).max(1);
    let mut chosen: Vec<usize> = lasting.iter().copied().step_by(step).collect();
    chosen.extend(lasting.last());
    chosen.dedup();
    chosen
}

/// Runs a call that has to succeed.
pub fn run(command: &mut Command) {
    succeed(command).unwrap();
}
