//! What `redirect log` and `redirect run` tell about connections.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use redirect_tests::{
    backend::Backend::Redirect,
    follower::{Follower, sole_reader},
    loader::{self, finish, redirect},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::{Dial, Family, Identity},
    scene::{Scene, To},
};
use rstest::rstest;
use serde_json::Value;

use Family::{Mapped, V4, V6};

fn cgroup(pod: &Pod) -> String {
    pod.cgroup.path().display().to_string()
}

fn is_message(event: &Value) -> bool {
    event["event"] == "message"
}

fn is_decision(event: &Value) -> bool {
    event["event"] == "decision"
}

/// The event is about this port of a destination.
fn is_about(event: &Value, port: u16) -> bool {
    let destination = event["destination"].as_str().unwrap_or_default();
    let text = event["text"].as_str().unwrap_or_default();
    destination.ends_with(&format!(":{port}")) || text.contains(&format!(" port {port}: "))
}

fn dial(scene: &mut Scene, family: Family, from: &Identity, to: To) -> String {
    let to = scene.address(family, to);
    scene
        .actor(from)
        .dial(&Dial::new(family, to))
        .outcome()
        .to_owned()
}

#[rstest]
fn missing_proxy_is_told(#[values(V4, V6, Mapped)] family: Family) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(Redirect, &Options::ISTIO);
    let mut neighbour = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    neighbour.attach(Redirect, &Options::ISTIO);
    let follower = Follower::start(["--cgroup", &cgroup(&scene.pod)]);
    let events = follower.until(
        || {
            dial(&mut neighbour, family, &Identity::APP, To::Service(9090));
            let outcome = dial(&mut scene, family, &Identity::APP, To::Service(80));
            assert_eq!(outcome, "ECONNREFUSED");
        },
        is_message,
    );
    let told = &events[events.len() - 1];
    let to = scene.address(family, To::Service(80));
    assert_eq!(
        told["text"],
        format!(
            "connection to {} port 80: refused: no proxy listens where it is to go",
            to.ip().to_canonical()
        )
    );
    assert_eq!(told["level"], "warn");
    assert_eq!(told["cgroups"][0], cgroup(&scene.pod));
    // Controls: nothing of the neighbour, and nothing once the proxy is there.
    scene.open_proxy();
    assert_eq!(
        dial(&mut scene, family, &Identity::APP, To::Service(443)),
        "15001"
    );
    scene.proxy.unlisten("15001");
    let events = follower.until(
        || {
            dial(&mut neighbour, family, &Identity::APP, To::Service(9090));
            dial(&mut scene, family, &Identity::APP, To::Service(8000));
        },
        |event| is_about(event, 8000),
    );
    assert!(
        !events
            .iter()
            .any(|event| is_about(event, 443) || is_about(event, 9090) || is_decision(event)),
        "{events:#?}"
    );
}

/// Waits for the decision about one connection.
fn decision(scene: &mut Scene, follower: &Follower, dial: &Dial, from: Option<&Identity>) -> Value {
    let port = dial.to.port();
    let events = follower.until(
        || {
            let outcome = match from {
                Some(identity) => scene.actor(identity).dial(dial),
                None => scene.outside.dial(dial),
            };
            assert!(outcome.error.is_none(), "{outcome:?}");
        },
        |event| is_decision(event) && is_about(event, port),
    );
    events[events.len() - 1].clone()
}

#[rstest]
fn each_decision_is_told_with_its_rule(#[values(V4, V6)] family: Family) {
    let options = Options {
        exclude_outbound: "443",
        exclude_inbound: "9090",
        ..Options::ISTIO
    };
    let mut scene = Scene::new();
    scene.attach(Redirect, &options);
    let follower = Follower::start(["--decisions", "--cgroup", &cgroup(&scene.pod)]);
    let (app, proxy) = (Identity::APP, Identity::PROXY);
    for (from, to, rule, action, port) in [
        (
            Some(&app),
            To::Service(80),
            "outbound-captured",
            "captured",
            Some(15001),
        ),
        (
            Some(&app),
            To::Service(443),
            "outbound-port-excluded",
            "passed",
            None,
        ),
        (
            Some(&app),
            To::Localhost(8000),
            "outbound-pod-local",
            "passed",
            None,
        ),
        (
            Some(&proxy),
            To::Service(8010),
            "outbound-proxy",
            "passed",
            None,
        ),
        (
            Some(&proxy),
            To::Own(8011),
            "outbound-proxy-to-self",
            "captured",
            Some(15006),
        ),
        (
            None,
            To::Own(8080),
            "inbound-captured",
            "captured",
            Some(15006),
        ),
        (None, To::Own(9090), "inbound-port-excluded", "passed", None),
    ] {
        let to = scene.address(family, to);
        let told = decision(&mut scene, &follower, &Dial::new(family, to), from);
        assert_eq!(told["rule"], rule, "{told:#}");
        assert_eq!(told["action"], action, "{told:#}");
        assert_eq!(told["destination"], to.to_string(), "{told:#}");
        assert_eq!(told["proxy_port"], port.map_or(Value::Null, Value::from));
        assert_eq!(
            told["uid"],
            from.map_or(Value::Null, |identity| Value::from(identity.euid)),
            "{told:#}"
        );
        let direction = if from.is_some() {
            "outbound"
        } else {
            "inbound"
        };
        assert_eq!(told["direction"], direction, "{told:#}");
        assert_eq!(told["cgroups"][0], cgroup(&scene.pod));
    }
}

#[rstest]
fn killed_reader_can_be_followed_by_another() {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let mut killed = Follower::start(["--decisions"]);
    let to = scene.address(V4, To::Service(80));
    decision(
        &mut scene,
        &killed,
        &Dial::new(V4, to),
        Some(&Identity::APP),
    );
    killed.kill();
    // Nobody reads, and what was asked for may still hold: capture goes on as ever.
    assert_eq!(
        dial(&mut scene, V4, &Identity::APP, To::Service(80)),
        "15001"
    );
    drop(killed);
    let follower = Follower::start([]);
    scene.proxy.unlisten("15001");
    let events = follower.until(
        || {
            dial(&mut scene, V4, &Identity::APP, To::Service(8000));
        },
        is_message,
    );
    assert!(!events.iter().any(is_decision), "{events:#?}");
}

#[rstest]
fn second_reader_is_refused() {
    let mut scene = Scene::new();
    scene.attach(Redirect, &Options::ISTIO);
    let follower = Follower::start(["--decisions"]);
    let to = scene.address(V4, To::Service(80));
    decision(
        &mut scene,
        &follower,
        &Dial::new(V4, to),
        Some(&Identity::APP),
    );
    let second = loader::run(["log"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        errors(&second).contains("another `redirect log` is running"),
        "{}",
        errors(&second)
    );
    // The first one reads on.
    decision(
        &mut scene,
        &follower,
        &Dial::new(V4, to),
        Some(&Identity::APP),
    );
}

#[rstest]
fn log_of_a_pod_that_is_not_attached_is_refused() {
    let pod = Pod::new();
    let path = cgroup(&pod);
    let output = loader::run(["log", "--cgroup", &path]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        errors(&output),
        format!(
            "redirect: --cgroup {path}: not attached; allowed are those that `redirect status` shows"
        )
    );
}

#[rstest]
fn run_tells_that_its_proxy_is_missing() {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let _sole = sole_reader();
    let to = scene.address(V4, To::Service(80)).ip();
    let run = |scene: &Scene| {
        scene.pod.netns.enter(|| {
            finish(redirect().args(["run", "--", "bash", "-c"]).arg(format!(
                "exec 3<>/dev/tcp/{to}/80 && read -t 5 greeting <&3 && echo $greeting"
            )))
        })
    };
    let told = format!("connection to {to} port 80: refused: no proxy listens");
    let output = run(&scene);
    assert!(errors(&output).contains(&told), "{}", errors(&output));
    assert_eq!(output.status.code(), Some(1));
    // The control: with a proxy there is nothing to tell.
    scene.open_proxy();
    let output = run(&scene);
    assert!(!errors(&output).contains(&told), "{}", errors(&output));
    let greeting = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(greeting.contains("15001"), "{greeting}{}", errors(&output));
}
