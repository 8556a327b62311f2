//! Many connections, one after another and at the same time.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::Ipv4Addr;

use redirect_tests::{
    actor::Actor,
    backend::Backend::Redirect,
    options::Options,
    pod::Pod,
    protocol::{Answer, Dial, Family, Identity, Listen, Request},
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
            proxy.listen(Listen::new("15001", at).silent().reuseport(2));
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

#[rstest]
fn connections_that_are_gone_cost_nothing(#[values(Family::V4, Family::V6)] family: Family) {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let to = scene.address(family, To::Service(80));
    // An idle one, which must not be forgotten.
    let idle = scene.app.dial(&Dial::new(family, to).keep("idle"));
    assert_eq!(idle.outcome(), "15001");
    let churn = Request::Churn {
        dial: Dial::new(family, to),
        count: 40_000,
    };
    match scene.app.request(&churn) {
        Answer::Churned {
            first,
            last,
            traffic,
        } => {
            assert_eq!(traffic.outcomes, [("15001".to_owned(), 40_000)]);
            // Generous, because other tests run next to this one: a table that only ages out costs far more.
            assert!(last < first * 2, "{first} ns became {last} ns");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        scene.app.ask("idle", "still there").as_deref(),
        Ok("still there")
    );
    assert_eq!(scene.app.look("idle").peer, idle.peer);
    assert!(
        scene
            .app
            .ask("idle", "probe 28")
            .unwrap()
            .contains(&to.ip().to_string())
    );
}
