//! What the loader remembers of the proxies' listeners.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
};

use redirect_tests::{
    actor::Actor,
    backend::Backend::Redirect,
    bpffs,
    daemon::out,
    loader::{self, attach_by, finish},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen},
    scene::{Scene, To, wildcards},
};
use rstest::rstest;

/// Ports with a remembered listener in the namespace with that cookie.
fn ports(cookie: u64) -> Vec<u16> {
    let mut ports: Vec<u16> = bpffs::listeners()
        .unwrap()
        .iter()
        .filter(|key| key.netns_cookie == cookie)
        .map(|key| key.port)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn cookie(scene: &Scene) -> u64 {
    let status = loader::status_of(&scene.pod);
    status["netns_cookie"].as_u64().unwrap()
}

#[rstest]
fn detach_forgets_listeners_of_former_ports_too() {
    const MOVED: Options = Options {
        proxy_port: "16001",
        ..Options::ISTIO
    };
    bpffs::private(|| {
        let (mut first, mut second) = (Scene::new(), Scene::new());
        for at in wildcards(16001) {
            first.proxy.listen(Listen::new("16001", at));
        }
        // The second keeps the maps in place.
        second.attach(Redirect, &Options::ISTIO);
        first.attach(Redirect, &Options::ISTIO);
        let cookies = [cookie(&first), cookie(&second)];
        assert_eq!(ports(cookies[0]), [15001, 15006]);
        first.attach(Redirect, &MOVED);
        assert_eq!(ports(cookies[0]), [15001, 15006, 16001]);
        first.detach();
        assert_eq!(ports(cookies[0]), [0; 0]);
        assert_eq!(ports(cookies[1]), [15001, 15006]);
    });
}

/// There is room for eight of each family on a port. Those of the application come first by address, and none of them serves the pod's own connections.
#[rstest]
#[case::by_user(Identity::new(1337, 4000), "15001")]
#[case::by_group(Identity::new(4000, 1337), "15001")]
#[case::neither(Identity::new(4000, 4000), "ECONNREFUSED")]
fn listeners_of_the_proxy_come_first(#[case] proxy: Identity, #[case] who: &str) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    for number in 1..=8 {
        let address = Ipv4Addr::new(10, 255, 255, number);
        scene.pod.netns.ip(&format!("addr add {address}/32 dev lo"));
        scene
            .app
            .listen(Listen::new("app", (address, 15001).into()));
    }
    let mut proxy = Actor::start(
        &scene.pod.netns.path(),
        Some(scene.pod.cgroup.child("sidecar")),
        proxy,
    );
    proxy.listen(Listen::new("15001", (Ipv4Addr::LOCALHOST, 15001).into()));
    assert_eq!(out(&mut scene, 80), "service");
    scene.attach(Redirect, &Options::ISTIO);
    assert_eq!(out(&mut scene, 80), who);
}

/// A proxy that is handed over to its next process has listeners of both families beside the former ones.
#[rstest]
#[case::ipv4(Family::V4, [0, 1])]
#[case::ipv6(Family::V6, [1, 0])]
fn listeners_of_one_family_do_not_push_out_the_other(
    #[case] family: Family,
    #[case] order: [usize; 2],
) {
    const FEW: usize = 2;
    const MANY: usize = 64;
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(Redirect, &Options::ISTIO);
    let answered = |scene: &mut Scene| {
        let dial = Dial::new(family, scene.address(family, To::Service(80)));
        scene.app.dial(&dial).outcome().to_owned()
    };
    let proxy = |scene: &Scene, who: &str, sockets: [usize; 2]| {
        let cgroup = Some(scene.pod.cgroup.child("sidecar"));
        let mut proxy = Actor::start(&scene.pod.netns.path(), cgroup, Identity::PROXY);
        for (place, sockets) in order.into_iter().zip(sockets) {
            proxy.listen(Listen::new(who, wildcards(15001)[place]).reuseport(sockets));
        }
        proxy
    };
    let former = proxy(&scene, "former", [MANY, MANY]);
    assert_eq!(answered(&mut scene), "former");
    let next = proxy(&scene, "next", [FEW, MANY]);
    drop(former);
    assert_eq!(answered(&mut scene), "next");
    drop(next);
    assert_eq!(answered(&mut scene), "ECONNREFUSED");
}

/// An IPv6 socket on an IPv4-mapped address serves IPv4 only, also one that was there before its pod was attached.
#[rstest]
fn listeners_on_mapped_addresses_serve_ipv4(
    #[values("[::ffff:0.0.0.0]:15001", "[::ffff:127.0.0.1]:15001")] at: SocketAddr,
    #[values(true, false)] is_before: bool,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let cgroup = Some(scene.pod.cgroup.child("sidecar"));
    let mut proxy = Actor::start(&scene.pod.netns.path(), cgroup, Identity::PROXY);
    let mut listen = || {
        proxy.listen(Listen {
            v6_only: false,
            ..Listen::new("15001", at)
        });
    };
    if is_before {
        listen();
    }
    scene.attach(Redirect, &Options::ISTIO);
    if !is_before {
        listen();
    }
    for (family, who) in [(Family::V4, "15001"), (Family::V6, "ECONNREFUSED")] {
        let dial = Dial::new(family, scene.address(family, To::Service(80)));
        assert_eq!(scene.app.dial(&dial).outcome(), who, "{family:?}");
    }
}

/// The application may listen more often than the loader may open files.
#[rstest]
fn the_proxy_is_found_among_many_listeners() {
    const LIMITED: &str = "ulimit -n 128; exec \"$0\" \"$@\"";
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    for number in 1..=200 {
        let at = (Ipv4Addr::new(127, 1, 1, number), 15001);
        scene.app.listen(Listen::new("app", at.into()));
    }
    let mut proxy = Actor::start(
        &scene.pod.netns.path(),
        Some(scene.pod.cgroup.child("sidecar")),
        Identity::PROXY,
    );
    proxy.listen(Listen::new("15001", (Ipv4Addr::LOCALHOST, 15001).into()));
    assert_eq!(out(&mut scene, 80), "service");
    let mut limited = Command::new("sh");
    let redirect = loader::redirect();
    limited.args(["-c", LIMITED]).arg(redirect.get_program());
    let mut attach = attach_by(limited, &scene.pod);
    let attached = finish(attach.args(Options::ISTIO.arguments()));
    assert!(attached.status.success(), "{}", errors(&attached));
    scene.adopt(&Options::ISTIO);
    assert_eq!(out(&mut scene, 80), "15001");
}
