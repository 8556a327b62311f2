//! What a source address that the application has chosen does to connections that would be captured.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_tests::{
    backend::Backend,
    options::{DNS_PROXY_PORT, Options},
    pod::SERVICE4,
    protocol::{Dial, Family, Identity, Listen, Setting, Transport, canonical},
    scene::{SERVICE, Scene, To, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};

/// Istio's options, with all DNS queries captured.
const DNS: Options = Options {
    redirect_dns: true,
    capture_all_dns: true,
    ..Options::ISTIO
};

#[rstest]
fn loopback_source_is_refused_with_the_kernels_own_error(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
    #[values([127, 0, 0, 1], [127, 0, 0, 6])] source: [u8; 4],
) {
    let mut scene = Scene::new();
    let [a, b, c, _] = scene.pod.ipv4.octets();
    let to = |ip: Ipv4Addr| SocketAddr::new(ip.into(), 80);
    let service = Dial::new(family, to(SERVICE4));
    for (attached, answers) in [(false, SERVICE), (true, "15001")] {
        if attached {
            scene.attach(backend, &Options::ISTIO);
        }
        for (destination, device, errno) in [
            (SERVICE4, None, "EINVAL"),
            (Ipv4Addr::new(a, b, c, 255), None, "EINVAL"),
            // The kernel looks for these on the interface that has the source address.
            (Ipv4Addr::new(224, 0, 0, 99), None, "ENETUNREACH"),
            (Ipv4Addr::new(239, 1, 2, 3), None, "ENETUNREACH"),
            (Ipv4Addr::BROADCAST, None, "ENETUNREACH"),
            (Ipv4Addr::new(224, 0, 0, 99), Some("eth0"), "EINVAL"),
            (Ipv4Addr::BROADCAST, Some("eth0"), "EINVAL"),
        ] {
            let mut dial =
                Dial::new(family, to(destination)).bind(SocketAddr::new(source.into(), 0));
            if let Some(device) = device {
                dial = dial.device(device);
            }
            let dialed = scene.app.dial(&dial);
            assert_eq!(dialed.outcome(), errno, "attached: {attached}, {dial:?}");
        }
        assert_eq!(scene.app.dial(&service).outcome(), answers);
    }
}

/// Both connected UDP sockets that ask a DNS server outside, with its queries captured.
#[rstest]
fn loopback_source_of_a_query_is_shown(#[values(Redirect, Iptables)] backend: Backend) {
    let mut scene = Scene::new();
    let [_, any] = wildcards(53);
    scene.outside.listen(Listen::new(SERVICE, any).udp());
    let agent = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), DNS_PROXY_PORT);
    scene.proxy.listen(Listen::new("agent", agent).udp());
    let server = scene.address(V6, To::Service(53));
    let own = scene.pod.own(V6);
    let ask = |scene: &mut Scene, source: IpAddr, port| {
        let mut dial = Dial::new(V6, server).bind(SocketAddr::new(source, port));
        dial.transport = Transport::ConnectedUdp;
        let dialed = scene.app.dial(&dial);
        let local = dialed.local.map(|local| local.ip());
        assert_eq!(dialed.peer.map(canonical), Some(server));
        (dialed.outcome().to_owned(), local)
    };
    let any = Ipv6Addr::UNSPECIFIED.into();
    let loopback = Ipv6Addr::LOCALHOST.into();
    assert_eq!(ask(&mut scene, any, 0), (SERVICE.to_owned(), Some(own)));
    scene.attach(backend, &DNS);
    for port in [0, 4055] {
        for (source, shown) in [(loopback, loopback), (own, own), (any, own)] {
            let expected = ("agent".to_owned(), Some(shown));
            assert_eq!(ask(&mut scene, source, port), expected, "{source} {port}");
        }
    }
}

/// Connecting again leaves the source as it is, whether the application or the kernel has chosen it.
#[rstest]
fn source_of_a_query_stays_when_another_server_is_asked(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let mut scene = Scene::new();
    scene.attach(backend, &DNS);
    let own = scene.pod.own(V6);
    let servers = [To::Service(53), To::Elsewhere(53)].map(|to| scene.address(V6, to));
    let any = Ipv6Addr::UNSPECIFIED.into();
    let loopback = Ipv6Addr::LOCALHOST.into();
    for port in [0, 4056] {
        for (source, shown) in [(loopback, loopback), (own, own), (any, own)] {
            let bind = SocketAddr::new(source, port);
            let seen = scene.app.datagrams(bind, &servers);
            assert_eq!(seen.local.map(|local| local.ip()), Some(shown), "{bind}");
            assert_eq!(seen.peer, Some(servers[1]), "{bind}");
        }
    }
}

/// No answer finds back to an address that is not the pod's. IPv4 refuses to send from one, unless the socket is
/// transparent.
#[rstest]
fn query_from_an_address_that_is_not_the_pods_ends_as_the_kernel_has_it(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Transport::Udp, Transport::ConnectedUdp)] transport: Transport,
    #[values(Setting::Freebind, Setting::Transparent)] setting: Setting,
) {
    let mut scene = Scene::new();
    for at in [
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PROXY_PORT),
        SocketAddr::new(Ipv6Addr::LOCALHOST.into(), DNS_PROXY_PORT),
    ] {
        scene.proxy.listen(Listen::new("agent", at).udp());
    }
    scene.attach(backend, &DNS);
    let server = scene.address(family, To::Service(53));
    let foreign = scene.address(family, To::Elsewhere(0));
    let own = SocketAddr::new(scene.pod.own(family), 0);
    let refused = family.is_ipv4() && setting == Setting::Freebind;
    let lost = if refused { "ENETUNREACH" } else { "EAGAIN" };
    for (source, outcome) in [(own, "agent"), (foreign, lost)] {
        let mut dial = Dial::new(family, server)
            .bind(source)
            .setting(setting.clone())
            .timeout_ms(500);
        dial.transport = transport;
        let dialed = scene.actor(&Identity::ROOT).dial(&dial);
        assert_eq!(dialed.outcome(), outcome, "from {source}: {dialed:?}");
    }
}

/// Documented: only for sockets that are not transparent does the kernel look at the source before the route.
#[rstest]
fn foreign_source_without_a_route_is_refused(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
    #[values(Setting::Freebind, Setting::Transparent)] setting: Setting,
) {
    let mut scene = Scene::new();
    scene.pod.netns.ip("route add unreachable 192.0.2.0/25");
    let to = SocketAddr::new(Ipv4Addr::new(192, 0, 2, 9).into(), 80);
    let foreign = scene.address(family, To::Elsewhere(0));
    let dial = Dial::new(family, to).bind(foreign).setting(setting.clone());
    for attached in [false, true] {
        if attached {
            scene.attach(backend, &Options::ISTIO);
        }
        let as_the_route = setting == Setting::Transparent || attached && backend == Redirect;
        let expected = if as_the_route {
            "EHOSTUNREACH"
        } else {
            "ENETUNREACH"
        };
        let dialed = scene.actor(&Identity::ROOT).dial(&dial);
        assert_eq!(dialed.outcome(), expected, "attached: {attached}");
    }
}
