//! Another build of the loader takes over what the first has attached.
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
    bpffs::{self, Objects},
    loader::{OtherBuild, attach_by, detach, finish, redirect},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Traffic},
    scene::{Scene, To},
};
use rstest::rstest;

use Family::{V4, V6};

/// How often the build changes under traffic.
const ROUNDS: usize = 6;

fn attach(by: Command, pod: &Pod) -> String {
    let mut command = attach_by(by, pod);
    let output = finish(command.args(Options::ISTIO.arguments()));
    assert!(output.status.success(), "{}", errors(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Directories of pinned programs: one for each build in use.
fn builds() -> usize {
    let pins = bpffs::pins();
    let is_build = |name: &str| name.starts_with("programs-") && !name.contains('/');
    pins.iter()
        .filter(|pin| is_build(&pin.to_string_lossy()))
        .count()
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
        for round in 0..ROUNDS {
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
