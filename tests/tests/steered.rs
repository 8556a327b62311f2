//! Telling captured connections apart by the port they are steered to, and what could be mistaken for one.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_common::connection::Original;
use redirect_tests::{
    actor::Actor,
    backend::Backend,
    maps::{destinations_of, exhaust_ports, flows_of},
    options::Options,
    pod::Pod,
    protocol::{Dial, Dialed, Family, Identity, Listen, canonical},
    scene::{APP as APP_NAME, Attempt, Lands, SERVICE, Scene, To, inward, out, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

const APP: Identity = Identity::APP;
const PROXY: Identity = Identity::PROXY;

/// The port that stands for the service's port 80 in a pod that has connected to nothing else.
fn port_of_service(scene: &Scene, family: Family) -> u16 {
    let original = Original {
        destination: scene.address(family, To::Service(80)).ip().into(),
        port: 80,
        proxy_port: 15001,
        in_place: 0,
    };
    original.steered_port(0)
}

/// Captured; with no port left to stand for a destination, if so asked.
fn attached(backend: Backend, exhausted: bool) -> Scene {
    let mut scene = Scene::new();
    scene.attach(backend, &Options::ISTIO);
    if backend == Redirect && exhausted {
        exhaust_ports(&scene.pod);
    }
    scene
}

/// What either end says the original destination was.
fn originals(dialed: &Dialed) -> [Option<SocketAddr>; 2] {
    let (Some(original), Some(original6), Some(greeting), Some(peer)) = (
        &dialed.original,
        &dialed.original6,
        &dialed.greeting,
        dialed.peer,
    ) else {
        panic!("{dialed:?}");
    };
    let client = [original, original6];
    let server = [&greeting.original, &greeting.original6];
    let level = usize::from(!canonical(peer).is_ipv4());
    [&client, &server].map(|end| end[level].address)
}

#[rstest]
fn pod_with_more_destinations_than_ports_is_captured_and_forgotten() {
    const DESTINATIONS: u32 = 4700;
    let mut scene = attached(Redirect, false);
    let mut second = attached(Redirect, false);
    let to = SocketAddr::from((Ipv4Addr::new(198, 18, 0, 1), 80));
    assert_eq!(second.app.sweep(to, 1).len(), 0);
    let wrong = scene.app.sweep(to, DESTINATIONS);
    assert!(wrong.is_empty(), "{} wrong: {:?}", wrong.len(), wrong[0]);
    let told_by_port = destinations_of(&scene.pod);
    assert!(told_by_port < DESTINATIONS as usize, "{told_by_port}");
    assert_eq!(flows_of(&scene.pod), 0, "all have been handed over");
    scene.detach();
    assert_eq!((destinations_of(&scene.pod), flows_of(&scene.pod)), (0, 0));
    assert_eq!(destinations_of(&second.pod), 1);
    // Uncaptured, nobody answers there.
    assert_eq!(scene.app.sweep(to, 1).len(), 1);
    assert_eq!(second.app.sweep(to, 1).len(), 0);
}

#[rstest]
fn port_that_stands_for_a_destination_is_a_port_like_others(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] exhausted: bool,
) {
    let mut scene = Scene::new();
    let port = port_of_service(&scene, family);
    for at in wildcards(port) {
        scene.app.listen(Listen::new(APP_NAME, at));
        scene.outside.listen(Listen::new(SERVICE, at));
    }
    let passthrough: IpAddr = if family.is_ipv4() {
        Ipv4Addr::new(127, 0, 0, 6).into()
    } else {
        scene.pod.netns.ip("addr replace ::6/128 dev lo nodad");
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into()
    };
    let mut attempts = vec![
        out(APP, To::Service(80), Outbound),
        out(APP, To::Own(port), Direct),
        out(APP, To::Localhost(port), Direct),
        out(APP, To::Service(port), Outbound),
        out(PROXY, To::Own(port), Inbound),
        out(PROXY, To::Localhost(port), Direct),
        out(PROXY, To::Own(port), Direct).source(passthrough),
        out(PROXY, To::Service(port), Direct),
    ];
    if family != Mapped {
        attempts.push(inward(port, Inbound));
    }
    scene.attach(backend, &Options::ISTIO);
    if backend == Redirect && exhausted {
        exhaust_ports(&scene.pod);
    }
    scene.all("attached", family, &attempts);
    // The ports have been taken now; the clients' own answers are compared too.
    for attempt in &attempts {
        let to = scene.address(family, attempt.to);
        let mut dial = Dial::new(family, to);
        dial.bind = attempt.bind;
        let Some(from) = &attempt.from else { continue };
        let dialed = scene.actor(from).dial(&dial);
        assert_eq!(originals(&dialed)[0], Some(to), "{attempt:?}");
        scene.judge(&dialed, to, attempt).unwrap();
    }
    if backend == Redirect && family != Mapped {
        let excluded = Options {
            exclude_inbound: Box::leak(port.to_string().into_boxed_str()),
            ..Options::ISTIO
        };
        scene.attach(backend, &excluded);
        scene.attempt(family, &inward(port, Direct)).unwrap();
    }
}

#[rstest]
fn udp_socket_is_never_taken_for_a_captured_connection(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = attached(backend, false);
    let port = port_of_service(&scene, family);
    scene
        .attempt(family, &out(APP, To::Service(80), Outbound))
        .unwrap();
    for to in [To::Own(port), To::Localhost(port), To::Service(port)] {
        let real = scene.address(family, to);
        let socket = scene.app.datagram(real);
        assert_eq!(socket.peer, Some(real));
        assert_eq!(socket.original.unwrap().address, None);
        assert_eq!(socket.original6.unwrap().address, None);
    }
}

#[rstest]
fn ephemeral_ports_may_be_steered_ports(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] exhausted: bool,
) {
    let mut scene = attached(backend, exhausted);
    let range = [("ipv4/ip_local_port_range", "61000 65534")];
    scene.pod.netns.sysctl(&range);
    scene.pod.peer.sysctl(&range);
    let mut attempts: Vec<Attempt> = vec![
        out(APP, To::Service(80), Outbound),
        out(APP, To::Elsewhere(443), Outbound),
        out(APP, To::Own(8080), Direct),
        out(APP, To::Localhost(8080), Direct),
        out(PROXY, To::Own(8080), Inbound),
        out(PROXY, To::Service(80), Direct),
    ];
    if family != Mapped {
        attempts.push(inward(8080, Inbound));
        attempts.push(inward(15020, Direct));
    }
    for _ in 0..5 {
        scene.all("overlapping ports", family, &attempts);
    }
}

#[rstest]
fn no_source_port_connects_a_socket_to_itself(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = Scene::new();
    let port = port_of_service(&scene, family);
    // The kernel has no other port to choose.
    let range = format!("{port} {port}");
    let range = [("ipv4/ip_local_port_range", &*range)];
    scene.pod.netns.sysctl(&range);
    // What would happen: nobody listens, and yet the socket is connected.
    let mut alone = Dial::new(family, scene.address(family, To::Own(port)));
    alone.greeting = false;
    let itself = scene.app.dial(&alone);
    assert_eq!((itself.error, itself.peer), (None, itself.local));
    scene.attach(backend, &Options::ISTIO);
    let to = scene.address(family, To::Service(80));
    let dialed = scene.app.dial(&Dial::new(family, to));
    let local = dialed.local.map(|local| local.port());
    assert_eq!(local, Some(port), "{dialed:?}");
    let attempt = out(APP, To::Service(80), Outbound);
    scene.judge(&dialed, to, &attempt).unwrap();
    assert_eq!(originals(&dialed), [Some(to); 2]);
}

#[rstest]
fn one_source_port_holds_connections_to_many_destinations(
    #[values(false, true)] exhausted: bool,
    #[values(V4, Mapped)] family: Family,
) {
    const COUNT: u8 = 200;
    let mut scene = attached(Redirect, exhausted);
    let source = SocketAddr::new(scene.pod.own(family), 23456);
    for index in 0..COUNT {
        let to = SocketAddr::from((Ipv4Addr::new(198, 18, 7, index), 80));
        let dial = Dial::new(family, to).bind(source).keep(&index.to_string());
        let dialed = scene.app.dial(&dial);
        assert_eq!(dialed.outcome(), "15001", "{to}");
        assert_eq!(
            dialed.greeting.as_ref().map(|g| canonical(g.peer)),
            Some(source)
        );
        assert_eq!(originals(&dialed), [Some(to); 2]);
    }
    for index in 0..COUNT {
        let name = index.to_string();
        assert_eq!(scene.app.ask(&name, &name).as_deref(), Ok(&*name));
        let peer = scene.app.look(&name).peer.map(canonical);
        let to = SocketAddr::from((Ipv4Addr::new(198, 18, 7, index), 80));
        assert_eq!(peer, Some(to));
    }
}

#[rstest]
fn socket_used_again_tells_nothing_of_what_it_was(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] exhausted: bool,
) {
    let mut scene = attached(backend, exhausted);
    let any = wildcards(23456)[usize::from(!family.is_ipv4())];
    scene.app.create("again", family);
    let captured = scene.address(family, To::Service(80));
    let mut first = Dial::new(family, captured).bind(any);
    first.timeout_ms = 3000;
    let next = |scene: &mut Scene, dial: &Dial, who: &str| {
        let dialed = scene.app.connect("again", dial);
        assert_eq!(dialed.outcome(), who, "{dialed:?}");
        assert_eq!(dialed.peer.map(canonical), Some(dial.to));
        assert_eq!(originals(&dialed), [Some(dial.to); 2]);
        scene.app.disconnect("again");
        let bare = scene.app.look("again");
        assert_eq!(bare.peer, None);
        assert_eq!(bare.local.map(|local| local.port()), Some(23456));
        assert_eq!(bare.original.unwrap().address, None);
        assert_eq!(bare.original6.unwrap().address, None);
    };
    next(&mut scene, &first, "15001");
    let own = scene.address(family, To::Own(8080));
    next(&mut scene, &Dial::new(family, own), APP_NAME);
    let elsewhere = scene.address(family, To::Elsewhere(443));
    next(&mut scene, &Dial::new(family, elsewhere), "15001");
    scene.app.serve("again", APP_NAME);
    let attempt = out(Identity::ROOT, To::Own(23456), Direct);
    scene.attempt(family, &attempt).unwrap();
    if family != Mapped {
        scene.attempt(family, &inward(23456, Inbound)).unwrap();
    }
}

#[rstest]
fn source_address_is_the_routes(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
    #[values(false, true)] secondary: bool,
) {
    let pod = Pod::new();
    let [a, b, c, _] = pod.ipv4.octets();
    let other = Ipv4Addr::new(a, b, c, 3);
    pod.netns.ip(&format!("addr add {other}/24 dev eth0"));
    if secondary {
        pod.netns.ip(&format!(
            "route replace default via {} src {other}",
            pod.peer4
        ));
    }
    let expected = if secondary { other } else { pod.ipv4 };
    let mut scene = Scene::with(pod, &Options::ISTIO);
    scene.attach(backend, &Options::ISTIO);
    let to = scene.address(family, To::Service(80));
    for who in ["15001", SERVICE] {
        let actor = if who == SERVICE {
            &mut scene.proxy
        } else {
            &mut scene.app
        };
        let dialed = actor.dial(&Dial::new(family, to));
        assert_eq!(dialed.outcome(), who);
        let seen = [dialed.local.unwrap(), dialed.greeting.unwrap().peer];
        let expected = IpAddr::from(expected);
        assert_eq!(
            seen.map(|address| canonical(address).ip()),
            [expected; 2],
            "{who}"
        );
        assert_eq!(dialed.peer.map(canonical), Some(to));
    }
}

#[rstest]
fn process_outside_of_the_cgroup_is_mistaken_at_a_port_that_stands_for_a_destination(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    // A limit, written down in docs/behaviour.md: no program of the pod sees this process connect.
    let mut scene = Scene::new();
    let port = port_of_service(&scene, V4);
    scene.app.listen(Listen::new(APP_NAME, wildcards(port)[0]));
    scene.attach(backend, &Options::ISTIO);
    let mut stranger = Actor::start(&scene.pod.netns.path(), None, APP);
    let dial = Dial::new(V4, scene.address(V4, To::Own(port)));
    assert_eq!(stranger.dial(&dial).outcome(), APP_NAME);
    scene
        .attempt(V4, &out(APP, To::Service(80), Outbound))
        .unwrap();
    let expected = match backend {
        Redirect => "15001",
        Iptables => APP_NAME,
    };
    assert_eq!(stranger.dial(&dial).outcome(), expected);
    // Its own processes are never mistaken.
    assert_eq!(scene.app.dial(&dial).outcome(), APP_NAME);
}
