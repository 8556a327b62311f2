//! What TPROXY needs in the pod's network namespace is made there, and nothing of it is left behind.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use redirect_tests::{
    actor::Actor,
    backend::Backend::Redirect,
    cgroup::Cgroup,
    loader::{self, attach_command, finish},
    namespace::{Namespace, errors, succeed},
    options::Options,
    pod::Pod,
    protocol::{Dial, Family::V4, Identity},
    scene::{Lands::Direct, Lands::InPlace, Lands::Inbound, Scene, To, inward, out},
};
use rstest::rstest;

const TPROXY: Options = Options {
    tproxy: true,
    ..Options::ISTIO
};
const SYSCTLS: [&str; 3] = [
    "ipv4/tcp_fwmark_accept",
    "ipv4/fwmark_reflect",
    "ipv6/fwmark_reflect",
];

/// Rules, routes of all tables, and the sysctls.
fn state(namespace: &Namespace) -> String {
    let mut text = String::new();
    for command in [
        "-4 rule",
        "-6 rule",
        "-4 route show table all",
        "-6 route show table all",
    ] {
        let mut ip = Command::new("ip");
        ip.args(["-n", namespace.name()]).args(command.split(' '));
        writeln!(text, "# {command}").unwrap();
        // A link-local address is the kernel's own, and takes its time.
        for line in succeed(&mut ip)
            .lines()
            .filter(|line| !line.contains("fe80::"))
        {
            writeln!(text, "{line}").unwrap();
        }
    }
    let values = namespace.enter(|| {
        SYSCTLS.map(|name| fs::read_to_string(Path::new("/proc/sys/net").join(name)).unwrap())
    });
    for (name, value) in SYSCTLS.iter().zip(values) {
        write!(text, "{name} = {value}").unwrap();
    }
    text
}

/// What one state has more than another.
fn added(before: &str, after: &str) -> Vec<String> {
    let mut known: Vec<&str> = before.lines().collect();
    let mut added = Vec::new();
    for line in after.lines() {
        match known.iter().position(|other| *other == line) {
            Some(place) => drop(known.remove(place)),
            None => added.push(line.trim().to_owned()),
        }
    }
    assert!(
        known.iter().all(|line| line.contains(" = ")),
        "lost: {known:?}"
    );
    added
}

fn attach(scene: &Scene, more: &[&str]) {
    let mut command = attach_command(&scene.pod);
    let output = finish(command.args(TPROXY.arguments()).args(more));
    assert!(output.status.success(), "{}", errors(&output));
}

fn detach(scene: &Scene) {
    let output = loader::detach(scene.pod.cgroup.path());
    assert!(output.status.success(), "{}", errors(&output));
}

#[rstest]
fn detach_takes_everything_back(#[values(true, false)] ipv6: bool) {
    let options = Options { ipv6, ..TPROXY };
    let mut scene = Scene::with(Pod::new(), &options);
    let before = state(&scene.pod.netns);
    scene.attach(Redirect, &options);
    let between = state(&scene.pod.netns);
    let families = 1 + usize::from(ipv6);
    let added = added(&before, &between);
    let count = |part: &str| added.iter().filter(|line| line.contains(part)).count();
    assert_eq!(count("fwmark 0x539 lookup 133"), families, "{added:?}");
    assert_eq!(
        count("local default dev lo table 133"),
        families,
        "{added:?}"
    );
    assert_eq!(count("fwmark_reflect = 1"), families, "{added:?}");
    assert_eq!(count("tcp_fwmark_accept = 1"), 1, "{added:?}");
    assert_eq!(added.len(), 1 + 3 * families, "{added:?}");
    // Again, and it stays as it is.
    scene.attach(Redirect, &options);
    assert_eq!(state(&scene.pod.netns), between);
    scene.detach();
    assert_eq!(state(&scene.pod.netns), before);
}

#[test]
fn nothing_is_needed_without_inbound_ports_or_tproxy() {
    let scene = Scene::new();
    let before = state(&scene.pod.netns);
    attach(&scene, &["-b", ""]);
    assert_eq!(state(&scene.pod.netns), before);
    attach(&scene, &["-m", "REDIRECT"]);
    assert_eq!(state(&scene.pod.netns), before);
    detach(&scene);
}

#[test]
fn what_was_there_stays() {
    let scene = Scene::new();
    let netns = &scene.pod.netns;
    for command in [
        "-4 rule add fwmark 1337 lookup 133",
        "-4 route add local default dev lo table 133",
        "-6 rule add fwmark 1337 lookup 133",
    ] {
        assert!(netns.try_ip(command), "{command}");
    }
    netns.sysctl(&[("ipv4/fwmark_reflect", "1")]);
    let before = state(netns);
    attach(&scene, &[]);
    let between = state(netns);
    assert_eq!(added(&before, &between).len(), 3, "{before}\n{between}");
    attach(&scene, &[]);
    detach(&scene);
    assert_eq!(state(netns), before);
}

#[test]
fn somebody_elses_changes_since_are_respected() {
    let scene = Scene::new();
    let netns = &scene.pod.netns;
    attach(&scene, &[]);
    // Taken away by hand: the next attach mends it, and a detach in between does not mind.
    assert!(netns.try_ip("-4 rule del fwmark 1337 lookup 133"));
    let current = || {
        let status = loader::status_of(&scene.pod);
        status["routes_current"].as_bool().unwrap()
    };
    let broken = state(netns);
    assert!(!current());
    attach(&scene, &[]);
    assert!(current());
    assert_ne!(state(netns), broken);
    netns.sysctl(&[("ipv4/fwmark_reflect", "0")]);
    assert!(netns.try_ip("-6 rule del fwmark 1337 lookup 133"));
    detach(&scene);
    assert!(!state(netns).contains("fwmark 0x539"));
}

#[test]
fn mode_mark_and_table_change_while_attached() {
    let mut scene = Scene::with(Pod::new(), &TPROXY);
    let before = state(&scene.pod.netns);
    scene.attach(Redirect, &TPROXY);
    let tproxy = state(&scene.pod.netns);
    scene.attempt(V4, &inward(8080, InPlace)).unwrap();
    let own = scene.address(V4, To::Own(8080));
    let held = Dial::new(V4, own).keep("held");
    assert_eq!(scene.outside.dial(&held).outcome(), "15006");

    scene.attach(Redirect, &Options::ISTIO);
    assert_eq!(state(&scene.pod.netns), before);
    scene.attempt(V4, &inward(8080, Inbound)).unwrap();
    scene
        .attempt(V4, &out(Identity::TPROXY, To::Own(8080), Direct))
        .unwrap();
    assert_eq!(
        scene.outside.ask("held", "still there").as_deref(),
        Ok("still there")
    );

    scene.attach(Redirect, &TPROXY);
    assert_eq!(state(&scene.pod.netns), tproxy);
    scene.attempt(V4, &inward(8080, InPlace)).unwrap();
    scene
        .attempt(V4, &out(Identity::TPROXY, To::Own(8080), InPlace))
        .unwrap();

    attach(&scene, &["-t", "77", "-r", "9999"]);
    let other = state(&scene.pod.netns);
    assert!(other.contains("fwmark 0x4d lookup 9999"), "{other}");
    assert!(!other.contains("133"), "{other}");
    let marked = out(Identity::TPROXY, To::Own(8080), Direct).mark(77);
    scene.attempt(V4, &marked).unwrap();
    scene
        .attempt(
            V4,
            &out(Identity::TPROXY, To::Own(8080), InPlace).mark(1337),
        )
        .unwrap();
    assert_eq!(
        scene.outside.ask("held", "to the end").as_deref(),
        Ok("to the end")
    );
    scene.detach();
    assert_eq!(state(&scene.pod.netns), before);
}

/// Another pod: loading programs takes most of the time of the first attach, and no kill is to fall into that.
fn programs_kept_loaded() -> Scene {
    let mut other = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    other.attach(Redirect, &Options::ISTIO);
    other
}

#[rstest]
fn killed_attach_is_completed_or_taken_back(#[values(true, false)] completed: bool) {
    let _other = programs_kept_loaded();
    let scene = Scene::with(Pod::new(), &TPROXY);
    let before = state(&scene.pod.netns);
    attach(&scene, &[]);
    let whole = state(&scene.pod.netns);
    detach(&scene);
    let mut partial = 0;
    for delay in (0..60).step_by(3) {
        let mut child = attach_command(&scene.pod)
            .args(TPROXY.arguments())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        let killed = state(&scene.pod.netns);
        partial += u32::from(killed != before);
        if completed {
            attach(&scene, &[]);
            assert_eq!(state(&scene.pod.netns), whole, "killed after {delay} ms");
        }
        detach(&scene);
        assert_eq!(
            state(&scene.pod.netns),
            before,
            "killed after {delay} ms:\n{killed}"
        );
    }
    println!("{partial} of 20 kills came after the first change");
}

#[test]
fn killed_detach_and_killed_change_leave_nothing() {
    let _other = programs_kept_loaded();
    let scene = Scene::with(Pod::new(), &TPROXY);
    let before = state(&scene.pod.netns);
    let redirect_mode = || {
        let mut command = attach_command(&scene.pod);
        command.args(Options::ISTIO.arguments());
        command
    };
    let detaching = || {
        let mut command = loader::redirect();
        command
            .arg("detach")
            .arg("--cgroup")
            .arg(scene.pod.cgroup.path());
        command
    };
    for delay in (0..40).step_by(4) {
        for mut command in [redirect_mode(), detaching()] {
            attach(&scene, &[]);
            let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = quiet.spawn().unwrap();
            thread::sleep(Duration::from_millis(delay));
            child.kill().unwrap();
            child.wait().unwrap();
            detach(&scene);
            assert_eq!(
                state(&scene.pod.netns),
                before,
                "{command:?} killed after {delay} ms"
            );
        }
    }
}

#[test]
fn namespace_is_found_without_the_process_that_named_it() {
    let scene = Scene::with(Pod::new(), &TPROXY);
    let before = state(&scene.pod.netns);
    let cgroup = scene.pod.cgroup.child("short");
    let named = Actor::start(&scene.pod.netns.path(), Some(cgroup), Identity::APP);
    let mut command = loader::redirect();
    command
        .arg("attach")
        .arg("--cgroup")
        .arg(scene.pod.cgroup.path());
    command
        .arg("--netns")
        .arg(format!("/proc/{}/ns/net", named.pid()));
    let output = finish(command.args(TPROXY.arguments()));
    assert!(output.status.success(), "{}", errors(&output));
    assert_ne!(state(&scene.pod.netns), before);
    drop(named);
    detach(&scene);
    assert_eq!(state(&scene.pod.netns), before);
}

#[test]
fn shared_namespace_keeps_what_the_other_cgroup_needs() {
    let scene = Scene::with(Pod::new(), &TPROXY);
    let second = Cgroup::below(&scene.pod.above, "second");
    let before = state(&scene.pod.netns);
    attach(&scene, &[]);
    let between = state(&scene.pod.netns);
    let attach_second = |more: &[&str]| {
        let mut command = loader::redirect();
        command.arg("attach").arg("--cgroup").arg(second.path());
        command.arg("--netns").arg(scene.pod.netns.path());
        finish(command.args(TPROXY.arguments()).args(more))
    };
    let output = attach_second(&["-r", "99"]);
    assert!(errors(&output).contains("other options"), "{output:?}");
    let output = attach_second(&[]);
    assert!(output.status.success(), "{}", errors(&output));
    detach(&scene);
    assert_eq!(state(&scene.pod.netns), between);
    let output = loader::detach(second.path());
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(state(&scene.pod.netns), before);
}
