//! Another build of the loader takes over what the first has attached.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use redirect_tests::{
    bpffs::{self, Objects},
    loader::{
        OtherBuild, attach_by, detach, finish, redirect, redirect_of_other_layout, status_by,
    },
    maps::exhaust_ports,
    namespace::errors,
    options::Options,
    patience::amount,
    pod::Pod,
    protocol::{Dial, Family, Probe, Traffic},
    scene::{Scene, To},
};
use rstest::rstest;
use serde_json::Value;

use Family::{V4, V6};

/// How often the build changes under traffic.
const ROUNDS: u32 = 6;
const ROUNDS_WHEN_SLOW: u32 = 2;
/// How often a call that takes a pod over is killed.
const KILLS: u32 = 16;
const KILLS_WHEN_SLOW: u32 = 4;

fn attach(by: Command, pod: &Pod) -> String {
    let mut command = attach_by(by, pod);
    let output = finish(command.args(Options::ISTIO.arguments()));
    assert!(output.status.success(), "{}", errors(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// How many builds have programs pinned.
fn builds() -> usize {
    let pins = bpffs::pins();
    let build = |pin: &PathBuf| {
        let name = pin.to_str()?.strip_prefix("programs-")?;
        name.split(['-', '/']).next().map(str::to_owned)
    };
    pins.iter().filter_map(build).collect::<BTreeSet<_>>().len()
}

fn only(traffic: &Traffic, who: &str) {
    let [(met, count)] = &traffic.outcomes[..] else {
        panic!("{traffic:?}");
    };
    assert!(met == who && *count > 50, "{traffic:?}");
}

#[rstest]
fn another_build_takes_over_without_an_uncaptured_moment(#[values(V4, V6)] family: Family) {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let mut scene = Scene::new();
        let (service, own) = (
            scene.address(family, To::Service(80)),
            scene.address(family, To::Own(8080)),
        );
        let (out, inward) = (Dial::new(family, service), Dial::new(family, own));
        assert_eq!(scene.app.dial(&out).outcome(), "service");
        assert_eq!(scene.outside.dial(&inward).outcome(), "app");
        attach(redirect(), &scene.pod);
        let first = scene.app.dial(&out.clone().keep("kept"));
        assert_eq!(first.outcome(), "15001");

        scene.app.traffic_start(out.clone());
        scene.outside.traffic_start(inward.clone());
        for round in 0..amount(ROUNDS, ROUNDS_WHEN_SLOW) {
            let before = Objects::pinned();
            let by = if round % 2 == 0 {
                other.redirect()
            } else {
                redirect()
            };
            let said = attach(by, &scene.pod);
            assert!(said.starts_with("changed "), "{said}");
            let after = Objects::pinned();
            // The same links, all with other programs.
            assert_eq!(after.links(), before.links());
            assert!(after.programs().is_disjoint(before.programs()));
            assert_eq!(builds(), 1);
            let alive = before.without(&after).wait_until_freed();
            assert!(alive.is_empty(), "{alive:?}");
        }
        only(&scene.app.traffic_stop(), "15001");
        only(&scene.outside.traffic_stop(), "15006");

        assert_eq!(scene.app.ask("kept", "hello").as_deref(), Ok("hello"));
        assert_eq!(scene.app.look("kept").peer, first.peer);
        let detached = detach(scene.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        assert!(bpffs::pins().is_empty());
        assert_eq!(scene.app.dial(&out).outcome(), "service");
        assert_eq!(scene.outside.dial(&inward).outcome(), "app");
    });
}

#[rstest]
fn build_goes_with_its_last_pod_also_if_that_build_detaches_it() {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let (mut stays, goes) = (Scene::new(), Scene::new());
        attach(other.redirect(), &stays.pod);
        let alone = bpffs::pins();
        assert_eq!(builds(), 1);
        attach(redirect(), &goes.pod);
        assert_eq!(builds(), 2);
        let detached = detach(goes.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        assert_eq!(bpffs::pins(), alone);
        let to = stays.address(V4, To::Service(80));
        assert_eq!(stays.app.dial(&Dial::new(V4, to)).outcome(), "15001");
    });
}

#[rstest]
fn old_build_stays_until_its_last_pod_is_upgraded() {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let mut scenes = [Scene::new(), Scene::new()];
        let both = |scenes: &mut [Scene; 2], who: &str| {
            for scene in scenes {
                let to = scene.address(V4, To::Service(80));
                assert_eq!(scene.app.dial(&Dial::new(V4, to)).outcome(), who);
            }
        };
        both(&mut scenes, "service");
        for scene in &scenes {
            attach(redirect(), &scene.pod);
        }
        assert_eq!(builds(), 1);
        attach(other.redirect(), &scenes[0].pod);
        assert_eq!(builds(), 2);
        both(&mut scenes, "15001");
        attach(other.redirect(), &scenes[1].pod);
        assert_eq!(builds(), 1);
        both(&mut scenes, "15001");
        for scene in &scenes {
            let detached = detach(scene.pod.cgroup.path());
            assert!(detached.status.success(), "{}", errors(&detached));
        }
        both(&mut scenes, "service");
        assert!(bpffs::pins().is_empty());
    });
}

/// Directories of the maps that an upgrade fills anew: one for each layout in use.
fn layouts() -> Vec<String> {
    let names = bpffs::pins().into_iter();
    names
        .map(|pin| pin.to_string_lossy().into_owned())
        .filter(|name| name.starts_with("maps-") && !name.contains('/'))
        .collect()
}

/// A call of the program whose maps have that layout.
fn of_layout(layout: u32) -> Command {
    match layout {
        1 => redirect(),
        _ => redirect_of_other_layout(),
    }
}

/// A pod whose connections go on while it changes hands.
struct Busy {
    scene: Scene,
    out: Dial,
    inward: Dial,
    peer: Option<std::net::SocketAddr>,
}

impl Busy {
    fn new(family: Family) -> Self {
        let mut scene = Scene::new();
        let (service, own) = (
            scene.address(family, To::Service(80)),
            scene.address(family, To::Own(8080)),
        );
        let (out, inward) = (Dial::new(family, service), Dial::new(family, own));
        assert_eq!(scene.app.dial(&out).outcome(), "service");
        assert_eq!(scene.outside.dial(&inward).outcome(), "app");
        Self {
            scene,
            out,
            inward,
            peer: None,
        }
    }

    /// Opens connections that stay, and goes on with others.
    fn start(&mut self) {
        let Scene { app, outside, .. } = &mut self.scene;
        let kept = app.dial(&self.out.clone().keep("kept"));
        assert_eq!(kept.outcome(), "15001");
        self.peer = kept.peer;
        assert_eq!(
            outside.dial(&self.inward.clone().keep("kept")).outcome(),
            "15006"
        );
        app.traffic_start(self.out.clone());
        outside.traffic_start(self.inward.clone());
    }

    /// The connections that stayed have their data and their addresses.
    fn check(&mut self) {
        for (actor, to) in [
            (&mut self.scene.app, self.out.to),
            (&mut self.scene.outside, self.inward.to),
        ] {
            assert_eq!(actor.ask("kept", "hello").as_deref(), Ok("hello"));
            assert_eq!(actor.look("kept").peer, Some(to));
            let asked = actor.ask("kept", "probe 28").unwrap();
            let (original, original6): (Probe, Probe) = serde_json::from_str(&asked).unwrap();
            let original = if to.is_ipv4() { original } else { original6 };
            assert_eq!(original.address, Some(to));
        }
    }

    /// Ends the traffic: how many connections have gone out and come in, those that stayed among them.
    fn stop(&mut self) -> [u64; 2] {
        let (out, inward) = (
            self.scene.app.traffic_stop(),
            self.scene.outside.traffic_stop(),
        );
        only(&out, "15001");
        only(&inward, "15006");
        [out.outcomes[0].1 + 1, inward.outcomes[0].1 + 1]
    }

    /// What the pod's counters say.
    fn counted(&self, status: &Value) -> [u64; 2] {
        let cgroup = self.scene.pod.cgroup.path().to_str().unwrap();
        let pods = status["pods"].as_array().unwrap();
        let pod = pods.iter().find(|pod| pod["cgroup"] == cgroup).unwrap();
        assert_eq!(pod["capturing"], true);
        ["outbound-captured", "inbound-captured"]
            .map(|rule| pod["connections"][rule].as_u64().unwrap())
    }
}

/// A segment that comes when its connection has gone is looked up like a first one, and counted as inbound: of a hundred
/// connections, that of one at most.
fn assert_counted(counted: [u64; 2], made: [u64; 2]) {
    assert_eq!(counted[0], made[0]);
    let late = made[1] / 100 + 3;
    assert!(
        (made[1]..=made[1] + late).contains(&counted[1]),
        "{counted:?} {made:?}"
    );
}

#[rstest]
fn another_layout_of_the_maps_takes_over_pods_one_by_one() {
    bpffs::private(|| {
        let mut pods = [Busy::new(V4), Busy::new(V6), Busy::new(V4)];
        let mut stranger = Busy::new(V4);
        for pod in &pods {
            attach(redirect(), &pod.scene.pod);
        }
        // What one of them connects to is told by its sockets, not by its ports.
        exhaust_ports(&pods[2].scene.pod);
        pods.iter_mut().for_each(Busy::start);
        for (from, to) in [(1, 2), (2, 1), (1, 2)] {
            for done in 0..pods.len() {
                let names: Vec<String> = [from, to].map(|name| format!("maps-{name}")).to_vec();
                assert!(layouts().iter().all(|name| names.contains(name)));
                let (before, counted) = (
                    Objects::pinned(),
                    pods[done].counted(&status_by(of_layout(to))),
                );
                let said = attach(of_layout(to), &pods[done].scene.pod);
                assert!(said.starts_with("changed "), "{said}");
                let after = Objects::pinned();
                assert_eq!(after.links(), before.links());
                assert_ne!(after.programs(), before.programs());
                // Either program tells of all pods, whichever of the two attached them.
                for layout in [from, to] {
                    let status = status_by(of_layout(layout));
                    let now = pods[done].counted(&status);
                    assert!(
                        now[0] >= counted[0] && now[1] >= counted[1],
                        "{now:?} {counted:?}"
                    );
                    for pod in &pods {
                        pod.counted(&status);
                    }
                }
                pods[done].check();
                let said = attach(of_layout(to), &pods[done].scene.pod);
                assert!(said.starts_with("unchanged "), "{said}");
            }
            assert_eq!(layouts(), [format!("maps-{to}")]);
            assert_eq!(builds(), 1);
        }
        for pod in &mut pods {
            pod.check();
            let made = pod.stop();
            assert_counted(pod.counted(&status_by(redirect())), made);
            // The policy is as it was.
            let excluded = Dial::new(V4, pod.scene.address(V4, To::Own(15020)));
            assert_eq!(pod.scene.outside.dial(&excluded).outcome(), "app");
            let first = pod.scene.app.dial(&pod.out);
            assert_eq!((first.outcome(), first.peer), ("15001", pod.peer));
        }
        assert_eq!(stranger.scene.app.dial(&stranger.out).outcome(), "service");
        // Attached by the one, detached by the other.
        for pod in &mut pods {
            let detached = detach(pod.scene.pod.cgroup.path());
            assert!(detached.status.success(), "{}", errors(&detached));
            assert_eq!(pod.scene.app.dial(&pod.out).outcome(), "service");
            assert_eq!(pod.scene.outside.dial(&pod.inward).outcome(), "app");
        }
        assert!(bpffs::pins().is_empty());
    });
}

#[rstest]
fn take_over_that_was_killed_is_completed_by_the_next_call() {
    bpffs::private(|| {
        let mut pod = Busy::new(V4);
        attach(redirect(), &pod.scene.pod);
        pod.start();
        // How long a whole call takes here and now: it is killed at one moment after the other.
        let begun = Instant::now();
        attach(redirect_of_other_layout(), &pod.scene.pod);
        let whole = begun.elapsed();
        let kills = amount(KILLS, KILLS_WHEN_SLOW);
        for (step, to) in (0..kills).zip([1, 2].into_iter().cycle()) {
            let mut command = attach_by(of_layout(to), &pod.scene.pod);
            let mut child = command
                .args(Options::ISTIO.arguments())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            thread::sleep(whole * step / kills);
            child.kill().unwrap();
            child.wait().unwrap();
            pod.check();
            for layout in [1, 2] {
                pod.counted(&status_by(of_layout(layout)));
            }
            attach(of_layout(to), &pod.scene.pod);
            pod.check();
            assert_eq!(layouts(), [format!("maps-{to}")]);
            assert_eq!(builds(), 1);
        }
        let made = pod.stop();
        assert_counted(pod.counted(&status_by(redirect())), made);
        let detached = detach(pod.scene.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        assert!(bpffs::pins().is_empty());
        assert_eq!(pod.scene.app.dial(&pod.out).outcome(), "service");
    });
}

#[rstest]
fn pods_of_a_release_that_cannot_be_taken_over_are_left_alone() {
    bpffs::private(|| {
        let mut pod = Busy::new(V4);
        let theirs = "/sys/fs/bpf/redirect/v999/pods/0000000000000001";
        fs::create_dir_all(theirs).unwrap();
        let mut command = attach_by(redirect(), &pod.scene.pod);
        let output = finish(command.args(Options::ISTIO.arguments()));
        assert_eq!(output.status.code(), Some(1));
        let said = errors(&output);
        assert!(
            said.contains("v999/pods: pods are attached by a release"),
            "{said}"
        );
        assert!(bpffs::pins().is_empty());
        assert_eq!(pod.scene.app.dial(&pod.out).outcome(), "service");
        fs::remove_dir(theirs).unwrap();
        attach(redirect(), &pod.scene.pod);
        assert_eq!(pod.scene.app.dial(&pod.out).outcome(), "15001");
        let detached = detach(pod.scene.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
    });
}
