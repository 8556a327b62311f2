//! TPROXY mode: inbound connections keep their local address, and the proxy may dial from its clients' addresses.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_tests::{
    backend::Backend,
    options::{Options, SELF_MARK},
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen, canonical},
    scene::{Lands, Scene, To, inward, out, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, InPlace, Inbound, Outbound};

/// What Istio's injector gives for `interceptionMode: TPROXY`.
const TPROXY: Options = Options {
    tproxy: true,
    ..Options::ISTIO
};
/// Envoy's `original_src` filter sets it.
const MARK: u32 = 1337;

#[rstest]
fn inbound_connections_keep_their_address(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let attempts = [
        inward(8080, InPlace),
        inward(80, InPlace),
        inward(53, InPlace),
        inward(15001, InPlace),
        inward(15006, InPlace),
        // The tunnel's port is not exempt here.
        inward(15008, InPlace),
        inward(15020, Direct),
        inward(15021, Direct),
        inward(15090, Direct),
    ];
    Scene::run(backend, family, TPROXY, &attempts);
}

#[rstest]
fn excluded_tunnel_passes(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        exclude_inbound: "15008,8000:8010",
        ..TPROXY
    };
    let attempts = [
        inward(15008, Direct),
        inward(8005, Direct),
        inward(8011, InPlace),
        out(Identity::TPROXY, To::Own(15008), Direct),
        out(Identity::TPROXY, To::Own(8011), InPlace),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn listed_ports_are_captured_and_exclusions_ignored(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        include_inbound: "80,15008",
        exclude_inbound: "80",
        ..TPROXY
    };
    let attempts = [
        inward(80, InPlace),
        inward(15008, InPlace),
        inward(8080, Direct),
        out(Identity::TPROXY, To::Own(80), InPlace),
        out(Identity::TPROXY, To::Own(8080), Direct),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn no_list_captures_nothing_inbound(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        include_inbound: "",
        ..TPROXY
    };
    let attempts = [
        inward(8080, Direct),
        out(Identity::TPROXY, To::Own(8080), Direct),
        out(Identity::PROXY, To::Own(8080), Inbound),
        out(Identity::APP, To::Service(80), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn proxy_reaches_its_own_listener_in_place_or_by_nat(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let attempts = [
        // The nat table has no rule for this uid, the mangle table has one for the gid.
        out(Identity::TPROXY, To::Own(8080), InPlace),
        out(Identity::TPROXY, To::Own(15008), InPlace),
        out(Identity::TPROXY, To::Own(15006), InPlace),
        out(Identity::TPROXY, To::Own(15020), Direct),
        out(Identity::new(1000, 1337), To::Own(8080), InPlace),
        // The nat table comes first, and has no exclusions.
        out(Identity::PROXY, To::Own(8080), Inbound),
        out(Identity::PROXY, To::Own(15020), Inbound),
        // But for the tunnel, which the mangle table then takes.
        out(Identity::PROXY, To::Own(15008), InPlace),
        out(Identity::TPROXY, To::Localhost(8080), Direct),
        out(Identity::PROXY, To::Localhost(8080), Direct),
        out(Identity::APP, To::Own(8080), Direct),
        out(Identity::APP, To::Localhost(8080), Direct),
        out(Identity::ROOT, To::Own(8080), Direct),
    ];
    Scene::run(backend, family, TPROXY, &attempts);
}

#[rstest]
fn marks_decide(#[values(Redirect, Iptables)] backend: Backend, #[values(V4, V6)] family: Family) {
    let attempts = [
        out(Identity::TPROXY, To::Own(8080), Direct).mark(MARK),
        out(Identity::TPROXY, To::Own(8080), InPlace).mark(7),
        out(Identity::TPROXY, To::Own(8080), InPlace).mark(SELF_MARK),
        out(Identity::ROOT, To::Own(8080), InPlace).mark(SELF_MARK),
        out(Identity::ROOT, To::Own(8080), Direct).mark(MARK),
        out(Identity::ROOT, To::Own(8080), Direct).mark(7),
        out(Identity::ROOT, To::Service(80), Outbound).mark(SELF_MARK),
    ];
    Scene::run(backend, family, TPROXY, &attempts);
}

#[rstest]
fn hop_to_the_application_and_loopback_pass(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let own6: IpAddr = if family == V4 {
        Ipv4Addr::new(127, 0, 0, 6).into()
    } else {
        Ipv6Addr::from_bits(6).into()
    };
    let mut attempts = vec![
        out(Identity::TPROXY, To::Own(8080), Direct).source(own6),
        out(Identity::PROXY, To::Own(8080), Direct).source(own6),
    ];
    if family == V4 {
        // L is 127.0.0.1 alone.
        let other = To::Address(Ipv4Addr::new(127, 0, 0, 5).into(), 8080);
        attempts.push(out(Identity::TPROXY, other, InPlace));
        attempts.push(out(Identity::APP, other, Direct));
    }
    Scene::run(backend, family, TPROXY, &attempts);
}

#[rstest]
fn loopback_of_the_options_passes(#[values(Redirect, Iptables)] backend: Backend) {
    let options = Options {
        loopback_cidr: "127.0.0.0/8",
        ..TPROXY
    };
    let other = To::Address(Ipv4Addr::new(127, 0, 0, 5).into(), 8080);
    let attempts = [
        out(Identity::TPROXY, other, Direct),
        out(Identity::TPROXY, To::Own(8080), InPlace),
    ];
    Scene::run(backend, V4, options, &attempts);
}

#[rstest]
fn outbound_options_do_not_hold_back_the_mangle_table(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        exclude_outbound: "8080",
        uids: "3,0",
        gids: "4",
        ..TPROXY
    };
    let attempts = [
        out(Identity::new(3, 3), To::Own(80), Inbound),
        out(Identity::new(3, 3), To::Own(8080), InPlace),
        // The second uid: rule O4b of the first lets it pass the nat table.
        out(Identity::new(0, 0), To::Own(80), InPlace),
        out(Identity::new(5, 4), To::Own(80), InPlace),
        out(Identity::APP, To::Own(80), Direct),
        out(Identity::APP, To::Service(80), Outbound),
        out(Identity::APP, To::Service(8080), Direct),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn ipv6_off_captures_ipv4_only(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        ipv6: false,
        ..TPROXY
    };
    let lands = if family == V6 { Direct } else { InPlace };
    let attempts = [
        inward(8080, lands),
        out(Identity::TPROXY, To::Own(8080), lands),
    ];
    Scene::run(backend, family, options, &attempts);
}

/// The ports that captured connections are steered to are ordinary ones here.
#[rstest]
fn steered_ports_are_told_apart(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    for address in wildcards(61_500) {
        scene.app.listen(Listen::new("app", address));
    }
    scene.attach(backend, &TPROXY);
    for attempt in [
        inward(61_500, InPlace),
        out(Identity::TPROXY, To::Own(61_500), InPlace),
        out(Identity::PROXY, To::Own(61_500), Inbound),
        out(Identity::APP, To::Own(61_500), Direct),
        out(Identity::TPROXY, To::Own(61_500), Direct).mark(MARK),
    ] {
        scene.attempt(family, &attempt).unwrap();
    }
}

/// A listener need not be transparent for this project. For iptables it has to be: that is the control.
#[rstest]
#[case(Redirect, "15006")]
#[case(Iptables, "EAGAIN")]
fn listener_need_not_be_transparent(#[case] backend: Backend, #[case] answers: &str) {
    let mut scene = Scene::without_proxy(Pod::new(), &TPROXY);
    for address in wildcards(15006) {
        scene.proxy.listen(Listen::new("15006", address));
    }
    scene.attach(backend, &TPROXY);
    let to = scene.address(V4, To::Own(8080));
    let mut dial = Dial::new(V4, to);
    if backend == Iptables {
        dial = dial.timeout_ms(700);
    }
    let dialed = scene.outside.dial(&dial);
    assert_eq!(
        dialed.outcome().replace("EINPROGRESS", "EAGAIN"),
        answers,
        "{dialed:?}"
    );
    if backend == Redirect {
        assert_eq!(dialed.greeting.unwrap().local, to);
    }
}

/// Envoy's `original_src`: from the client's address to the application.
fn as_client(scene: &Scene, family: Family, port: u16) -> Dial {
    let client: IpAddr = if family.is_ipv4() {
        scene.pod.peer4.into()
    } else {
        scene.pod.peer6.into()
    };
    Dial::new(family, scene.address(family, To::Own(port)))
        .transparent((client, 0).into())
        .mark(MARK)
        .timeout_ms(1500)
}

#[rstest]
fn proxy_dials_from_its_clients_address(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    let dial = as_client(&scene, family, 8080);
    let refused = as_client(&scene, family, 12345);
    let proxy = Identity::TPROXY;
    // The answers leave the pod.
    assert_ne!(scene.actor(&proxy).dial(&dial).outcome(), "app");
    scene.attach(backend, &TPROXY);
    for _ in 0..20 {
        let dialed = scene.actor(&proxy).dial(&dial.clone().keep("kept"));
        assert_eq!(dialed.outcome(), "app", "{dialed:?}");
        let greeting = dialed.greeting.unwrap();
        assert_eq!(Some(greeting.peer), dialed.local.map(canonical));
        assert_eq!(greeting.peer.ip(), dial.bind.unwrap().ip());
        assert_eq!(greeting.local, dial.to);
        let long = "x".repeat(100_000);
        let said = scene.actor(&proxy).ask("kept", &long);
        assert_eq!(said.as_deref(), Ok(&*long));
    }
    // A reset finds its way too.
    let dialed = scene.actor(&proxy).dial(&refused);
    assert_eq!(dialed.outcome(), "ECONNREFUSED", "{dialed:?}");
    // And nobody else's connection is taken for it: the client itself is captured.
    scene.actor(&proxy).hang("kept");
    scene.attempt(family, &inward(8080, InPlace)).unwrap();
    scene.detach();
    assert_ne!(scene.actor(&proxy).dial(&dial).outcome(), "app");
}

/// With SYN cookies the listener is looked for once more, when the handshake ends.
#[rstest]
fn syn_cookies_change_nothing(#[values(V4, V6)] family: Family) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    scene.pod.netns.sysctl(&[("ipv4/tcp_syncookies", "2")]);
    scene.attach(Redirect, &TPROXY);
    let dial = as_client(&scene, family, 8080);
    for _ in 0..10 {
        scene.attempt(family, &inward(8080, InPlace)).unwrap();
        let to_self = out(Identity::TPROXY, To::Own(8080), InPlace);
        scene.attempt(family, &to_self).unwrap();
        let dialed = scene.actor(&Identity::TPROXY).dial(&dial);
        assert_eq!(dialed.outcome(), "app", "{dialed:?}");
    }
}

/// What let the proxy's connection pass ends with it: the same addresses and ports, from outside, are captured.
#[rstest]
fn former_connection_of_the_proxy_opens_no_hole(#[values(V4, V6)] family: Family) {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    scene.attach(Redirect, &TPROXY);
    let proxy = Identity::TPROXY;
    for (port, outcome) in [(8080, "app"), (12345, "ECONNREFUSED")] {
        let mut dial = as_client(&scene, family, port);
        dial.reset = true;
        let source = SocketAddr::new(dial.bind.unwrap().ip(), 40_000);
        dial.bind = Some(source);
        assert_eq!(scene.actor(&proxy).dial(&dial).outcome(), outcome);
        let again = Dial::new(family, dial.to).bind(source);
        assert_eq!(scene.outside.dial(&again).outcome(), "15006", "port {port}");
    }
}
