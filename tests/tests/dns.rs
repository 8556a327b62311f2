//! DNS capture: who answers a query, over UDP and TCP, and what both ends see (semantics.md 2.3, O7, and 2.4).
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, so that the backtrace points at the line"
)]

use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    bpffs::{self, Objects},
    loader::{self, attach_command, finish},
    namespace::errors,
    options::{DNS_PROXY_PORT, Options},
    pod::{ELSEWHERE4, ELSEWHERE6, SERVICE4, SERVICE6},
    protocol::{Burst, Dial, Dialed, Family, Identity, Listen, Transport, canonical},
    scene::{APP as APP_NAME, SERVICE, Scene, To, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Transport::{ConnectedUdp, Tcp, Udp};

const APP: Identity = Identity::APP;
const PROXY: Identity = Identity::PROXY;
/// Neither the proxy's user nor in its group by name, but of its group.
const GROUP: Identity = Identity::new(1000, 1337);

/// The name of the agent's listeners.
const AGENT: &str = "agent";
/// How long to wait for an answer that must not come.
const SILENCE_MS: u64 = 300;

const ALL: Options = Options {
    redirect_dns: true,
    capture_all_dns: true,
    ..Options::ISTIO
};

/// A `resolv.conf`, removed with this value.
struct ResolvConf(PathBuf);

impl ResolvConf {
    fn naming(servers: &[IpAddr]) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("redirect-dns-{}-{serial}", process::id()));
        let lines: String = servers
            .iter()
            .map(|server| format!("nameserver {server}\n"))
            .collect();
        fs::write(
            &path,
            format!("search example.com\n{lines}options ndots:5\n"),
        )
        .unwrap();
        Self(path)
    }

    /// Only its servers' queries are captured.
    fn options(&self) -> Options {
        Options {
            redirect_dns: true,
            // Options are constants in every other test.
            resolv_conf: Box::leak(self.0.to_str().unwrap().to_owned().into_boxed_str()),
            ..Options::ISTIO
        }
    }
}

impl Drop for ResolvConf {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

/// Where the agent listens.
fn agent_addresses() -> [SocketAddr; 2] {
    [
        (Ipv4Addr::LOCALHOST, DNS_PROXY_PORT).into(),
        (Ipv6Addr::LOCALHOST, DNS_PROXY_PORT).into(),
    ]
}

fn open_agent(agent: &mut Actor) {
    for address in agent_addresses() {
        agent.listen(Listen::new(AGENT, address));
        agent.listen(Listen::new(AGENT, address).udp());
    }
}

/// A scene with DNS servers in the pod and outside, without an agent.
fn scene_without_agent() -> Scene {
    let mut scene = Scene::new();
    for address in wildcards(53).into_iter().chain(wildcards(5000)) {
        scene.app.listen(Listen::new(APP_NAME, address).udp());
        scene.outside.listen(Listen::new(SERVICE, address).udp());
    }
    scene
}

fn scene() -> Scene {
    let mut scene = scene_without_agent();
    open_agent(&mut scene.proxy);
    scene
}

fn dial(
    scene: &mut Scene,
    from: &Identity,
    transport: Transport,
    family: Family,
    to: To,
) -> Dialed {
    let mut dial = Dial::new(family, scene.address(family, to)).timeout_ms(2000);
    dial.transport = transport;
    scene.actor(from).dial(&dial)
}

/// Who answers one query, and whether what both ends see is what iptables shows.
fn check(scene: &mut Scene, backend: Backend, family: Family, transport: Transport, row: &Row) {
    let (from, to, over_tcp, over_udp) = row;
    let who = if transport == Tcp { over_tcp } else { over_udp };
    let server = scene.address(family, *to);
    let dialed = dial(scene, from, transport, family, *to);
    let context = format!("{family:?} {transport:?} {row:?}: {dialed:#?}");
    assert_eq!(dialed.outcome(), *who, "{context}");
    assert_eq!(dialed.error, None, "{context}");
    let greeting = dialed.greeting.as_ref().unwrap();
    let local = canonical(dialed.local.unwrap());
    if transport != Udp {
        assert_eq!(dialed.peer.map(canonical), Some(server), "{context}");
        if !server.ip().is_loopback() && !scene.pod.is_local(server.ip()) {
            assert_eq!(local.ip(), scene.pod.own(family), "{context}");
        }
    }
    if transport != Tcp {
        assert_eq!(dialed.replied.map(canonical), Some(server), "{context}");
    }
    if *who != AGENT {
        return;
    }
    let loopback = SocketAddr::new(
        if family.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        },
        DNS_PROXY_PORT,
    );
    assert_eq!(canonical(greeting.local), loopback, "{context}");
    if transport == Tcp {
        let original = if family.is_ipv4() {
            &greeting.original
        } else {
            &greeting.original6
        };
        assert_eq!(original.address, Some(server), "{context}");
    }
    // What is asked on a socket that is not connected shows the agent a slot address.
    if transport != Udp || backend == Iptables {
        let expected = if transport == Udp {
            SocketAddr::new(canonical(greeting.peer).ip(), local.port())
        } else {
            local
        };
        assert_eq!(canonical(greeting.peer), expected, "{context}");
    }
}

/// Who asks whom; who answers over TCP, and over UDP.
type Row = (Identity, To, &'static str, &'static str);

fn table(backend: Backend, family: Family, options: &Options, rows: &[Row]) {
    let mut scene = scene();
    let uncaptured = |scene: &mut Scene| {
        for transport in [Tcp, ConnectedUdp, Udp] {
            let dialed = dial(scene, &APP, transport, family, To::Service(53));
            assert_eq!(dialed.outcome(), SERVICE, "{transport:?}: {dialed:?}");
        }
    };
    uncaptured(&mut scene);
    scene.attach(backend, options);
    for row in rows {
        for transport in [Tcp, ConnectedUdp, Udp] {
            check(&mut scene, backend, family, transport, row);
        }
    }
    scene.detach();
    uncaptured(&mut scene);
}

/// An address of 127.0.0.0/8 other than the usual one, where the family has such.
fn other_loopback(family: Family) -> To {
    if family.is_ipv4() {
        To::Address(Ipv4Addr::new(127, 0, 0, 5).into(), 53)
    } else {
        To::Localhost(53)
    }
}

#[rstest]
fn every_query_goes_to_the_agent_and_no_other_port_does(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let rows = [
        (APP, To::Service(53), AGENT, AGENT),
        (APP, To::Elsewhere(53), AGENT, AGENT),
        (APP, To::Own(53), AGENT, AGENT),
        (APP, To::Localhost(53), AGENT, AGENT),
        (APP, other_loopback(family), AGENT, AGENT),
        (Identity::ROOT, To::Service(53), AGENT, AGENT),
        (APP, To::Service(5000), "15001", SERVICE),
        (APP, To::Own(5000), APP_NAME, APP_NAME),
        (PROXY, To::Service(53), SERVICE, SERVICE),
        (PROXY, To::Own(53), APP_NAME, APP_NAME),
        (PROXY, To::Localhost(53), APP_NAME, APP_NAME),
        (GROUP, To::Service(53), SERVICE, SERVICE),
        (GROUP, To::Own(53), "15006", APP_NAME),
    ];
    table(backend, family, &ALL, &rows);
}

#[rstest]
fn only_queries_to_the_servers_of_resolv_conf_go_to_the_agent(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let resolv_conf = ResolvConf::naming(&[SERVICE4.into(), SERVICE6.into()]);
    let loopback = if family.is_ipv4() { "15001" } else { APP_NAME };
    let rows = [
        (APP, To::Service(53), AGENT, AGENT),
        (APP, To::Elsewhere(53), "15001", SERVICE),
        (APP, To::Own(53), "15001", APP_NAME),
        (APP, To::Localhost(53), APP_NAME, APP_NAME),
        (APP, other_loopback(family), loopback, APP_NAME),
        (PROXY, To::Service(53), SERVICE, SERVICE),
        (PROXY, To::Own(53), APP_NAME, APP_NAME),
        (GROUP, To::Own(53), "15006", APP_NAME),
    ];
    table(backend, family, &resolv_conf.options(), &rows);
}

#[rstest]
fn servers_of_one_family_leave_the_other_alone(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let resolv_conf = ResolvConf::naming(&[SERVICE4.into()]);
    let (tcp, udp) = if family.is_ipv4() {
        (AGENT, AGENT)
    } else {
        ("15001", SERVICE)
    };
    let rows = [
        (APP, To::Service(53), tcp, udp),
        // The exceptions of the earlier rules hold for both.
        (APP, To::Own(53), "15001", APP_NAME),
    ];
    table(backend, family, &resolv_conf.options(), &rows);
}

#[rstest]
fn excluded_port_beats_dns_capture(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        exclude_outbound: "53",
        ..ALL
    };
    let rows = [
        (APP, To::Service(53), SERVICE, SERVICE),
        (APP, To::Own(53), APP_NAME, APP_NAME),
        (APP, To::Localhost(53), APP_NAME, APP_NAME),
        (GROUP, To::Own(53), APP_NAME, APP_NAME),
    ];
    table(backend, family, &options, &rows);
}

#[rstest]
fn dns_is_captured_where_nothing_else_is(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        redirect_dns: true,
        capture_all_dns: true,
        exclude_cidrs: "203.0.113.0/24",
        ..Options::BARE
    };
    let rows = [
        (APP, To::Service(53), AGENT, AGENT),
        (APP, To::Service(5000), SERVICE, SERVICE),
        (PROXY, To::Service(53), SERVICE, SERVICE),
    ];
    table(backend, family, &options, &rows);
}

#[rstest]
fn owner_groups_and_ipv6_off_come_before_dns(#[values(Redirect, Iptables)] backend: Backend) {
    let options = Options {
        owner_groups: Some("2000"),
        ipv6: false,
        ..ALL
    };
    let member = Identity::new(1000, 2000);
    let rows = [
        (APP, To::Service(53), SERVICE, SERVICE),
        (member.clone(), To::Service(53), AGENT, AGENT),
    ];
    table(backend, V4, &options, &rows);
    let rows = [(member, To::Service(53), SERVICE, SERVICE)];
    table(backend, V6, &options, &rows);
}

/// Destinations that the agent is to answer for, and one server of the application's own.
fn servers(family: Family) -> Vec<SocketAddr> {
    let ips: [IpAddr; 3] = if family.is_ipv4() {
        [
            SERVICE4.into(),
            ELSEWHERE4.into(),
            Ipv4Addr::new(192, 0, 2, 53).into(),
        ]
    } else {
        let nowhere = Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 0x53);
        [SERVICE6.into(), ELSEWHERE6.into(), nowhere.into()]
    };
    ips.map(|ip| SocketAddr::new(ip, 53)).to_vec()
}

fn open_reversing_agent(agent: &mut Actor, count: usize) {
    for address in agent_addresses() {
        agent.reverse(AGENT, address, count);
    }
}

/// Every answer comes from the server that was asked this question.
fn assert_each_by_its_server(scene: &mut Scene, burst: &Burst) {
    let replies = scene.app.burst(burst);
    let replies = replies.unwrap_or_else(|error| panic!("{burst:?}: {error}"));
    assert_eq!(replies.len(), burst.to.len());
    for (index, server) in burst.to.iter().enumerate() {
        let text = format!("{AGENT} {index}");
        let reply = replies.iter().find(|reply| reply.text == text);
        let from = reply.map(|reply| canonical(reply.from));
        assert_eq!(from, Some(*server), "{burst:?}: {replies:?}");
    }
}

#[rstest]
fn many_queries_of_one_socket_stay_apart_whatever_the_order_of_answers(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values("unbound", "wildcard", "address")] bound: &str,
) {
    let mut scene = scene_without_agent();
    scene.attach(backend, &ALL);
    let mut burst = Burst::new(family, servers(family));
    open_reversing_agent(&mut scene.proxy, burst.to.len());
    let wildcard: IpAddr = if family == V4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    burst.bind = match bound {
        "unbound" => None,
        "wildcard" => Some(SocketAddr::new(wildcard, 4053)),
        _ => Some(SocketAddr::new(scene.pod.own(family), 0)),
    };
    assert_each_by_its_server(&mut scene, &burst);
    // A dual-stack socket asks servers of both families.
    if family == Mapped && bound != "address" {
        burst.to[1] = SocketAddr::new(ELSEWHERE6.into(), 53);
        // Each of the agent's two sockets waits for its own.
        scene.proxy.unreverse();
        open_reversing_agent(&mut scene.proxy, 1);
        assert_each_by_its_server(&mut scene, &burst);
    }
}

#[rstest]
fn query_that_names_its_server_on_a_connected_socket_is_answered_by_it(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = scene_without_agent();
    scene.attach(backend, &ALL);
    open_reversing_agent(&mut scene.proxy, 1);
    let server = scene.address(family, To::Service(53));
    let mut burst = Burst::new(family, vec![server, server]).lockstep();
    burst.connect = Some(server);
    assert_each_by_its_server(&mut scene, &burst);
}

#[rstest]
fn connected_socket_with_a_port_of_its_own_sees_its_address_and_the_server(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = scene();
    scene.attach(backend, &ALL);
    let to = scene.address(family, To::Service(53));
    let any: IpAddr = if family == V6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    // Port 0 is one of the kernel's choice.
    for (source, port) in [
        (any, 4054),
        (any, 0),
        (scene.pod.own(family), 4054),
        (scene.pod.own(family), 0),
    ] {
        let mut dial = Dial::new(family, to).bind(SocketAddr::new(source, port));
        dial.transport = ConnectedUdp;
        let dialed = scene.app.dial(&dial);
        assert_eq!(dialed.outcome(), AGENT, "{dialed:#?}");
        assert_eq!(dialed.peer.map(canonical), Some(to), "{dialed:#?}");
        assert_eq!(dialed.replied.map(canonical), Some(to), "{dialed:#?}");
        let local = canonical(dialed.local.unwrap());
        assert_eq!(local.ip(), scene.pod.own(family), "{dialed:#?}");
        assert!([0, local.port()].contains(&port), "{dialed:#?}");
        let sender = canonical(dialed.greeting.as_ref().unwrap().peer);
        assert_eq!(sender.port(), local.port(), "{dialed:#?}");
        // Documented: bound to a port alone, the socket talks to the agent from loopback.
        let shown = backend == Iptables || source != any;
        assert_eq!(sender.ip() == local.ip(), shown, "{dialed:#?}");
    }
}

#[rstest]
fn agent_on_wildcard_addresses_answers_and_asks_from_the_same_port(
    #[values(V4, V6)] family: Family,
) {
    let mut scene = scene_without_agent();
    scene.attach(Redirect, &ALL);
    for address in wildcards(DNS_PROXY_PORT) {
        scene.proxy.reverse(AGENT, address, 1);
    }
    let burst = Burst::new(family, servers(family)).lockstep();
    assert_each_by_its_server(&mut scene, &burst);
    // The answers to its own queries would go to the agent's thread, so that it makes room.
    scene.proxy.unreverse();
    scene.outside.unlisten(SERVICE);
    for address in wildcards(53) {
        scene.outside.reverse(SERVICE, address, 1);
    }
    let server = SocketAddr::new(
        if family == V4 {
            scene.pod.peer4.into()
        } else {
            scene.pod.peer6.into()
        },
        53,
    );
    let mut own = Burst::new(family, vec![server]);
    own.bind = wildcards(DNS_PROXY_PORT)
        .into_iter()
        .find(|address| address.is_ipv4() == (family == V4));
    let replies = scene.proxy.burst(&own).unwrap();
    assert_eq!(replies[0].text, format!("{SERVICE} 0"));
    assert_eq!(replies[0].from, server);
}

#[rstest]
fn agent_of_any_user_is_answered_for(#[values(V4, V6, Mapped)] family: Family) {
    let mut scene = scene_without_agent();
    let other = Identity::new(4000, 4000);
    open_agent(scene.actor(&other));
    scene.attach(Redirect, &ALL);
    for transport in [Tcp, ConnectedUdp, Udp] {
        let row = (APP, To::Service(53), AGENT, AGENT);
        check(&mut scene, Redirect, family, transport, &row);
    }
}

#[rstest]
fn without_an_agent_nothing_is_answered_and_nothing_leaves(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = scene_without_agent();
    scene.attach(backend, &ALL);
    let to = scene.address(family, To::Service(53));
    let mut outcome = |transport| {
        let mut dial = Dial::new(family, to).timeout_ms(SILENCE_MS);
        dial.transport = transport;
        scene.app.dial(&dial).outcome().to_owned()
    };
    assert_eq!(outcome(Tcp), "ECONNREFUSED");
    // The kernel's refusal finds its way back through conntrack only to a socket that is not connected,
    // and by a slot address only if that is of IPv4.
    let (connected, unconnected) = match (backend, family) {
        (Iptables, _) => ("EAGAIN", "ECONNREFUSED"),
        (Redirect, V6) => ("ECONNREFUSED", "EAGAIN"),
        (Redirect, V4 | Mapped) => ("ECONNREFUSED", "ECONNREFUSED"),
    };
    assert_eq!(outcome(ConnectedUdp), connected);
    assert_eq!(outcome(Udp), unconnected);
}

#[rstest]
fn dns_capture_goes_on_and_off_while_attached(#[values(V4, V6, Mapped)] family: Family) {
    let mut scene = scene();
    let resolv_conf = ResolvConf::naming(&[ELSEWHERE4.into(), ELSEWHERE6.into()]);
    let elsewhere = resolv_conf.options();
    let steps = [
        (Options::ISTIO, "15001", SERVICE),
        (ALL, AGENT, AGENT),
        (elsewhere, "15001", SERVICE),
        (ALL, AGENT, AGENT),
        (Options::ISTIO, "15001", SERVICE),
    ];
    for (options, over_tcp, over_udp) in steps {
        scene.attach(Redirect, &options);
        for transport in [Tcp, ConnectedUdp, Udp] {
            let row = (APP, To::Service(53), over_tcp, over_udp);
            check(&mut scene, Redirect, family, transport, &row);
        }
    }
}

#[rstest]
fn agent_that_listens_before_or_after_attach_is_found() {
    for early in [true, false] {
        let mut scene = scene_without_agent();
        if early {
            open_agent(&mut scene.proxy);
        }
        scene.attach(Redirect, &ALL);
        if !early {
            open_agent(&mut scene.proxy);
        }
        let status = loader::status_of(&scene.pod);
        let listeners = &status["listeners"];
        assert_eq!(listeners[DNS_PROXY_PORT.to_string()], 2, "{listeners}");
        for family in [V4, V6, Mapped] {
            let row = (APP, To::Service(53), AGENT, AGENT);
            check(&mut scene, Redirect, family, Tcp, &row);
        }
    }
}

#[rstest]
fn pod_that_asks_too_many_servers_is_still_answered_and_it_is_counted() {
    let mut scene = scene_without_agent();
    scene.attach(Redirect, &ALL);
    open_reversing_agent(&mut scene.proxy, 1);
    let servers = (0..6000_u32).map(|index| {
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + index);
        SocketAddr::new(ip.into(), 53)
    });
    let burst = Burst::new(V4, servers.collect()).lockstep();
    assert_each_by_its_server(&mut scene, &burst);
    let status = loader::status_of(&scene.pod);
    let connections = &status["connections"];
    assert_eq!(connections["outbound-dns"], 6000, "{connections}");
    let without = connections["no-dns-slot"].as_u64();
    assert!(
        without.is_some_and(|count| count >= 6000 - 4096),
        "{connections}"
    );
}

#[rstest]
fn resolv_conf_without_servers_turns_dns_capture_off_with_a_warning() {
    let mut scene = scene();
    let resolv_conf = ResolvConf::naming(&[]);
    let options = resolv_conf.options();
    let mut command = attach_command(&scene.pod);
    command
        .args(options.arguments())
        .envs(options.environment());
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", errors(&output));
    let told = errors(&output);
    assert!(told.contains("names no DNS server"), "{told}");
    let row = (APP, To::Service(53), "15001", SERVICE);
    for transport in [Tcp, ConnectedUdp, Udp] {
        check(&mut scene, Redirect, V4, transport, &row);
    }
    drop(loader::detach(scene.pod.cgroup.path()));
}

#[rstest]
fn programs_of_dns_are_loaded_for_the_first_pod_that_needs_them() {
    let are_there = || {
        bpffs::pins()
            .iter()
            .any(|pin| pin.to_string_lossy().contains("-dns"))
    };
    bpffs::private(|| {
        let mut scene = scene();
        scene.attach(Redirect, &Options::ISTIO);
        let loaded = Objects::loaded().programs().len();
        assert!(!are_there() && loaded > 5);
        scene.attach(Redirect, &ALL);
        assert!(are_there() && Objects::loaded().programs().len() > loaded);
        let row = (APP, To::Service(53), AGENT, AGENT);
        check(&mut scene, Redirect, V4, ConnectedUdp, &row);
        // Its hooks stay until the pod is detached.
        scene.attach(Redirect, &Options::ISTIO);
        assert!(are_there());
        scene.detach();
        assert!(bpffs::pins().is_empty());
    });
}
