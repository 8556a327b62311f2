//! The edges of the socket interface: every way to make a connection is captured, and looks as it does with iptables.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    maps::flows_of,
    options::Options,
    patience::patience,
    pod::{Pod, Shape},
    protocol::{Dial, Dialed, Family, Identity, Listen, Setting, Way, canonical},
    raw::io_uring_refused,
    scene::{APP as APP_NAME, Lands, SERVICE, Scene, To, out, wildcards},
    skip,
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

const APP: Identity = Identity::APP;
const PROXY: Identity = Identity::PROXY;

fn attached(backend: Backend) -> Scene {
    let mut scene = Scene::new();
    scene.attach(backend, &Options::ISTIO);
    scene
}

/// The rows that every way has to pass: captured out, handed to the inbound listener, let alone.
fn rows() -> [(Identity, To, Lands); 4] {
    [
        (APP, To::Service(80), Outbound),
        (PROXY, To::Own(8080), Inbound),
        (APP, To::Own(8080), Direct),
        (PROXY, To::Service(80), Direct),
    ]
}

/// Makes the connections of [`rows`], before and after attach, as `alter` would have them.
fn rows_hold(
    backend: Backend,
    family: Family,
    mut scene: Scene,
    alter: impl Fn(Dial) -> Dial,
    make: impl Fn(&mut Actor, &Dial) -> Dialed,
) {
    for attached in [false, true] {
        if attached {
            scene.attach(backend, &Options::ISTIO);
        }
        for (from, to, lands) in rows() {
            let lands = if attached { lands } else { Direct };
            let real = scene.address(family, to);
            let dialed = make(scene.actor(&from), &alter(Dial::new(family, real)));
            let attempt = out(from, to, lands);
            if let Err(wrong) = scene.judge(&dialed, real, &attempt) {
                panic!("{attempt:?}: {wrong}\n    {dialed:?}");
            }
        }
    }
}

#[rstest]
fn every_way_to_connect_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Way::Nonblocking, Way::FastOpen, Way::FastOpenConnect, Way::IoUring)] way: Way,
) {
    if way == Way::IoUring
        && let Some(error) = io_uring_refused()
    {
        skip!("io_uring_setup: {error}");
    }
    let scene = Scene::new();
    // Client and server, data in the first SYN without a cookie, on every listener.
    scene.pod.netns.sysctl(&[("ipv4/tcp_fastopen", "1543")]);
    scene.pod.peer.sysctl(&[("ipv4/tcp_fastopen", "1543")]);
    rows_hold(backend, family, scene, |dial| dial.way(way), Actor::dial);
}

#[rstest]
fn child_process_connects_like_its_parent(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] inherits: bool,
) {
    rows_hold(
        backend,
        family,
        Scene::new(),
        |dial| dial,
        |actor, dial| {
            if inherits {
                actor.create("inherited", family);
                actor.spawn(Some("inherited"), dial)
            } else {
                actor.spawn(None, dial)
            }
        },
    );
}

#[rstest]
fn threads_connect_at_the_same_time(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = attached(backend);
    let ends = [
        (To::Service(80), Outbound),
        (To::Elsewhere(443), Outbound),
        (To::Own(8080), Direct),
        (To::Service(8080), Outbound),
    ];
    let dials = (0..64).map(|index| Dial::new(family, scene.address(family, ends[index % 4].0)));
    let dialed = scene.app.together(dials.collect());
    assert_eq!(dialed.len(), 64);
    for (index, dialed) in dialed.iter().enumerate() {
        let (to, lands) = ends[index % 4];
        let real = scene.address(family, to);
        scene.judge(dialed, real, &out(APP, to, lands)).unwrap();
    }
}

#[rstest]
fn multipath_tcp_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    if let Err(error) = redirect_tests::dial::create(family, true) {
        skip!("socket(IPPROTO_MPTCP): {error}");
    }
    let mut scene = attached(backend);
    for (from, to, lands) in rows() {
        let real = scene.address(family, to);
        let dialed = scene
            .actor(&from)
            .dial(&Dial::new(family, real).multipath());
        scene.judge(&dialed, real, &out(from, to, lands)).unwrap();
    }
}

#[rstest]
fn multipath_listener_is_found_by_iptables_only(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[values(false, true)] before_attach: bool,
    #[values(false, true)] multipath: bool,
) {
    if let Err(error) = redirect_tests::dial::create(family, true) {
        skip!("socket(IPPROTO_MPTCP): {error}");
    }
    // A limit, written down in docs/behaviour.md: the kernel lets no MPTCP socket into a sockhash.
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let open = |scene: &mut Scene| {
        for at in wildcards(15001) {
            scene.proxy.listen(Listen::new("15001", at).multipath());
        }
    };
    if before_attach {
        open(&mut scene);
    }
    scene.attach(backend, &Options::ISTIO);
    if !before_attach {
        open(&mut scene);
    }
    let to = scene.address(family, To::Service(80));
    let mut dial = Dial::new(family, to);
    dial.multipath = multipath;
    let dialed = scene.app.dial(&dial);
    if backend == Redirect {
        assert_eq!(dialed.outcome(), "ECONNREFUSED");
        return;
    }
    assert_eq!(dialed.outcome(), "15001");
    let greeting = dialed.greeting.unwrap();
    let told = [greeting.original.address, greeting.original6.address];
    // An accepted MPTCP socket does not know the option.
    assert_eq!(told.contains(&Some(to)), !multipath, "{told:?}");
}

#[rstest]
fn device_bound_socket_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = attached(backend);
    let to = scene.address(family, To::Service(80));
    let on = |device: &str| Dial::new(family, to).setting(Setting::Device(device.to_owned()));
    match backend {
        Redirect => {
            let dialed = scene.app.dial(&on("eth0"));
            scene
                .judge(&dialed, to, &out(APP, To::Service(80), Outbound))
                .unwrap();
        }
        // The proxy's answer comes over lo, where this socket does not listen.
        Iptables => {
            let dialed = scene.app.dial(&on("eth0").timeout_ms(500));
            assert_eq!(dialed.outcome(), "EINPROGRESS");
        }
    }
    let dialed = scene.proxy.dial(&on("eth0"));
    scene
        .judge(&dialed, to, &out(PROXY, To::Service(80), Direct))
        .unwrap();
    let local = scene.address(family, To::Localhost(8080));
    let dial = Dial::new(family, local).setting(Setting::Device("lo".to_owned()));
    let dialed = scene.app.dial(&dial);
    scene
        .judge(&dialed, local, &out(APP, To::Localhost(8080), Direct))
        .unwrap();
}

#[rstest]
fn source_bound_without_a_port_is_kept(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
) {
    let mut scene = attached(backend);
    let source = SocketAddr::new(scene.pod.own(family), 0);
    let to = scene.address(family, To::Service(80));
    let dial = Dial::new(family, to)
        .bind(source)
        .setting(Setting::BindAddressNoPort);
    let dialed = scene.app.dial(&dial);
    scene
        .judge(&dialed, to, &out(APP, To::Service(80), Outbound))
        .unwrap();
}

#[rstest]
#[case::freebind(Setting::Freebind)]
#[case::transparent(Setting::Transparent)]
fn source_that_is_not_the_pods_never_leaves_uncaptured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[case] setting: Setting,
) {
    let mut scene = Scene::new();
    let (source, version): (IpAddr, &str) = match family {
        V6 => (
            Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 7).into(),
            "-6",
        ),
        _ => (Ipv4Addr::new(192, 0, 2, 77).into(), "-4"),
    };
    // Answers find back, and to the socket, although the pod does not have the address.
    let own = scene.pod.own(family);
    scene.pod.peer.ip(&format!("route add {source} via {own}"));
    for command in [
        format!("{version} rule add iif eth0 lookup 77"),
        format!("{version} route add local {source} dev lo table 77"),
    ] {
        assert!(scene.pod.netns.try_ip(&command), "{command}");
    }
    let to = scene.address(family, To::Service(80));
    // For IPv4 the kernel itself finds no way from an address that is nobody's, unless the socket is transparent.
    let refused = family == V4 && matches!(setting, Setting::Freebind);
    let dial = Dial::new(family, to)
        .bind(SocketAddr::new(source, 0))
        .setting(setting)
        .timeout_ms(500);
    let dialed = scene.actor(&Identity::ROOT).dial(&dial);
    let expected = if refused { "ENETUNREACH" } else { SERVICE };
    assert_eq!(dialed.outcome(), expected, "{dialed:?}");
    scene.attach(backend, &Options::ISTIO);
    let dialed = scene.actor(&Identity::ROOT).dial(&dial);
    println!("{backend:?} {family:?}: {}", dialed.outcome());
    // The proxy's answer is for an address out there: nobody ever hears it.
    let expected = if refused {
        "ENETUNREACH"
    } else {
        "EINPROGRESS"
    };
    assert_eq!(dialed.outcome(), expected, "{dialed:?}");
}

#[rstest]
#[case::outside(To::Service(80), Outbound)]
#[case::itself(To::Own(8080), Direct)]
fn ipv6_socket_bound_to_an_address_connects_to_ipv4(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(false, true)] mapped: bool,
    #[case] to: To,
    #[case] lands: Lands,
) {
    let mut scene = attached(backend);
    let real = scene.address(V4, to);
    let bind = scene.pod.own(if mapped { V4 } else { V6 });
    let dial = Dial::new(Mapped, real).bind(SocketAddr::new(bind, 0));
    let dialed = scene.app.dial(&dial);
    if mapped {
        let attempt = out(APP, to, lands).source(bind);
        scene.judge(&dialed, real, &attempt).unwrap();
    } else {
        // Binding to an IPv6 address makes the socket IPv6 only.
        assert_eq!(dialed.outcome(), "ENETUNREACH");
    }
}

/// Not even a captured connection becomes IPv4 by that.
#[rstest]
fn ipv6_socket_bound_to_ipv4_does_not_connect_to_ipv6(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(false, true)] loopback: bool,
) {
    let mut scene = attached(backend);
    let IpAddr::V4(own) = scene.pod.own(V4) else {
        panic!("not IPv4");
    };
    let bind = if loopback { Ipv4Addr::LOCALHOST } else { own };
    let real = scene.address(V6, To::Service(80));
    let dial = Dial::new(V6, real);
    let dialed = scene.app.dial(&dial);
    let attempt = out(APP, To::Service(80), Outbound);
    scene.judge(&dialed, real, &attempt).unwrap();
    let dial = dial.bind(SocketAddr::new(bind.to_ipv6_mapped().into(), 0));
    assert_eq!(scene.app.dial(&dial).outcome(), "EAFNOSUPPORT");
}

#[rstest]
fn link_local_destination_is_captured(#[values(Redirect, Iptables)] backend: Backend) {
    let mut scene = Scene::new();
    let [index, peer] = [&scene.pod.netns, &scene.pod.peer].map(|namespace| {
        namespace.ip("addr replace fe80::77/64 dev eth0 nodad");
        namespace.enter(|| nix::net::if_::if_nametoindex("eth0").unwrap())
    });
    scene
        .pod
        .netns
        .ip("addr del fe80::77/64 dev eth0\naddr add fe80::66/64 dev eth0 nodad");
    assert_ne!(peer, 0);
    let to = SocketAddrV6::new("fe80::77".parse().unwrap(), 80, 0, index);
    let dial = Dial::new(V6, to.into());
    assert_eq!(scene.app.dial(&dial).outcome(), SERVICE);
    scene.attach(backend, &Options::ISTIO);
    assert_eq!(scene.proxy.dial(&dial).outcome(), SERVICE);
    if backend == Iptables {
        // The scope binds the socket to eth0, and the proxy's answer comes over lo.
        let dialed = scene.app.dial(&dial.timeout_ms(500));
        assert_eq!(dialed.outcome(), "EINPROGRESS");
        return;
    }
    let dialed = scene.app.dial(&dial);
    assert_eq!(dialed.outcome(), "15001", "{dialed:?}");
    assert_eq!(
        dialed.peer.map(|peer| peer.ip()),
        Some(IpAddr::V6(*to.ip()))
    );
    let told = dialed.greeting.unwrap().original6.address.unwrap();
    assert_eq!((told.ip(), told.port()), (IpAddr::V6(*to.ip()), 80));
}

#[rstest]
fn unspecified_address_is_the_bound_one(#[values(Redirect, Iptables)] backend: Backend) {
    let mut scene = attached(backend);
    for at in wildcards(8081) {
        scene.app.listen(Listen::new(APP_NAME, at));
    }
    let own = SocketAddr::new(scene.pod.own(V4), 0);
    // A mapped source and the IPv6 wildcard: IPv4's loopback (tcp_v6_connect).
    let dial = Dial::new(Mapped, (Ipv6Addr::UNSPECIFIED, 8081).into()).bind(own);
    let dialed = scene.app.dial(&dial);
    assert_eq!(dialed.outcome(), APP_NAME, "{dialed:?}");
    let peer = dialed.peer.map(canonical);
    assert_eq!(peer, Some((Ipv4Addr::LOCALHOST, 8081).into()));
    let dial = Dial::new(V4, (Ipv4Addr::UNSPECIFIED, 8081).into()).bind(own);
    let peer = scene.app.dial(&dial).peer;
    assert_eq!(peer.map(|peer| peer.ip()), Some(own.ip()));
    // The proxy's call to the pod's own address is captured.
    let dialed = scene.proxy.dial(&dial);
    assert_eq!(dialed.outcome(), "15006");
    assert_eq!(dialed.peer.map(|peer| peer.ip()), Some(own.ip()));
}

#[rstest]
fn socket_passed_on_belongs_to_its_creator(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] abroad: bool,
) {
    let mut scene = attached(backend);
    // In no cgroup of the pod, and maybe in another network namespace: both are the socket's, not the caller's.
    let netns = if abroad {
        scene.pod.peer.path()
    } else {
        scene.pod.netns.path()
    };
    let mut stranger = Actor::start(&netns, None, Identity::ROOT);
    let to = scene.address(family, To::Service(80));
    let dial = Dial::new(family, to);
    for (creator, lands) in [(PROXY, Direct), (APP, Outbound)] {
        let name = format!("of {}", creator.ruid);
        let actor = scene.actor(&creator);
        actor.create(&name, family);
        actor.give(&name, &mut stranger);
        let dialed = stranger.connect(&name, &dial);
        let attempt = out(creator, To::Service(80), lands);
        scene.judge(&dialed, to, &attempt).unwrap();
    }
}

#[rstest]
fn refused_and_repeated_connects_end_as_without_capture(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(backend, &Options::ISTIO);
    scene.app.create("again", family);
    let to = scene.address(family, To::Service(80));
    let dial = Dial::new(family, to);
    assert_eq!(scene.app.connect("again", &dial).outcome(), "ECONNREFUSED");
    scene.open_proxy();
    let dialed = scene.app.connect("again", &dial);
    scene
        .judge(&dialed, to, &out(APP, To::Service(80), Outbound))
        .unwrap();
    let own = Dial::new(family, scene.address(family, To::Own(8080)));
    assert_eq!(scene.app.connect("again", &own).outcome(), "EISCONN");
    assert_eq!(scene.app.look("again").peer.map(canonical), Some(to));
}

#[rstest]
fn half_closed_connection_keeps_its_names(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = attached(backend);
    let to = scene.address(family, To::Service(80));
    let dial = Dial::new(family, to).keep("half");
    let first = scene.app.dial(&dial);
    assert_eq!(first.outcome(), "15001");
    assert_eq!(scene.app.half_close("half", "last").as_deref(), Ok("last"));
    // Both directions are closed now: the kernel itself may not know a peer any more.
    let after = scene.app.look("half");
    assert!(
        after.peer.is_none_or(|peer| canonical(peer) == to),
        "{after:?}"
    );
}

#[rstest]
fn several_sockets_share_a_source_port(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = attached(backend);
    let source = SocketAddr::new(scene.pod.own(family), 23456);
    let ends = [To::Service(80), To::Elsewhere(80), To::Service(443)];
    for (index, to) in ends.into_iter().enumerate() {
        let real = scene.address(family, to);
        let dial = Dial::new(family, real)
            .bind(source)
            .setting(Setting::ReusePort)
            .keep(&index.to_string());
        let dialed = scene.app.dial(&dial);
        assert_eq!(dialed.outcome(), "15001");
        assert_eq!(dialed.local.map(canonical), Some(source));
        assert_eq!(dialed.peer.map(canonical), Some(real));
    }
    // The same end twice is refused by the kernel.
    let dial = Dial::new(family, scene.address(family, ends[0]))
        .bind(source)
        .setting(Setting::ReusePort);
    assert_eq!(scene.app.dial(&dial).outcome(), "EADDRNOTAVAIL");
}

#[rstest]
fn dropped_syn_is_captured_when_it_comes_again(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(backend, &Options::ISTIO);
    for at in wildcards(15001) {
        scene.proxy.listen(Listen::new("15001", at).slow(1, 1500));
    }
    let to = scene.address(family, To::Service(80));
    let mut first = Dial::new(family, to);
    first.greeting = false;
    for name in ["first", "second"] {
        assert_eq!(scene.app.dial(&first.clone().keep(name)).error, None);
    }
    // The queue is full: the kernel sends the SYN again after a second.
    let begun = Instant::now();
    let dialed = scene.app.dial(&Dial::new(family, to).timeout_ms(20_000));
    assert!(begun.elapsed() > Duration::from_millis(900));
    scene
        .judge(&dialed, to, &out(APP, To::Service(80), Outbound))
        .unwrap();
}

#[rstest]
fn attempt_given_up_leaves_nothing(#[values(false, true)] exhausted: bool) {
    let mut scene = attached(Redirect);
    if exhausted {
        redirect_tests::maps::exhaust_ports(&scene.pod);
    }
    let to = scene.address(V4, To::Service(80));
    // A full queue: the handshake does not end before the client gives up.
    scene.proxy.unlisten("15001");
    let listen = Listen::new("slow", wildcards(15001)[0]).slow(0, 5_000);
    scene.proxy.listen(listen);
    let mut dial = Dial::new(V4, to).timeout_ms(300);
    dial.greeting = false;
    let outcomes = scene.app.together(vec![dial; 6]);
    assert!(
        outcomes.iter().any(|dialed| dialed.error.is_some()),
        "{outcomes:?}"
    );
    // Two handshakes at once may pass the full queue: one client then ends only when its server has made room.
    let deadline = Instant::now() + patience(Duration::from_secs(20));
    while flows_of(&scene.pod) != 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(flows_of(&scene.pod), 0);
}

#[rstest]
fn ipv4_pod_refuses_ipv6_at_once(#[values(Redirect, Iptables)] backend: Backend) {
    let pod = Pod::shaped(Shape {
        ipv6: false,
        ..Pod::shape()
    });
    let mut scene = Scene::with(pod, &Options::ISTIO);
    let first = Dial::new(V6, scene.address(V6, To::Service(80)));
    assert_eq!(scene.app.dial(&first).outcome(), "ENETUNREACH");
    scene.attach(backend, &Options::ISTIO);
    assert_eq!(scene.app.dial(&first).outcome(), "ENETUNREACH");
    scene
        .attempt(V4, &out(APP, To::Service(80), Outbound))
        .unwrap();
}
