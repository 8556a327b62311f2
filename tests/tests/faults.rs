//! The loader is killed after every single call that changes something: connections meet the old state or the new one, and the
//! next call puts everything right.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::process::Command;

use redirect_tests::{
    bpffs::{self, Objects, State},
    loader::{self, OtherBuild, attach_by, attach_command, finish, redirect},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen, canonical},
    scene::{Scene, To, wildcards},
    tracer,
};
use rstest::rstest;

use Family::{Mapped, V4, V6};

/// More calls than this are sampled, but for the first and last of each kind in a row.
const MOST: usize = 120;
/// How often a call may end before the point at which it was to be killed.
const MOST_ENDED_EARLY: usize = 5;

const DIAL_COUNT: usize = 7;

/// Connections whose ends tell the policy: who dials (`None` is outside), how, and where to.
const DIALS: [(Option<Identity>, Family, To); DIAL_COUNT] = [
    (Some(Identity::APP), V4, To::Service(80)),
    (Some(Identity::APP), V6, To::Service(80)),
    (Some(Identity::APP), Mapped, To::Service(443)),
    (Some(Identity::PROXY), V4, To::Service(80)),
    (Some(Identity::PROXY), V4, To::Own(8080)),
    (None, V4, To::Own(8080)),
    (None, V6, To::Own(8080)),
];

/// Who answers [`DIALS`].
type Ends = [&'static str; DIAL_COUNT];

const DIRECT: Ends = [
    "service", "service", "service", "service", "app", "app", "app",
];
const ISTIO: Ends = [
    "15001", "15001", "15001", "service", "15006", "15006", "15006",
];
const OTHER: Ends = [
    "16001", "16001", "service", "service", "16006", "16006", "16006",
];

/// Another policy in every respect: ports, lists and what is captured.
const OTHER_OPTIONS: Options = Options {
    proxy_port: "16001",
    inbound_port: "16006",
    exclude_outbound: "443",
    exclude_cidrs: "192.0.2.0/24,198.18.0.0/15",
    ..Options::ISTIO
};

/// A third one, of the pods that are not meant.
const THIRD: Ends = [
    "15001", "15001", "service", "service", "15006", "15006", "15006",
];
const THIRD_OPTIONS: Options = Options {
    exclude_outbound: "443",
    ..Options::ISTIO
};

/// A pod whose proxy listens where both policies say.
fn scene() -> Scene {
    let mut scene = Scene::new();
    for port in [16001, 16006] {
        for at in wildcards(port) {
            scene.proxy.listen(Listen::new(&port.to_string(), at));
        }
    }
    scene
}

/// Who answers now. What both ends see has to fit it.
fn ends(scene: &mut Scene) -> Result<Vec<String>, String> {
    DIALS
        .iter()
        .map(|(from, family, to)| {
            let to = scene.address(*family, *to);
            let dial = Dial::new(*family, to);
            let dialed = match from {
                Some(identity) => scene.actor(identity).dial(&dial),
                None => scene.outside.dial(&dial),
            };
            let who = dialed.outcome().to_owned();
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
            Ok(who)
        })
        .collect()
}

/// Connections that stand for as long as they like.
const ESTABLISHED: [&str; 2] = ["out", "in"];

fn establish(scene: &mut Scene) {
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

fn converse(scene: &mut Scene, text: &str) -> Result<(), String> {
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

fn attach(scene: &Scene, options: &Options) -> Command {
    let mut command = attach_command(&scene.pod);
    command.args(options.arguments());
    command
}

fn detach(scene: &Scene) -> Command {
    let mut command = redirect();
    command
        .arg("detach")
        .arg("--cgroup")
        .arg(scene.pod.cgroup.path());
    command
}

fn succeed(command: &mut Command) -> Result<(), String> {
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
struct Cast {
    scene: Scene,
    /// Before the call that is killed.
    old: Ends,
    /// After it, had it not been killed.
    new: Ends,
    /// After the call that repairs.
    repaired: Ends,
}

impl Cast {
    fn new(old: Ends, new: Ends, repaired: Ends) -> Self {
        Self {
            scene: scene(),
            old,
            new,
            repaired,
        }
    }

    /// Of a pod that the case is not about.
    fn bystander(ends: Ends) -> Self {
        Self::new(ends, ends, ends)
    }
}

/// A call of the loader and what it is to be killed in.
struct Case<'a> {
    /// The pods; the first is the one that the call is about.
    casts: Vec<Cast>,
    /// How often the call has ended before it could be killed.
    ended_early: usize,
    /// Brings the machine from the rest state to the old one.
    prepare: &'a dyn Fn(&[Cast]),
    /// The call that is killed.
    command: &'a dyn Fn(&[Cast]) -> Command,
    /// Where it is killed.
    kills: fn(&str) -> bool,
    /// The call after that.
    repair: &'a dyn Fn(&[Cast]) -> Command,
    /// Brings the machine back to the rest state.
    restore: &'a dyn Fn(&[Cast]),
}

const EVERYWHERE: fn(&str) -> bool = |_| true;
const PINS: fn(&str) -> bool = |call| ["unlinkat", "unlink", "rmdir", "rename"].contains(&call);

impl Case<'_> {
    /// Kills the call at every point, one after another.
    fn endure(mut self) {
        let rest = State::read();
        let resting = Objects::pinned();
        let wanted = self.undisturbed(self.repair, |cast| cast.repaired).1;
        let calls = self.undisturbed(self.command, |cast| cast.new).0;
        let points = points(&calls, self.kills);
        eprintln!("{} calls, killed after {}", calls.len(), points.len());
        assert!(!points.is_empty(), "{calls:?}");
        let mut wrong = Vec::new();
        for point in points {
            let name = format!(
                "killed after {point} of {}, {}",
                calls.len(),
                calls[point - 1]
            );
            if let Err(error) = self.kill(point, &wanted) {
                wrong.push(format!("{name}: {error}"));
            }
            let used = Objects::pinned().without(&resting);
            (self.restore)(&self.casts);
            let left = State::read().differences(&rest);
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
    }

    /// What a call does when nobody kills it: its calls to the kernel, and the state it leaves.
    fn undisturbed(
        &mut self,
        command: &dyn Fn(&[Cast]) -> Command,
        ends: fn(&Cast) -> Ends,
    ) -> (Vec<String>, State) {
        (self.prepare)(&self.casts);
        self.meet("before", |cast| vec![cast.old]).unwrap();
        let traced = tracer::run(&command(&self.casts), None);
        assert_eq!(traced.code, Some(0), "{}", traced.errors);
        self.meet("after", |cast| vec![ends(cast)]).unwrap();
        let state = State::read();
        (self.restore)(&self.casts);
        (traced.calls, state)
    }

    fn kill(&mut self, point: usize, wanted: &State) -> Result<(), String> {
        (self.prepare)(&self.casts);
        for cast in &mut self.casts {
            establish(&mut cast.scene);
        }
        let traced = tracer::run(&(self.command)(&self.casts), Some(point));
        match traced.code {
            None => {}
            // Connections of its run left fewer entries to remove than those of the run that was counted.
            Some(0) if self.ended_early < MOST_ENDED_EARLY => self.ended_early += 1,
            code => return Err(format!("it ended: {code:?} {}", traced.errors)),
        }
        self.meet("killed", |cast| vec![cast.old, cast.new])?;
        self.converse("killed")?;
        succeed(redirect().arg("status")).or_else(only_a_warning)?;
        succeed(&mut (self.repair)(&self.casts))?;
        let differences = State::read().differences(wanted);
        if !differences.is_empty() {
            return Err(format!("repaired: {}", differences.join(", ")));
        }
        self.meet("repaired", |cast| vec![cast.repaired])?;
        self.converse("repaired")
    }

    fn converse(&mut self, when: &str) -> Result<(), String> {
        self.casts
            .iter_mut()
            .try_for_each(|cast| converse(&mut cast.scene, when))
    }

    /// Compares all connections with any of the ends that are allowed.
    fn meet(&mut self, when: &str, allowed: impl Fn(&Cast) -> Vec<Ends>) -> Result<(), String> {
        for cast in &mut self.casts {
            let allowed = allowed(cast);
            let met = ends(&mut cast.scene).map_err(|error| format!("{when}: {error}"))?;
            if !allowed.iter().any(|ends| met == ends) {
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

/// After which calls to kill, counted from 1.
fn points(calls: &[String], kills: fn(&str) -> bool) -> Vec<usize> {
    let step = calls.len().div_ceil(MOST);
    let differs = |a: usize, b: usize| calls.get(a) != calls.get(b);
    (0..calls.len())
        .filter(|&i| kills(&calls[i]))
        .filter(|&i| i % step == 0 || differs(i, i + 1) || i == 0 || differs(i, i - 1))
        .map(|i| i + 1)
        .collect()
}

fn run(command: &mut Command) {
    succeed(command).unwrap();
}

#[rstest]
fn first_attach_ever() {
    bpffs::private(|| {
        Case {
            casts: vec![Cast::new(DIRECT, ISTIO, ISTIO)],
            ended_early: 0,
            prepare: &|_| (),
            command: &attach_istio,
            kills: EVERYWHERE,
            repair: &attach_istio,
            restore: &|casts| {
                run(&mut detach_first(casts));
                bpffs::remove_root();
            },
        }
        .endure();
    });
}

#[rstest]
#[case::repeated(ISTIO, attach_istio)]
#[case::given_up(DIRECT, detach_first)]
fn attach_of_a_second_pod(#[case] repaired: Ends, #[case] repair: fn(&[Cast]) -> Command) {
    bpffs::private(|| {
        let casts = vec![Cast::new(DIRECT, ISTIO, repaired), Cast::bystander(OTHER)];
        run(&mut attach(&casts[1].scene, &OTHER_OPTIONS));
        Case {
            casts,
            ended_early: 0,
            prepare: &|_| (),
            command: &attach_istio,
            kills: EVERYWHERE,
            repair: &repair,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure();
    });
}

#[rstest]
fn change_of_policy() {
    bpffs::private(|| {
        let casts = vec![Cast::new(ISTIO, OTHER, OTHER), Cast::bystander(THIRD)];
        // Stays attached throughout, so that the programs stay loaded.
        run(&mut attach(&casts[1].scene, &THIRD_OPTIONS));
        Case {
            casts,
            ended_early: 0,
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &attach_other,
            kills: EVERYWHERE,
            repair: &attach_other,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure();
    });
}

#[rstest]
fn detach_of_one_pod() {
    bpffs::private(|| {
        let casts = vec![Cast::new(OTHER, DIRECT, DIRECT), Cast::bystander(ISTIO)];
        run(&mut attach(&casts[1].scene, &Options::ISTIO));
        Case {
            casts,
            ended_early: 0,
            prepare: &|casts| run(&mut attach_other(casts)),
            command: &detach_first,
            kills: EVERYWHERE,
            repair: &detach_first,
            restore: &|_| (),
        }
        .endure();
    });
}

#[rstest]
#[case::repeated(EVERYWHERE, DIRECT, detach_first)]
// Until the pins go it is the same as for one pod of several.
#[case::attached_again(PINS, ISTIO, attach_istio)]
fn detach_of_the_last_pod(
    #[case] kills: fn(&str) -> bool,
    #[case] repaired: Ends,
    #[case] repair: fn(&[Cast]) -> Command,
) {
    bpffs::private(|| {
        Case {
            casts: vec![Cast::new(ISTIO, DIRECT, repaired)],
            ended_early: 0,
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &detach_first,
            kills,
            repair: &repair,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure();
    });
}

#[rstest]
fn upgrade() {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let casts = vec![Cast::bystander(ISTIO), Cast::bystander(OTHER)];
        // Keeps the programs of the old build loaded.
        run(&mut attach(&casts[1].scene, &OTHER_OPTIONS));
        let upgrade = |casts: &[Cast]| {
            let mut command = attach_by(other.redirect(), &casts[0].scene.pod);
            command.args(Options::ISTIO.arguments());
            command
        };
        Case {
            casts,
            ended_early: 0,
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &upgrade,
            kills: EVERYWHERE,
            repair: &upgrade,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure();
    });
}

#[rstest]
fn collection_of_a_pod_that_vanished() {
    bpffs::private(|| {
        let casts = vec![Cast::bystander(OTHER)];
        run(&mut attach_other(&casts));
        Case {
            casts,
            ended_early: 0,
            prepare: &|_| vanish(),
            command: &attach_other,
            kills: EVERYWHERE,
            repair: &attach_other,
            restore: &|_| (),
        }
        .endure();
    });
}

fn attach_istio(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &Options::ISTIO)
}

fn attach_other(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &OTHER_OPTIONS)
}

fn detach_first(casts: &[Cast]) -> Command {
    detach(&casts[0].scene)
}

/// Leaves behind what a pod leaves that is deleted while attached.
fn vanish() {
    let pod = Pod::new();
    loader::attach(&pod, &Options::ISTIO);
    drop(pod);
    bpffs::wait_until_cut_off();
}
