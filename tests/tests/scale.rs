//! Many connections, one after another and at the same time.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    actor::Actor,
    backend::Backend::Redirect,
    bpffs, loader,
    options::Options,
    patience::{amount, patience},
    pod::Pod,
    protocol::{Answer, Dial, Family, Identity, Listen, Manner, Probe, Request},
    scene::{Scene, To, wildcards},
};
use rstest::rstest;

/// Processes on either side, because each may only have so many descriptors.
const PROCESSES: u32 = 10;
/// Connections of each.
const EACH: u32 = 10_500;

#[rstest]
fn pod_holds_100_000_captured_connections_to_many_destinations() {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let (netns, cgroup) = (scene.pod.netns.path(), scene.pod.cgroup.child("crowd"));
    let start = |identity| Actor::start(&netns, Some(cgroup.clone()), identity);
    let mut proxies: Vec<Actor> = (0..PROCESSES).map(|_| start(Identity::PROXY)).collect();
    for proxy in &mut proxies {
        for at in wildcards(15001) {
            proxy.listen(Listen::new("15001", at).manner(Manner::Hold).reuseport(2));
        }
    }
    scene.attach(Redirect, &Options::ISTIO);
    let mut clients: Vec<Actor> = (0..PROCESSES).map(|_| start(Identity::APP)).collect();
    let mut total = 0;
    for (client, third) in clients.iter_mut().zip(0..) {
        let crowd = Request::Crowd {
            to: (Ipv4Addr::new(198, 18, third, 1), 80).into(),
            addresses: 250,
            count: EACH,
        };
        match client.request(&crowd) {
            Answer::Crowd { held, error } => {
                total += held;
                assert_eq!(held, EACH, "{total} in all: {error:?}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(total > 100_000);
}

/// Short connections, after which a test says so.
const STRETCH: u32 = 25_000;
/// How often.
const STRETCHES: u32 = 8;
const STRETCHES_WHEN_SLOW: u32 = 2;

#[rstest]
fn connections_that_are_gone_leave_nothing() {
    bpffs::private(|| {
        let mut scene = Scene::new();
        let dials = [("idle 4", Family::V4), ("idle 6", Family::V6)].map(|(name, family)| {
            (
                name,
                Dial::new(family, scene.address(family, To::Service(80))),
            )
        });
        for (_, dial) in &dials {
            assert_eq!(scene.app.dial(dial).outcome(), "service");
        }
        scene.attach(Redirect, &Options::ISTIO);
        for (name, dial) in &dials {
            assert_eq!(scene.app.dial(&dial.clone().keep(name)).outcome(), "15001");
        }

        listen(&mut scene, Manner::HangUp);
        let (sockets, captured) = (sockets(&scene), captured(&scene));
        let short = amount(STRETCHES, STRETCHES_WHEN_SLOW) * STRETCH;
        for (done, (_, dial)) in (0..short)
            .step_by(STRETCH as usize)
            .zip(dials.iter().cycle())
        {
            eprintln!("{done} of {short} connections");
            churn(&mut scene, dial);
        }
        assert_eq!(self::captured(&scene) - captured, u64::from(short));
        assert_eq!(bpffs::flows(), Some(Vec::new()));
        // What is known of a connection is kept with its sockets: none of them is left.
        wait_for_sockets(&scene, &sockets);

        listen(&mut scene, Manner::Converse);
        for (name, dial) in &dials {
            let after = scene.app.dial(dial);
            assert_eq!(after.outcome(), "15001");
            assert_eq!(after.peer, Some(dial.to));
            assert_eq!(scene.app.look(name).peer, Some(dial.to));
            assert_eq!(scene.app.ask(name, "hello").as_deref(), Ok("hello"));
            let asked = scene.app.ask(name, "probe 28").unwrap();
            let (original, original6): (Probe, Probe) = serde_json::from_str(&asked).unwrap();
            let original = if dial.to.is_ipv4() {
                original
            } else {
                original6
            };
            assert_eq!(original.address, Some(dial.to));
        }
        scene.detach();
        for (_, dial) in &dials {
            assert_eq!(scene.app.dial(dial).outcome(), "service");
        }
    });
}

fn churn(scene: &mut Scene, dial: &Dial) {
    let mut dial = dial.clone();
    dial.greeting = false;
    let churn = Request::Churn {
        dial,
        count: STRETCH,
    };
    match scene.app.request(&churn) {
        Answer::Traffic(traffic) => {
            assert_eq!(
                traffic.outcomes,
                [("closed".to_owned(), u64::from(STRETCH))]
            );
        }
        other => panic!("{other:?}"),
    }
}

/// Opens the proxy's outbound listener anew.
fn listen(scene: &mut Scene, manner: Manner) {
    scene.proxy.unlisten("15001");
    for at in wildcards(15001) {
        scene.proxy.listen(Listen::new("15001", at).manner(manner));
    }
}

/// How many connections the pod's counters call captured.
fn captured(scene: &Scene) -> u64 {
    let status = loader::status_of(&scene.pod);
    status["connections"]["outbound-captured"].as_u64().unwrap()
}

/// How many TCP sockets the pod has, of each family.
fn sockets(scene: &Scene) -> [String; 2] {
    scene.pod.netns.enter(|| {
        [("sockstat", "TCP: inuse "), ("sockstat6", "TCP6: inuse ")].map(|(file, field)| {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
            let found = text.lines().find_map(|line| line.strip_prefix(field));
            // The numbers that follow are those of the whole machine.
            found.unwrap().split(' ').next().unwrap().to_owned()
        })
    })
}

fn wait_for_sockets(scene: &Scene, wanted: &[String; 2]) {
    let deadline = Instant::now() + patience(Duration::from_secs(10));
    while sockets(scene) != *wanted {
        assert!(
            Instant::now() < deadline,
            "{:?} were {wanted:?}",
            sockets(scene)
        );
        thread::sleep(Duration::from_millis(10));
    }
}
