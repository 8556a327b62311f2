//! Which connections from outside are captured: semantics.md 2.5.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_tests::{
    backend::Backend,
    options::Options,
    pod::Pod,
    protocol::{Answer, Dial, Family, Identity, Listen, Request},
    scene::{Attempt, Lands, Scene, To, inward, out},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{V4, V6};
use Lands::{Direct, Inbound};

#[rstest]
#[case::wildcard_takes_all_but_excluded_ports_and_the_tunnel(
    Options::ISTIO,
    &[53, 80, 8080, 15001, 15006, 15007],
    &[15008, 15020, 15021, 15090],
)]
#[case::excluded_range_passes(
    Options { exclude_inbound: "443,8000:8010", ..Options::ISTIO },
    &[7999, 8011, 15020],
    &[443, 8000, 8010],
)]
#[case::listed_ports_are_captured_and_exclusions_ignored(
    Options { include_inbound: "80,8000:8010,15008", exclude_inbound: "80,8005", ..Options::ISTIO },
    &[80, 8005, 8010],
    &[8011, 8080, 15001, 15006, 15008],
)]
#[case::no_list_captures_nothing(
    Options { include_inbound: "", ..Options::ISTIO },
    &[],
    &[8080, 15006],
)]
#[case::custom_ports_move_listener_and_tunnel(
    Options { proxy_port: "12001", inbound_port: "12006", tunnel_port: "9000", ..Options::ISTIO },
    &[8080, 15008],
    &[9000],
)]
#[case::outbound_options_do_not_touch_inbound(
    Options {
        exclude_outbound: "8080",
        exclude_cidrs: "0.0.0.0/0,::/0",
        owner_groups: Some(""),
        ..Options::ISTIO
    },
    &[8080],
    &[],
)]
fn ports(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[case] options: Options,
    #[case] captured: &[u16],
    #[case] direct: &[u16],
) {
    let attempts: Vec<Attempt> = captured
        .iter()
        .map(|port| inward(*port, Inbound))
        .chain(direct.iter().map(|port| inward(*port, Direct)))
        .collect();
    Scene::run(backend, family, options, &attempts);
}

/// The proxy's end of such a connection has the application's port: like a connection of the application's own, it is in the way of a
/// socket without `SO_REUSEADDR`. With iptables it has 15006.
#[rstest]
fn application_listens_where_the_proxy_has_connections(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(false, true)] reuse_address: bool,
) {
    const PORT: u16 = 8088;
    let mut scene = Scene::new();
    scene.attach(backend, &Options::ISTIO);
    let to = scene.address(V4, To::Own(PORT));
    let dial = Dial::new(V4, to);
    scene.outside.create("held", V4);
    assert_eq!(scene.outside.connect("held", &dial).outcome(), "15006");
    let listen = Listen {
        reuse_address,
        ..Listen::new("restarted", (Ipv4Addr::UNSPECIFIED, PORT).into())
    };
    let answer = scene.app.request(&Request::Listen(listen));
    if backend == Redirect && !reuse_address {
        assert!(
            matches!(&answer, Answer::Failed(error) if error == "EADDRINUSE"),
            "{answer:?}"
        );
        return;
    }
    assert!(matches!(answer, Answer::Done), "{answer:?}");
    assert_eq!(scene.outside.dial(&dial).outcome(), "15006");
    let inside = Dial::new(V4, (Ipv4Addr::LOCALHOST, PORT).into());
    assert_eq!(scene.app.dial(&inside).outcome(), "restarted");
}

#[rstest]
fn ipv6_off_captures_ipv4_only(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let lands = if family == V6 { Direct } else { Inbound };
    Scene::run(
        backend,
        family,
        Options {
            ipv6: false,
            ..Options::ISTIO
        },
        &[inward(8080, lands)],
    );
}

#[rstest]
fn port_without_a_server_is_captured_all_the_same(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::new();
    let attempt = inward(12345, Inbound);
    assert!(
        scene
            .attempt(family, &attempt)
            .unwrap_err()
            .contains("ECONNREFUSED")
    );
    scene.attach(backend, &Options::ISTIO);
    scene.attempt(family, &attempt).unwrap();
}

#[rstest]
fn connection_within_the_pod_is_never_inbound(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let attempts = [
        out(Identity::APP, To::Own(8080), Direct),
        out(Identity::APP, To::Localhost(8080), Direct),
        out(Identity::ROOT, To::Own(8080), Direct),
    ];
    Scene::run(backend, family, Options::ISTIO, &attempts);
}

/// A source of a network that is the pod's own as a whole (`ip route add local`).
#[rstest]
fn connection_from_the_pods_own_network_is_never_inbound(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let mut scene = Scene::new();
    scene.pod.netns.ip("route add local 198.51.100.0/24 dev lo");
    scene.attach(backend, &Options::ISTIO);
    for last in [1, 2, 77, 255] {
        let source = IpAddr::from([198, 51, 100, last]);
        let attempt = out(Identity::APP, To::Own(8080), Direct).source(source);
        scene.attempt(V4, &attempt).unwrap();
    }
    scene.attempt(V4, &inward(8080, Inbound)).unwrap();
}

#[rstest]
fn no_listener_refuses_the_peer(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attempt(family, &inward(8080, Direct)).unwrap();
    scene.attach(backend, &Options::ISTIO);
    assert!(
        scene
            .attempt(family, &inward(8080, Inbound))
            .unwrap_err()
            .contains("ECONNREFUSED")
    );
    scene.attempt(family, &inward(15020, Direct)).unwrap();
}

#[rstest]
fn second_address_and_second_link_are_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(true, false)] before_attach: bool,
) {
    let mut scene = Scene::new();
    let [a, b, c, _] = scene.pod.ipv4.octets();
    let second = Ipv4Addr::new(a, b, c, 3);
    let other = Ipv4Addr::new(192, 0, 2, 2);
    let add = |scene: &Scene| {
        scene
            .pod
            .netns
            .ip(&format!("addr add {second}/24 dev eth0"));
        scene.pod.netns.ip(&format!(
            "link add net1 type veth peer name net1 netns {}",
            scene.pod.peer.name()
        ));
        scene
            .pod
            .netns
            .ip(&format!("addr add {other}/24 dev net1\nlink set net1 up"));
        scene
            .pod
            .peer
            .ip("addr add 192.0.2.1/24 dev net1\nlink set net1 up");
    };
    if before_attach {
        add(&scene);
    }
    scene.attach(backend, &Options::ISTIO);
    if !before_attach {
        add(&scene);
        if backend == Redirect {
            // Documented: a second attach brings the address set up to date at the latest.
            scene.attach(backend, &Options::ISTIO);
        }
    }
    for address in [second, other] {
        let to = (address, 8080).into();
        let dialed = scene.outside.dial(&Dial::new(V4, to));
        let greeting = dialed
            .greeting
            .unwrap_or_else(|| panic!("{address}: {:?}", dialed.error));
        assert_eq!(greeting.who, "15006");
        assert_eq!(dialed.peer, Some(to));
        assert_eq!(greeting.original.address, Some(to));
        // From inside, these are the pod's own: direct for the application, inbound for the proxy.
        let to = To::Address(IpAddr::V4(address), 8080);
        let inside = scene.address(V4, to);
        assert_eq!(scene.app.dial(&Dial::new(V4, inside)).outcome(), "app");
        assert_eq!(scene.proxy.dial(&Dial::new(V4, inside)).outcome(), "15006");
    }
}

/// Documented: iptables aims at the first address of the interface, which is the newest one in IPv6.
#[rstest]
fn proxy_on_one_address_serves_all_of_the_pod(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let first = scene.pod.own(family);
    let (second, bits): (IpAddr, u8) = match first {
        IpAddr::V4(ip) => (Ipv4Addr::from_bits(ip.to_bits() + 1).into(), 24),
        IpAddr::V6(ip) => (Ipv6Addr::from_bits(ip.to_bits() + 1).into(), 64),
    };
    let nodad = if family == V6 { "nodad" } else { "" };
    scene
        .pod
        .netns
        .ip(&format!("addr add {second}/{bits} dev eth0 {nodad}"));
    let at = SocketAddr::new(first, 15006);
    scene.proxy.listen(Listen::new("15006", at));
    scene.attach(backend, &Options::ISTIO);
    for called in [first, second] {
        let dial = |port| Dial::new(family, SocketAddr::new(called, port));
        assert_eq!(scene.outside.dial(&dial(15020)).outcome(), "app");
        let dialed = scene.outside.dial(&dial(8080));
        let shown = dialed.greeting.as_ref().map(|greeting| greeting.local.ip());
        let expected = match (backend, family) {
            (Redirect, _) => ("15006", Some(called)),
            (Iptables, V6) => ("ECONNREFUSED", None),
            (Iptables, _) => ("15006", Some(first)),
        };
        assert_eq!((dialed.outcome(), shown), expected, "{called}");
    }
}
