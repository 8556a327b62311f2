//! An init container in the place of istio-init: it runs `istio-iptables` in a container of the pod, and the pod is captured.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{fs, process::Output, thread, time::Duration};

use redirect_tests::{
    actor::Actor,
    backend::Backend::Redirect,
    container::{Container, Isolation},
    loader::{status_mentions, status_of},
    namespace::{errors, succeed},
    options::Options,
    pod::Pod,
    protocol::{Family, Identity, Listen},
    scene::{Attempt, Lands, Scene, To, inward, out},
};
use rstest::rstest;

use Family::V4;
use Lands::{Direct, Inbound, Outbound};

/// What Istio's injector writes.
#[rustfmt::skip]
const INJECTED: &[&str] = &[
    "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*",
    "-d", "15090,15021,15020", "--log_output_level=default:info",
];

/// The harness' pods have an IPv4 address first: IPv6 is not captured.
const EXPECTED: Options = Options {
    ipv6: false,
    ..Options::ISTIO
};

fn captured() -> [Attempt; 6] {
    [
        out(Identity::APP, To::Service(80), Outbound),
        out(Identity::APP, To::Own(8080), Direct),
        out(Identity::PROXY, To::Service(80), Direct),
        out(Identity::PROXY, To::Own(8080), Inbound),
        inward(8080, Inbound),
        inward(15020, Direct),
    ]
}

fn uncaptured() -> [Attempt; 6] {
    captured().map(|attempt| Attempt {
        lands: Direct,
        ..attempt
    })
}

/// With more flags behind those of the injector.
fn injected<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [INJECTED, more].concat()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Ends with that code and one line that contains all of `parts`.
fn fails(output: &Output, code: i32, parts: &[&str]) {
    let text = errors(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in {text}");
    }
}

fn succeeds(output: &Output, said_line: &str) {
    assert!(
        output.status.success(),
        "{:?} {}",
        output.status,
        errors(output)
    );
    assert!(
        said(output).contains(said_line),
        "{said_line:?} is missing in {}",
        said(output)
    );
}

fn attached(pod: &Pod) -> String {
    format!("attached {}\n", pod.cgroup.path().display())
}

/// Captures the pod from an init container, which is gone afterwards.
fn init(pod: &Pod) {
    let container = Container::new(pod, "init");
    succeeds(&container.istio_iptables(INJECTED), &attached(pod));
    container.remove();
}

/// The scene of a pod that was captured before its containers began.
fn later(pod: Pod) -> Scene {
    let mut scene = Scene::with(pod, &EXPECTED);
    scene.adopt(&EXPECTED);
    scene
}

#[rstest]
#[case::cgroupfs_driver(false, Isolation::None, false)]
#[case::systemd_driver(true, Isolation::None, true)]
#[case::with_namespaces(false, Isolation::Namespaces, true)]
#[case::systemd_driver_with_namespaces(true, Isolation::Namespaces, false)]
fn init_container_captures_its_pod_and_no_other(
    #[case] systemd: bool,
    #[case] isolation: Isolation,
    #[case] by_name: bool,
) {
    let pod = if systemd {
        Pod::new().with_systemd_driver()
    } else {
        Pod::new()
    };
    let mut sibling = Scene::new();
    sibling.all("sibling before", V4, &uncaptured());

    let container = Container::new(&pod, "cri-containerd-0123.scope")
        .isolated(isolation)
        .by_name(by_name);
    succeeds(&container.istio_iptables(INJECTED), &attached(&pod));
    // The link-local address comes a moment after the link: until then there is something to bring up to date.
    let unchanged = (0..50).any(|_| {
        thread::sleep(Duration::from_millis(100));
        said(&container.istio_iptables(INJECTED)).starts_with("unchanged")
    });
    assert!(unchanged);
    let changed = container.istio_iptables(&injected(&["-o", "443"]));
    succeeds(&changed, "changed");
    container.remove();

    let mut scene = later(pod);
    scene.all("containers that came later", V4, &captured());
    scene.all(
        "changed",
        V4,
        &[out(Identity::APP, To::Service(443), Direct)],
    );
    sibling.all("sibling", V4, &uncaptured());
    scene.detach();
    scene.all("after detach", V4, &uncaptured());
}

#[rstest]
fn containers_that_run_already_are_captured_too() {
    let mut scene = Scene::new();
    scene.all("before", V4, &uncaptured());
    let container = Container::new(&scene.pod, "init");
    succeeds(&container.istio_iptables(INJECTED), &attached(&scene.pod));
    scene.adopt(&EXPECTED);
    scene.all("captured", V4, &captured());
}

#[rstest]
fn validation_tells_a_captured_pod_from_one_that_is_not(#[values(false, true)] ipv6: bool) {
    let pod = Pod::new();
    if ipv6 {
        pod.netns.ip(&format!("addr del {}/24 dev eth0", pod.ipv4));
        // A peer that loses such calls must not be taken for capture.
        pod.netns.ip("addr add ::6/128 dev lo nodad");
    }
    let cni = injected(&[
        "--run-validation",
        "--skip-rule-apply",
        "--probe-timeout",
        "1s",
    ]);
    let validate = |user| {
        Container::new(&pod, "istio-validation")
            .user(user)
            .istio_iptables(&cni)
    };
    let service = if ipv6 {
        "[::6]:15002"
    } else {
        "127.0.0.6:15002"
    };

    fails(
        &validate(1337),
        126,
        &[
            "redirect: iptables validation failed; workload is not ready for Istio.",
            "validation timeout",
            service,
            "cni.repair.deletePods=true",
        ],
    );
    init(&pod);
    succeeds(&validate(1337), "validation passed");
    fails(
        &validate(1000),
        126,
        &["validation timeout", "uid 1000 is not the proxy's"],
    );
    // Nothing of it stays behind.
    let mut scene = later(pod);
    if !ipv6 {
        scene.all("after validation", V4, &captured());
    }
    scene.detach();
    let again = Container::new(&scene.pod, "istio-validation")
        .user(1337)
        .istio_iptables(&cni);
    // The proxy listens itself now.
    fails(&again, 126, &["no listener available", "15001", "15006"]);
}

#[rstest]
fn validation_follows_its_options() {
    let pod = Pod::new();
    let options = [
        "-p",
        "15101",
        "-z",
        "15106",
        "--run-validation",
        "--iptables-probe-port",
        "9",
        "-n=false",
    ];
    let container = Container::new(&pod, "init");
    // The superuser is not the proxy: attached, and yet not valid.
    let as_root = container.istio_iptables(&injected(
        &[&options[..], &["--probe-timeout=300ms"]].concat(),
    ));
    fails(&as_root, 126, &["127.0.0.6:9", "15101 or 15106", "300ms"]);
    assert_eq!(said(&as_root), attached(&pod));
    let skip = injected(&[&options[..], &["--skip-rule-apply"]].concat());
    succeeds(
        &Container::new(&pod, "validation")
            .user(1337)
            .istio_iptables(&skip),
        "validation passed",
    );
    // Those who call the port that counts are told from those who call another.
    let other = injected(&[
        "-p",
        "15001",
        "-z",
        "15006",
        "--run-validation",
        "--skip-rule-apply",
        "--probe-timeout=1s",
    ]);
    fails(
        &Container::new(&pod, "validation")
            .user(1337)
            .istio_iptables(&other),
        126,
        &["validation timeout"],
    );
    Redirect.detach(&pod);
}

#[rstest]
fn cleanup_undoes_and_is_fine_with_nothing_to_undo() {
    let pod = Pod::new();
    let cleanup = |pod: &Pod| Container::new(pod, "init").istio_iptables(&["--cleanup-only"]);
    succeeds(&cleanup(&pod), "not attached");
    init(&pod);
    assert!(status_mentions(&pod));
    succeeds(&cleanup(&pod), "detached");
    assert!(!status_mentions(&pod));
    succeeds(&cleanup(&pod), "not attached");
    Scene::with(pod, &EXPECTED).all("cleaned up", V4, &uncaptured());
}

#[rstest]
#[case::flag(&["--dry-run"], &[])]
#[case::variable(&[], &[("DRY_RUN", "true")])]
fn dry_run_says_what_it_would_do_and_leaves_nothing(
    #[case] flags: &[&str],
    #[case] variables: &[(&str, &str)],
) {
    let pod = Pod::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dry-run");
    let mut container = Container::new(&pod, "init").user(1000);
    for (name, value) in variables {
        container = container.variable(name, value);
    }
    let plain = container.istio_iptables(&injected(flags));
    succeeds(
        &plain,
        &format!("would attach         {}\n", pod.cgroup.path().display()),
    );
    succeeds(&plain, "-d 15020-15021,15090\n");
    succeeds(
        &plain,
        "inbound captured     all ports except 15020-15021,15090 and 15008\n",
    );

    let container =
        Container::new(&pod, "init").variable("DRY_RUN_FILE_PATH", &file.display().to_string());
    let with_file = container.istio_iptables(&injected(&["-n", "--run-validation"]));
    succeeds(&with_file, "would validate       with port 15002 for 5s\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), said(&with_file));
    let nowhere =
        Container::new(&pod, "init").variable("DRY_RUN_FILE_PATH", "/no/such/directory/file");
    fails(
        &nowhere.istio_iptables(&["-n"]),
        1,
        &["DRY_RUN_FILE_PATH", "/no/such/directory/file"],
    );

    assert!(!status_mentions(&pod));
    assert!(!has_passthrough(&pod));
    Scene::with(pod, &EXPECTED).all("after a dry run", V4, &uncaptured());
}

/// What the node's status says about the addresses of a pod.
fn addresses(pod: &Pod) -> Option<bool> {
    status_of(pod)["routes_current"].as_bool()
}

#[rstest]
fn status_finds_the_namespace_through_the_pods_processes() {
    let pod = Pod::new();
    init(&pod);
    assert_eq!(addresses(&pod), None, "nobody is in the pod");
    let _app = Actor::start(
        &pod.netns.path(),
        Some(pod.cgroup.child("app")),
        Identity::APP,
    );
    let current = (0..50).any(|_| {
        // The link-local address comes a moment after the link.
        thread::sleep(Duration::from_millis(100));
        container_again(&pod, INJECTED);
        addresses(&pod) == Some(true)
    });
    assert!(current);
    pod.netns.ip("addr add 10.99.99.99/32 dev lo");
    assert_eq!(addresses(&pod), Some(false));
    Redirect.detach(&pod);
}

#[rstest]
fn skipping_the_rules_does_nothing() {
    let pod = Pod::new();
    let container = Container::new(&pod, "init");
    let skipped = container.istio_iptables(&injected(&["--skip-rule-apply"]));
    assert!(skipped.status.success(), "{}", errors(&skipped));
    assert!(!status_mentions(&pod));
    init(&pod);
    let skipped = container_again(&pod, &["--skip-rule-apply", "--cleanup-only"]);
    assert!(skipped.status.success(), "{}", errors(&skipped));
    assert!(status_mentions(&pod));
    Redirect.detach(&pod);
}

fn container_again(pod: &Pod, arguments: &[&str]) -> Output {
    Container::new(pod, "again").istio_iptables(arguments)
}

fn has_passthrough(pod: &Pod) -> bool {
    let addresses = succeed(
        pod.netns
            .command("ip")
            .args(["-6", "address", "show", "dev", "lo"]),
    );
    addresses.contains("inet6 ::6/128")
}

#[rstest]
fn ipv6_pod_gets_the_proxys_source_address() {
    let pod = Pod::new();
    init(&pod);
    assert!(!has_passthrough(&pod), "IPv6 is not captured");
    succeeds(
        &container_again(&pod, &injected(&["--ipv6", "on"])),
        "changed",
    );
    assert!(has_passthrough(&pod));
    let mut scene = Scene::with(pod, &Options::ISTIO);
    scene.adopt(&Options::ISTIO);
    scene.all("IPv6", Family::V6, &captured());
    let from_proxy = out(Identity::PROXY, To::Own(8080), Direct).source("::6".parse().unwrap());
    scene.all("from ::6", Family::V6, &[from_proxy]);
    succeeds(
        &container_again(&scene.pod, &["--cleanup-only"]),
        "detached",
    );
    assert!(!has_passthrough(&scene.pod));
}

#[rstest]
fn outside_of_a_pod_there_is_one_clear_error() {
    let pod = Pod::new();
    let above = pod.above.path();
    let outside = Container::new(&pod, "x").in_cgroup(above.to_owned());
    for arguments in [&["-i", "*"][..], &["--dry-run"], &["--cleanup-only"]] {
        let text = above.display().to_string();
        fails(
            &outside.istio_iptables(arguments),
            1,
            &["not in a pod", &text, "pod<uid>"],
        );
    }
    let hidden = Container::new(&pod, "hidden").isolated(Isolation::HiddenTree);
    fails(
        &hidden.istio_iptables(INJECTED),
        1,
        &[
            "not visible",
            "mount the host's /sys/fs/cgroup at /sys/fs/cgroup",
            "/mnt",
        ],
    );
    let unpinned = Container::new(&pod, "unpinned").isolated(Isolation::HiddenPins);
    fails(
        &unpinned.istio_iptables(INJECTED),
        1,
        &["no BPF file system is mounted at /sys/fs/bpf", "hostPath"],
    );
    let users = Container::new(&pod, "users").isolated(Isolation::Users);
    fails(
        &users.istio_iptables(INJECTED),
        1,
        &[
            "user namespace",
            "hostUsers: false",
            "attach the pod from the node",
        ],
    );
    let host = redirect_tests::loader::run(["istio-iptables", "-i", "*"]);
    fails(&host, 1, &["host's own network namespace", "hostNetwork"]);
    assert!(!status_mentions(&pod));
}

#[rstest]
#[case::the_least("+net_admin,+bpf,+perfmon", &[])]
#[case::the_old_ones("+net_admin,+sys_admin", &[])]
#[case::istio_init_has("+net_admin,+net_raw", &["CAP_BPF", "CAP_PERFMON"])]
#[case::no_net_admin("+bpf,+perfmon", &["CAP_NET_ADMIN"])]
#[case::no_perfmon("+net_admin,+bpf", &["CAP_PERFMON"])]
#[case::none("+chown", &["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"])]
fn capabilities_that_are_missing_are_named(#[case] has: &str, #[case] missing: &[&str]) {
    let pod = Pod::new();
    let container = Container::new(&pod, "init").capabilities(has);
    let output = container.istio_iptables(INJECTED);
    if missing.is_empty() {
        succeeds(&output, &attached(&pod));
        container.remove();
        later(pod).all("with few capabilities", V4, &captured());
    } else {
        fails(&output, 1, missing);
        assert!(!status_mentions(&pod));
    }
}

#[rstest]
fn proxy_that_listens_already_is_found_where_its_process_is_visible() {
    let pod = Pod::new();
    let mut proxy = Actor::start(
        &pod.netns.path(),
        Some(pod.cgroup.child("proxy")),
        Identity::PROXY,
    );
    proxy.listen(Listen::new("15001", "0.0.0.0:15001".parse().unwrap()));
    let with_few = Container::new(&pod, "init").capabilities("+net_admin,+bpf,+perfmon");
    let output = with_few.istio_iptables(INJECTED);
    succeeds(&output, &attached(&pod));
    assert!(errors(&output).contains("the listener on 0.0.0.0:15001 cannot be reached"));
    let with_more =
        Container::new(&pod, "init").capabilities("+net_admin,+bpf,+perfmon,+sys_ptrace");
    let output = with_more.istio_iptables(INJECTED);
    assert_eq!(errors(&output), "");
    Redirect.detach(&pod);
}
