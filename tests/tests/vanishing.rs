//! What goes while the loader is at it. A pod: the call fails, or what it has attached is collected; another pod stays captured. An
//! interface: it is not missed.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    bpffs::{self, Objects},
    daemon_faults::Vanishes::{self, Both, Cgroup, Namespace},
    faults::{
        self, DIRECT, Ends, INTERFACE, ISTIO, MACHINE_OPTIONS, OTHER, OTHER_OPTIONS, attach,
        detach, ends, run, sample,
    },
    loader::{self, attach_command},
    machine::{Link, Machine},
    options::Options,
    patience::patience,
    pod::Pod,
    scene::Scene,
    tracer,
    traces::Traces,
};
use rstest::rstest;

/// At most at so many of the loader's calls.
const MOST: u32 = 24;
/// The kernel takes a namespace apart some time after its last user has gone.
const PATIENCE: Duration = Duration::from_secs(20);

#[rstest]
// Its descriptor keeps the namespace until the call ends.
#[case::namespace(Namespace, false)]
#[case::cgroup(Cgroup, true)]
#[case::both(Both, true)]
fn pod_that_vanishes_while_it_is_attached_leaves_nothing(
    #[case] vanishes: Vanishes,
    #[case] fails: bool,
) {
    bpffs::private(|| {
        let mut other = faults::scene();
        run(&mut attach(&other, &OTHER_OPTIONS));
        let (rest, resting) = (Traces::read([&other]), Objects::loaded());
        let attach_pod = |pod: &Pod| {
            let mut command = attach_command(pod);
            command.args(Options::ISTIO.arguments());
            command
        };
        let calls = {
            let pod = Pod::new();
            let traced = tracer::run(&attach_pod(&pod), None);
            assert_eq!(traced.code, Some(0), "{}", traced.errors);
            loader::detach(pod.cgroup.path());
            traced.calls
        };
        let points = sample(&calls, MOST);
        let mut failed = 0;
        for &point in &points {
            let pod = Pod::new();
            let command = attach_pod(&pod);
            let Pod {
                netns,
                cgroup,
                above: _above,
                peer: _peer,
                ..
            } = pod;
            let (mut netns, mut cgroup) = (Some(netns), Some(cgroup));
            let traced = tracer::run_held(&command, point, || {
                if vanishes != Namespace {
                    cgroup = None;
                }
                if vanishes != Cgroup {
                    netns = None;
                }
            });
            let case = format!("{vanishes:?} at {point}, {}: {traced:?}", calls[point - 1]);
            assert!(traced.struck, "{case}");
            match traced.code {
                Some(0) => (),
                Some(1) if says_it_has_gone(&traced.errors) => failed += 1,
                _ => panic!("{case}"),
            }
            assert_eq!(ends(&mut other, None).unwrap(), OTHER, "{case}");
            let deadline = Instant::now() + patience(PATIENCE);
            loop {
                // Any call collects.
                run(&mut attach(&other, &OTHER_OPTIONS));
                let left = Traces::read([&other]).differences(&rest);
                let alive = Objects::loaded().without(&resting);
                if left.is_empty() && alive.is_empty() {
                    break;
                }
                assert!(Instant::now() < deadline, "{case}: {left:?} {alive:?}");
                thread::sleep(Duration::from_millis(10));
            }
        }
        eprintln!("{vanishes:?}: {failed} of {} failed", points.len());
        assert_eq!(failed > 0, fails);
        assert!(failed < points.len(), "it never succeeds");
        run(&mut detach(&other));
    });
}

fn says_it_has_gone(said: &str) -> bool {
    said.starts_with("redirect: cgroup ")
        && said.contains(" has gone: ")
        && said.lines().count() == 1
}

fn attach_machines(scene: &Scene) -> Command {
    attach(scene, &MACHINE_OPTIONS)
}

fn attach_istio(scene: &Scene) -> Command {
    attach(scene, &Options::ISTIO)
}

#[rstest]
#[case::attach(DIRECT, attach_machines, ISTIO)]
#[case::removed(ISTIO, attach_istio, ISTIO)]
#[case::detach(ISTIO, detach, DIRECT)]
fn interface_that_vanishes_is_not_missed(
    #[case] old: Ends,
    #[case] command: fn(&Scene) -> Command,
    #[case] new: Ends,
) {
    bpffs::private(|| {
        let prepared = || {
            let scene = faults::scene();
            let machine = Machine::new(&scene.pod, INTERFACE, 1, Link::Plain);
            if old == ISTIO {
                run(&mut attach_machines(&scene));
            }
            (scene, machine)
        };
        let calls = {
            let (scene, _machine) = prepared();
            let traced = tracer::run(&command(&scene), None);
            assert_eq!(traced.code, Some(0), "{}", traced.errors);
            run(&mut detach(&scene));
            traced.calls
        };
        let at_it = (1..=calls.len()).filter(|point| calls[point - 1] == "netlink");
        let points: Vec<usize> = at_it.collect();
        assert!(!points.is_empty(), "{calls:?}");
        for point in points {
            let (mut scene, _machine) = prepared();
            let traced = tracer::run_held(&command(&scene), point, || {
                scene.pod.netns.ip(&format!("link delete {INTERFACE}"));
            });
            let case = format!("at {point}: {traced:?}");
            assert!(traced.struck, "{case}");
            assert_eq!(traced.code, Some(0), "{case}");
            assert_eq!(ends(&mut scene, None).unwrap(), new, "{case}");
            run(&mut detach(&scene));
            assert!(bpffs::pins().is_empty(), "{case}: {:?}", bpffs::pins());
        }
    });
}
