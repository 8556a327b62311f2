//! What somebody inside a pod, or next to it, can and cannot do to capture: the lines of docs/security.md.
//! Where iptables has an equivalent, the same attempt is made against it.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use redirect_common::connection::Original;
use redirect_tests::{
    actor::{Actor, executable},
    backend::Backend,
    bpffs,
    iptables::Variant,
    loader::{finish, redirect},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Greeting, Identity, Listen, Start},
    scene::{APP as APP_NAME, Lands, PROXY_PORTS, SERVICE, Scene, To, inward, out, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Inbound, Outbound};

const APP: Identity = Identity::APP;

fn attached(backend: Backend, options: &Options) -> Scene {
    let mut scene = Scene::new();
    scene.attach(backend, options);
    scene
}

/// Asks who answers at an address, from whatever process it runs in.
const DIAL: &str = "exec 3<>\"/dev/tcp/$0/$1\" && head -n 1 <&3";

/// A command in the pod's network namespace, and in one of its cgroups or in another one.
fn inside(scene: &Scene, cgroup: &Path, words: &[&str]) -> Command {
    let mut command = scene.pod.netns.command("sh");
    command.args(["-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""]);
    command.arg(cgroup).args(words);
    command
}

/// Who answers a program that is run by those words, in the pod: a listener's name, or the error's words.
fn answers(scene: &Scene, cgroup: &Path, words: &[&str], to: SocketAddr) -> String {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let dial = ["timeout", "3", "bash", "-c", DIAL, &ip, &port];
    let output = finish(&mut inside(scene, cgroup, &[words, &dial].concat()));
    if output.status.success() {
        let greeting: Greeting = serde_json::from_slice(&output.stdout).unwrap();
        return greeting.who;
    }
    let errors = errors(&output);
    let error = errors.lines().find_map(|line| line.split_once("connect: "));
    match error {
        Some((_, error)) => error.to_owned(),
        None => panic!("{words:?}: {:?}: {errors}", output.status),
    }
}

fn by_user(id: &'static str) -> [&'static str; 6] {
    ["setpriv", "--reuid", id, "--regid", id, "--clear-groups"]
}

/// A superuser with what a container may be given to change its network.
const ADMINISTRATOR: [&str; 3] = [
    "setpriv",
    "--bounding-set=-all,+net_admin,+net_raw,+net_bind_service",
    "--inh-caps=-all,+net_admin,+net_raw",
];

#[rstest]
fn administrator_of_the_pods_network_does_not_end_capture(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let mut scene = Scene::new();
    let before = scene.address(V4, To::Service(80));
    assert_eq!(
        answers(&scene, scene.pod.cgroup.path(), &by_user("1000"), before),
        SERVICE
    );
    scene.attach(backend, &Options::ISTIO);
    let cgroup = scene.pod.cgroup.path().to_owned();
    let tables = format!("iptables-{}", Variant::from_environment().name());
    let gateway = scene.pod.peer4.to_string();
    let own = scene.pod.ipv4.to_string();
    for change in [
        &[&*tables, "-w", "-t", "nat", "-F"][..],
        &["ip", "rule", "add", "pref", "1", "lookup", "main"],
        &[
            "ip", "route", "replace", "default", "via", &gateway, "src", &own,
        ],
        &["ip", "route", "add", "203.0.113.10/32", "via", &gateway],
        &["ip", "addr", "add", "203.0.113.11/32", "dev", "lo"],
        &["tc", "qdisc", "add", "dev", "eth0", "clsact"],
        &["tc", "qdisc", "del", "dev", "eth0", "clsact"],
    ] {
        let words = [&ADMINISTRATOR, change].concat();
        let output = finish(inside(&scene, &cgroup, &words).env("XTABLES_LOCKFILE", "/dev/null"));
        assert!(output.status.success(), "{change:?}: {}", errors(&output));
    }
    let expected = match backend {
        Redirect => "15001",
        // The rules are just settings of the namespace.
        Iptables => SERVICE,
    };
    assert_eq!(answers(&scene, &cgroup, &by_user("1000"), before), expected);
    let own = scene.address(V4, To::Own(8080));
    let from_outside = scene.outside.dial(&Dial::new(V4, own));
    let expected = match backend {
        Redirect => "15006",
        Iptables => APP_NAME,
    };
    assert_eq!(from_outside.outcome(), expected);
}

/// What is captured before passes afterwards: routes are read without the user whose packets a rule sends elsewhere.
#[rstest]
fn foreign_destination_called_the_pods_own_passes() {
    let mut scene = attached(Redirect, &Options::ISTIO);
    let to = scene.address(V4, To::Service(80));
    let cgroup = scene.pod.cgroup.path().to_owned();
    assert_eq!(answers(&scene, &cgroup, &by_user("1000"), to), "15001");
    let (foreign, gateway) = (to.ip(), scene.pod.peer4);
    scene.pod.netns.ip(&format!(
        "route add local {foreign}/32 dev lo\nroute add default via {gateway} dev eth0 table 77\nrule add pref 1 uidrange 1000-1000 lookup 77\nrule add pref 2 lookup local\nrule del pref 0"
    ));
    // Otherwise what the foreign address answers is refused as forged.
    scene.pod.netns.sysctl(&[
        ("ipv4/conf/all/accept_local", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/eth0/rp_filter", "0"),
    ]);
    scene.attach(Redirect, &Options::ISTIO);
    assert_eq!(answers(&scene, &cgroup, &by_user("1000"), to), SERVICE);
}

#[rstest]
#[case::another_user(&["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"])]
#[case::superuser_of_a_user_namespace(&["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "unshare", "--user", "--map-root-user"])]
#[case::with_another_bpf_file_system(&["unshare", "--mount", "sh", "-c", "mount -t bpf bpf /sys/fs/bpf && exec \"$@\"", "sh"])]
fn detach_from_inside_the_pod_does_nothing(#[case] words: &[&str]) {
    let mut scene = attached(Redirect, &Options::ISTIO);
    let (to, cgroup) = (
        scene.address(V4, To::Service(80)),
        scene.pod.cgroup.path().to_owned(),
    );
    let program = redirect().get_program().to_str().unwrap().to_owned();
    let cgroup_name = cgroup.to_str().unwrap();
    let detach = [program.as_str(), "detach", "--cgroup", cgroup_name];
    let output = finish(&mut inside(&scene, &cgroup, &[words, &detach].concat()));
    println!("{:?}: {}", output.status, errors(&output));
    assert_eq!(answers(&scene, &cgroup, &by_user("1000"), to), "15001");
    // Nor can the settings be read.
    let status = [program.as_str(), "status", "-o", "json"];
    let output = finish(&mut inside(&scene, &cgroup, &[words, &status].concat()));
    assert!(!String::from_utf8_lossy(&output.stdout).contains(cgroup_name));
    // The control: the host's superuser sees it and ends it.
    let output = finish(&mut inside(&scene, &cgroup, &status));
    assert!(String::from_utf8_lossy(&output.stdout).contains(cgroup_name));
    let output = finish(&mut inside(&scene, &cgroup, &detach));
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(answers(&scene, &cgroup, &by_user("1000"), to), SERVICE);
    scene.detach();
}

/// Everything below a directory, and whether it is a directory itself.
fn below(directory: &Path) -> Vec<(PathBuf, bool)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let is_directory = path.is_dir();
        if is_directory {
            found.append(&mut below(&path));
        }
        found.push((path, is_directory));
    }
    found
}

#[rstest]
fn pins_are_for_the_superuser_only() {
    bpffs::private(|| {
        let scene = attached(Redirect, &Options::ISTIO);
        let start = |identity| Actor::start(&scene.pod.netns.path(), None, identity);
        let (mut root, mut user) = (start(Identity::ROOT), start(APP));
        let words = ["--user", "--map-root-user", "--net"];
        let mut command = Command::new("setpriv");
        command.args(&by_user("1000")[1..]).arg("unshare");
        let mut user_namespace = Actor::start_by(
            command.args(words).arg(executable("actor")),
            Start {
                cgroup: None,
                netns: "/proc/self/ns/net".into(),
                net_admin: false,
                identity: Identity::ROOT,
            },
        );
        let top = Path::new("/sys/fs/bpf/redirect");
        let mut found = below(top);
        found.push((top.to_owned(), true));
        let pins: Vec<&Path> = found
            .iter()
            .filter_map(|(path, is_directory)| (!is_directory).then_some(path.as_path()))
            .collect();
        for place in ["/PODS", "/pods/", "/programs-"] {
            let is_there = |pin: &&&Path| pin.to_str().unwrap().contains(place);
            assert!(pins.iter().find(is_there).is_some(), "{place}: {pins:?}");
        }
        for (path, is_directory) in &found {
            let mode = fs::metadata(path).unwrap().permissions().mode() & 0o7777;
            let expected = if *is_directory { 0o700 } else { 0o600 };
            assert_eq!(mode, expected, "{}: {mode:o}", path.display());
        }
        let refused = Err("EACCES".to_owned());
        for pin in &pins {
            assert_eq!(root.open_pin(pin), Ok(()), "{pin:?}");
            assert_eq!(user.open_pin(pin), refused, "{pin:?}");
            assert_eq!(user_namespace.open_pin(pin), refused, "{pin:?}");
        }
        // The control: it is the modes that keep them out.
        for (path, is_directory) in &found {
            let mode = if *is_directory { 0o755 } else { 0o666 };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        for pin in &pins {
            assert_eq!(user.open_pin(pin), Ok(()), "{pin:?}");
            assert_eq!(user_namespace.open_pin(pin), Ok(()), "{pin:?}");
        }
    });
}

#[rstest]
fn proxys_id_in_a_user_namespace_is_not_the_proxys(#[values(Redirect, Iptables)] backend: Backend) {
    let scene = attached(backend, &Options::ISTIO);
    let (to, cgroup) = (scene.address(V4, To::Service(80)), scene.pod.cgroup.path());
    // The control: the id itself, which whoever may choose it passes by; with iptables too.
    assert_eq!(answers(&scene, cgroup, &by_user("1337"), to), SERVICE);
    let mapped = ["unshare", "--user", "--map-user=1337", "--map-group=1337"];
    let words = [&by_user("1000")[..], &mapped].concat();
    assert_eq!(answers(&scene, cgroup, &words, to), "15001");
}

#[rstest]
fn cgroup_below_the_pods_is_captured_and_one_beside_it_is_not(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let scene = attached(backend, &Options::ISTIO);
    let (to, cgroup) = (scene.address(V4, To::Service(80)), scene.pod.cgroup.path());
    // With a cgroup namespace, the pod's cgroup is the root of what can be mounted.
    let script = "mount -t cgroup2 none /mnt && mkdir -p /mnt/mine && echo $$ >/mnt/mine/cgroup.procs && exec \"$@\"";
    let below = ["unshare", "--mount", "--cgroup", "sh", "-c", script, "sh"];
    assert_eq!(answers(&scene, cgroup, &below, to), "15001");
    // Whoever writes to the host's cgroup tree leaves; iptables does not look at cgroups.
    let expected = match backend {
        Redirect => SERVICE,
        Iptables => "15001",
    };
    assert_eq!(answers(&scene, scene.pod.above.path(), &[], to), expected);
}

#[rstest]
#[case::of_its_own(&["unshare", "--net"])]
#[case::of_a_user_namespace(&["unshare", "--user", "--map-root-user", "--net"])]
fn network_namespace_made_inside_of_the_pod_leads_nowhere(
    #[values(Redirect, Iptables)] backend: Backend,
    #[case] words: &[&str],
) {
    let scene = attached(backend, &Options::ISTIO);
    let (to, cgroup) = (scene.address(V4, To::Service(80)), scene.pod.cgroup.path());
    assert_eq!(answers(&scene, cgroup, &[], to), "15001");
    let unreachable = "Network is unreachable";
    assert_eq!(answers(&scene, cgroup, words, to), unreachable);
}

#[rstest]
#[case::application(&["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"])]
#[case::superuser_of_a_user_namespace(&["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "unshare", "--user", "--map-root-user"])]
#[case::administrator(&ADMINISTRATOR)]
fn namespace_of_another_pod_is_closed_without_rights_over_it(#[case] words: &[&str]) {
    let (scene, other) = (attached(Redirect, &Options::ISTIO), Pod::new());
    let net = format!("--net={}", other.netns.path().display());
    let enter = |words: &[&str]| {
        let words = [words, &["nsenter", &net, "true"]].concat();
        finish(&mut inside(&scene, scene.pod.cgroup.path(), &words))
    };
    let refused = errors(&enter(words));
    assert!(refused.contains("Operation not permitted"), "{refused}");
    // The control: the host's superuser.
    let entered = enter(&[]);
    assert!(entered.status.success(), "{}", errors(&entered));
}

#[rstest]
fn marks_of_redirect_mode_mean_nothing(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let root = || Identity::ROOT;
    let rows = [1337, 1338, 1].map(|mark| out(root(), To::Service(80), Outbound).mark(mark));
    Scene::run(backend, family, Options::ISTIO, &rows);
}

/// The port that stands for the service's port 80 in a pod that has connected to nothing else.
fn standing_port(scene: &Scene, family: Family) -> u16 {
    let original = Original {
        destination: scene.address(family, To::Service(80)).ip().into(),
        port: 80,
        proxy_port: 15001,
        in_place: 0,
    };
    original.steered_port(0)
}

/// Ports of the data plane: of the proxy, of the range that stands for destinations, of the spare ones.
fn scanned(scene: &Scene, family: Family) -> Vec<u16> {
    let sample = (61_000..=65_535).step_by(233);
    let standing = standing_port(scene, family);
    PROXY_PORTS
        .into_iter()
        .chain([standing, 65_534, 65_535])
        .chain(sample)
        .collect()
}

#[rstest]
fn scan_from_outside_finds_what_the_inbound_options_say(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[values(false, true)] all: bool,
) {
    let options = Options {
        include_inbound: if all { "*" } else { "8080" },
        exclude_inbound: "",
        ..Options::ISTIO
    };
    let mut scene = attached(backend, &options);
    scene
        .attempt(family, &out(APP, To::Service(80), Outbound))
        .unwrap();
    scene.attempt(family, &inward(8080, Inbound)).unwrap();
    for port in scanned(&scene, family) {
        let to = scene.address(family, To::Own(port));
        let dialed = scene.outside.dial(&Dial::new(family, to));
        let expected = match port {
            _ if all => "15006",
            15001 => "15001",
            15006 => "15006",
            _ => "ECONNREFUSED",
        };
        assert_eq!(dialed.outcome(), expected, "{port}");
    }
}

#[rstest]
fn scan_from_inside_reaches_only_what_listens(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = attached(backend, &Options::ISTIO);
    let captured = out(APP, To::Service(80), Outbound);
    scene.attempt(family, &captured).unwrap();
    for port in scanned(&scene, family) {
        for to in [To::Own(port), To::Localhost(port)] {
            let to = scene.address(family, to);
            let dialed = scene.app.dial(&Dial::new(family, to));
            let expected = match port {
                15001 => "15001",
                15006 => "15006",
                _ => "ECONNREFUSED",
            };
            assert_eq!(dialed.outcome(), expected, "{to}");
            if let Some(greeting) = dialed.greeting {
                // Asked for the original destination, it names itself: a proxy can tell such a loop.
                let original = if family.is_ipv4() {
                    greeting.original
                } else {
                    greeting.original6
                };
                assert_eq!(original.address, Some(to));
            }
        }
    }
    scene.attempt(family, &captured).unwrap();
}

#[rstest]
fn ports_of_another_pod_are_the_ones_it_serves(#[values(V4, V6)] family: Family) {
    // What stands for a destination in one pod means nothing to another.
    let mut scene = attached(Redirect, &Options::ISTIO);
    scene
        .attempt(family, &out(APP, To::Service(80), Outbound))
        .unwrap();
    let port = standing_port(&scene, family);
    let to = scene.address(family, To::Own(port));
    let dialed = scene.outside.dial(&Dial::new(family, to));
    assert_eq!(dialed.outcome(), "15006");
    let greeting = dialed.greeting.unwrap();
    let original = if family.is_ipv4() {
        greeting.original
    } else {
        greeting.original6
    };
    assert_eq!(original.address, Some(to), "not the service");
    scene.detach();
    assert_eq!(
        scene.outside.dial(&Dial::new(family, to)).outcome(),
        "ECONNREFUSED"
    );
}

#[rstest]
fn source_forged_outside_gets_no_connection(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let mut scene = attached(backend, &Options::ISTIO);
    scene
        .attempt(family, &out(APP, To::Service(80), Outbound))
        .unwrap();
    let own = scene.pod.own(family);
    let passthrough: IpAddr = match family {
        V6 => Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
        _ => Ipv4Addr::new(127, 0, 0, 6).into(),
    };
    let standing = standing_port(&scene, family);
    for source in [own, passthrough] {
        for port in [8080, 15001, standing] {
            let to = scene.address(family, To::Own(port));
            let dial = Dial::new(family, to)
                .transparent(SocketAddr::new(source, 0))
                .timeout_ms(300);
            let dialed = scene.outside.dial(&dial);
            assert!(dialed.greeting.is_none(), "{source} to {to}: {dialed:?}");
        }
    }
    // The control: the way is open for a source that is no forgery.
    scene.attempt(family, &inward(8080, Inbound)).unwrap();
}

/// When the proxy begins to listen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Proxy {
    First,
    Last,
    LastAndBeforeAttach,
}

#[rstest]
fn foreign_listeners_on_the_proxys_ports_neither_push_it_out_nor_take_its_place(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(Proxy::First, Proxy::Last, Proxy::LastAndBeforeAttach)] proxy: Proxy,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    if proxy != Proxy::LastAndBeforeAttach {
        scene.attach(backend, &Options::ISTIO);
    }
    let own = scene.pod.ipv4;
    let listen = |scene: &mut Scene| {
        // The proxy binds one address of each port, which leaves the others free.
        let outbound = (Ipv4Addr::LOCALHOST, 15001).into();
        scene.proxy.listen(Listen::new("15001", outbound));
        scene
            .proxy
            .listen(Listen::new("15006", (own, 15006).into()));
    };
    if proxy == Proxy::First {
        listen(&mut scene);
    }
    for port in PROXY_PORTS {
        for number in 1..=20 {
            // No address of the pod: IP_FREEBIND takes no privilege.
            let foreign: IpAddr = Ipv4Addr::new(1, 0, 2, number).into();
            let loopback: IpAddr = Ipv4Addr::new(127, 0, 1, number).into();
            for address in [foreign, loopback] {
                let thief = Listen::new("thief", (address, port).into());
                scene.app.listen(thief.freebind());
            }
        }
        let group = Listen::new("thief", wildcards(port)[1]).reuseport(20);
        scene.app.listen(group);
    }
    if proxy != Proxy::First {
        listen(&mut scene);
    }
    if proxy == Proxy::LastAndBeforeAttach {
        scene.attach(backend, &Options::ISTIO);
    }
    for _ in 0..5 {
        let outbound = out(APP, To::Service(80), Outbound);
        scene.attempt(V4, &outbound).unwrap();
        scene.attempt(V4, &inward(8080, Inbound)).unwrap();
    }
    // The control: they do listen.
    let to = SocketAddr::from((Ipv4Addr::new(127, 0, 1, 7), 15001));
    assert_eq!(scene.app.dial(&Dial::new(V4, to)).outcome(), "thief");
}
