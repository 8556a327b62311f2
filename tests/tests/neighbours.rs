//! Other programs on the same hooks, and other pods around.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use redirect_tests::{
    backend::Backend::Redirect,
    foreign::LoadBalancer,
    options::Options,
    pod::{ELSEWHERE4, SERVICE4},
    protocol::{Dial, Family, canonical},
    scene::{Scene, To},
};
use rstest::rstest;

use Family::V4;

#[rstest]
fn load_balancer_alone_translates() {
    // The control for the tests below.
    let mut scene = Scene::new();
    let _balancer = LoadBalancer::attach(scene.pod.above.path(), SERVICE4, ELSEWHERE4);
    let to = scene.address(V4, To::Service(80));
    let dialed = scene.app.dial(&Dial::new(V4, to));
    assert_eq!(dialed.outcome(), "service");
    assert_eq!(dialed.greeting.unwrap().local.ip(), ELSEWHERE4);
}

/// On which cgroup the other program hangs, and whether it was there first.
#[rstest]
#[case::above_and_first(true, true)]
#[case::above_and_later(true, false)]
#[case::same_cgroup_and_later(false, false)]
fn load_balancer_does_not_hide_connections_from_the_proxy(
    #[case] above: bool,
    #[case] first: bool,
) {
    let mut scene = Scene::new();
    if !first {
        scene.attach(Redirect, &Options::ISTIO);
    }
    let cgroup = if above {
        &scene.pod.above
    } else {
        &scene.pod.cgroup
    };
    let _balancer = LoadBalancer::attach(cgroup.path(), SERVICE4, ELSEWHERE4);
    if first {
        scene.attach(Redirect, &Options::ISTIO);
    }
    let to = scene.address(V4, To::Service(80));
    let dialed = scene.app.dial(&Dial::new(V4, to));
    assert_eq!(dialed.outcome(), "15001");
    assert_eq!(dialed.peer.map(canonical), Some(to));
    assert_eq!(dialed.greeting.unwrap().original.address, Some(to));
    // What the proxy sends on is the balancer's to translate.
    let dialed = scene.proxy.dial(&Dial::new(V4, to));
    assert_eq!(dialed.outcome(), "service");
    assert_eq!(dialed.greeting.unwrap().local.ip(), ELSEWHERE4);
}

#[rstest]
fn load_balancer_that_runs_first_is_followed() {
    // On the pod's own cgroup the order is that of attaching: the proxy is told the backend, as with iptables behind such a balancer.
    let mut scene = Scene::new();
    let _balancer = LoadBalancer::attach(scene.pod.cgroup.path(), SERVICE4, ELSEWHERE4);
    scene.attach(Redirect, &Options::ISTIO);
    let to = scene.address(V4, To::Service(80));
    let dialed = scene.app.dial(&Dial::new(V4, to));
    assert_eq!(dialed.outcome(), "15001");
    let backend = scene.address(V4, To::Elsewhere(80));
    assert_eq!(dialed.greeting.unwrap().original.address, Some(backend));
}

#[rstest]
fn process_outside_the_pods_cgroup_is_not_captured() {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let netns = scene.pod.netns.path();
    let identity = redirect_tests::protocol::Identity::APP;
    let mut stranger = redirect_tests::actor::Actor::start(&netns, None, identity);
    let to = scene.address(V4, To::Service(80));
    assert_eq!(stranger.dial(&Dial::new(V4, to)).outcome(), "service");
}

#[rstest]
fn process_in_another_namespace_of_the_pods_cgroup_is_not_captured() {
    // The cgroup decides where programs run, the namespace what they do.
    let (mut scene, other) = (Scene::new(), Scene::new());
    scene.attach(Redirect, &Options::ISTIO);
    let cgroup = Some(scene.pod.cgroup.child("stray"));
    let identity = redirect_tests::protocol::Identity::APP;
    let mut stray = redirect_tests::actor::Actor::start(&other.pod.netns.path(), cgroup, identity);
    let to = scene.address(V4, To::Service(80));
    assert_eq!(stray.dial(&Dial::new(V4, to)).outcome(), "service");
}
