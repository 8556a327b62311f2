//! Other programs on the same hooks, and other pods around.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::SocketAddr;

use redirect_tests::{
    actor::Actor,
    backend::Backend::{self, Iptables, Redirect},
    foreign::{LoadBalancer, SocketChooser},
    loader::{self, finish, redirect},
    namespace::errors,
    options::Options,
    pod::{ELSEWHERE4, Pod, SERVICE4},
    protocol::{Dial, Family, Identity, Listen, canonical},
    scene::{Scene, To, wildcards},
    server::{Server, bound},
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
#[case::before_redirect(true, "foreign")]
#[case::after_redirect(false, "15006")]
fn first_choice_of_a_socket_stands(#[case] before: bool, #[case] who: &str) {
    let mut scene = Scene::new();
    let at = (scene.pod.ipv4, 7777).into();
    let open = || bound(&Listen::new("foreign", at)).unwrap();
    let socket = scene.pod.netns.enter(open);
    let _server = Server::on(socket.try_clone().unwrap(), "foreign").unwrap();
    let answers = |scene: &mut Scene, port: u16| {
        let to = scene.address(V4, To::Own(port));
        scene.outside.dial(&Dial::new(V4, to)).outcome().to_owned()
    };
    if !before {
        scene.attach(Redirect, &Options::ISTIO);
    }
    let _chooser = SocketChooser::attach(&scene.pod.netns.path(), 8080, &socket);
    if before {
        assert_eq!(answers(&mut scene, 8080), "foreign");
        scene.attach(Redirect, &Options::ISTIO);
    }
    assert_eq!(answers(&mut scene, 8080), who);
    // What it does not choose for is redirect's.
    assert_eq!(answers(&mut scene, 9090), "15006");
    scene.detach();
    assert_eq!(answers(&mut scene, 8080), "foreign");
}

#[rstest]
fn process_outside_the_pods_cgroup_is_not_captured() {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let netns = scene.pod.netns.path();
    let mut stranger = Actor::start(&netns, None, Identity::APP);
    let to = scene.address(V4, To::Service(80));
    assert_eq!(stranger.dial(&Dial::new(V4, to)).outcome(), "service");
}

#[rstest]
fn process_in_another_namespace_of_the_pods_cgroup_is_not_captured() {
    // The cgroup decides where programs run, the namespace what they do.
    let (mut scene, other) = (Scene::new(), Scene::new());
    scene.attach(Redirect, &Options::ISTIO);
    let cgroup = Some(scene.pod.cgroup.child("stray"));
    let mut stray = Actor::start(&other.pod.netns.path(), cgroup, Identity::APP);
    let to = scene.address(V4, To::Service(80));
    assert_eq!(stray.dial(&Dial::new(V4, to)).outcome(), "service");
}

#[rstest]
fn process_in_another_pods_namespace_is_that_pods(#[values(Redirect, Iptables)] backend: Backend) {
    let (mut scene, mut other) = (Scene::new(), Scene::new());
    scene.attach(backend, &Options::ISTIO);
    let exclude_outbound = "80";
    other.attach(
        backend,
        &Options {
            exclude_outbound,
            ..Options::ISTIO
        },
    );
    let cgroup = Some(scene.pod.cgroup.child("stray"));
    let mut stray = Actor::start(&other.pod.netns.path(), cgroup, Identity::APP);
    let answers = |actor: &mut Actor, port: u16| {
        let to = SocketAddr::from((SERVICE4, port));
        actor.dial(&Dial::new(V4, to)).outcome().to_owned()
    };
    // The control: in its own namespace both are captured.
    assert_eq!(answers(&mut scene.app, 80), "15001");
    assert_eq!(answers(&mut scene.app, 443), "15001");
    assert_eq!(answers(&mut stray, 80), "service");
    assert_eq!(answers(&mut stray, 443), "15001");
    // It is the other pod's proxy that answers.
    other.proxy.unlisten("15001");
    assert_eq!(answers(&mut stray, 443), "ECONNREFUSED");
    assert_eq!(answers(&mut scene.app, 443), "15001");
}

#[rstest]
fn cgroup_that_moves_to_another_namespace_is_captured_there() {
    // As when a pod's sandbox is made anew while something still holds the old one.
    let (first, second) = (
        Pod::new(),
        Scene::without_proxy(Pod::new(), &Options::ISTIO),
    );
    let cgroup = second.pod.above.child("moving");
    let attach = |pod: &Pod| {
        let mut command = redirect();
        command.arg("attach").arg("--cgroup").arg(&cgroup);
        command.arg("--netns").arg(pod.netns.path());
        let output = finish(command.args(Options::ISTIO.arguments()));
        assert!(output.status.success(), "{}", errors(&output));
    };
    attach(&first);
    let start = |identity| Actor::start(&second.pod.netns.path(), Some(cgroup.clone()), identity);
    let (mut proxy, mut app) = (start(Identity::PROXY), start(Identity::APP));
    for at in wildcards(15001) {
        proxy.listen(Listen::new("15001", at));
    }
    let to = second.address(V4, To::Service(80));
    assert_eq!(app.dial(&Dial::new(V4, to)).outcome(), "service");
    attach(&second.pod);
    let dialed = app.dial(&Dial::new(V4, to));
    assert_eq!(dialed.outcome(), "15001");
    assert_eq!(dialed.greeting.unwrap().original.address, Some(to));
    let detached = loader::detach(&cgroup);
    assert!(detached.status.success(), "{}", errors(&detached));
    assert_eq!(app.dial(&Dial::new(V4, to)).outcome(), "service");
}
