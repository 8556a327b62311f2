//! `-c`: interfaces without capture, in either direction.
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
    loader,
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Identity, canonical},
    scene::{Scene, To},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};

/// The pod's second link, as Multus adds one.
const POD4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const POD6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
/// Its other end, where the service listens as well.
const PEER4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);

const EXCLUDED: Options = Options {
    exclude_interfaces: "net1",
    ..Options::ISTIO
};

/// A pod with a second link `net1`.
fn two_links(options: &Options) -> Scene {
    let scene = Scene::with(Pod::new(), options);
    add_link(&scene, "net1");
    scene
}

fn add_link(scene: &Scene, name: &str) {
    let pod = &scene.pod;
    pod.netns.ip(&format!(
        "link add {name} type veth peer name net1 netns {}\naddr add {POD4}/24 dev {name}\naddr add {POD6}/64 dev {name} nodad\nlink set {name} up",
        pod.peer.name()
    ));
    pod.peer.ip(&format!(
        "addr add {PEER4}/24 dev net1\naddr add {PEER6}/64 dev net1 nodad\nlink set net1 up"
    ));
    // What a test sends over the other link than the address's own must not be taken for a forgery.
    for namespace in [&pod.netns, &pod.peer] {
        namespace.sysctl(&[
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/conf/eth0/rp_filter", "0"),
        ]);
    }
}

fn of(family: Family, ipv4: Ipv4Addr, ipv6: Ipv6Addr, port: u16) -> SocketAddr {
    let ip: IpAddr = if family.is_ipv4() {
        ipv4.into()
    } else {
        ipv6.into()
    };
    SocketAddr::new(ip, port)
}

/// Who answers on the way out over the first and the second link, and on the way in.
fn answers(scene: &mut Scene, family: Family) -> [String; 4] {
    let first_out = scene.address(family, To::Service(80));
    let second_out = of(family, PEER4, PEER6, 80);
    let first_in = SocketAddr::new(scene.pod.own(family), 8080);
    let second_in = of(family, POD4, POD6, 8080);
    let out = [first_out, second_out].map(|to| scene.app.dial(&Dial::new(family, to)));
    let inward = [first_in, second_in].map(|to| scene.outside.dial(&Dial::new(family, to)));
    for (dialed, to) in out.iter().zip([first_out, second_out]) {
        assert_eq!(dialed.peer.map(canonical), Some(to), "{dialed:?}");
    }
    let [a, b] = out;
    let [c, d] = inward;
    [a, b, c, d].map(|dialed| dialed.outcome().to_owned())
}

#[rstest]
fn excluded_interface_is_not_captured_in_or_out(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values("net1", "net+", "lo,net1,nosuch0")] names: &'static str,
) {
    let options = Options {
        exclude_interfaces: names,
        ..Options::ISTIO
    };
    let mut scene = two_links(&options);
    assert_eq!(
        answers(&mut scene, family),
        ["service", "service", "app", "app"]
    );
    scene.attach(backend, &Options::ISTIO);
    assert_eq!(
        answers(&mut scene, family),
        ["15001", "15001", "15006", "15006"]
    );
    if backend == Iptables {
        scene.detach();
    }
    scene.attach(backend, &options);
    assert_eq!(
        answers(&mut scene, family),
        ["15001", "service", "15006", "app"]
    );
    scene.detach();
    assert_eq!(
        answers(&mut scene, family),
        ["service", "service", "app", "app"]
    );
}

#[rstest]
fn tproxy_leaves_excluded_interfaces_alone(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        tproxy: true,
        ..EXCLUDED
    };
    let mut scene = two_links(&options);
    scene.attach(backend, &options);
    assert_eq!(
        answers(&mut scene, family),
        ["15001", "service", "15006", "app"]
    );
}

#[rstest]
fn every_interface_may_be_excluded(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let options = Options {
        exclude_interfaces: "+",
        ..Options::ISTIO
    };
    let mut scene = two_links(&options);
    scene.attach(backend, &options);
    assert_eq!(
        answers(&mut scene, family),
        ["service", "service", "app", "app"]
    );
    // Also the proxy's way to its own pod.
    let own = SocketAddr::new(scene.pod.own(family), 8080);
    assert_eq!(scene.proxy.dial(&Dial::new(family, own)).outcome(), "app");
}

#[rstest]
fn excluded_lo_lets_the_proxy_reach_its_own_pod(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[values(true, false)] tproxy: bool,
) {
    let options = Options {
        exclude_interfaces: "lo",
        tproxy,
        ..Options::ISTIO
    };
    let mut scene = two_links(&options);
    scene.attach(backend, &options);
    let own = SocketAddr::new(scene.pod.own(family), 8080);
    for identity in [Identity::PROXY, Identity::TPROXY] {
        let dialed = scene.actor(&identity).dial(&Dial::new(family, own));
        assert_eq!(dialed.outcome(), "app", "{identity:?}");
    }
    assert_eq!(
        answers(&mut scene, family),
        ["15001", "15001", "15006", "15006"]
    );
}

/// The route says eth0; the socket is bound to net1.
#[rstest]
fn socket_bound_to_a_device_leaves_by_it(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = two_links(&EXCLUDED);
    let gateway = of(family, PEER4, PEER6, 0).ip();
    let netns = &scene.pod.netns;
    netns.ip(&format!(
        "route add default via {gateway} dev net1 metric 5000"
    ));
    scene.attach(backend, &EXCLUDED);
    let to = scene.address(family, To::Service(80));
    let unbound = Dial::new(family, to);
    let on_eth0 = unbound.clone().device("eth0");
    // What iptables redirects to 127.0.0.1 gets no answer on a socket that is bound to eth0.
    let (on_eth0, at_eth0) = match backend {
        Redirect => (on_eth0, "15001"),
        Iptables => (on_eth0.timeout_ms(800), "EINPROGRESS"),
    };
    for (dial, who) in [
        (unbound.clone(), "15001"),
        (on_eth0, at_eth0),
        (unbound.device("net1"), "service"),
    ] {
        assert_eq!(scene.app.dial(&dial).outcome(), who, "{dial:?}");
    }
    // What goes to the pod itself leaves through lo all the same.
    let own = of(family, POD4, POD6, 8080);
    let dial = Dial::new(family, own).device("net1");
    assert_eq!(scene.actor(&Identity::ROOT).dial(&dial).outcome(), "app");
}

/// It is the interface that counts, not the address.
#[rstest]
fn address_of_another_interface_does_not_matter(#[values(Redirect, Iptables)] backend: Backend) {
    let mut scene = two_links(&EXCLUDED);
    let own = scene.pod.own(V4);
    scene.attach(backend, &EXCLUDED);
    let to = Dial::new(V4, SocketAddr::new(own, 8080));
    assert_eq!(scene.outside.dial(&to).outcome(), "15006");
    scene
        .pod
        .peer
        .ip(&format!("route add {own}/32 via {POD4} dev net1"));
    assert_eq!(scene.outside.dial(&to).outcome(), "app");
    let second = Dial::new(V4, (POD4, 8080).into());
    let first_hop = scene.pod.ipv4;
    scene
        .pod
        .peer
        .ip(&format!("route add {POD4}/32 via {first_hop} dev eth0"));
    assert_eq!(scene.outside.dial(&second).outcome(), "15006");
}

/// iptables compares names, this project the indexes that bore them at attach.
#[test]
fn interface_that_comes_or_is_renamed_counts_after_the_next_attach() {
    let mut scene = Scene::with(Pod::new(), &EXCLUDED);
    let current = |scene: &Scene| {
        let status = loader::status_of(&scene.pod);
        status["routes_current"].as_bool().unwrap()
    };
    scene.attach(Redirect, &EXCLUDED);
    assert!(current(&scene));
    add_link(&scene, "net1");
    // No address goes with the link, or comes by itself some time later.
    let netns = &scene.pod.netns;
    netns.ip("link set net1 addrgenmode none\naddr flush dev net1 scope link");
    netns.sysctl(&[("ipv6/conf/net1/keep_addr_on_down", "1")]);
    assert!(!current(&scene));
    assert_eq!(answers(&mut scene, V4)[3], "15006");
    scene.attach(Redirect, &EXCLUDED);
    assert!(current(&scene));
    assert_eq!(
        answers(&mut scene, V4),
        ["15001", "service", "15006", "app"]
    );

    let netns = &scene.pod.netns;
    netns.ip("link set net1 down\nlink set net1 name net9\nlink set net9 up");
    // The routes are the same: it is the name that tells.
    assert!(!current(&scene));
    assert_eq!(
        answers(&mut scene, V4),
        ["15001", "service", "15006", "app"]
    );
    scene.attach(Redirect, &EXCLUDED);
    assert!(current(&scene));
    assert_eq!(
        answers(&mut scene, V4),
        ["15001", "15001", "15006", "15006"]
    );

    scene.pod.netns.ip("link del net9");
    scene.attach(Redirect, &EXCLUDED);
    assert!(current(&scene));
}

#[test]
fn too_many_interfaces_are_refused_before_anything_is_touched() {
    let scene = Scene::new();
    for number in 0..17 {
        let netns = &scene.pod.netns;
        netns.ip(&format!(
            "link add many{number} type veth peer name peer{number}"
        ));
    }
    let mut command = loader::attach_command(&scene.pod);
    let output = loader::finish(command.args(["-c", "many+"]));
    let text = errors(&output);
    assert!(!output.status.success(), "{text}");
    for word in ["--istio-exclude-interfaces", "17", "16"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!loader::status_mentions(&scene.pod));
}
