//! `redirect check`: what it finds on this node, and what it leaves.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{fs, process::Command};

use redirect_tests::{
    bpffs,
    cgroup::mount_point,
    foreign::LoadBalancer,
    iptables::{self, Variant},
    loader::{finish, redirect},
    namespace::errors,
    options::Options,
    pod::{ELSEWHERE4, Pod, SERVICE4},
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
    let output = finish(&mut command);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", errors(&output)));
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

#[rstest]
fn rules_of_istio_in_the_pod_are_found(#[values(Variant::Nft, Variant::Legacy)] variant: Variant) {
    if !variant.works() {
        skip!("no iptables-{}", variant.name());
    }
    let what = format!("bad iptables-{}: ", variant.name());
    let pod = Pod::new();
    let found = |pod: &Pod| {
        let (ready, findings) = check(pod);
        let found = complaints(&findings)
            .iter()
            .any(|line| line.starts_with(&what));
        assert_eq!(ready, !found, "{findings:#?}");
        found
    };
    assert!(!found(&pod));
    iptables::apply(&pod, &Options::ISTIO, variant);
    assert!(found(&pod));
    iptables::flush(&pod, variant);
    assert!(!found(&pod));
}

#[rstest]
#[case::of_the_pod(true, "runs before redirect's")]
#[case::above_the_pod(false, "runs after redirect's")]
fn program_on_the_same_hook_is_noted(#[case] pods_own: bool, #[case] meaning: &str) {
    let pod = Pod::new();
    let noted = |pod: &Pod| {
        let (ready, findings) = check(pod);
        assert!(ready, "{findings:#?}");
        let mut complaints = complaints(&findings).into_iter();
        complaints.find(|line| line.starts_with("note connect4 at "))
    };
    assert_eq!(noted(&pod), None);
    let cgroup = if pods_own { &pod.cgroup } else { &pod.above };
    let _balancer = LoadBalancer::attach(cgroup.path(), SERVICE4, ELSEWHERE4);
    let line = noted(&pod).expect("the other program");
    assert!(
        line.contains(&cgroup.path().display().to_string()),
        "{line}"
    );
    assert!(line.contains(meaning), "{line}");
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
