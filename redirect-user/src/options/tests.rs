//! Options as a user gives them: arguments and variables in, policy or message out.

use std::collections::HashMap;

use clap::{CommandFactory, Parser};

use super::*;

mod fuzz;
mod istio_iptables;
mod refused;

/// The flags as a program has them.
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    flags: CaptureFlags,
    command: Vec<String>,
}

struct TestNames;

const SERVICES: &str = "\
# comment http 81/tcp
http\t\t80/tcp\t\twww # WorldWideWeb
https 443/tcp
https 443/udp
http-alt 8080/tcp webcache
tftp 69/udp
broken
odd 99999/tcp
3com-tsmux 106/tcp
";

impl Names for TestNames {
    fn user(&self, name: &str) -> Option<u32> {
        HashMap::from([("envoy", 101), ("www-data", 33), ("loner", 7)])
            .get(name)
            .copied()
    }

    fn group(&self, name: &str) -> Option<u32> {
        HashMap::from([("envoy", 102), ("www-data", 33)])
            .get(name)
            .copied()
    }

    fn tcp_service(&self, name: &str) -> Option<u16> {
        tcp_service_in(SERVICES, name)
    }
}

fn parse(args: &[&str]) -> CaptureFlags {
    match Cli::try_parse_from([&["redirect"], args].concat()) {
        Ok(cli) => cli.flags,
        Err(error) => panic!("{args:?}: {error}"),
    }
}

fn env_of(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
    |name| {
        let set = variables.iter().find(|(variable, _)| *variable == name)?;
        Some(set.1.to_owned())
    }
}

fn try_policy(args: &[&str], variables: &[(&str, &str)]) -> Result<Policy, OptionError> {
    parse(args).validate_with(&env_of(variables), &TestNames)
}

fn policy(args: &[&str]) -> Policy {
    policy_env(args, &[])
}

fn policy_env(args: &[&str], variables: &[(&str, &str)]) -> Policy {
    try_policy(args, variables).unwrap_or_else(|error| panic!("{args:?} {variables:?}: {error}"))
}

fn ports(ranges: &[(u16, u16)]) -> Vec<PortRange> {
    ranges
        .iter()
        .map(|&(first, last)| PortRange { first, last })
        .collect()
}

fn ids(ranges: &[(u32, u32)]) -> Vec<IdRange> {
    ranges
        .iter()
        .map(|&(first, last)| IdRange { first, last })
        .collect()
}

#[test]
fn flags_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_option_unset_gives_istios_defaults() {
    let policy = policy(&[]);
    assert_eq!(policy, Policy::default());
    assert_eq!(
        (
            policy.outbound_port,
            policy.inbound_port,
            policy.tunnel_port
        ),
        (15001, 15006, 15008)
    );
    assert_eq!(policy.proxy_uids, ids(&[(1337, 1337)]));
    assert_eq!(policy.proxy_gids, ids(&[(1337, 1337)]));
    assert_eq!(policy.include_outbound_cidrs, Scope::Listed(vec![]));
    assert!(!policy.loopback_included);
    assert_eq!(policy.exclude_outbound_cidrs, vec![]);
    assert_eq!(policy.include_outbound_ports, vec![]);
    assert_eq!(policy.exclude_outbound_ports, vec![]);
    assert_eq!(policy.inbound_ports, Scope::Listed(vec![]));
    assert_eq!(policy.exclude_inbound_ports, vec![]);
    assert_eq!(policy.owner_groups, Scope::All);
    assert_eq!(policy.owner_groups_exclude, vec![]);
    assert_eq!(policy.loopback.to_string(), "127.0.0.1/32");
    assert_eq!(policy.ipv6, Ipv6::Auto);
}

/// Short name, long name, variable (Istio has none for `-p`) and a value.
#[rustfmt::skip]
const FLAGS: &[(&str, &str, &str, &str)] = &[
    ("-p", "--envoy-port", "", "1"),
    ("-z", "--inbound-capture-port", "INBOUND_CAPTURE_PORT", "2"),
    ("-e", "--inbound-tunnel-port", "INBOUND_TUNNEL_PORT", "3"),
    ("-u", "--proxy-uid", "PROXY_UID", "4"),
    ("-g", "--proxy-gid", "PROXY_GID", "5"),
    ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "10.0.0.0/8"),
    ("-x", "--istio-service-exclude-cidr", "ISTIO_SERVICE_EXCLUDE_CIDR", "10.1.0.0/16"),
    ("-m", "--istio-inbound-interception-mode", "ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY"),
    ("-c", "--istio-exclude-interfaces", "ISTIO_EXCLUDE_INTERFACES", "eth1"),
    ("-k", "--kube-virt-interfaces", "KUBE_VIRT_INTERFACES", "eth1"),
    ("-b", "--istio-inbound-ports", "ISTIO_INBOUND_PORTS", "*"),
    ("-d", "--istio-local-exclude-ports", "ISTIO_LOCAL_EXCLUDE_PORTS", "6"),
    ("-o", "--istio-local-outbound-ports-exclude", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "7"),
    ("-q", "--istio-outbound-ports", "ISTIO_OUTBOUND_PORTS", "8"),
    ("", "--outbound-ipv4-loopback-cidr", "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.0/8"),
    ("", "--outbound-owner-groups", "ISTIO_OUTBOUND_OWNER_GROUPS", "9"),
    ("", "--outbound-owner-groups-exclude", "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "10"),
    ("", "--dual-stack=true", "DUAL_STACK", "true"),
    ("", "--dual-stack", "ISTIO_DUAL_STACK", "true"),
    ("", "--ipv6", "", "on"),
];

#[test]
fn short_long_and_variable_mean_the_same() {
    let mut seen = vec![Policy::default()];
    for &(short, long, variable, value) in FLAGS {
        let args = if long.starts_with("--dual-stack") {
            vec![long]
        } else {
            vec![long, value]
        };
        let by_long = policy_env(&args, &[]);
        if !short.is_empty() {
            assert_eq!(policy_env(&[short, value], &[]), by_long, "{short}");
        }
        if !variable.is_empty() {
            assert_eq!(policy_env(&[], &[(variable, value)]), by_long, "{variable}");
        }
        assert!(
            !seen.contains(&by_long) || long == "--dual-stack",
            "{long} changes a field of its own"
        );
        seen.push(by_long);
    }
}

#[test]
fn command_line_beats_environment_beats_default() {
    let variables = [
        ("INBOUND_CAPTURE_PORT", "2000"),
        ("ISTIO_INBOUND_PORTS", "80"),
        ("PROXY_UID", "5"),
    ];
    let policy = policy_env(&["-b", "*"], &variables);
    assert_eq!(policy.inbound_port, 2000);
    assert_eq!(policy.inbound_ports, Scope::All);
    assert_eq!(policy.outbound_port, 15001);
    assert_eq!(policy.proxy_gids, ids(&[(5, 5)]));
    // An empty flag is given all the same.
    assert_eq!(
        policy_env(&["-b", ""], &variables).inbound_ports,
        Scope::Listed(vec![])
    );
    // So the variable's bad value does not matter.
    assert_eq!(
        policy_env(&["-z", "9"], &[("INBOUND_CAPTURE_PORT", "x")]).inbound_port,
        9
    );
}

#[test]
fn later_variable_beats_earlier_one() {
    let variables = [("DUAL_STACK", "true"), ("ISTIO_DUAL_STACK", "false")];
    assert_eq!(policy_env(&[], &variables).ipv6, Ipv6::Auto);
    assert_eq!(
        policy_env(&["--dual-stack"], &variables).ipv6,
        Ipv6::DualStack
    );
}

#[test]
fn envoy_port_has_no_variable() {
    assert_eq!(policy_env(&[], &[("ENVOY_PORT", "2")]).outbound_port, 15001);
}

#[test]
fn flag_given_twice_counts_as_its_last() {
    assert_eq!(policy(&["-p", "1", "-p", "2"]).outbound_port, 2);
}

#[test]
fn option_that_asks_for_nothing_is_fine() {
    let args = [
        "--redirect-dns=false",
        "--capture-all-dns",
        "-c",
        "",
        "-k",
        ",",
        "--resolv-conf",
        "/read/only/when/needed",
        "-m",
        "REDIRECT",
        "-t",
        "5",
        "-r",
        "6",
    ];
    assert_eq!(policy(&args), Policy::default());
    let variables = [
        ("REDIRECT_DNS", "true"),
        ("ISTIO_META_DNS_CAPTURE", "false"),
        ("ISTIO_INBOUND_INTERCEPTION_MODE", ""),
    ];
    assert_eq!(policy_env(&[], &variables), Policy::default());
}

#[test]
fn tproxy_takes_mark_and_table() {
    let mode = |args: &[&str], variables: &[(&str, &str)]| policy_env(args, variables).mode;
    let tproxy = |mark, table| Mode::Tproxy { mark, table };
    assert_eq!(mode(&["-m", "TPROXY"], &[]), tproxy(1337, 133));
    assert_eq!(
        mode(
            &["-m", " TPROXY ", "-t", "4294967295", "-r", " 1 "],
            &[("ISTIO_INBOUND_TPROXY_MARK", "7")]
        ),
        tproxy(u32::MAX, 1)
    );
    let variables = [
        ("ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY"),
        ("ISTIO_INBOUND_TPROXY_MARK", "7"),
        ("ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "8"),
    ];
    assert_eq!(mode(&[], &variables), tproxy(7, 8));
    assert_eq!(mode(&["-m", ""], &variables), Mode::Redirect);
}

#[test]
fn dns_capture_is_off_by_list_or_all() {
    let file = std::env::temp_dir().join(format!("resolv-conf-{}", std::process::id()));
    let path = file.display().to_string();
    let dns = |text: &str, args: &[&str], variables: &[(&str, &str)]| {
        std::fs::write(&file, text).expect("a temporary file");
        let dns = policy_env(&[args, &["--resolv-conf", &path]].concat(), variables).dns;
        std::fs::remove_file(&file).expect("just written");
        dns
    };
    let text = "nameserver 10.96.0.10\nnameserver x\n";
    let servers = Dns::Servers(vec!["10.96.0.10".parse().expect("an address")]);
    assert_eq!(dns(text, &[], &[]), Dns::Off);
    assert_eq!(dns(text, &["--capture-all-dns"], &[]), Dns::Off);
    assert_eq!(dns(text, &["--redirect-dns"], &[]), servers);
    for variable in ["REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"] {
        assert_eq!(dns(text, &[], &[(variable, "true")]), servers);
    }
    let all = [("CAPTURE_ALL_DNS", "1")];
    assert_eq!(dns(text, &["--redirect-dns"], &all), Dns::All);
    assert_eq!(
        dns(text, &["--redirect-dns", "--capture-all-dns=false"], &all),
        servers
    );
    assert_eq!(dns("nameserver x", &["--redirect-dns"], &[]), Dns::Off);
}

#[test]
fn interfaces_are_read_as_patterns() {
    let named = |policy: &Policy| {
        let list = |patterns: &[InterfacePattern]| {
            let printed: Vec<_> = patterns.iter().map(ToString::to_string).collect();
            printed.join(",")
        };
        (
            list(&policy.exclude_interfaces),
            list(&policy.virtual_interfaces),
        )
    };
    let expected = ("eth1,net+".to_owned(), "tap0".to_owned());
    assert_eq!(
        named(&policy_env(&["-c", "net+, eth1,eth1", "-k", "tap0"], &[])),
        expected
    );
    let variables = [
        ("ISTIO_EXCLUDE_INTERFACES", "eth1,net+"),
        ("KUBE_VIRT_INTERFACES", "tap0"),
    ];
    assert_eq!(named(&policy_env(&[], &variables)), expected);
}

#[test]
fn command_after_two_dashes_is_left_alone() {
    let Ok(cli) = Cli::try_parse_from([
        "redirect",
        "-i",
        "*",
        "--dual-stack",
        "--",
        "curl",
        "-p",
        "x",
    ]) else {
        panic!("not parsed");
    };
    assert_eq!(cli.command, ["curl", "-p", "x"]);
    assert_eq!(cli.flags.dual_stack.as_deref(), Some("true"));
}

#[test]
fn ports_odd_but_valid_are_accepted() {
    for (text, expected) in [
        ("80, 443", ports(&[(80, 80), (443, 443)])),
        (" 443 ,80,80", ports(&[(80, 80), (443, 443)])),
        ("8000:9000", ports(&[(8000, 9000)])),
        ("8000-9000", ports(&[(8000, 9000)])),
        ("8000 - 9000", ports(&[(8000, 9000)])),
        ("8000-8000", ports(&[(8000, 8000)])),
        ("65000:", ports(&[(65000, 65535)])),
        (":1023", ports(&[(0, 1023)])),
        ("0", ports(&[(0, 0)])),
        ("0-65535", ports(&[(0, 65535)])),
        ("http", ports(&[(80, 80)])),
        ("www", ports(&[(80, 80)])),
        ("http-alt", ports(&[(8080, 8080)])),
        ("3com-tsmux", ports(&[(106, 106)])),
        ("http:https", ports(&[(80, 443)])),
        ("80,", ports(&[(80, 80)])),
        (",,80,,", ports(&[(80, 80)])),
        (",", vec![]),
        ("", vec![]),
        (" ", vec![]),
        ("81,80,79", ports(&[(79, 81)])),
        ("10-30,20-40,35", ports(&[(10, 40)])),
        ("65535,65534", ports(&[(65534, 65535)])),
    ] {
        let policy = policy(&["-b", text, "-d", text, "-o", text, "-q", text]);
        assert_eq!(
            policy.inbound_ports,
            Scope::Listed(expected.clone()),
            "{text:?}"
        );
        assert_eq!(policy.exclude_inbound_ports, expected, "{text:?}");
        assert_eq!(policy.exclude_outbound_ports, expected, "{text:?}");
        assert_eq!(policy.include_outbound_ports, expected, "{text:?}");
    }
    assert_eq!(policy(&["-b", " * "]).inbound_ports, Scope::All);
    assert_eq!(policy(&["-p", "9", "-z", " 9 "]).inbound_port, 9);
}

#[test]
fn cidrs_odd_but_valid_are_accepted() {
    for (text, expected) in [
        ("10.0.0.5/8", "10.0.0.0/8"),
        ("10.0.0.1/8, 10.0.0.2/8,", "10.0.0.0/8"),
        ("fd00::1/8,10.0.0.0/8", "10.0.0.0/8,fd00::/8"),
        ("0.0.0.0/0,::/0", "0.0.0.0/0,::/0"),
        (
            "192.0.2.1/32,2001:DB8::1/128",
            "192.0.2.1/32,2001:db8::1/128",
        ),
        ("10.0.0.0/25,10.0.0.128/25", "10.0.0.0/25,10.0.0.128/25"),
        ("", ""),
        (",", ""),
    ] {
        let policy = policy(&["-i", text, "-x", text]);
        assert_eq!(
            policy.include_outbound_cidrs.to_string(),
            expected,
            "{text:?}"
        );
        assert_eq!(
            Scope::Listed(policy.exclude_outbound_cidrs).to_string(),
            expected,
            "{text:?}"
        );
    }
    assert_eq!(policy(&["-i", "*"]).include_outbound_cidrs, Scope::All);
    assert_eq!(
        policy(&["--outbound-ipv4-loopback-cidr", "127.5.6.7/8"])
            .loopback
            .to_string(),
        "127.0.0.0/8"
    );
}

#[test]
fn loopback_in_include_is_noticed_as_istio_does() {
    for (text, expected) in [
        ("127.1.2.3/32", true),
        ("10.0.0.0/8,::1/128", true),
        ("127.0.0.1/1", true),
        ("0.0.0.0/0", false),
        ("*", false),
        ("", false),
    ] {
        assert_eq!(
            policy(&["-i", text]).loopback_included,
            expected,
            "{text:?}"
        );
    }
}

#[test]
fn proxy_ids_keep_their_order() {
    let policy = policy(&["-u", "9,3, envoy,1000-2000,3,", "-g", "www-data,1"]);
    assert_eq!(
        policy.proxy_uids,
        ids(&[(9, 9), (3, 3), (101, 101), (1000, 2000), (3, 3)])
    );
    assert_eq!(policy.proxy_gids, ids(&[(33, 33), (1, 1)]));
}

#[test]
fn proxy_gid_unset_reads_the_uids_text_as_groups() {
    assert_eq!(policy(&["-u", "5,6-7"]).proxy_gids, ids(&[(5, 5), (6, 7)]));
    let named = policy(&["-u", "envoy", "-g", ""]);
    assert_eq!(
        (named.proxy_uids, named.proxy_gids),
        (ids(&[(101, 101)]), ids(&[(102, 102)]))
    );
}

#[test]
fn proxy_uid_unset_is_looked_up() {
    let envoy = policy_env(&["-u", ""], &[("ENVOY_USER", "loner"), ("PROXY_UID", "1")]);
    assert_eq!(
        (envoy.proxy_uids, envoy.proxy_gids),
        (ids(&[(7, 7)]), ids(&[(7, 7)]))
    );
    assert_eq!(
        policy_env(&[], &[("ENVOY_USER", "nobody-here")]),
        Policy::default()
    );
    let only_gid = policy_env(&["-g", "4"], &[("ENVOY_USER", "loner")]);
    assert_eq!(
        (only_gid.proxy_uids, only_gid.proxy_gids),
        (ids(&[(7, 7)]), ids(&[(4, 4)]))
    );
}

#[test]
fn id_limits_are_inclusive() {
    let sixteen = (0..16)
        .map(|id| id.to_string())
        .collect::<Vec<_>>()
        .join(",");
    assert_eq!(policy(&["-u", &sixteen]).proxy_gids.len(), 16);
    let groups = (0..64)
        .map(|id| (id * 2).to_string())
        .collect::<Vec<_>>()
        .join(",");
    let flags = [
        "--outbound-owner-groups",
        &groups,
        "--outbound-owner-groups-exclude",
        &groups,
    ];
    assert_eq!(policy(&flags).owner_groups.listed().len(), 64);
    assert_eq!(
        policy(&["-u", "4294967294"]).proxy_uids,
        ids(&[(u32::MAX - 1, u32::MAX - 1)])
    );
}

#[test]
fn owner_groups_are_a_set() {
    let include = |text| policy(&["--outbound-owner-groups", text]).owner_groups;
    assert_eq!(include("*"), Scope::All);
    assert_eq!(include(""), Scope::Listed(vec![]));
    assert_eq!(
        include("envoy, 4,3,10-20,15"),
        Scope::Listed(ids(&[(3, 4), (10, 20), (102, 102)]))
    );
}

#[test]
fn ipv6_choice_beats_dual_stack() {
    for (args, expected) in [
        (&["--ipv6", "auto"][..], Ipv6::Auto),
        (&["--ipv6", "auto", "--dual-stack"], Ipv6::DualStack),
        (&["--ipv6", "on", "--dual-stack"], Ipv6::On),
        (&["--ipv6=off", "--dual-stack=1"], Ipv6::Off),
        (&["--dual-stack=false"], Ipv6::Auto),
    ] {
        assert_eq!(policy(args).ipv6, expected, "{args:?}");
    }
}

#[test]
fn policy_survives_json() {
    let policy = policy(&[
        "-i",
        "10.0.0.0/8,fd00::/8",
        "-b",
        "*",
        "-d",
        "1-5",
        "--ipv6",
        "on",
        "-u",
        "3,4-5",
    ]);
    let policy = Policy {
        mode: Mode::Tproxy { mark: 1, table: 2 },
        dns: Dns::Servers(vec!["fd00::10".parse().expect("an address")]),
        exclude_interfaces: policy_env(&["-c", "eth1,net+"], &[]).exclude_interfaces,
        ..policy
    };
    let Ok(text) = serde_json::to_string(&policy) else {
        panic!("not written")
    };
    match serde_json::from_str::<Policy>(&text) {
        Ok(read) => assert_eq!(read, policy, "{text}"),
        Err(error) => panic!("{text}: {error}"),
    }
}

#[test]
fn digest_names_the_lists_only() {
    let lists = policy(&["-i", "10.0.0.0/8", "-b", "80,81", "-o", "5"]);
    // Pinned: the loader of another version must find the lists in the kernel again.
    assert_eq!(lists.digest(), 0x1a71_6b8b_1946_5541);
    let same = policy(&[
        "-i",
        "10.0.0.9/8",
        "-b",
        "81-81,80",
        "-o",
        "5,",
        "-u",
        "7",
        "-p",
        "9",
        "--ipv6",
        "on",
    ]);
    assert_eq!(lists.digest(), same.digest());
    let mut digests = vec![lists.digest(), policy(&[]).digest()];
    for args in [
        ["-o", "5"],
        ["-q", "5"],
        ["-b", "5"],
        ["-d", "5"],
        ["-i", "::/0"],
        ["-x", "::/0"],
        ["-x", "0.0.0.0/0"],
    ] {
        digests.push(policy(&args).digest());
    }
    let count = digests.len();
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), count);
}

#[test]
fn ranges_and_scopes_print_as_they_are_written() {
    let policy = policy(&["-b", "80,8000-9000", "-i", "*", "-u", "1000-2000"]);
    assert_eq!(policy.inbound_ports.to_string(), "80,8000-9000");
    assert_eq!(policy.include_outbound_cidrs.to_string(), "*");
    assert_eq!(policy.proxy_uids[0].to_string(), "1000-2000");
    assert_eq!(Scope::<PortRange>::Listed(vec![]).to_string(), "");
}

#[test]
fn system_names_find_root_and_survive_a_nul() {
    assert_eq!(SystemNames.user("root"), Some(0));
    assert_eq!(SystemNames.group("root"), Some(0));
    assert_eq!(SystemNames.user("a\0b"), None);
    assert_eq!(SystemNames.tcp_service("no such service"), None);
}
