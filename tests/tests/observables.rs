//! What both ends of a captured connection can see, compared with iptables' REDIRECT.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    options::Options,
    pod::Pod,
    protocol::{Dial, Dialed, Family, Identity, Listen, Probe, Way, canonical},
    scene::{self, Lands, Scene, To, answered, inward, out, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Inbound, Outbound};

/// Buffers that programs use: too short, `sockaddr_in`, `sockaddr_in6`, istio-validation's `ip6_mtuinfo`, `sockaddr_storage`.
const LENGTHS: [usize; 5] = [8, 16, 28, 32, 128];

fn failed(errno: &str, length: usize) -> Probe {
    Probe {
        errno: Some(errno.to_owned()),
        address: None,
        length,
    }
}

/// Connections to be captured: from a process of the pod, or from outside.
type Connection = (Option<Identity>, To);

const OUT: Connection = (Some(Identity::APP), To::Service(80));
const IN: Connection = (None, To::Own(8080));

/// A scene with the proxy on dual-stack sockets, or on one socket per family.
fn scene(dual_stack: bool) -> Scene {
    if !dual_stack {
        return Scene::new();
    }
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    for port in [15001, 15006] {
        let at = (Ipv6Addr::UNSPECIFIED, port).into();
        scene
            .proxy
            .listen(Listen::new(&port.to_string(), at).dual_stack());
    }
    scene
}

/// Attaches, after a look at the connections uncaptured: the destination answers, and nobody knows of an original one.
fn attach(scene: &mut Scene, backend: Backend, family: Family, connections: &[Connection]) {
    for (from, to) in connections {
        let to = scene.address(family, *to);
        let dialed = dial_from(scene, from.as_ref()).dial(&Dial::new(family, to));
        let Some(greeting) = &dialed.greeting else {
            panic!("{to} uncaptured: {dialed:?}");
        };
        assert!(
            [scene::APP, scene::SERVICE].contains(&&*greeting.who),
            "{dialed:?}"
        );
        let probes = [
            Some(&greeting.original),
            Some(&greeting.original6),
            dialed.original.as_ref(),
            dialed.original6.as_ref(),
        ];
        assert!(
            probes
                .into_iter()
                .flatten()
                .all(|probe| probe.address.is_none()),
            "{dialed:?}"
        );
    }
    scene.attach(backend, &Options::ISTIO);
}

/// What `SO_ORIGINAL_DST` has to say at both levels with that buffer.
fn expected(real: SocketAddr, ipv6_socket: bool, length: usize) -> [Probe; 2] {
    let at = |size: usize, found: bool, absent: &str| match () {
        () if length < size && absent != "EOPNOTSUPP" => failed("EINVAL", length),
        () if found => answered(real, length),
        () => failed(absent, length),
    };
    let ipv4 = real.is_ipv4();
    let ipv6_level = if ipv6_socket { "ENOENT" } else { "EOPNOTSUPP" };
    [at(16, ipv4, "ENOENT"), at(28, !ipv4, ipv6_level)]
}

#[rstest]
#[case::outbound(Some(Identity::APP), To::Service(80))]
#[case::self_call(Some(Identity::PROXY), To::Own(8080))]
#[case::inbound(None, To::Own(8080))]
#[case::direct_in_the_pod(Some(Identity::APP), To::Own(8080))]
#[case::direct_on_loopback(Some(Identity::APP), To::Localhost(8080))]
#[case::direct_from_outside(None, To::Own(15020))]
fn original_destination_answers_like_netfilter(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] dual_stack: bool,
    #[case] from: Option<Identity>,
    #[case] to: To,
) {
    let mut scene = scene(dual_stack);
    attach(&mut scene, backend, family, &[(from.clone(), to)]);
    let real = scene.address(family, to);
    let dial = Dial::new(family, real).probe(&LENGTHS);
    let dialed = dial_from(&mut scene, from.as_ref()).dial(&dial);
    let greeting = dialed
        .greeting
        .as_ref()
        .unwrap_or_else(|| panic!("{:?}", dialed.error));
    let ipv6_socket = greeting.local.is_ipv6();
    for (length, original, original6) in &dialed.probes {
        let [ip, ipv6] = expected(real, ipv6_socket, *length);
        assert_eq!(
            *original, ip,
            "SOL_IP, {length} bytes, server {}",
            greeting.who
        );
        assert_eq!(
            *original6, ipv6,
            "SOL_IPV6, {length} bytes, server {}",
            greeting.who
        );
    }
    assert_eq!(dialed.probes.len(), LENGTHS.len());
}

/// Both directions, but for mapped sockets: from outside they are no other than IPv4.
fn controls(family: Family) -> &'static [Connection] {
    static BOTH: [Connection; 2] = [OUT, IN];
    match family {
        Mapped => &BOTH[..1],
        V4 | V6 => &BOTH,
    }
}

fn dial_from<'a>(scene: &'a mut Scene, from: Option<&Identity>) -> &'a mut Actor {
    match from {
        Some(identity) => scene.actor(identity),
        None => &mut scene.outside,
    }
}

#[rstest]
#[case::captured(Identity::APP, To::Service(80))]
#[case::self_call(Identity::PROXY, To::Own(8080))]
#[case::passed_outside(Identity::PROXY, To::Service(80))]
#[case::passed_inside(Identity::APP, To::Own(8080))]
fn client_may_ask_for_the_original_destination_too(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[case] from: Identity,
    #[case] to: To,
) {
    let mut scene = scene(false);
    attach(&mut scene, backend, family, &[(Some(from.clone()), to)]);
    let real = scene.address(family, to);
    let dialed = scene.actor(&from).dial(&Dial::new(family, real));
    let asked = if family.is_ipv4() {
        dialed.original
    } else {
        dialed.original6
    };
    assert_eq!(asked.unwrap().address, Some(real), "{from:?}");
}

#[rstest]
fn addresses_stay_the_same_while_the_connection_lives(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] nonblocking: bool,
) {
    let mut scene = scene(false);
    attach(&mut scene, backend, family, &[OUT]);
    let to = scene.address(family, To::Service(80));
    let mut dial = Dial::new(family, to).keep("kept");
    if nonblocking {
        dial = dial.way(Way::Nonblocking);
    }
    let first = scene.app.dial(&dial);
    assert_eq!(first.outcome(), "15001");
    assert_eq!(scene.app.ask("kept", "hello").as_deref(), Ok("hello"));
    let later = scene.app.look("kept");
    assert_eq!(later.local, first.local);
    assert_eq!(later.peer, first.peer);
    assert_eq!(later.peer.map(canonical), Some(to));
    assert_eq!(later.peer.map(|peer| peer.is_ipv4()), Some(family == V4));
}

/// Which halves of its own address a client binds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Bound {
    Address,
    Port,
    Both,
}

#[rstest]
#[case::outbound(Identity::APP, To::Service(80), "15001")]
#[case::self_call(Identity::PROXY, To::Own(8080), "15006")]
fn bound_source_is_kept(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Bound::Address, Bound::Port, Bound::Both)] bound: Bound,
    #[case] from: Identity,
    #[case] to: To,
    #[case] who: &str,
) {
    let mut scene = scene(false);
    attach(&mut scene, backend, family, &[(Some(from.clone()), to)]);
    let own = scene.pod.own(family);
    let any: IpAddr = if family.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let source = match bound {
        Bound::Address => SocketAddr::new(own, 0),
        Bound::Port => SocketAddr::new(any, 23456),
        Bound::Both => SocketAddr::new(own, 23456),
    };
    let to = scene.address(family, to);
    let dialed = scene.actor(&from).dial(&Dial::new(family, to).bind(source));
    assert_eq!(dialed.outcome(), who);
    let local = canonical(dialed.local.unwrap());
    assert_eq!(local.ip(), own);
    if bound != Bound::Address {
        assert_eq!(local.port(), 23456);
    }
    assert_eq!(dialed.peer.map(canonical), Some(to));
    assert_eq!(canonical(dialed.greeting.unwrap().peer), local);
}

#[rstest]
fn one_source_port_reaches_several_destinations(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = scene(false);
    attach(&mut scene, backend, family, &[OUT]);
    let source = SocketAddr::new(scene.pod.own(family), 23456);
    for (name, to) in [
        ("a", To::Service(80)),
        ("b", To::Service(443)),
        ("c", To::Elsewhere(80)),
    ] {
        let to = scene.address(family, to);
        let dialed = scene
            .app
            .dial(&Dial::new(family, to).bind(source).keep(name));
        assert_eq!(dialed.outcome(), "15001", "{to}");
        assert_eq!(dialed.local.map(canonical), Some(source));
        assert_eq!(dialed.peer.map(canonical), Some(to));
        let greeting = dialed.greeting.unwrap();
        let original = if family.is_ipv4() {
            greeting.original
        } else {
            greeting.original6
        };
        assert_eq!(original.address, Some(to));
    }
    for name in ["a", "b", "c"] {
        assert_eq!(scene.app.ask(name, name).as_deref(), Ok(name));
    }
}

#[rstest]
fn one_source_port_from_outside_reaches_several_ports(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = scene(false);
    attach(&mut scene, backend, family, &[IN]);
    let outside: IpAddr = if family == V4 {
        scene.pod.peer4.into()
    } else {
        scene.pod.peer6.into()
    };
    let source = SocketAddr::new(outside, 23456);
    for port in [80u16, 8080, 9090] {
        let to = scene.address(family, To::Own(port));
        let dialed = scene
            .outside
            .dial(&Dial::new(family, to).bind(source).keep(&port.to_string()));
        if port != 80 && !backend.serves_one_source_port_twice() {
            assert_eq!(dialed.outcome(), "EINPROGRESS", "{to}");
            return;
        }
        assert_eq!(dialed.outcome(), "15006", "{to}");
        assert_eq!(dialed.peer, Some(to));
        let greeting = dialed.greeting.unwrap();
        let original = if family == V4 {
            greeting.original
        } else {
            greeting.original6
        };
        assert_eq!(original.address, Some(to));
    }
    for port in ["80", "8080", "9090"] {
        assert_eq!(scene.outside.ask(port, port).as_deref(), Ok(port));
    }
}

/// Where the proxy's two listeners are bound.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Proxy {
    AnyIpv4,
    AnyDualStack,
    AnyBoth,
    Loopback,
    PodAddress,
    ReusePort,
    ReusePortDualStack,
}

impl Proxy {
    fn open(self, scene: &mut Scene) {
        let own: [IpAddr; 2] = [scene.pod.ipv4.into(), scene.pod.ipv6.into()];
        for port in [15001, 15006] {
            let listen = |at| Listen::new(&port.to_string(), at);
            let any6: SocketAddr = (Ipv6Addr::UNSPECIFIED, port).into();
            let listeners: Vec<Listen> = match self {
                Self::AnyIpv4 => vec![listen((Ipv4Addr::UNSPECIFIED, port).into())],
                Self::AnyDualStack => vec![listen(any6).dual_stack()],
                Self::AnyBoth => wildcards(port).map(listen).into(),
                Self::Loopback => vec![
                    listen((Ipv4Addr::LOCALHOST, port).into()),
                    listen((Ipv6Addr::LOCALHOST, port).into()),
                ],
                Self::PodAddress => own.map(|ip| listen(SocketAddr::new(ip, port))).into(),
                Self::ReusePort => wildcards(port).map(|at| listen(at).reuseport(4)).into(),
                Self::ReusePortDualStack => vec![listen(any6).dual_stack().reuseport(4)],
            };
            for listen in listeners {
                scene.proxy.listen(listen);
            }
        }
    }

    /// Whether iptables' REDIRECT finds it: OUTPUT goes to loopback, PREROUTING to the link's address.
    fn serves(self, family: Family, inward: bool) -> bool {
        match self {
            Self::AnyIpv4 => family.is_ipv4(),
            Self::Loopback => !inward,
            Self::PodAddress => inward,
            _ => true,
        }
    }
}

#[rstest]
fn proxy_is_found_wherever_it_listens(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(
        Proxy::AnyIpv4,
        Proxy::AnyDualStack,
        Proxy::AnyBoth,
        Proxy::Loopback,
        Proxy::PodAddress,
        Proxy::ReusePort,
        Proxy::ReusePortDualStack
    )]
    proxy: Proxy,
    #[values(false, true)] before_attach: bool,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    if before_attach {
        proxy.open(&mut scene);
    }
    attach(&mut scene, backend, family, controls(family));
    if !before_attach {
        proxy.open(&mut scene);
    }
    let mut check = |when: &str, serves: [bool; 2]| {
        // Several SO_REUSEPORT sockets share the connections: ask more than once.
        for _ in 0..4 {
            let outward = scene.attempt(family, &out(Identity::APP, To::Service(80), Outbound));
            expect(when, outward, serves[0]);
            let inside = scene.attempt(family, &out(Identity::PROXY, To::Own(8080), Inbound));
            expect(when, inside, serves[0]);
            if family != Mapped {
                expect(
                    when,
                    scene.attempt(family, &inward(8080, Inbound)),
                    serves[1],
                );
            }
        }
    };
    let serves = [proxy.serves(family, false), proxy.serves(family, true)];
    check("first", serves);
    for port in ["15001", "15006"] {
        scene.proxy.unlisten(port);
    }
    let mut check = |when: &str, serves: [bool; 2]| {
        let outward = scene.attempt(family, &out(Identity::APP, To::Service(80), Outbound));
        expect(when, outward, serves[0]);
        if family != Mapped {
            expect(
                when,
                scene.attempt(family, &inward(8080, Inbound)),
                serves[1],
            );
        }
    };
    check("closed", [false, false]);
    proxy.open(&mut scene);
    let outward = scene.attempt(family, &out(Identity::APP, To::Service(80), Outbound));
    expect("reopened", outward, serves[0]);
    if family != Mapped {
        expect(
            "reopened",
            scene.attempt(family, &inward(8080, Inbound)),
            serves[1],
        );
    }
}

fn expect(when: &str, result: Result<(), String>, served: bool) {
    match result {
        Ok(()) => assert!(served, "{when}: served, though no listener is reachable"),
        Err(error) if served => panic!("{when}: {error}"),
        Err(error) => assert!(error.contains("ECONNREFUSED"), "{when}: {error}"),
    }
}

#[rstest]
fn one_closed_reuseport_socket_of_another_proxy_leaves_the_rest_serving(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    // As Envoy's hot restart: the new process opens its sockets before the old one closes its own.
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    attach(&mut scene, backend, family, controls(family));
    let old: Vec<SocketAddr> = [15001, 15006].into_iter().flat_map(wildcards).collect();
    for at in &old {
        scene
            .proxy
            .listen(Listen::new(&format!("old {}", at.port()), *at).reuseport(2));
    }
    for at in &old {
        scene
            .proxy
            .listen(Listen::new(&at.port().to_string(), *at).reuseport(2));
    }
    for port in [15001, 15006] {
        scene.proxy.unlisten(&format!("old {port}"));
    }
    for _ in 0..8 {
        scene
            .attempt(family, &out(Identity::APP, To::Service(80), Outbound))
            .unwrap();
        scene.attempt(family, &inward(8080, Inbound)).unwrap();
    }
}

#[rstest]
fn no_proxy_refuses_the_client(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] nonblocking: bool,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    attach(&mut scene, backend, family, &[OUT]);
    let mut dial = Dial::new(family, scene.address(family, To::Service(80)));
    if nonblocking {
        dial = dial.way(Way::Nonblocking);
    }
    assert_eq!(scene.app.dial(&dial).outcome(), "ECONNREFUSED");
    assert_eq!(scene.proxy.dial(&dial).outcome(), "service");
}

#[rstest]
fn destination_nobody_serves_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = scene(false);
    let destinations = [To::Service(12345), To::Elsewhere(1), To::Service(65535)]
        .map(|to| scene.address(family, to));
    for real in destinations {
        let dialed = scene.app.dial(&Dial::new(family, real));
        assert_eq!(dialed.outcome(), "ECONNREFUSED");
    }
    scene.attach(backend, &Options::ISTIO);
    for real in destinations {
        let dialed: Dialed = scene.app.dial(&Dial::new(family, real));
        assert_eq!(dialed.outcome(), "15001");
        assert_eq!(dialed.peer.map(canonical), Some(real));
        assert_eq!(
            scene.proxy.dial(&Dial::new(family, real)).outcome(),
            "ECONNREFUSED"
        );
    }
}
