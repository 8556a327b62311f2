//! Attaching, changing, detaching: what happens to connections, and what is left behind.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{
    fs::OpenOptions,
    io::pipe,
    net::SocketAddr,
    os::fd::OwnedFd,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    backend::Backend,
    bpffs,
    faults::{self, DIRECT, Ends, ISTIO, OTHER, OTHER_OPTIONS, THIRD_OPTIONS},
    loader::{self, attach_command, finish, status_mentions},
    namespace::errors,
    options::Options,
    patience::{amount, patience},
    pod::{Pod, Shape},
    protocol::{Dial, Family, Identity, Traffic},
    scene::{Lands, Scene, To, inward, out},
    traces::Traces,
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

const APP: Identity = Identity::APP;

#[rstest]
fn established_connections_live_through_attach_and_detach(
    #[values(V4, V6, Mapped)] family: Family,
) {
    let mut scene = Scene::new();
    let (service, own) = (
        scene.address(family, To::Service(80)),
        scene.address(family, To::Own(8080)),
    );
    let inside = if family == Mapped { V4 } else { family };
    let expect_echo = |scene: &mut Scene, text: &str, captured: bool| {
        assert_eq!(scene.app.ask("out", text).as_deref(), Ok(text));
        assert_eq!(scene.outside.ask("in", text).as_deref(), Ok(text));
        if captured {
            assert_eq!(scene.app.ask("captured out", text).as_deref(), Ok(text));
            assert_eq!(scene.outside.ask("captured in", text).as_deref(), Ok(text));
        }
    };
    assert_eq!(
        scene
            .app
            .dial(&Dial::new(family, service).keep("out"))
            .outcome(),
        "service"
    );
    assert_eq!(
        scene
            .outside
            .dial(&Dial::new(inside, own).keep("in"))
            .outcome(),
        "app"
    );
    expect_echo(&mut scene, "before", false);
    scene.attach(Redirect, &Options::ISTIO);
    expect_echo(&mut scene, "attached", false);
    assert_eq!(scene.app.look("out").peer.map(|peer| peer.port()), Some(80));
    assert_eq!(
        scene
            .app
            .dial(&Dial::new(family, service).keep("captured out"))
            .outcome(),
        "15001"
    );
    assert_eq!(
        scene
            .outside
            .dial(&Dial::new(inside, own).keep("captured in"))
            .outcome(),
        "15006"
    );
    expect_echo(&mut scene, "both", true);
    scene.attach(
        Redirect,
        &Options {
            exclude_outbound: "80",
            include_inbound: "",
            ..Options::ISTIO
        },
    );
    expect_echo(&mut scene, "changed", true);
    scene.detach();
    expect_echo(&mut scene, "detached", true);
}

#[rstest]
fn accepted_connection_keeps_its_answers_while_attached(#[values(V4, V6, Mapped)] family: Family) {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let to = scene.address(family, To::Service(80));
    let first = scene.app.dial(&Dial::new(family, to).keep("kept"));
    scene.attach(
        Redirect,
        &Options {
            exclude_outbound: "80",
            ..Options::ISTIO
        },
    );
    let later = scene.app.look("kept");
    assert_eq!(later.peer, first.peer);
    assert_eq!(later.local, first.local);
    assert!(
        scene
            .app
            .ask("kept", "probe 28")
            .unwrap()
            .contains(&to.ip().to_string())
    );
}

/// Lets the application dial the service, or the peer the application, while `change` happens over and over for a while.
fn under_traffic(
    scene: &mut Scene,
    family: Family,
    inward: bool,
    mut change: impl FnMut(&Pod, u32),
) -> Traffic {
    scene.attach(Redirect, &Options::ISTIO);
    let to = if inward {
        To::Own(8080)
    } else {
        To::Service(80)
    };
    let dial = Dial::new(family, scene.address(family, to));
    let actor = if inward {
        &mut scene.outside
    } else {
        &mut scene.app
    };
    actor.traffic_start(dial);
    let begun = Instant::now();
    let mut round = 0;
    // Some changes are slow on a busy machine: enough of them and enough time.
    while round < 8 || begun.elapsed() < Duration::from_millis(1000) {
        assert!(
            begun.elapsed() < patience(Duration::from_secs(20)),
            "only {round} changes"
        );
        change(&scene.pod, round);
        round += 1;
        thread::sleep(Duration::from_millis(20));
    }
    actor.traffic_stop()
}

/// The other options in even rounds, Istio's in odd ones.
fn alternate(pod: &Pod, round: u32, options: &Options) {
    let options = [options, &Options::ISTIO][round as usize % 2];
    loader::attach(pod, options);
}

fn only(traffic: &Traffic, allowed: &[&str]) {
    let strangers: Vec<_> = traffic
        .outcomes
        .iter()
        .filter(|(who, _)| !allowed.contains(&who.as_str()))
        .collect();
    assert!(strangers.is_empty(), "{traffic:?}");
    let met: u64 = traffic.outcomes.iter().map(|(_, count)| count).sum();
    assert!(met > 50, "hardly any traffic: {traffic:?}");
}

#[rstest]
#[case::outbound(false, "15001")]
#[case::inbound(true, "15006")]
fn options_change_without_an_uncaptured_moment(
    #[values(V4, V6)] family: Family,
    #[case] inward: bool,
    #[case] who: &str,
) {
    let mut scene = Scene::new();
    let traffic = under_traffic(&mut scene, family, inward, |pod, round| {
        let changed = Options {
            exclude_outbound: "443",
            exclude_inbound: "9090",
            exclude_cidrs: "198.51.100.0/24",
            include_cidrs: "203.0.113.0/24,2001:db8::/32",
            ..Options::ISTIO
        };
        alternate(pod, round, &changed);
    });
    only(&traffic, &[who]);
}

#[rstest]
fn options_that_end_capture_never_break_a_connection(#[values(V4, V6)] family: Family) {
    let mut scene = Scene::new();
    let traffic = under_traffic(&mut scene, family, false, |pod, round| {
        let without = Options {
            exclude_outbound: "80",
            ..Options::ISTIO
        };
        alternate(pod, round, &without);
    });
    only(&traffic, &["15001", "service"]);
}

#[rstest]
#[case::outbound(false, &["15001", "service"])]
#[case::inbound(true, &["15006", "app"])]
fn attach_and_detach_never_break_a_connection(
    #[values(V4, V6)] family: Family,
    #[case] inward: bool,
    #[case] allowed: &[&str],
) {
    let mut scene = Scene::new();
    let traffic = under_traffic(&mut scene, family, inward, |pod, round| {
        if round % 2 == 0 {
            Redirect.detach(pod);
        } else {
            loader::attach(pod, &Options::ISTIO);
        }
    });
    only(&traffic, allowed);
}

#[rstest]
fn attach_again_changes_nothing() {
    let mut scene = Scene::new();
    let traffic = under_traffic(&mut scene, V4, false, |pod, _| {
        loader::attach(pod, &Options::ISTIO);
    });
    only(&traffic, &["15001"]);
    scene.attempt(V4, &inward(8080, Inbound)).unwrap();
    scene.detach();
    scene
        .attempt(V4, &out(APP, To::Service(80), Direct))
        .unwrap();
}

#[rstest]
fn changed_options_replace_the_old_ones() {
    let mut scene = Scene::new();
    let steps = [
        (Options::ISTIO, Outbound, Inbound),
        (
            Options {
                exclude_outbound: "80",
                ..Options::ISTIO
            },
            Direct,
            Inbound,
        ),
        (
            Options {
                include_inbound: "9090",
                ..Options::ISTIO
            },
            Outbound,
            Direct,
        ),
        (
            Options {
                include_cidrs: "198.51.100.0/24",
                exclude_inbound: "8080",
                ..Options::ISTIO
            },
            Direct,
            Direct,
        ),
        (
            Options {
                uids: "1000",
                gids: "1337",
                ..Options::ISTIO
            },
            Direct,
            Inbound,
        ),
        (
            Options {
                owner_groups_exclude: "1000",
                ..Options::ISTIO
            },
            Direct,
            Inbound,
        ),
        (Options::ISTIO, Outbound, Inbound),
        (Options::BARE, Direct, Direct),
    ];
    for (options, outbound, inbound) in steps {
        scene.attach(Redirect, &options);
        scene.all(
            &format!("{options:?}"),
            V4,
            &[out(APP, To::Service(80), outbound), inward(8080, inbound)],
        );
    }
}

#[rstest]
fn ipv6_can_be_turned_on_and_off_live() {
    let mut scene = Scene::new();
    for (ipv6, outbound, inbound) in [
        (true, Outbound, Inbound),
        (false, Direct, Direct),
        (true, Outbound, Inbound),
    ] {
        scene.attach(
            Redirect,
            &Options {
                ipv6,
                ..Options::ISTIO
            },
        );
        let attempts = [out(APP, To::Service(80), outbound), inward(8080, inbound)];
        scene.all("changed", V6, &attempts);
        scene.all(
            "changed",
            V4,
            &[out(APP, To::Service(80), Outbound), inward(8080, Inbound)],
        );
    }
}

#[rstest]
fn equal_addresses_in_two_pods_do_not_meet(#[values(Redirect, Iptables)] backend: Backend) {
    let shape = Shape {
        number: 7,
        ..Pod::shape()
    };
    let first_options = Options {
        exclude_outbound: "443",
        exclude_inbound: "9090",
        ..Options::ISTIO
    };
    let second_options = Options {
        exclude_outbound: "80",
        exclude_inbound: "8080",
        ..Options::ISTIO
    };
    let (mut first, mut second) = (Scene::shaped(shape), Scene::shaped(shape));
    assert_eq!(first.pod.ipv4, second.pod.ipv4);
    first.attach(backend, &first_options);
    for family in [V4, V6] {
        second
            .attempt(family, &out(APP, To::Service(80), Direct))
            .unwrap();
        second.attempt(family, &inward(9090, Direct)).unwrap();
    }
    second.attach(backend, &second_options);
    let pairs = |port_out, port_in, captured: bool| {
        let (outbound, inbound) = if captured {
            (Outbound, Inbound)
        } else {
            (Direct, Direct)
        };
        [
            out(APP, To::Service(port_out), outbound),
            inward(port_in, inbound),
        ]
    };
    for family in [V4, V6] {
        first.all("first", family, &pairs(80, 8080, true));
        first.all("first", family, &pairs(443, 9090, false));
        second.all("second", family, &pairs(443, 9090, true));
        second.all("second", family, &pairs(80, 8080, false));
    }
    // The same four numbers in both pods at the same time.
    for scene in [&mut first, &mut second] {
        let source = SocketAddr::new(scene.pod.ipv4.into(), 23456);
        let to = scene.address(V4, To::Elsewhere(8000));
        assert_eq!(
            scene
                .app
                .dial(&Dial::new(V4, to).bind(source).keep("same"))
                .outcome(),
            "15001"
        );
    }
    for scene in [&mut first, &mut second] {
        assert_eq!(scene.app.ask("same", "hello").as_deref(), Ok("hello"));
        assert!(
            scene
                .app
                .ask("same", "probe 16")
                .unwrap()
                .contains("198.51.100.20:8000")
        );
    }
    first.detach();
    first
        .attempt(V4, &out(APP, To::Service(80), Direct))
        .unwrap();
    second.all("the other is gone", V4, &pairs(443, 9090, true));
}

#[rstest]
fn detach_leaves_nothing_and_may_be_repeated() {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    assert!(status_mentions(&scene.pod));
    scene.detach();
    assert!(!status_mentions(&scene.pod));
    let again = loader::detach(scene.pod.cgroup.path());
    // Either answer is fine, as long as it is one line and no panic.
    assert!(errors(&again).lines().count() <= 1, "{}", errors(&again));
    scene.attach(Redirect, &Options::ISTIO);
    scene
        .attempt(V4, &out(APP, To::Service(80), Outbound))
        .unwrap();
}

#[rstest]
fn pod_that_vanished_is_collected_by_the_next_call() {
    let (name, _netns) = {
        let scene = Scene::new();
        loader::attach(&scene.pod, &Options::ISTIO);
        // Dropped while attached, as when a node deletes a pod.
        (
            scene.pod.cgroup.path().display().to_string(),
            scene.pod.netns.path(),
        )
    };
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let status = loader::status().to_string();
    assert!(!status.contains(&format!("{name}\"")), "{status}");
}

/// Two calls at once for a pod that is attached, each with what connections meet after it.
#[rstest]
#[case::two_policies(attach_istio, ISTIO, attach_other, OTHER)]
#[case::attach_and_detach(attach_other, OTHER, faults::detach, DIRECT)]
fn simultaneous_calls_end_as_if_one_came_after_the_other(
    #[case] first: Call,
    #[case] after_first: Ends,
    #[case] second: Call,
    #[case] after_second: Ends,
) {
    bpffs::private(|| {
        let mut scene = faults::scene();
        let orders = [[second, first], [first, second]];
        let mut outcomes = orders.map(|calls| {
            faults::run(&mut attach_third(&scene));
            for call in calls {
                faults::run(&mut call(&scene));
            }
            let met = faults::ends(&mut scene, None).unwrap();
            (met, Traces::read([&scene]), 0)
        });
        assert_eq!(outcomes[0].0, after_first);
        assert_eq!(outcomes[1].0, after_second);
        for round in 0..12 {
            faults::run(&mut attach_third(&scene));
            let mut calls = [first, second];
            calls.rotate_left(round as usize % 2);
            let children = calls.map(|call| {
                let mut command = call(&scene);
                command.stdout(Stdio::null()).stderr(Stdio::piped());
                let child = command.spawn().unwrap();
                // The later the other begins, the more this one has done.
                thread::sleep(patience(Duration::from_millis(10)) * (round / 2));
                child
            });
            for child in children {
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", errors(&output));
                assert_eq!(errors(&output), "");
            }
            let (met, now) = (
                faults::ends(&mut scene, None).unwrap(),
                Traces::read([&scene]),
            );
            let outcome = outcomes.iter_mut().find(|(ends, ..)| met == *ends);
            let (_, wanted, count) = outcome.unwrap_or_else(|| panic!("neither: {met:?}"));
            assert_eq!(now.differences(wanted), Vec::<String>::new());
            *count += 1;
        }
        let counts = outcomes.map(|(_, _, count)| count);
        assert!(!counts.contains(&0), "one always wins: {counts:?}");
        faults::run(&mut faults::detach(&scene));
    });
}

/// A call of the loader for the scene's pod.
type Call = fn(&Scene) -> Command;

fn attach_istio(scene: &Scene) -> Command {
    faults::attach(scene, &Options::ISTIO)
}

fn attach_other(scene: &Scene) -> Command {
    faults::attach(scene, &OTHER_OPTIONS)
}

fn attach_third(scene: &Scene) -> Command {
    faults::attach(scene, &THIRD_OPTIONS)
}

#[rstest]
fn attach_by_pid_finds_cgroup_and_namespace() {
    let mut scene = Scene::new();
    let pid = scene.app.pid().to_string();
    let mut command = loader::redirect();
    command.args(["attach", "--pid", &pid]);
    command.args(Options::ISTIO.arguments());
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", errors(&output));
    let to = scene.address(V4, To::Service(80));
    assert_eq!(scene.app.dial(&Dial::new(V4, to)).outcome(), "15001");
    let detached = loader::detach(&scene.pod.cgroup.child("app"));
    assert!(detached.status.success(), "{}", errors(&detached));
    assert_eq!(scene.app.dial(&Dial::new(V4, to)).outcome(), "service");
}

#[rstest]
fn no_route_stays_unreachable(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    // Programs that try IPv6 first rely on this error to fall back at once.
    let mut scene = Scene::shaped(Shape {
        default_routes: false,
        ..Pod::shape()
    });
    let to = scene.address(family, To::Service(80));
    assert_eq!(
        scene.app.dial(&Dial::new(family, to)).outcome(),
        "ENETUNREACH"
    );
    scene.attach(backend, &Options::ISTIO);
    assert_eq!(
        scene.app.dial(&Dial::new(family, to)).outcome(),
        "ENETUNREACH"
    );
    assert_eq!(
        scene.proxy.dial(&Dial::new(family, to)).outcome(),
        "ENETUNREACH"
    );
}

#[rstest]
fn ipv6_in_a_pod_without_ipv6_stays_unreachable(#[values(Redirect, Iptables)] backend: Backend) {
    let mut scene = Scene::shaped(Shape {
        ipv6: false,
        ..Pod::shape()
    });
    let to = scene.address(V6, To::Service(80));
    scene.attach(
        backend,
        &Options {
            ipv6: false,
            ..Options::ISTIO
        },
    );
    assert_eq!(scene.app.dial(&Dial::new(V6, to)).outcome(), "ENETUNREACH");
    scene.all(
        "IPv4",
        V4,
        &[out(APP, To::Service(80), Outbound), inward(8080, Inbound)],
    );
    scene.all("mapped", Mapped, &[out(APP, To::Service(80), Outbound)]);
}

#[rstest]
fn silent_destination_is_answered_by_the_proxy(#[values(Redirect, Iptables)] backend: Backend) {
    // Routed, but nobody has the address: uncaptured this would wait in vain.
    let mut scene = Scene::new();
    scene.pod.peer.ip("route add blackhole 192.0.2.0/24");
    let to: SocketAddr = "192.0.2.77:80".parse().unwrap();
    let dial = Dial::new(V4, to);
    let unheard = scene.app.dial(&dial.clone().timeout_ms(300));
    assert_ne!(unheard.outcome(), "15001");
    scene.attach(backend, &Options::ISTIO);
    let dialed = scene.app.dial(&dial);
    assert_eq!(dialed.outcome(), "15001");
    assert_eq!(dialed.peer, Some(to));
}

#[rstest]
fn ipv6_auto_follows_the_first_global_address(#[values(false, true)] only_ipv6: bool) {
    let mut scene = Scene::new();
    if only_ipv6 {
        scene
            .pod
            .netns
            .ip(&format!("addr del {}/24 dev eth0", scene.pod.ipv4));
    }
    let mut command = attach_command(&scene.pod);
    command.args(["-i", "*", "-b", "*", "-u", "1337", "--ipv6", "auto"]);
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", errors(&output));
    let to = scene.address(V6, To::Service(80));
    let who = if only_ipv6 { "15001" } else { "service" };
    assert_eq!(scene.app.dial(&Dial::new(V6, to)).outcome(), who);
    Redirect.detach(&scene.pod);
}

/// Two loops of attach and detach and one of status, with a bpffs of their own so that no other test keeps the pins alive:
/// every round sets everything up and tears everything down.
const TOGETHER: &str = r#"
mount -t bpf bpf /sys/fs/bpf || exit 1
program=$1
rounds=$6
again() {
    for round in $(seq $rounds); do
        "$program" attach --cgroup "$1" --netns "$2" -i '*' -b '*' -u 1337 >/dev/null || return 1
        "$program" detach --cgroup "$1" >/dev/null || return 1
    done
}
again "$2" "$3" & first=$!
again "$4" "$5" & second=$!
failed=0
while kill -0 $first 2>/dev/null; do
    "$program" status -o json >/dev/null || failed=1
done
wait $first || failed=1
wait $second || failed=1
exit $failed
"#;

#[rstest]
fn loaders_at_the_same_time_do_not_trip_over_each_other() {
    let (first, second) = (Pod::new(), Pod::new());
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", TOGETHER, "bash"]);
    command.arg(loader::redirect().get_program());
    for pod in [&first, &second] {
        command.arg(pod.cgroup.path()).arg(pod.netns.path());
    }
    command.arg(amount(5, 2).to_string());
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(errors(&output), "");
}

#[rstest]
#[case::attach(&["attach", "-i", "*", "-b", "*", "-u", "1337"])]
#[case::status(&["status"])]
#[case::status_json(&["status", "-o", "json"])]
#[case::detach(&["detach"])]
fn reader_that_has_read_enough_changes_nothing(#[case] words: &[&str]) {
    let pod = Pod::new();
    let call = |stdout: OwnedFd| {
        let mut command = loader::redirect();
        command.args(words);
        if words[0] != "status" {
            command.arg("--cgroup").arg(pod.cgroup.path());
        }
        if words[0] == "attach" {
            command.arg("--netns").arg(pod.netns.path());
        }
        command.stdout(stdout).output().unwrap()
    };
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let output = call(writer.into());
    assert_eq!(
        (output.status.code(), errors(&output)),
        (Some(0), String::new())
    );
    assert_eq!(status_mentions(&pod), words[0] == "attach");

    // Negative control: what was not written, and not for want of a reader, is told.
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = call(full.into());
    let told = "redirect: writing to standard output: No space left on device (os error 28)";
    assert_eq!(
        (output.status.code(), errors(&output).trim_end()),
        (Some(1), told)
    );
    finish(
        loader::redirect()
            .args(["detach", "--cgroup"])
            .arg(pod.cgroup.path()),
    );
}
