//! Marked connections in TPROXY mode, where redirect is known to differ from iptables (docs/behaviour.md).
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    options::{Options, SELF_MARK, TPROXY_MARK},
    pod::{ELSEWHERE4, Pod},
    protocol::{Dial, Family, Identity, Start, Way},
    scene::{SERVICE, Scene, To},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};

const TPROXY: Options = Options {
    tproxy: true,
    ..Options::ISTIO
};

#[rstest]
fn reset_to_the_ipv6_loopback_address_is_lost_as_without_capture(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(TPROXY_MARK, 42)] mark: u32,
) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    let loopback = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0);
    let dial = |scene: &Scene, port| {
        Dial::new(V6, scene.address(V6, To::Own(port)))
            .way(Way::Nonblocking)
            .timeout_ms(500)
            .bind(loopback)
            .mark(mark)
    };
    for attached in [false, true] {
        if attached {
            scene.attach(backend, &TPROXY);
        }
        // Only what has no listener differs.
        for (port, with_iptables, otherwise) in
            [(8080, "app", "app"), (81, "ECONNREFUSED", "TimedOut")]
        {
            let rescued = attached && backend == Iptables && mark == TPROXY_MARK;
            let expected = if rescued { with_iptables } else { otherwise };
            let dial = dial(&scene, port);
            let dialed = scene.actor(&Identity::ROOT).dial(&dial);
            assert_eq!(dialed.outcome(), expected, "attached: {attached}");
        }
    }
}

#[rstest]
fn connection_with_the_mark_of_the_rules_reaches_the_outbound_listener(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values("", "127.0.0.4/30")] loopback_cidr: &'static str,
) {
    let options = Options {
        loopback_cidr,
        ..TPROXY
    };
    let mut scene = Scene::with(Pod::new(), &options);
    let to = scene.address(family, To::Service(80));
    let unmarked = Dial::new(family, to);
    let marked = unmarked.clone().mark(SELF_MARK);
    let dial = |scene: &mut Scene, dial: &Dial| {
        let dialed = scene.actor(&Identity::ROOT).dial(dial);
        dialed.outcome().to_owned()
    };
    assert_eq!(dial(&mut scene, &marked), SERVICE);
    scene.attach(backend, &options);
    assert_eq!(dial(&mut scene, &unmarked), "15001");
    let taken_for_the_proxys = backend == Iptables && family.is_ipv4() && !loopback_cidr.is_empty();
    let expected = if taken_for_the_proxys {
        "15006"
    } else {
        "15001"
    };
    assert_eq!(dial(&mut scene, &marked), expected);
}

#[rstest]
fn answer_to_a_foreign_source_needs_no_route_but_that_of_the_mark(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    scene.pod.netns.ip("route add unreachable 192.0.2.0/25");
    let [unreachable, reachable]: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 9).into(), ELSEWHERE4.into()];
    let to = scene.address(V4, To::Own(8080));
    let outcome = |scene: &mut Scene, from: &Identity, source, mark| {
        let dial = Dial::new(V4, to)
            .transparent(SocketAddr::new(source, 0))
            .way(Way::Nonblocking)
            .timeout_ms(500)
            .mark(mark);
        let mut dialer = Actor::start_as(Start {
            cgroup: Some(scene.pod.cgroup.child("others")),
            netns: scene.pod.netns.path(),
            net_admin: true,
            identity: from.clone(),
        });
        dialer.dial(&dial).outcome().to_owned()
    };
    let proxys = &Identity::PROXY;
    let apps = &Identity::APP;
    assert_eq!(
        outcome(&mut scene, apps, reachable, TPROXY_MARK),
        "TimedOut"
    );
    scene.attach(backend, &TPROXY);
    // Without the mark the answer leaves the pod.
    assert_eq!(outcome(&mut scene, apps, reachable, 42), "TimedOut");
    assert_eq!(outcome(&mut scene, apps, reachable, TPROXY_MARK), "app");
    for (from, source, answers) in [(apps, unreachable, "app"), (proxys, reachable, "15006")] {
        let expected = if backend == Redirect {
            answers
        } else {
            "TimedOut"
        };
        let outcome = outcome(&mut scene, from, source, TPROXY_MARK);
        assert_eq!(outcome, expected, "{answers}");
    }
}
