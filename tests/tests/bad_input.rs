//! Calls that are refused: one line that names flag and value, and nothing attached.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{fs, path::PathBuf, process::Command, sync::LazyLock};

use redirect_tests::{
    actor::Actor,
    loader::{attach_command, finish, redirect, run, status_mentions},
    namespace::errors,
    options::Options,
    pod::Pod,
    protocol::Identity,
};
use rstest::rstest;

/// Flags, environment (`NAME=value`), and what the one line on stderr has to contain.
type Refusal<'a> = (&'a [&'a str], &'a [&'a str], &'a [&'a str]);

/// A list of that many groups.
fn groups(count: u32) -> String {
    (2000..2000 + count)
        .map(|group| group.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

static GROUPS_65: LazyLock<String> = LazyLock::new(|| groups(65));
static GROUPS_17: LazyLock<String> = LazyLock::new(|| groups(17));

/// Runs `command`, which has to fail with one line that contains `parts`.
fn refused(command: &mut Command, parts: &[&str]) -> Result<(), String> {
    let output = finish(command);
    let text = errors(&output);
    let wrong = match output.status.code() {
        Some(0) => "was accepted".to_owned(),
        Some(1 | 2) if text.contains("panicked") => "panicked".to_owned(),
        Some(1 | 2) if text.lines().count() != 1 => "is not one line".to_owned(),
        Some(1 | 2) => match parts.iter().find(|part| !text.contains(**part)) {
            None => return Ok(()),
            Some(part) => format!("does not name {part:?}"),
        },
        code => format!("ended with {code:?}"),
    };
    let arguments: Vec<_> = command.get_args().skip(1).collect();
    Err(format!(
        "{arguments:?} {:?}: {wrong}: {text}",
        command.get_envs().collect::<Vec<_>>()
    ))
}

fn all(refusals: &[Refusal<'_>]) {
    let pod = Pod::new();
    let mut wrong = Vec::new();
    for (flags, environment, parts) in refusals {
        let mut command = attach_command(&pod);
        command.args(*flags);
        command.envs(environment.iter().map(|pair| pair.split_once('=').unwrap()));
        wrong.extend(refused(&mut command, parts).err());
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(!status_mentions(&pod));
}

#[rstest]
fn ports_of_listeners() {
    all(&[
        (&["-p", "abc"], &[], &["--envoy-port", "abc", "1-65535"]),
        (&["-p", "0"], &[], &["--envoy-port", "0"]),
        (&["-p", "70000"], &[], &["--envoy-port", "70000"]),
        (&["-p", "-1"], &[], &["--envoy-port", "-1"]),
        (&["-p", ""], &[], &["--envoy-port"]),
        (
            &["--envoy-port", "15001,15002"],
            &[],
            &["--envoy-port", "15001,15002"],
        ),
        (
            &["--envoy-port", "0x3a99"],
            &[],
            &["--envoy-port", "0x3a99"],
        ),
        (
            &["-z", "99999999999999999999"],
            &[],
            &["--inbound-capture-port", "99999999999999999999"],
        ),
        (
            &["--inbound-capture-port", "15006x"],
            &[],
            &["--inbound-capture-port", "15006x"],
        ),
        (
            &[],
            &["INBOUND_CAPTURE_PORT=none"],
            &["INBOUND_CAPTURE_PORT", "none"],
        ),
        (&["-e", "1.5"], &[], &["--inbound-tunnel-port", "1.5"]),
        (&["-e", "65536"], &[], &["--inbound-tunnel-port", "65536"]),
        (
            &[],
            &["INBOUND_TUNNEL_PORT=*"],
            &["INBOUND_TUNNEL_PORT", "*"],
        ),
    ]);
}

#[rstest]
fn port_lists() {
    all(&[
        (&["-b", "abc"], &[], &["--istio-inbound-ports", "abc"]),
        (
            &["-b", "80,70000"],
            &[],
            &["--istio-inbound-ports", "70000"],
        ),
        (&["-b", "80,*"], &[], &["--istio-inbound-ports", "*"]),
        (
            &["-b", "9000:8000"],
            &[],
            &["--istio-inbound-ports", "9000:8000"],
        ),
        (
            &["-b", "9000-8000"],
            &[],
            &["--istio-inbound-ports", "9000-8000"],
        ),
        (&["-b", "80;443"], &[], &["--istio-inbound-ports", "80;443"]),
        (
            &["-b", "80\n443"],
            &[],
            &["--istio-inbound-ports", "80\\n443"],
        ),
        (
            &[],
            &["ISTIO_INBOUND_PORTS=80,-443"],
            &["ISTIO_INBOUND_PORTS", "-443"],
        ),
        (
            &["-b", "*", "-d", "*"],
            &[],
            &["--istio-local-exclude-ports", "*"],
        ),
        (
            &["-d", "1:2:3"],
            &[],
            &["--istio-local-exclude-ports", "1:2:3"],
        ),
        (
            &[],
            &["ISTIO_LOCAL_EXCLUDE_PORTS=no-such-service"],
            &["ISTIO_LOCAL_EXCLUDE_PORTS", "no-such-service"],
        ),
        (
            &["-o", "65536"],
            &[],
            &["--istio-local-outbound-ports-exclude", "65536"],
        ),
        (
            &["-o", "*"],
            &[],
            &["--istio-local-outbound-ports-exclude", "*"],
        ),
        (
            &[],
            &["ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE=443,x"],
            &["ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "443,x"],
        ),
        (
            &["-q", "eighty"],
            &[],
            &["--istio-outbound-ports", "eighty"],
        ),
        (
            &["-q", "80 443"],
            &[],
            &["--istio-outbound-ports", "80 443"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_PORTS=99999"],
            &["ISTIO_OUTBOUND_PORTS", "99999"],
        ),
    ]);
}

#[rstest]
fn cidrs() {
    all(&[
        (
            &["-i", "10.0.0.0"],
            &[],
            &["--istio-service-cidr", "10.0.0.0", "10.0.0.0/32"],
        ),
        (
            &["-i", "10.0.0.0/33"],
            &[],
            &["--istio-service-cidr", "10.0.0.0/33", "0-32"],
        ),
        (
            &["-i", "2001:db8::/129"],
            &[],
            &["--istio-service-cidr", "2001:db8::/129", "0-128"],
        ),
        (
            &["-i", "10.0.0/8"],
            &[],
            &["--istio-service-cidr", "10.0.0/8"],
        ),
        (
            &["-i", "300.0.0.0/8"],
            &[],
            &["--istio-service-cidr", "300.0.0.0/8"],
        ),
        (
            &["-i", "10.0.0.0/-1"],
            &[],
            &["--istio-service-cidr", "10.0.0.0/-1"],
        ),
        (&["-i", "10.0.0.0/8,*"], &[], &["--istio-service-cidr", "*"]),
        (
            &["-i", "example.com"],
            &[],
            &["--istio-service-cidr", "example.com"],
        ),
        (
            &["-i", "10.0.0.0/8,,x"],
            &[],
            &["--istio-service-cidr", "x"],
        ),
        (
            &["-i", "::ffff:10.0.0.0/104"],
            &[],
            &["--istio-service-cidr", "::ffff:10.0.0.0/104"],
        ),
        (
            &[],
            &["ISTIO_SERVICE_CIDR=10.0.0.0/8/8"],
            &["ISTIO_SERVICE_CIDR", "10.0.0.0/8/8"],
        ),
        (&["-x", "*"], &[], &["--istio-service-exclude-cidr", "*"]),
        (
            &["-x", "fe80::1%eth0/64"],
            &[],
            &["--istio-service-exclude-cidr", "fe80::1%eth0/64"],
        ),
        (
            &[],
            &["ISTIO_SERVICE_EXCLUDE_CIDR=10.1.2.3"],
            &["ISTIO_SERVICE_EXCLUDE_CIDR", "10.1.2.3"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=10.0.0.0/8"],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=127.0.0.1/7"],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1/7"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=::1/128"],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "::1/128"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR=127.0.0.1"],
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.1"],
        ),
    ]);
}

#[rstest]
fn identities() {
    all(&[
        (
            &["-u", "no-such-user"],
            &[],
            &["--proxy-uid", "no-such-user"],
        ),
        (&["-u", "-5"], &[], &["--proxy-uid", "-5"]),
        (&["-u", "4294967295"], &[], &["--proxy-uid", "4294967295"]),
        (&["-u", "4294967296"], &[], &["--proxy-uid", "4294967296"]),
        (&["-u", "2000-1000"], &[], &["--proxy-uid", "2000-1000"]),
        (&["-u", ","], &[], &["--proxy-uid", ","]),
        (&["-u", "1337,*"], &[], &["--proxy-uid", "*"]),
        (&["-u", &GROUPS_17], &[], &["--proxy-uid", "16", "17"]),
        (&[], &["PROXY_UID=1337 1338"], &["PROXY_UID", "1337 1338"]),
        (
            &["-g", "no-such-group"],
            &[],
            &["--proxy-gid", "no-such-group"],
        ),
        (&["-g", "1-2-3"], &[], &["--proxy-gid", "1-2-3"]),
        (&[], &["PROXY_GID=0x539"], &["PROXY_GID", "0x539"]),
        (
            &[],
            &["ISTIO_OUTBOUND_OWNER_GROUPS=no-such-group"],
            &["ISTIO_OUTBOUND_OWNER_GROUPS", "no-such-group"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_OWNER_GROUPS=2000,*"],
            &["ISTIO_OUTBOUND_OWNER_GROUPS", "*"],
        ),
        (
            &[],
            &["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=*"],
            &["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "*"],
        ),
        (
            &["--outbound-owner-groups", &GROUPS_65],
            &[],
            &["--outbound-owner-groups", "cannot exceed 64, got 65"],
        ),
    ]);
    let many = format!("ISTIO_OUTBOUND_OWNER_GROUPS={}", *GROUPS_65);
    all(&[(
        &[],
        &[&many],
        &[
            "ISTIO_OUTBOUND_OWNER_GROUPS",
            "number of owner groups",
            "cannot exceed 64, got 65",
        ],
    )]);
}

#[rstest]
fn modes_and_switches() {
    all(&[
        (
            &["-m", "tproxy"],
            &[],
            &["--istio-inbound-interception-mode", "tproxy", "REDIRECT"],
        ),
        (
            &["-m", "NONE"],
            &[],
            &["--istio-inbound-interception-mode", "NONE"],
        ),
        (
            &["--redirect-dns=maybe"],
            &[],
            &["--redirect-dns", "maybe", "true and false"],
        ),
        (
            &["--redirect-dns=false"],
            &["CAPTURE_ALL_DNS=yes"],
            &["CAPTURE_ALL_DNS", "yes", "true and false"],
        ),
        (
            &["--redirect-dns", "--resolv-conf", "/no/such/file"],
            &[],
            &["--resolv-conf", "/no/such/file", "No such file"],
        ),
        (
            &["--resolv-conf=/etc"],
            &["REDIRECT_DNS=1"],
            &["--resolv-conf", "/etc", "not a regular file"],
        ),
        (
            &["-t", "0x539"],
            &[],
            &["--istio-inbound-tproxy-mark", "0x539", "1-4294967295"],
        ),
        (
            &[],
            &["ISTIO_INBOUND_TPROXY_MARK=0"],
            &["ISTIO_INBOUND_TPROXY_MARK", "0"],
        ),
        (
            &["-r", "main"],
            &[],
            &["--istio-inbound-tproxy-route-table", "main"],
        ),
        (
            &[],
            &["ISTIO_INBOUND_TPROXY_ROUTE_TABLE="],
            &["ISTIO_INBOUND_TPROXY_ROUTE_TABLE"],
        ),
        (
            &["-c", "a-name-of-16-chr"],
            &[],
            &["--istio-exclude-interfaces", "a-name-of-16-chr", "1-15"],
        ),
        (
            &[],
            &["ISTIO_EXCLUDE_INTERFACES=eth*"],
            &["ISTIO_EXCLUDE_INTERFACES", "eth*", "eth+"],
        ),
        (&["-k", "a/b"], &[], &["--kube-virt-interfaces", "a/b"]),
        (
            &[],
            &["KUBE_VIRT_INTERFACES=tap0,!tap1"],
            &["KUBE_VIRT_INTERFACES", "!tap1"],
        ),
        (
            &["-m", "TPROXY"],
            &["KUBE_VIRT_INTERFACES=tap0"],
            &[
                "KUBE_VIRT_INTERFACES",
                "tap0",
                "cannot be combined",
                "TPROXY",
            ],
        ),
        (
            &["--ipv6", "maybe"],
            &[],
            &["--ipv6", "maybe", "auto, on and off"],
        ),
        (&["--ipv6", ""], &[], &["--ipv6"]),
        (&["--dual-stack=perhaps"], &[], &["--dual-stack", "perhaps"]),
        (&[], &["DUAL_STACK=yes"], &["DUAL_STACK", "yes"]),
    ]);
}

/// What Istio's flag parser stops at ends with 255 as there, everything else with 1.
#[rstest]
fn calls_of_istio_iptables() {
    let mut wrong = Vec::new();
    for (flags, environment, code, parts) in [
        (&["--frobnicate"][..], &[][..], 255, &["--frobnicate"][..]),
        (&["surplus"], &[], 255, &["surplus"]),
        (&["-p"], &[], 255, &["--envoy-port"]),
        (&["--run-validation", "false"], &[], 255, &["false"]),
        (&["--dry-run=maybe"], &[], 255, &["--dry-run", "maybe"]),
        (&["-n=2"], &[], 255, &["--dry-run", "2"]),
        (&["--dual-stack=on"], &[], 255, &["--dual-stack", "on"]),
        (&["--redirect-dns=on"], &[], 255, &["--redirect-dns", "on"]),
        (&["--capture-all-dns=x"], &[], 255, &["--capture-all-dns"]),
        (&["--skip-rule-apply=x"], &[], 255, &["--skip-rule-apply"]),
        (&["--run-validation=x"], &[], 255, &["--run-validation"]),
        (&["--cleanup-only=x"], &[], 255, &["--cleanup-only"]),
        (&["--reconcile=x"], &[], 255, &["--reconcile"]),
        (&["--force-apply=x"], &[], 255, &["--force-apply"]),
        (&["--drop-invalid=x"], &[], 255, &["--drop-invalid"]),
        (&["--native-nftables=x"], &[], 255, &["--native-nftables"]),
        (&["--cni-mode=x"], &[], 255, &["--cni-mode"]),
        (&["--log_as_json=x"], &[], 255, &["--log_as_json"]),
        (
            &["--iptables-probe-port", "70000"],
            &[],
            255,
            &["--iptables-probe-port", "70000", "1-65535"],
        ),
        (
            &["--probe-timeout", "5"],
            &[],
            255,
            &["--probe-timeout", "5", "500ms"],
        ),
        (
            &["--force-iptables-binary", "iptables"],
            &[],
            1,
            &["--force-iptables-binary", "iptables", "legacy and nft"],
        ),
        (&["-p", "abc"], &[], 1, &["--envoy-port", "abc"]),
        (&["-i", "10.0.0.0"], &[], 1, &["--istio-service-cidr"]),
        (&["-m", "NONE"], &[], 1, &["NONE", "REDIRECT and TPROXY"]),
        (&[], &["DRY_RUN=maybe"], 1, &["DRY_RUN", "maybe"]),
        (&[], &["SKIP_RULE_APPLY=x"], 1, &["SKIP_RULE_APPLY"]),
        (&[], &["RUN_VALIDATION=x"], 1, &["RUN_VALIDATION"]),
        (&[], &["CLEANUP_ONLY=x"], 1, &["CLEANUP_ONLY"]),
        (&[], &["RECONCILE=x"], 1, &["RECONCILE"]),
        (&[], &["FORCE_APPLY=x"], 1, &["FORCE_APPLY"]),
        (&[], &["DROP_INVALID=x"], 1, &["DROP_INVALID"]),
        (&[], &["INVALID_DROP=x"], 1, &["INVALID_DROP"]),
        (&[], &["NATIVE_NFTABLES=x"], 1, &["NATIVE_NFTABLES"]),
        (&[], &["CNI_MODE=x"], 1, &["CNI_MODE"]),
        (
            &[],
            &["IPTABLES_PROBE_PORT=abc"],
            1,
            &["IPTABLES_PROBE_PORT"],
        ),
        (&[], &["PROBE_TIMEOUT=-1s"], 1, &["PROBE_TIMEOUT", "-1s"]),
        (
            &[],
            &["FORCE_IPTABLES_BINARY=x"],
            1,
            &["FORCE_IPTABLES_BINARY", "x", "legacy and nft"],
        ),
        (&[], &["PROXY_UID=x y"], 1, &["PROXY_UID", "x y"]),
    ] {
        let mut command = redirect();
        command.arg("istio-iptables").args(flags);
        command.envs(
            environment
                .iter()
                .map(|pair: &&str| pair.split_once('=').unwrap()),
        );
        let output = finish(&mut command);
        let text = errors(&output);
        let missing = parts.iter().find(|part| !text.contains(**part));
        if output.status.code() != Some(code) || missing.is_some() || text.contains("panicked") {
            wrong.push(format!(
                "{flags:?} {environment:?}: {:?}, not {code}: {text}",
                output.status
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    let help = run(["istio-iptables", "--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("--run-validation"));
}

#[rstest]
fn wrong_targets() {
    let pod = Pod::new();
    let text = |path: PathBuf| path.display().to_string();
    let (cgroup, netns) = (text(pod.cgroup.path().to_owned()), text(pod.netns.path()));
    let v1 = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .find(|line| line.contains(" - cgroup ") && line.contains("pids"))
        .and_then(|line| line.split(' ').nth(4).map(str::to_owned));
    let root = text(redirect_tests::cgroup::mount_point());
    let procs = format!("{cgroup}/cgroup.procs");
    let mut targets: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec!["--cgroup", "/no/such/cgroup", "--netns", &netns],
            vec!["/no/such/cgroup", "does not exist"],
        ),
        (
            vec!["--cgroup", "/tmp", "--netns", &netns],
            vec!["/tmp", "not a cgroup"],
        ),
        (
            vec!["--cgroup", &procs, "--netns", &netns],
            vec!["cgroup.procs", "not a directory"],
        ),
        (
            vec!["--cgroup", &root, "--netns", &netns],
            vec!["root cgroup"],
        ),
        (
            vec!["--cgroup", &cgroup, "--netns", "/run/netns/no-such"],
            vec!["/run/netns/no-such", "does not exist"],
        ),
        (
            vec!["--cgroup", &cgroup, "--netns", "/proc/version"],
            vec!["/proc/version", "not a namespace"],
        ),
        (
            vec!["--cgroup", &cgroup, "--netns", "/proc/self/ns/mnt"],
            vec!["/proc/self/ns/mnt", "mnt", "network namespace"],
        ),
        (
            vec!["--cgroup", &cgroup, "--netns", "/proc/thread-self/ns/net"],
            vec!["/proc/thread-self/ns/net", "host"],
        ),
        (vec!["--pid", "1"], vec![]),
        (vec!["--pid", "4194304"], vec!["4194304"]),
        (vec!["--pid", "0"], vec!["0"]),
    ];
    if let Some(v1) = &v1 {
        targets.push((
            vec!["--cgroup", v1, "--netns", &netns],
            vec![v1, "cgroup v1"],
        ));
    }
    let wrong: Vec<_> = targets
        .iter()
        .filter_map(|(flags, parts)| {
            refused(
                redirect().arg("attach").args(flags).args(["-i", "*"]),
                parts,
            )
            .err()
        })
        .collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    assert!(!status_mentions(&pod));
}

#[rstest]
fn cgroup_whose_processes_live_elsewhere() {
    let (pod, other) = (Pod::new(), Pod::new());
    let cgroup = pod.cgroup.child("app");
    let _stray = Actor::start(&other.netns.path(), Some(cgroup), Identity::APP);
    let mut command = attach_command(&pod);
    command.args(Options::ISTIO.arguments());
    let output = finish(&mut command);
    assert!(
        !output.status.success(),
        "a cgroup of another namespace was accepted"
    );
    assert_eq!(errors(&output).lines().count(), 1, "{}", errors(&output));
}

#[rstest]
#[case::no_command(&[])]
#[case::unknown_command(&["frobnicate"])]
#[case::unknown_flag(&["attach", "--frobnicate"])]
#[case::no_target(&["attach", "-i", "*"])]
#[case::only_a_cgroup(&["attach", "--cgroup", "/sys/fs/cgroup"])]
#[case::only_a_namespace(&["attach", "--netns", "/proc/self/ns/net"])]
#[case::pid_is_no_number(&["attach", "--pid", "self"])]
#[case::negative_pid(&["attach", "--pid", "-1"])]
#[case::flag_without_a_value(&["attach", "--cgroup"])]
#[case::detach_without_a_target(&["detach"])]
#[case::detach_of_both(&["detach", "--all", "--cgroup", "/tmp"])]
#[case::unknown_output(&["status", "-o", "xml"])]
#[case::run_without_a_command(&["run", "--"])]
fn wrong_usage_ends_with_2(#[case] arguments: &[&str]) {
    let output = run(arguments.iter().copied());
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
    assert!(!errors(&output).contains("panicked"));
}

#[rstest]
#[case::attach(&["attach", "--pid", "1"])]
#[case::detach(&["detach", "--all"])]
fn without_privileges_the_missing_ones_are_named(#[case] arguments: &[&str]) {
    let program = redirect().get_program().to_owned();
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "--inh-caps",
        "-all",
    ]);
    command.arg(program).args(arguments);
    let output = finish(&mut command);
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert_eq!(errors(&output).lines().count(), 1, "{}", errors(&output));
    assert!(
        errors(&output).contains("CAP_") || errors(&output).contains("root"),
        "{}",
        errors(&output)
    );
}

#[rstest]
fn refused_options_leave_an_attached_pod_alone() {
    let pod = Pod::new();
    redirect_tests::loader::attach(&pod, &Options::ISTIO);
    let before = redirect_tests::loader::status();
    let mut command = attach_command(&pod);
    refused(
        command.args(["-i", "10.0.0.0/99"]),
        &["--istio-service-cidr", "10.0.0.0/99"],
    )
    .unwrap();
    assert_eq!(
        redirect_tests::loader::status().to_string(),
        before.to_string()
    );
    redirect_tests::backend::Backend::Redirect.detach(&pod);
}
