//! `redirect check`: what it finds on this node, and what it leaves.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{
    fs,
    process::{Command, Output},
};

use redirect_tests::{
    bpffs,
    cgroup::mount_point,
    foreign::{LoadBalancer, SocketChooser},
    iptables::{self, Variant},
    loader::{self, finish, redirect, redirect_inside},
    namespace::errors,
    options::Options,
    pod::{ELSEWHERE4, Pod, SERVICE4},
    protocol::Listen,
    server::bound,
    skip,
};
use rstest::rstest;
use serde_json::Value;

/// Whether the node is found ready, and the findings.
fn check(pod: &Pod) -> (bool, Vec<Value>) {
    let mut command = redirect();
    command.args(["check", "-o", "json", "--cgroup"]);
    command.arg(pod.cgroup.path());
    command.arg("--netns").arg(pod.netns.path());
    report(&finish(&mut command))
}

fn report(output: &Output) -> (bool, Vec<Value>) {
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", errors(output)));
    let ready = report["ready"].as_bool().expect("ready");
    // The exit code says the same.
    assert_eq!(output.status.code(), Some(i32::from(!ready)));
    (
        ready,
        report["findings"].as_array().expect("findings").clone(),
    )
}

/// Findings that are not `ok`, as "level what: detail".
fn complaints(findings: &[Value]) -> Vec<String> {
    let text = |finding: &Value, field: &str| finding[field].as_str().expect(field).to_owned();
    findings
        .iter()
        .map(|finding| {
            let [level, what, detail] = ["level", "what", "detail"].map(|f| text(finding, f));
            format!("{level} {what}: {detail}")
        })
        .filter(|line| !line.starts_with("ok "))
        .collect()
}

#[rstest]
fn node_is_ready_and_is_left_as_it_was() {
    bpffs::private(|| {
        let pod = Pod::new();
        let (ready, findings) = check(&pod);
        assert!(ready, "{findings:#?}");
        let rehearsal = findings
            .iter()
            .find(|finding| finding["what"] == "rehearsal");
        assert_eq!(rehearsal.unwrap()["level"], "ok");
        assert!(bpffs::pins().is_empty(), "{:?}", bpffs::pins());
    });
    let left = fs::read_dir(mount_point())
        .unwrap()
        .flatten()
        .find(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Other tests check at the same time, by processes of their own.
            let pid = name.strip_prefix("redirect-check-");
            pid.is_some_and(|pid| !fs::exists(format!("/proc/{pid}")).unwrap())
        });
    assert!(left.is_none(), "{left:?}");
}

/// What hides a part of the node from this call, and the finding that names it.
#[rstest]
#[case::btf("mount -t tmpfs none /sys/kernel/btf", "bad BTF: ")]
#[case::cgroup2("umount --lazy CGROUP2", "bad cgroup2: ")]
#[case::mount_point_of_bpffs("mount -t tmpfs none /sys/fs", "bad bpffs: ")]
#[case::bpffs("mount -t tmpfs none /sys/fs/bpf", "note bpffs: ")]
#[case::confidentiality(
    "mount -t tmpfs none /sys/kernel/security && echo 'none integrity [confidentiality]' >/sys/kernel/security/lockdown",
    "bad lockdown: "
)]
fn what_the_node_lacks_is_named(#[case] hide: &str, #[case] named: &str) {
    let hide = hide.replace("CGROUP2", mount_point().to_str().unwrap());
    let found = |hide: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]);
        command.arg(format!("{hide} && exec \"$0\" check -o json"));
        let (ready, findings) = report(&finish(command.arg(redirect().get_program())));
        (ready, complaints(&findings))
    };
    let is_named = |lines: &[String]| lines.iter().any(|line| line.starts_with(named));
    let (ready, lines) = found("true");
    assert!(ready && !is_named(&lines), "{lines:#?}");
    let (ready, lines) = found(&hide);
    assert!(is_named(&lines), "{lines:#?}");
    assert_eq!(ready, named.starts_with("note"), "{lines:#?}");
}

#[rstest]
fn rehearsal_leaves_the_namespace_of_the_call_alone() {
    /// The most that a network namespace has (`netns_bpf_max_progs()`).
    const FULL: usize = 64;
    let pod = Pod::new();
    let listen = Listen::new("foreign", (pod.ipv4, 7777).into());
    let socket = pod.netns.enter(|| bound(&listen).unwrap());
    let attach = || SocketChooser::attach(&pod.netns.path(), 7777, &socket);
    let _choosers: Vec<SocketChooser> = (0..FULL).map(|_| attach()).collect();
    let mut command = redirect_inside(&pod.netns);
    let (ready, findings) = report(&finish(command.args(["check", "-o", "json"])));
    assert!(ready, "{findings:#?}");
    // The control: nothing goes there any more.
    let refused = finish(&mut loader::attach_command(&pod));
    assert!(errors(&refused).contains("attaching sk_lookup"));
}

#[rstest]
fn rules_of_istio_in_the_pod_are_found(
    #[values(Variant::Nft, Variant::Legacy)] variant: Variant,
    #[values(false, true)] ipv6_alone: bool,
) {
    if !variant.works() {
        skip!("no iptables-{}", variant.name());
    }
    let pod = Pod::new();
    let found = |pod: &Pod| {
        let (ready, findings) = check(pod);
        let lines = complaints(&findings);
        let found = ["iptables", "ip6tables"].map(|program| {
            let what = format!("bad {program}-{}: ", variant.name());
            lines.iter().any(|line| line.starts_with(&what))
        });
        assert_eq!(ready, !found.contains(&true), "{findings:#?}");
        found
    };
    assert_eq!(found(&pod), [false, false]);
    iptables::apply(&pod, &Options::ISTIO, variant);
    if ipv6_alone {
        iptables::flush_family(&pod, variant, false);
    }
    assert_eq!(found(&pod), [!ipv6_alone, true]);
    iptables::flush(&pod, variant);
    assert_eq!(found(&pod), [false, false]);
}

#[rstest]
#[case::of_the_pod(true, "runs before redirect's")]
#[case::above_the_pod(false, "runs after redirect's")]
fn program_on_the_same_hook_is_noted(#[case] pods_own: bool, #[case] meaning: &str) {
    let pod = Pod::new();
    let cgroup = if pods_own { &pod.cgroup } else { &pod.above };
    let place = format!(" at {}: ", cgroup.path().display());
    let noted = |pod: &Pod| {
        let (ready, findings) = check(pod);
        assert!(ready, "{findings:#?}");
        let mut lines = complaints(&findings);
        lines.retain(|line| line.contains(&place));
        lines
    };
    assert!(noted(&pod).is_empty());
    let _balancer = LoadBalancer::attach(cgroup.path(), SERVICE4, ELSEWHERE4);
    let lines = noted(&pod);
    // Two programs of redirect's may hang there, but it is one hook.
    let [line] = &lines[..] else {
        panic!("{lines:#?}")
    };
    assert!(line.starts_with("note connect4"), "{line}");
    assert!(line.contains(meaning), "{line}");
}

#[rstest]
#[case::before_redirect(true, "warning sk_lookup: ", "runs before redirect's")]
#[case::after_redirect(false, "note sk_lookup: ", "runs after redirect's")]
fn program_that_chooses_sockets_is_told(
    #[case] before: bool,
    #[case] level: &str,
    #[case] meaning: &str,
) {
    let pod = Pod::new();
    let told = |pod: &Pod| {
        let (ready, findings) = check(pod);
        assert!(ready, "{findings:#?}");
        let mut lines = complaints(&findings);
        lines.retain(|line| line.contains("sk_lookup"));
        lines
    };
    let listen = Listen::new("foreign", (pod.ipv4, 7777).into());
    let socket = pod.netns.enter(|| bound(&listen).unwrap());
    if !before {
        loader::attach(&pod, &Options::ISTIO);
    }
    assert!(told(&pod).is_empty());
    let _chooser = SocketChooser::attach(&pod.netns.path(), 7777, &socket);
    if before {
        loader::attach(&pod, &Options::ISTIO);
    }
    let lines = told(&pod);
    let detached = loader::detach(pod.cgroup.path());
    assert!(detached.status.success(), "{}", errors(&detached));
    let [line] = &lines[..] else {
        panic!("{lines:#?}")
    };
    assert!(line.starts_with(level) && line.contains(meaning), "{line}");
}

#[rstest]
fn without_privileges_it_tells_which_are_missing() {
    let program = redirect().get_program().to_owned();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command
        .args(["--inh-caps", "-all"])
        .arg(program)
        .arg("check");
    let output = finish(&mut command);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{table}");
    let line = table.lines().find(|line| line.contains("capabilities"));
    assert!(line.unwrap().contains("CAP_NET_ADMIN"), "{table}");
    assert!(table.contains("cannot be captured"), "{table}");
}
