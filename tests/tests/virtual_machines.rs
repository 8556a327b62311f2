//! Virtual machines behind interfaces of the pod (`-k`): which of their connections are captured,
//! and that nothing else of theirs is touched.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, so that the backtrace points at the line"
)]

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use redirect_tests::{
    backend::Backend,
    loader,
    machine::{Link, Machine},
    maps::remembers,
    namespace::{errors, succeed},
    options::Options,
    patience::patience,
    pod::{Pod, service},
    protocol::{Dial, Family, Listen},
    scene::{APP, SERVICE, Scene, To, wildcards},
};
use rstest::rstest;
use socket2::{Domain, Protocol, Socket, Type};

use Backend::{Iptables, Redirect};
use Family::{V4, V6};

const OUTBOUND: &str = "15001";
const INBOUND: &str = "15006";
/// What an actor calls a connection that nobody answers.
const TIMEOUT: &str = "EINPROGRESS";

/// Istio's options, with machines behind `vm0`.
const MACHINES: Options = Options {
    virtual_interfaces: "vm0",
    ..Options::ISTIO
};

fn scene() -> (Scene, Machine) {
    with_link(Link::Plain)
}

fn with_link(link: Link) -> (Scene, Machine) {
    let scene = Scene::new();
    let machine = Machine::new(&scene.pod, "vm0", 1, link);
    (scene, machine)
}

/// Who captures what a machine dials, and where it ends.
fn proxys_end(scene: &Scene, machine: &Machine, family: Family) -> Option<(Backend, SocketAddr)> {
    let end = SocketAddr::new(machine.gateway(family), 15001);
    Some((scene.captured_by()?, end))
}

/// Dials a destination that is to be captured. The connection stands, since a segment that comes after its end is counted again.
fn captured(scene: &Scene, machine: &mut Machine, family: Family, to: To) {
    let to = scene.address(family, to);
    let proxy = proxys_end(scene, machine, family);
    let dial = Dial::new(family, to).keep(&to.to_string());
    machine.check(family, &dial, OUTBOUND, proxy);
}

/// Dials a destination that is to be left alone.
fn direct(scene: &Scene, machine: &mut Machine, family: Family, to: To, who: &str) {
    let to = scene.address(family, to);
    machine.check(family, &Dial::new(family, to), who, None);
}

/// How often a rule has decided.
fn count(scene: &Scene, rule: &str) -> u64 {
    loader::status_of(&scene.pod)["connections"][rule]
        .as_u64()
        .unwrap_or_default()
}

#[rstest]
fn everything_a_machine_dials_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[values(Link::Plain, Link::Bridge)] link: Link,
) {
    let (mut scene, mut machine) = with_link(link);
    let gateway = machine.gateway(family);
    let control = |scene: &Scene, machine: &mut Machine| {
        for port in [80, 53, 15008] {
            direct(scene, machine, family, To::Service(port), SERVICE);
            direct(scene, machine, family, To::Own(port), APP);
            direct(scene, machine, family, To::Address(gateway, port), APP);
        }
    };
    control(&scene, &mut machine);
    scene.attach(backend, &MACHINES);
    for port in [80, 53, 15001, 15006, 15008, 15020, 15090] {
        captured(&scene, &mut machine, family, To::Service(port));
        captured(&scene, &mut machine, family, To::Own(port));
        captured(&scene, &mut machine, family, To::Address(gateway, port));
    }
    captured(&scene, &mut machine, family, To::Elsewhere(80));
    // A port where nobody listens, among those that stand for destinations.
    captured(&scene, &mut machine, family, To::Own(61234));
    scene.detach();
    control(&scene, &mut machine);
}

#[rstest]
fn no_other_option_has_a_say(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    let options = Options {
        exclude_cidrs: "0.0.0.0/0,::/0",
        exclude_outbound: "1:65535",
        owner_groups: Some(""),
        include_inbound: "",
        exclude_interfaces: MACHINES.virtual_interfaces,
        redirect_dns: true,
        capture_all_dns: true,
        ..MACHINES
    };
    direct(&scene, &mut machine, family, To::Service(80), SERVICE);
    scene.attach(backend, &options);
    captured(&scene, &mut machine, family, To::Service(80));
    captured(&scene, &mut machine, family, To::Service(53));
    captured(&scene, &mut machine, family, To::Own(8080));
}

#[rstest]
fn only_included_destinations_are_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    let options = Options {
        include_cidrs: "203.0.113.0/24,2001:db8:113::/48",
        include_outbound: "80",
        ..MACHINES
    };
    scene.attach(backend, &options);
    let gateway = machine.gateway(family);
    for port in [80, 8080] {
        captured(&scene, &mut machine, family, To::Service(port));
        direct(&scene, &mut machine, family, To::Elsewhere(port), SERVICE);
        // Not inbound either.
        direct(&scene, &mut machine, family, To::Own(port), APP);
        direct(
            &scene,
            &mut machine,
            family,
            To::Address(gateway, port),
            APP,
        );
    }
    if backend == Redirect {
        assert_eq!(
            (
                count(&scene, "machine-captured"),
                count(&scene, "machine-not-included")
            ),
            (2, 6)
        );
    }
}

#[rstest]
fn machines_behind_other_interfaces_are_not_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    let mut other = Machine::new(&scene.pod, "net1", 2, Link::Plain);
    let options = Options {
        include_inbound: "8080",
        ..MACHINES
    };
    scene.attach(backend, &options);
    captured(&scene, &mut machine, family, To::Service(80));
    direct(&scene, &mut other, family, To::Service(80), SERVICE);
    // As for everybody outside.
    let to = scene.address(family, To::Own(8080));
    let dialed = other.actor.dial(&Dial::new(family, to));
    assert_eq!(dialed.outcome(), INBOUND, "{dialed:?}");
    let dialed = scene.outside.dial(&Dial::new(family, to));
    assert_eq!(dialed.outcome(), INBOUND, "{dialed:?}");
}

#[rstest]
fn a_prefix_names_several_interfaces(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    let mut second = Machine::new(&scene.pod, "vm1", 2, Link::Plain);
    let options = Options {
        virtual_interfaces: "vm+",
        ..MACHINES
    };
    scene.attach(backend, &options);
    captured(&scene, &mut machine, family, To::Service(80));
    captured(&scene, &mut second, family, To::Service(80));
}

#[rstest]
fn ipv6_off_captures_ipv4_only(#[values(Redirect, Iptables)] backend: Backend) {
    let (mut scene, mut machine) = scene();
    let options = Options {
        ipv6: false,
        ..MACHINES
    };
    scene.attach(backend, &options);
    captured(&scene, &mut machine, V4, To::Service(80));
    direct(&scene, &mut machine, V6, To::Service(80), SERVICE);
    direct(&scene, &mut machine, V6, To::Own(8080), APP);
}

#[rstest]
fn without_a_proxy_the_machine_is_refused(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &MACHINES);
    let mut machine = Machine::new(&scene.pod, "vm0", 1, Link::Plain);
    direct(&scene, &mut machine, family, To::Service(80), SERVICE);
    scene.attach(backend, &MACHINES);
    let dial = Dial::new(family, scene.address(family, To::Service(80)));
    assert_eq!(machine.actor.dial(&dial).outcome(), "ECONNREFUSED");
    scene.open_proxy();
    captured(&scene, &mut machine, family, To::Service(80));
}

#[rstest]
fn datagrams_are_forwarded(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, machine) = scene();
    let at = |address: IpAddr, port: u16| SocketAddr::new(address, port);
    let wildcard = wildcards(5300)[usize::from(family == V6)];
    let server = sharing(&scene, wildcard);
    let own = at(machine.own(family), 0);
    let client = machine.netns.enter(|| UdpSocket::bind(own).unwrap());
    for socket in [&server, &client] {
        socket
            .set_read_timeout(Some(patience(Duration::from_secs(3))))
            .unwrap();
    }
    let exchange = |scene: &Scene| {
        let mut buffer = [0; 16];
        client.send_to(b"ask", at(service(family), 5300)).unwrap();
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        // From the address the question went to.
        let answerer = sharing(scene, at(service(family), 5300));
        answerer.send_to(b"answer", from).unwrap();
        let (_, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(from, at(service(family), 5300));
    };
    exchange(&scene);
    scene.attach(backend, &MACHINES);
    exchange(&scene);
}

/// A UDP socket of the peer that shares the port.
fn sharing(scene: &Scene, address: SocketAddr) -> UdpSocket {
    scene.pod.peer.enter(|| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.into()
    })
}

/// Sends the first segment of a connection from the machine to a port 80, byte by byte: as no kernel
/// would send it. `more` says that fragments follow.
fn send_syn(machine: &Machine, to: [u8; 4], more: bool) {
    let mut header = vec![
        0x45,
        0,
        0,
        40,
        0,
        1,
        if more { 0x20 } else { 0 },
        0,
        64,
        6,
        0,
        0,
    ];
    header.extend(machine.ipv4.octets());
    header.extend(to);
    let mut tcp = vec![
        0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0,
    ];
    let pseudo = [&header[12..], &[0, 6, 0, 20], &tcp].concat();
    let sum: u32 = pseudo
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let packet = [header, tcp].concat();
    let gateway = SocketAddr::new(machine.gateway4.into(), 0);
    machine.netns.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
        // The header says where it goes, the call by which way.
        socket.send_to(&packet, &gateway.into()).unwrap();
    });
}

#[rstest]
fn loopback_addresses_cannot_be_dialled() {
    let (mut scene, machine) = scene();
    scene.attach(Redirect, &MACHINES);
    let IpAddr::V4(service) = service(V4) else {
        unreachable!()
    };
    send_syn(&machine, [127, 0, 0, 1], false);
    send_syn(&machine, [127, 1, 2, 3], false);
    assert_eq!(count(&scene, "machine-captured"), 0);
    send_syn(&machine, service.octets(), false);
    assert_eq!(count(&scene, "machine-captured"), 1);
    assert_eq!(count(&scene, "machine-dropped"), 0);
}

#[rstest]
fn large_transfers_survive_the_translation(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    scene.attach(backend, &MACHINES);
    let to = scene.address(family, To::Service(80));
    let proxy = proxys_end(&scene, &machine, family);
    let dial = Dial::new(family, to).keep("large");
    machine.check(family, &dial, OUTBOUND, proxy);
    let line: String = (0_u32..1 << 20)
        .map(|n| format!("{:08x}", n.wrapping_mul(0x9e37_79b9)))
        .collect();
    let echo = machine.actor.ask("large", &line).unwrap();
    assert!(
        echo == line,
        "{} of {} bytes came back, or others",
        echo.len(),
        line.len()
    );
}

#[rstest]
fn one_source_port_serves_several_destinations_at_once(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    scene.attach(backend, &MACHINES);
    let source = SocketAddr::new(machine.own(family), 40_000);
    let destinations = [
        To::Service(80),
        To::Service(8080),
        To::Elsewhere(80),
        To::Own(80),
    ];
    for (index, to) in destinations.into_iter().enumerate() {
        let to = scene.address(family, to);
        let dial = Dial::new(family, to).bind(source).keep(&index.to_string());
        let dialed = machine.actor.dial(&dial);
        if index > 0 && !backend.serves_one_source_port_twice() {
            assert_eq!(dialed.outcome(), "EINPROGRESS", "{to}");
            return;
        }
        assert_eq!(dialed.outcome(), OUTBOUND, "{dialed:?}");
        let greeting = dialed.greeting.unwrap();
        let asked = if family == V4 {
            greeting.original
        } else {
            greeting.original6
        };
        assert_eq!(asked.address, Some(to));
        // Conntrack changes the port of all but the first.
        if backend == Redirect {
            assert_eq!(greeting.peer, source);
        }
    }
    for index in 0..destinations.len() {
        let line = format!("line {index}");
        assert_eq!(machine.actor.ask(&index.to_string(), &line), Ok(line));
    }
}

#[rstest]
fn what_a_machine_serves_is_not_touched(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (mut scene, mut machine) = scene();
    machine.actor.listen(Listen::new(
        "machine",
        wildcards(9000)[usize::from(family == V6)],
    ));
    let to = SocketAddr::new(machine.own(family), 9000);
    // With iptables, -b has a say in what is only forwarded.
    let options = Options {
        include_inbound: "",
        ..MACHINES
    };
    scene.attach(backend, &options);
    // Its answers go to an address and a port that it has dialled itself before.
    let dialled = scene.address(family, To::Service(7777));
    let from_machine = machine.actor.dial(&Dial::new(family, dialled));
    assert_eq!(from_machine.outcome(), OUTBOUND, "{from_machine:?}");
    let dial = Dial::new(family, to).bind(dialled).keep("served");
    let dialed = scene.outside.dial(&dial);
    assert_eq!(dialed.outcome(), "machine", "{dialed:?}");
    assert_eq!(
        scene.outside.ask("served", "still there"),
        Ok("still there".to_owned())
    );
    let from_pod = scene.proxy.dial(&Dial::new(family, to));
    assert_eq!(from_pod.outcome(), "machine", "{from_pod:?}");
}

#[rstest]
fn established_connections_outlive_attach_and_change(#[values(V4, V6)] family: Family) {
    let (mut scene, mut machine) = scene();
    let to = scene.address(family, To::Service(80));
    machine.check(family, &Dial::new(family, to).keep("before"), SERVICE, None);
    scene.attach(Redirect, &MACHINES);
    let proxy = proxys_end(&scene, &machine, family);
    machine.check(
        family,
        &Dial::new(family, to).keep("captured"),
        OUTBOUND,
        proxy,
    );
    let narrow = Options {
        include_cidrs: "198.51.100.0/24",
        proxy_port: "15006",
        inbound_port: "15001",
        ..MACHINES
    };
    for name in ["before", "captured"] {
        assert_eq!(
            machine.actor.ask(name, "attached"),
            Ok("attached".to_owned()),
            "{name}"
        );
    }
    scene.attach(Redirect, &narrow);
    machine.check(family, &Dial::new(family, to).keep("after"), SERVICE, None);
    for name in ["before", "captured", "after"] {
        assert_eq!(
            machine.actor.ask(name, "changed"),
            Ok("changed".to_owned()),
            "{name}"
        );
    }
    // Documented: without filters there is nobody to translate.
    scene.detach();
    for name in ["before", "after"] {
        assert_eq!(
            machine.actor.ask(name, "detached"),
            Ok("detached".to_owned()),
            "{name}"
        );
    }
    assert!(machine.actor.ask("captured", "detached").is_err());
}

#[rstest]
fn a_connection_that_was_forgotten_goes_on(#[values(V4, V6)] family: Family) {
    let (mut scene, mut machine) = scene();
    scene.attach(Redirect, &MACHINES);
    let to = scene.address(family, To::Service(80));
    let proxy = proxys_end(&scene, &machine, family);
    let dial = Dial::new(family, to).keep("idle");
    let idle = machine.check(family, &dial, OUTBOUND, proxy);
    let is_remembered = || remembers(&scene.pod, idle.local.unwrap(), to);
    // More connections than are remembered (32,768), each to a destination of its own port.
    let sources = 172_u32 << 24 | 30 << 16 | 1 << 8;
    let flood = |machine: &Machine| {
        machine.netns.enter(|| {
            for source_port in 1..40 {
                for port in 1..1000_u16 {
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                    socket.set_nonblocking(true).unwrap();
                    socket.set_linger(Some(Duration::ZERO)).unwrap();
                    socket.set_reuse_address(true).unwrap();
                    let own = IpAddr::V4((sources | 2).into());
                    let bound = SocketAddr::new(own, 20_000 + source_port);
                    socket.bind(&bound.into()).unwrap();
                    let _in_progress = socket.connect(&SocketAddr::new(service(V4), port).into());
                }
            }
        });
    };
    assert!(is_remembered());
    flood(&machine);
    flood(&machine);
    assert!(!is_remembered());
    assert_eq!(machine.actor.ask("idle", "hello"), Ok("hello".to_owned()));
    assert_eq!(machine.actor.ask("idle", "again"), Ok("again".to_owned()));
}

#[rstest]
fn what_cannot_be_captured_is_dropped() {
    let (mut scene, mut machine) = scene();
    scene.attach(Redirect, &MACHINES);
    captured(&scene, &mut machine, V4, To::Service(80));
    let IpAddr::V4(to) = service(V4) else {
        unreachable!()
    };
    assert_eq!(count(&scene, "machine-dropped"), 0);
    // The connection could not be followed.
    send_syn(&machine, to.octets(), true);
    assert_eq!(count(&scene, "machine-dropped"), 1);
    // Without an address there is nothing to translate to.
    scene
        .pod
        .netns
        .ip(&format!("addr flush dev {}", machine.interface));
    scene.pod.netns.ip(&format!(
        "route add {} dev {}",
        machine.ipv4, machine.interface
    ));
    scene.attach(Redirect, &MACHINES);
    let dial = Dial::new(V4, scene.address(V4, To::Service(80))).timeout_ms(500);
    let dialed = machine.actor.dial(&dial);
    assert_eq!(dialed.outcome(), TIMEOUT, "{dialed:?}");
    assert!(count(&scene, "machine-dropped") > 1);
    // The same, where it need not be captured.
    let dropped = count(&scene, "machine-dropped");
    let narrow = Options {
        include_cidrs: "192.0.2.0/24",
        ..MACHINES
    };
    scene.attach(Redirect, &narrow);
    send_syn(&machine, to.octets(), true);
    assert_eq!(count(&scene, "machine-dropped"), dropped);
}

#[rstest]
fn when_no_port_is_left_new_destinations_are_dropped() {
    let (mut scene, mut machine) = scene();
    scene.attach(Redirect, &MACHINES);
    captured(&scene, &mut machine, V4, To::Service(80));
    machine.netns.enter(|| {
        for port in 1000..=u16::MAX {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            let _in_progress = socket.connect(&SocketAddr::new(service(V4), port).into());
        }
    });
    assert!(count(&scene, "machine-dropped") > 0);
    let dial = |to| Dial::new(V4, scene.address(V4, to)).timeout_ms(500);
    let outcomes: Vec<_> = (1..20)
        .map(|port| {
            machine
                .actor
                .dial(&dial(To::Elsewhere(port)))
                .outcome()
                .to_owned()
        })
        .collect();
    assert!(
        outcomes.iter().any(|outcome| outcome == TIMEOUT),
        "{outcomes:?}"
    );
    assert!(
        !outcomes.iter().any(|outcome| outcome == SERVICE),
        "{outcomes:?}"
    );
    captured(&scene, &mut machine, V4, To::Service(80));
}

/// `tc` about an interface of the pod.
fn tc(scene: &Scene, arguments: &str) -> String {
    let line = format!("tc {arguments}");
    succeed(scene.pod.netns.command("sh").args(["-c", &line]))
}

#[rstest]
fn detach_leaves_nothing_and_takes_nothing_of_others() {
    let (mut scene, mut machine) = scene();
    let clsact = |scene: &Scene| tc(scene, "qdisc show dev vm0").contains("clsact");
    assert!(!clsact(&scene));
    scene.attach(Redirect, &MACHINES);
    assert!(clsact(&scene));
    let filters = |scene: &Scene| {
        ["ingress", "egress"].map(|side| tc(scene, &format!("filter show dev vm0 {side}")))
    };
    for shown in filters(&scene) {
        assert_eq!(shown.matches(" direct-action ").count(), 1, "{shown}");
    }
    // A policy without -k takes them away too, and one with it puts them back.
    scene.attach(Redirect, &Options::ISTIO);
    assert!(!clsact(&scene));
    direct(&scene, &mut machine, V4, To::Service(80), SERVICE);
    scene.attach(Redirect, &MACHINES);
    captured(&scene, &mut machine, V4, To::Service(80));
    scene.detach();
    assert!(!clsact(&scene));

    // Somebody else's filter, added while ours are there: the qdisc stays for it.
    scene.attach(Redirect, &MACHINES);
    tc(
        &scene,
        "filter add dev vm0 ingress pref 9 protocol all bpf bytecode '1,6 0 0 0,'",
    );
    scene.detach();
    assert!(clsact(&scene));
    assert!(filters(&scene)[0].contains("bytecode"));
    for shown in filters(&scene) {
        assert!(!shown.contains("direct-action"), "{shown}");
    }

    // Somebody else's qdisc, without any filter.
    tc(&scene, "filter del dev vm0 ingress");
    scene.attach(Redirect, &MACHINES);
    captured(&scene, &mut machine, V4, To::Service(80));
    scene.detach();
    assert!(clsact(&scene));
}

#[rstest]
fn attach_again_mends_what_is_missing() {
    let mut scene = Scene::new();
    let patterns = |scene: &Scene| loader::status_of(&scene.pod)["virtual_interfaces"].to_string();
    let output = loader::attach(&scene.pod, &MACHINES);
    assert!(
        errors(&output).contains("no interface vm0"),
        "{}",
        errors(&output)
    );
    scene.attach(Redirect, &MACHINES);
    assert_eq!(patterns(&scene), r#"{"vm0":{}}"#);
    let mut machine = Machine::new(&scene.pod, "vm0", 1, Link::Plain);
    assert_eq!(patterns(&scene), r#"{"vm0":{"vm0":false}}"#);
    direct(&scene, &mut machine, V4, To::Service(80), SERVICE);
    let again =
        |scene: &Scene| String::from_utf8(loader::attach(&scene.pod, &MACHINES).stdout).unwrap();
    assert!(again(&scene).starts_with("changed"));
    assert_eq!(patterns(&scene), r#"{"vm0":{"vm0":true}}"#);
    captured(&scene, &mut machine, V4, To::Service(80));
    assert!(again(&scene).starts_with("unchanged"));
    // One of the two filters, the qdisc with both, the interface's address.
    tc(&scene, "filter del dev vm0 egress");
    assert_eq!(patterns(&scene), r#"{"vm0":{"vm0":false}}"#);
    assert!(again(&scene).starts_with("changed"));
    captured(&scene, &mut machine, V4, To::Service(80));
    tc(&scene, "qdisc del dev vm0 clsact");
    assert!(again(&scene).starts_with("changed"));
    captured(&scene, &mut machine, V4, To::Service(80));
    assert!(again(&scene).starts_with("unchanged"));
}
