//! The CNI plugin as a container runtime calls it, against a daemon that answers as each test says.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    time::{Duration, Instant},
};

use redirect_tests::{
    cni::{Call, NoDaemon, StubDaemon, result},
    namespace::Namespace,
};
use rstest::rstest;
use serde_json::{Value, json};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const CAPTURED: &str = r#"{"result":"captured"}"#;
const OK: &str = r#"{"result":"ok"}"#;

/// Codes of the CNI specification, and the plugin's own.
const INCOMPATIBLE_VERSION: u64 = 1;
const ENVIRONMENT: u64 = 4;
const UNDECODABLE: u64 = 6;
const CONFIG: u64 = 7;
const TRY_AGAIN: u64 = 11;
const NOT_AVAILABLE: u64 = 50;
const REFUSED: u64 = 100;

/// Any network namespace will do where nothing is attached.
fn own_netns() -> &'static Path {
    Path::new("/proc/self/ns/net")
}

fn call(command: &str, version: &str, socket: &Path) -> Call {
    Call::new(command, version, own_netns(), socket)
}

#[test]
fn add_asks_the_daemon_and_echoes_the_former_result_in_every_version() {
    let netns = Namespace::new(&format!("rd-{}-cni-add", std::process::id()));
    let daemon = StubDaemon::answering(CAPTURED);
    for version in VERSIONS {
        let call = Call::new("ADD", version, &netns.path(), &daemon.socket());
        for called in [call.run(), call.run_by_subcommand()] {
            assert!(called.ok, "{called:?}");
            assert_eq!(called.stdout.trim_end(), result(version));
            assert_eq!(called.stderr, "");
        }
        let wanted = json!({
            "version": 1, "op": "add", "container_id": "c-1", "netns": netns.path(),
            "pod": { "namespace": "shop", "name": "cart-0", "uid": "u-1" },
        });
        assert_eq!(daemon.asked(), [wanted.clone(), wanted]);
    }
}

#[test]
fn add_passes_on_what_the_runtime_hands_over() {
    let daemon = StubDaemon::answering(r#"{"result":"skipped","reason":"no proxy"}"#);
    let runtime = json!({
        "cgroupPath": "/kubepods/podu-1",
        "io.kubernetes.cri.pod-annotations": { "sidecar.istio.io/status": "{}" },
        "portMappings": [],
    });
    let called = call("ADD", "1.0.0", &daemon.socket())
        .field("runtimeConfig", runtime)
        .run();
    assert!(called.ok, "{called:?}");
    let asked = &daemon.asked()[0];
    assert_eq!(asked["cgroup_parent"], "/kubepods/podu-1");
    assert_eq!(
        asked["annotations"],
        json!({ "sidecar.istio.io/status": "{}" })
    );
}

#[test]
fn add_without_former_result_answers_an_empty_one() {
    let daemon = StubDaemon::answering(CAPTURED);
    let called = call("ADD", "1.0.0", &daemon.socket()).previous(None).run();
    assert!(called.ok, "{called:?}");
    let result: Value = serde_json::from_str(&called.stdout).unwrap();
    assert_eq!(result["cniVersion"], "1.0.0");
    assert_eq!(daemon.asked().len(), 1);
}

#[test]
fn pods_that_are_none_of_ours_pass_without_the_daemon() {
    let none = NoDaemon::new();
    let add = call("ADD", "1.0.0", &none.socket());
    let cart = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0";
    for (what, called) in [
        ("no Kubernetes pod", add.clone().variable("CNI_ARGS", "")),
        (
            "no Kubernetes pod, other arguments",
            add.clone().variable("CNI_ARGS", "IgnoreUnknown=1;X=y"),
        ),
        (
            "an excluded namespace",
            add.clone()
                .field("excludeNamespaces", json!(["a", "shop"]))
                .variable("CNI_ARGS", cart),
        ),
        (
            "kube-system, if nothing else is said",
            add.clone()
                .variable("CNI_ARGS", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns"),
        ),
        (
            "the daemon's own pod",
            add.clone().field("podNamespace", json!("mesh")).variable(
                "CNI_ARGS",
                "K8S_POD_NAMESPACE=mesh;K8S_POD_NAME=redirect-x7f",
            ),
        ),
    ] {
        let called = called.run();
        assert!(called.ok, "{what}: {called:?}");
        assert_eq!(called.stdout.trim_end(), result("1.0.0"), "{what}");
    }
    // Each of them is told from its neighbour.
    for (what, called) in [
        ("a pod", add.clone()),
        (
            "kube-system, if others are excluded",
            add.clone()
                .field("excludeNamespaces", json!([]))
                .variable("CNI_ARGS", "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns"),
        ),
        (
            "another pod in the daemon's namespace",
            add.clone()
                .field("podNamespace", json!("mesh"))
                .variable("CNI_ARGS", "K8S_POD_NAMESPACE=mesh;K8S_POD_NAME=istiod"),
        ),
        (
            "a pod called like the daemon's elsewhere",
            add.field("podNamespace", json!("mesh"))
                .variable("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=redirect-x"),
        ),
    ] {
        assert_eq!(called.run().error().0, TRY_AGAIN, "{what}");
    }
}

#[rstest]
#[case::away(None, TRY_AGAIN, "does not run")]
#[case::try_again(
    Some("{\"error\":\"no cgroup yet\",\"retry\":true}\n"),
    TRY_AGAIN,
    "no cgroup yet"
)]
#[case::refused(
    Some("{\"error\":\"interceptionMode: X\",\"retry\":false}\n"),
    REFUSED,
    "interceptionMode: X"
)]
#[case::hangs_up(Some(""), TRY_AGAIN, "hung up without an answer")]
#[case::half_a_line(Some("{\"result\":\"capt"), TRY_AGAIN, "hung up without an answer")]
#[case::no_json(Some("yes\n"), TRY_AGAIN, "is not understood")]
#[case::another_outcome(
    Some("{\"result\":\"ok\"}\n"),
    TRY_AGAIN,
    "answered Ok: allowed are [Captured, Skipped]"
)]
#[case::unknown_outcome(Some("{\"result\":\"maybe\"}\n"), TRY_AGAIN, "is not understood")]
fn add_fails_closed_and_with_fail_open_passes_and_counts(
    #[case] answer: Option<&'static str>,
    #[case] code: u64,
    #[case] words: &str,
) {
    let daemon = answer.map(|answer| StubDaemon::new(move |_| answer.to_owned()));
    let none = NoDaemon::new();
    let socket = daemon.as_ref().map_or(none.socket(), StubDaemon::socket);
    let add = call("ADD", "1.0.0", &socket);
    let called = add.run();
    let (found, message) = called.error();
    assert_eq!(found, code, "{message}");
    assert!(message.contains(words), "{message}");

    let log = none.socket().with_file_name("cni.log");
    let called = add
        .field("failOpen", json!(true))
        .field("logFile", json!(log))
        .run();
    assert!(called.ok, "{called:?}");
    assert_eq!(called.stdout.trim_end(), result("1.0.0"));
    let told = "pod shop/cart-0 starts uncaptured";
    assert!(called.stderr.contains(told), "{called:?}");
    let logged = fs::read_to_string(log).unwrap();
    assert!(logged.contains(told) && logged.contains(words), "{logged}");
    let counter = socket.with_file_name("failed-open");
    assert_eq!(fs::read_to_string(counter).unwrap(), "1\n");
}

#[test]
fn daemon_that_never_answers_is_given_up_after_the_timeout() {
    let none = NoDaemon::new();
    let _silent = UnixListener::bind(none.socket()).unwrap();
    let started = Instant::now();
    let (code, message) = call("ADD", "1.0.0", &none.socket()).run().error();
    assert_eq!(code, TRY_AGAIN);
    assert!(message.contains("did not answer within 1 s"), "{message}");
    assert!(started.elapsed() >= Duration::from_secs(1));
    let called = call("DEL", "1.0.0", &none.socket()).run();
    assert!(called.ok, "{called:?}");
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn daemon_whose_answer_never_ends_is_given_up() {
    let endless = StubDaemon::new(|_| "x".repeat(1 << 20));
    let (code, message) = call("ADD", "1.0.0", &endless.socket()).run().error();
    assert_eq!(code, TRY_AGAIN);
    assert!(message.contains("does not end"), "{message}");
}

#[test]
fn fail_open_hides_nothing_but_the_daemon() {
    let none = NoDaemon::new();
    let add = call("ADD", "1.0.0", &none.socket()).field("failOpen", json!(true));
    let vanished = add.clone().variable("CNI_NETNS", "/run/netns/rd-none");
    assert_eq!(vanished.run().error().0, ENVIRONMENT);
    let wrong = add.field("socket", json!(1));
    assert_eq!(wrong.run().error().0, CONFIG);
    assert_eq!(none.failed_open(), 0);
}

#[test]
fn del_never_fails_because_of_the_daemon_or_its_configuration() {
    let none = NoDaemon::new();
    let del = call("DEL", "1.0.0", &none.socket());
    let liar = StubDaemon::answering(CAPTURED);
    let refusing = StubDaemon::answering(r#"{"error":"no","retry":false}"#);
    for (what, call) in [
        ("daemon away", del.clone()),
        ("namespace gone", del.clone().variable("CNI_NETNS", "")),
        (
            "namespace vanished",
            del.clone().variable("CNI_NETNS", "/run/netns/rd-none"),
        ),
        ("own field wrong", del.clone().field("failOpen", json!("x"))),
        (
            "daemon lies",
            del.clone().field("socket", json!(liar.socket())),
        ),
        (
            "daemon refuses",
            del.field("socket", json!(refusing.socket())),
        ),
    ] {
        let called = call.run();
        assert!(called.ok && called.stdout.is_empty(), "{what}: {called:?}");
    }
    let daemon = StubDaemon::answering(OK);
    let called = call("DEL", "0.3.1", &daemon.socket())
        .variable("CNI_NETNS", "")
        .run();
    assert!(called.ok && called.stderr.is_empty(), "{called:?}");
    let wanted = json!({
        "version": 1, "op": "del", "container_id": "c-1",
        "pod": { "namespace": "shop", "name": "cart-0", "uid": "u-1" },
    });
    assert_eq!(daemon.asked(), [wanted]);
}

#[test]
fn check_asks_the_daemon_since_0_4_0() {
    let daemon = StubDaemon::answering(CAPTURED);
    for version in VERSIONS {
        let called = call("CHECK", version, &daemon.socket()).run();
        if version < "0.4.0" {
            assert_eq!(called.error().0, INCOMPATIBLE_VERSION, "{version}");
            assert!(daemon.asked().is_empty());
        } else {
            assert!(
                called.ok && called.stdout.is_empty(),
                "{version}: {called:?}"
            );
            assert_eq!(daemon.asked()[0]["op"], "check");
        }
    }
    let gone = StubDaemon::answering(r#"{"error":"not attached","retry":false}"#);
    let (code, message) = call("CHECK", "1.0.0", &gone.socket()).run().error();
    assert_eq!(
        (code, message.as_str()),
        (REFUSED, "redirect: not attached")
    );
    let (code, message) = call("CHECK", "1.0.0", &daemon.socket())
        .previous(None)
        .run()
        .error();
    assert_eq!(code, CONFIG);
    assert!(message.starts_with("prevResult: missing"), "{message}");
}

#[test]
fn status_and_gc_ask_the_daemon_since_1_1_0() {
    let daemon = StubDaemon::answering(OK);
    let none = NoDaemon::new();
    let living =
        json!([{ "containerID": "a", "ifname": "eth0" }, { "containerID": "b", "ifname": "eth0" }]);
    for version in VERSIONS {
        let status = call("STATUS", version, &daemon.socket())
            .previous(None)
            .run();
        let gc = call("GC", version, &daemon.socket())
            .previous(None)
            .field("cni.dev/valid-attachments", living.clone())
            .run();
        if version < "1.1.0" {
            assert_eq!(status.error().0, INCOMPATIBLE_VERSION, "{version}");
            assert_eq!(gc.error().0, INCOMPATIBLE_VERSION, "{version}");
            continue;
        }
        assert!(status.ok && status.stdout.is_empty(), "{status:?}");
        assert!(gc.ok && gc.stdout.is_empty(), "{gc:?}");
        let wanted = [
            json!({ "version": 1, "op": "status" }),
            json!({ "version": 1, "op": "gc", "valid_container_ids": ["a", "b"] }),
        ];
        assert_eq!(daemon.asked(), wanted);
    }
    // What would forget every sandbox is not even asked.
    assert_eq!(
        call("GC", "1.1.0", &daemon.socket()).run().error().0,
        CONFIG
    );
    assert!(daemon.asked().is_empty());
    let away = call("STATUS", "1.1.0", &none.socket());
    assert_eq!(away.run().error().0, NOT_AVAILABLE);
    // ADD would succeed.
    assert!(away.field("failOpen", json!(true)).run().ok);
}

#[test]
fn version_lists_what_is_spoken_whatever_is_asked() {
    let none = NoDaemon::new();
    let version = call("VERSION", "1.1.0", &none.socket());
    for (input, answered) in [
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"0.1.0"}"#, "0.1.0"),
        ("", "1.1.0"),
        ("{", "1.1.0"),
    ] {
        let called = version.run_with(input);
        assert!(called.ok, "{input}: {called:?}");
        let value: Value = serde_json::from_str(&called.stdout).unwrap();
        let wanted = json!({ "cniVersion": answered, "supportedVersions": VERSIONS });
        assert_eq!(value, wanted, "{input}");
    }
}

#[rstest]
#[case::command("CNI_COMMAND", "", "CNI_COMMAND: missing")]
#[case::unknown_command("CNI_COMMAND", "add", "CNI_COMMAND: \"add\": allowed are ADD, CHECK")]
#[case::container("CNI_CONTAINERID", "", "CNI_CONTAINERID: missing")]
#[case::odd_container("CNI_CONTAINERID", "../x", "CNI_CONTAINERID: \"../x\"")]
#[case::interface("CNI_IFNAME", "", "CNI_IFNAME: missing")]
#[case::netns("CNI_NETNS", "", "CNI_NETNS: missing")]
#[case::vanished("CNI_NETNS", "/run/netns/rd-none", "CNI_NETNS: network namespace")]
#[case::no_namespace(
    "CNI_NETNS",
    "/proc/version",
    "CNI_NETNS: \"/proc/version\" is not a namespace"
)]
#[case::other_kind("CNI_NETNS", "/proc/self/ns/mnt", "is a mnt namespace")]
#[case::arguments("CNI_ARGS", "K8S_POD_NAME", "CNI_ARGS: \"K8S_POD_NAME\"")]
#[case::half_a_pod(
    "CNI_ARGS",
    "K8S_POD_NAME=x",
    "CNI_ARGS: K8S_POD_NAME=\"x\" without K8S_POD_NAMESPACE"
)]
fn wrong_environment_is_named(#[case] name: &str, #[case] value: &str, #[case] words: &str) {
    let daemon = StubDaemon::answering(CAPTURED);
    let called = call("ADD", "1.0.0", &daemon.socket())
        .variable(name, value)
        .run();
    let (code, message) = called.error();
    assert_eq!(code, ENVIRONMENT, "{message}");
    assert!(message.contains(words), "{message}");
    assert!(daemon.asked().is_empty());
}

#[rstest]
#[case::nothing("", UNDECODABLE, "standard input: ")]
#[case::half(r#"{"cniVersion":"1.0.0""#, UNDECODABLE, "standard input: ")]
#[case::list("[]", UNDECODABLE, "standard input: ")]
#[case::no_version("{}", INCOMPATIBLE_VERSION, "cniVersion: \"0.1.0\"")]
#[case::old(
    r#"{"cniVersion":"0.2.0"}"#,
    INCOMPATIBLE_VERSION,
    "cniVersion: \"0.2.0\""
)]
#[case::new(
    r#"{"cniVersion":"1.2.0"}"#,
    INCOMPATIBLE_VERSION,
    "allowed are 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"
)]
#[case::number(r#"{"cniVersion":1}"#, CONFIG, "cniVersion: 1")]
#[case::field(
    r#"{"cniVersion":"1.0.0","failOpen":"yes"}"#,
    CONFIG,
    "failOpen: \"yes\": allowed: true and false"
)]
#[case::result(r#"{"cniVersion":"1.0.0","prevResult":[]}"#, CONFIG, "prevResult: ")]
#[case::result_version(
    r#"{"cniVersion":"1.0.0","prevResult":{"cniVersion":"0.3.1"}}"#,
    CONFIG,
    "prevResult.cniVersion: \"0.3.1\": allowed is 1.0.0"
)]
fn wrong_configuration_is_named(#[case] input: &str, #[case] code: u64, #[case] words: &str) {
    let none = NoDaemon::new();
    let called = call("ADD", "1.0.0", &none.socket()).run_with(input);
    let (found, message) = called.error();
    assert_eq!(found, code, "{message}");
    assert!(message.contains(words), "{message}");
}

#[test]
fn endless_configuration_is_refused() {
    let none = NoDaemon::new();
    let input = " ".repeat(5 << 20);
    let called = call("ADD", "1.0.0", &none.socket()).run_with(&input);
    assert_eq!(called.error().0, UNDECODABLE);
}

#[test]
fn annotations_too_long_for_the_daemon_do_not_keep_a_pod_from_starting() {
    let daemon = StubDaemon::answering(CAPTURED);
    let annotations = json!({
        "io.kubernetes.cri.pod-annotations": { "huge": "x".repeat(200_000), "sidecar.istio.io/status": "{}" },
    });
    let called = call("ADD", "1.0.0", &daemon.socket())
        .field("runtimeConfig", annotations)
        .run();
    assert!(called.ok, "{called:?}");
    assert!(called.stderr.contains("annotation huge"), "{called:?}");
    let passed_on = &daemon.asked()[0]["annotations"];
    assert_eq!(*passed_on, json!({ "sidecar.istio.io/status": "{}" }));
}
