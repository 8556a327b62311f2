//! Options as a user gives them: arguments and variables in, policy or message out.

use std::collections::HashMap;

use clap::{CommandFactory, Parser};
use proptest::prelude::*;

use super::*;

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

fn try_policy(args: &[&str], variables: &[(&str, &str)]) -> Result<Policy, OptionError> {
    let env = |name: &str| {
        let set = variables.iter().find(|(variable, _)| *variable == name)?;
        Some(set.1.to_owned())
    };
    parse(args).validate_with(&env, &TestNames)
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
        let by_long = policy(&args);
        if !short.is_empty() {
            assert_eq!(policy(&[short, value]), by_long, "{short}");
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
fn unsupported_option_that_asks_for_nothing_is_fine() {
    let args = [
        "--redirect-dns=false",
        "--capture-all-dns=F",
        "-c",
        "",
        "-k",
        ",",
        "--resolv-conf",
        "",
        "-m",
        "REDIRECT",
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

const PORT: &str = "allowed are 1-65535";
const PORTS: &str =
    "allowed are 0-65535, ranges LOW-HIGH or LOW:HIGH, and service names of /etc/services";
const PORTS_ALL: &str = "allowed are 0-65535, ranges LOW-HIGH or LOW:HIGH, service names of /etc/services, or * for all";
const CIDRS: &str = "allowed are CIDRs such as 10.0.0.0/8 or fd00::/8";
const CIDRS_ALL: &str = "allowed are CIDRs such as 10.0.0.0/8 or fd00::/8, or * for all";
const LOOPBACK: &str = "allowed are IPv4 CIDRs within 127.0.0.0/8, with a prefix length of 8-32";
const UIDS: &str = "allowed are uids 0-4294967294, ranges LOW-HIGH, and user names";
const GIDS: &str = "allowed are gids 0-4294967294, ranges LOW-HIGH, and group names";
const GIDS_ALL: &str = "allowed are gids 0-4294967294, ranges LOW-HIGH, group names, or * for all";
const MODE: &str = "allowed are REDIRECT (TPROXY is not supported yet)";
const BOOLEAN: &str = "allowed are true and false";
const IPV6: &str = "allowed are auto, on and off";
const LATER: &str = "is not supported yet";

/// Arguments; the message up to what is allowed; what is allowed, or [`LATER`].
#[rustfmt::skip]
const REFUSED_FLAGS: &[(&[&str], &str, &str)] = &[
    // Listening ports.
    (&["-p", "0"], r#"--envoy-port: "0" is not a port to listen on"#, PORT),
    (&["-p", ""], r#"--envoy-port: "" is not a port to listen on"#, PORT),
    (&["-p", "65536"], r#"--envoy-port: "65536" is not a port to listen on"#, PORT),
    (&["-p", "-1"], r#"--envoy-port: "-1" is not a port to listen on"#, PORT),
    (&["-p", "+1"], r#"--envoy-port: "+1" is not a port to listen on"#, PORT),
    (&["-p", "015001"], r#"--envoy-port: "015001" is not a port to listen on"#, PORT),
    (&["-p", "0x10"], r#"--envoy-port: "0x10" is not a port to listen on"#, PORT),
    (&["-p", "http"], r#"--envoy-port: "http" is not a port to listen on"#, PORT),
    (&["-p", "1,2"], r#"--envoy-port: "1,2" is not a port to listen on"#, PORT),
    (&["-p", "99999999999999999999"], r#"--envoy-port: "99999999999999999999" is not a port to listen on"#, PORT),
    (&["-p", "1\n2"], r#"--envoy-port: "1\n2" is not a port to listen on"#, PORT),
    (&["-z", "70000"], r#"--inbound-capture-port: "70000" is not a port to listen on"#, PORT),
    (&["-z", "0"], r#"--inbound-capture-port: "0" is not a port to listen on"#, PORT),
    (&["-e", "0"], r#"--inbound-tunnel-port: "0" is not a port to listen on"#, PORT),
    (&["-e", "*"], r#"--inbound-tunnel-port: "*" is not a port to listen on"#, PORT),
    // Lists of ports.
    (&["-b", "80,abc"], r#"--istio-inbound-ports: "80,abc": "abc" is not a port"#, PORTS_ALL),
    (&["-b", "abc"], r#"--istio-inbound-ports: "abc" is not a port"#, PORTS_ALL),
    (&["-b", "70000"], r#"--istio-inbound-ports: "70000" is not a port"#, PORTS_ALL),
    (&["-b", "*,80"], r#"--istio-inbound-ports: "*,80": "*" must stand alone"#, PORTS_ALL),
    (&["-b", "**"], r#"--istio-inbound-ports: "**" is not a port"#, PORTS_ALL),
    (&["-b", "010"], r#"--istio-inbound-ports: "010" is not a port"#, PORTS_ALL),
    (&["-b", "-1"], r#"--istio-inbound-ports: "-1" is not a port"#, PORTS_ALL),
    (&["-b", "-d"], r#"--istio-inbound-ports: "-d" is not a port"#, PORTS_ALL),
    (&["-b", "80 443"], r#"--istio-inbound-ports: "80 443" is not a port"#, PORTS_ALL),
    (&["-b", "80;443"], r#"--istio-inbound-ports: "80;443" is not a port"#, PORTS_ALL),
    (&["-b", "80/tcp"], r#"--istio-inbound-ports: "80/tcp" is not a port"#, PORTS_ALL),
    (&["-b", "!80"], r#"--istio-inbound-ports: "!80" is not a port"#, PORTS_ALL),
    (&["-b", "tftp"], r#"--istio-inbound-ports: "tftp" is not a port"#, PORTS_ALL),
    (&["-b", "odd"], r#"--istio-inbound-ports: "odd" is not a port"#, PORTS_ALL),
    (&["-b", "9000:8000"], r#"--istio-inbound-ports: "9000:8000" is a range whose low end is above its high end"#, PORTS_ALL),
    (&["-b", "9000-8000"], r#"--istio-inbound-ports: "9000-8000" is a range whose low end is above its high end"#, PORTS_ALL),
    (&["-b", "80-"], r#"--istio-inbound-ports: "80-" is not a port or a range of ports"#, PORTS_ALL),
    (&["-b", ":"], r#"--istio-inbound-ports: ":" is not a port or a range of ports"#, PORTS_ALL),
    (&["-b", "1-2-3"], r#"--istio-inbound-ports: "1-2-3" is not a port or a range of ports"#, PORTS_ALL),
    (&["-b", "1:70000"], r#"--istio-inbound-ports: "1:70000" is not a port or a range of ports"#, PORTS_ALL),
    (&["-d", "*"], r#"--istio-local-exclude-ports: "*" is not a port"#, PORTS),
    (&["-d", "15020,x"], r#"--istio-local-exclude-ports: "15020,x": "x" is not a port"#, PORTS),
    (&["-o", "*"], r#"--istio-local-outbound-ports-exclude: "*" is not a port"#, PORTS),
    (&["-o", "53,65536"], r#"--istio-local-outbound-ports-exclude: "53,65536": "65536" is not a port"#, PORTS),
    (&["-q", "*"], r#"--istio-outbound-ports: "*" is not a port"#, PORTS),
    (&["-q", "2:1"], r#"--istio-outbound-ports: "2:1" is a range whose low end is above its high end"#, PORTS),
    (&["-q", "8०"], r#"--istio-outbound-ports: "8०" is not a port"#, PORTS),
    // CIDRs.
    (&["-i", "10.0.0.0"], r#"--istio-service-cidr: "10.0.0.0" has no prefix length (did you mean 10.0.0.0/32?)"#, CIDRS_ALL),
    (&["-i", "fd00::1"], r#"--istio-service-cidr: "fd00::1" has no prefix length (did you mean fd00::1/128?)"#, CIDRS_ALL),
    (&["-i", "*,10.0.0.0/8"], r#"--istio-service-cidr: "*,10.0.0.0/8": "*" must stand alone"#, CIDRS_ALL),
    (&["-i", "abc"], r#"--istio-service-cidr: "abc" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "example.com/8"], r#"--istio-service-cidr: "example.com/8" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "10.0.0/8"], r#"--istio-service-cidr: "10.0.0/8" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "10.0.0.256/8"], r#"--istio-service-cidr: "10.0.0.256/8" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "010.0.0.0/8"], r#"--istio-service-cidr: "010.0.0.0/8" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "fe80::1%eth0/64"], r#"--istio-service-cidr: "fe80::1%eth0/64" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "/8"], r#"--istio-service-cidr: "/8" is not a CIDR"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/33"], r#"--istio-service-cidr: "10.0.0.0/33" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/"], r#"--istio-service-cidr: "10.0.0.0/" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/08"], r#"--istio-service-cidr: "10.0.0.0/08" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/-1"], r#"--istio-service-cidr: "10.0.0.0/-1" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/255.0.0.0"], r#"--istio-service-cidr: "10.0.0.0/255.0.0.0" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "10.0.0.0/8/8"], r#"--istio-service-cidr: "10.0.0.0/8/8" has a prefix length that is not 0-32"#, CIDRS_ALL),
    (&["-i", "fd00::/129"], r#"--istio-service-cidr: "fd00::/129" has a prefix length that is not 0-128"#, CIDRS_ALL),
    (&["-i", "::ffff:10.0.0.0/104"], r#"--istio-service-cidr: "::ffff:10.0.0.0/104" is an IPv4-mapped address, to be written as IPv4"#, CIDRS_ALL),
    (&["-x", "*"], r#"--istio-service-exclude-cidr: "*" is not a CIDR"#, CIDRS),
    (&["-x", "10.0.0.0/8,x"], r#"--istio-service-exclude-cidr: "10.0.0.0/8,x": "x" is not a CIDR"#, CIDRS),
    // Loopback CIDR.
    (&["--outbound-ipv4-loopback-cidr", ""], r#"--outbound-ipv4-loopback-cidr: "" is not a CIDR"#, LOOPBACK),
    (&["--outbound-ipv4-loopback-cidr", "127.0.0.1"], r#"--outbound-ipv4-loopback-cidr: "127.0.0.1" has no prefix length (did you mean 127.0.0.1/32?)"#, LOOPBACK),
    (&["--outbound-ipv4-loopback-cidr", "10.0.0.0/8"], r#"--outbound-ipv4-loopback-cidr: "10.0.0.0/8" is not a loopback CIDR"#, LOOPBACK),
    (&["--outbound-ipv4-loopback-cidr", "127.0.0.1/7"], r#"--outbound-ipv4-loopback-cidr: "127.0.0.1/7" covers more than loopback"#, LOOPBACK),
    (&["--outbound-ipv4-loopback-cidr", "::1/128"], r#"--outbound-ipv4-loopback-cidr: "::1/128" is not an IPv4 CIDR"#, LOOPBACK),
    // Users and groups.
    (&["-u", "ghost"], r#"--proxy-uid: "ghost" is not a known user"#, UIDS),
    (&["-u", "1337,ghost"], r#"--proxy-uid: "1337,ghost": "ghost" is not a known user"#, UIDS),
    (&["-u", "4294967295"], r#"--proxy-uid: "4294967295" is not a user id or a range of them"#, UIDS),
    (&["-u", "-1"], r#"--proxy-uid: "-1" is not a user id or a range of them"#, UIDS),
    (&["-u", "01"], r#"--proxy-uid: "01" is not a user id or a range of them"#, UIDS),
    (&["-u", "1-2-3"], r#"--proxy-uid: "1-2-3" is not a user id or a range of them"#, UIDS),
    (&["-u", "2000-1000"], r#"--proxy-uid: "2000-1000" is a range whose low end is above its high end"#, UIDS),
    (&["-u", "*"], r#"--proxy-uid: "*" is not a known user"#, UIDS),
    (&["-u", ","], r#"--proxy-uid: "," names nobody"#, UIDS),
    (&["-g", "ghost"], r#"--proxy-gid: "ghost" is not a known group"#, GIDS),
    (&["-g", "1-"], r#"--proxy-gid: "1-" is not a group id or a range of them"#, GIDS),
    (&["-u", "loner"], r#"--proxy-gid, taken from --proxy-uid: "loner" is not a known group"#, GIDS),
    (&["--outbound-owner-groups", "ghost"], r#"--outbound-owner-groups: "ghost" is not a known group"#, GIDS_ALL),
    (&["--outbound-owner-groups", "*,1"], r#"--outbound-owner-groups: "*,1": "*" must stand alone"#, GIDS_ALL),
    (&["--outbound-owner-groups-exclude", "*"], r#"--outbound-owner-groups-exclude: "*" is not a known group"#, GIDS),
    (&["--outbound-owner-groups-exclude", "9-8"], r#"--outbound-owner-groups-exclude: "9-8" is a range whose low end is above its high end"#, GIDS),
    // Choices.
    (&["-m", "NONE"], r#"--istio-inbound-interception-mode: "NONE" is not an interception mode"#, MODE),
    (&["-m", "tproxy"], r#"--istio-inbound-interception-mode: "tproxy" is not an interception mode"#, MODE),
    (&["--ipv6", "yes"], r#"--ipv6: "yes" is not an IPv6 setting"#, IPV6),
    (&["--ipv6", ""], r#"--ipv6: "" is not an IPv6 setting"#, IPV6),
    (&["--dual-stack=maybe"], r#"--dual-stack: "maybe" is not a boolean"#, BOOLEAN),
    (&["--redirect-dns=maybe"], r#"--redirect-dns: "maybe" is not a boolean"#, BOOLEAN),
    // Not yet.
    (&["-m", "TPROXY"], r#"--istio-inbound-interception-mode: "TPROXY""#, LATER),
    (&["--redirect-dns"], r#"--redirect-dns: "true""#, LATER),
    (&["--capture-all-dns=1"], r#"--capture-all-dns: "1""#, LATER),
    (&["--resolv-conf", "/etc/resolv.conf"], r#"--resolv-conf: "/etc/resolv.conf""#, LATER),
    (&["-c", "eth1"], r#"--istio-exclude-interfaces: "eth1""#, LATER),
    (&["-k", "tap0,tap1"], r#"--kube-virt-interfaces: "tap0,tap1""#, LATER),
];

/// Variable and value; the message up to what is allowed; what is allowed, or [`LATER`].
#[rustfmt::skip]
const REFUSED_VARIABLES: &[(&str, &str, &str, &str)] = &[
    ("INBOUND_CAPTURE_PORT", "", r#"INBOUND_CAPTURE_PORT: "" is not a port to listen on"#, PORT),
    ("INBOUND_TUNNEL_PORT", "x", r#"INBOUND_TUNNEL_PORT: "x" is not a port to listen on"#, PORT),
    ("PROXY_UID", "ghost", r#"PROXY_UID: "ghost" is not a known user"#, UIDS),
    ("PROXY_UID", "loner", r#"--proxy-gid, taken from PROXY_UID: "loner" is not a known group"#, GIDS),
    ("PROXY_GID", "x y", r#"PROXY_GID: "x y" is not a known group"#, GIDS),
    ("ISTIO_SERVICE_CIDR", "10.1.2.3", r#"ISTIO_SERVICE_CIDR: "10.1.2.3" has no prefix length (did you mean 10.1.2.3/32?)"#, CIDRS_ALL),
    ("ISTIO_SERVICE_EXCLUDE_CIDR", "*", r#"ISTIO_SERVICE_EXCLUDE_CIDR: "*" is not a CIDR"#, CIDRS),
    ("ISTIO_INBOUND_PORTS", "80,abc", r#"ISTIO_INBOUND_PORTS: "80,abc": "abc" is not a port"#, PORTS_ALL),
    ("ISTIO_LOCAL_EXCLUDE_PORTS", "abc", r#"ISTIO_LOCAL_EXCLUDE_PORTS: "abc" is not a port"#, PORTS),
    ("ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "a", r#"ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE: "a" is not a port"#, PORTS),
    ("ISTIO_OUTBOUND_PORTS", "3-1", r#"ISTIO_OUTBOUND_PORTS: "3-1" is a range whose low end is above its high end"#, PORTS),
    ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "", r#"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: "" is not a CIDR"#, LOOPBACK),
    ("ISTIO_OUTBOUND_OWNER_GROUPS", "ghost", r#"ISTIO_OUTBOUND_OWNER_GROUPS: "ghost" is not a known group"#, GIDS_ALL),
    ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "*", r#"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: "*" is not a known group"#, GIDS),
    ("ISTIO_INBOUND_INTERCEPTION_MODE", "NONE", r#"ISTIO_INBOUND_INTERCEPTION_MODE: "NONE" is not an interception mode"#, MODE),
    ("ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY", r#"ISTIO_INBOUND_INTERCEPTION_MODE: "TPROXY""#, LATER),
    ("REDIRECT_DNS", "true", r#"REDIRECT_DNS: "true""#, LATER),
    ("ISTIO_META_DNS_CAPTURE", "T", r#"ISTIO_META_DNS_CAPTURE: "T""#, LATER),
    ("CAPTURE_ALL_DNS", "yes", r#"CAPTURE_ALL_DNS: "yes" is not a boolean"#, BOOLEAN),
    ("CAPTURE_ALL_DNS", "true", r#"CAPTURE_ALL_DNS: "true""#, LATER),
    ("ISTIO_EXCLUDE_INTERFACES", "eth+", r#"ISTIO_EXCLUDE_INTERFACES: "eth+""#, LATER),
    ("KUBE_VIRT_INTERFACES", "tap0", r#"KUBE_VIRT_INTERFACES: "tap0""#, LATER),
    ("ISTIO_DUAL_STACK", "on", r#"ISTIO_DUAL_STACK: "on" is not a boolean"#, BOOLEAN),
];

fn assert_refused(args: &[&str], variables: &[(&str, &str)], fault: &str, rest: &str) {
    let separator = if rest == LATER { " " } else { ": " };
    match try_policy(args, variables) {
        Ok(policy) => panic!("{args:?} {variables:?} accepted: {policy:?}"),
        Err(error) => assert_eq!(
            error.to_string(),
            format!("{fault}{separator}{rest}"),
            "{args:?} {variables:?}"
        ),
    }
}

#[test]
fn bad_flags_are_refused_with_their_message() {
    assert!(REFUSED_FLAGS.len() + REFUSED_VARIABLES.len() >= 70);
    for (args, fault, rest) in REFUSED_FLAGS {
        assert_refused(args, &[], fault, rest);
    }
}

#[test]
fn bad_variables_are_refused_with_their_message() {
    for &(variable, value, fault, rest) in REFUSED_VARIABLES {
        assert_refused(&[], &[(variable, value)], fault, rest);
    }
}

#[test]
fn too_long_lists_are_refused_with_their_message() {
    let ones = |count: usize| vec!["1"; count].join(",");
    let (ids, groups) = (ones(17), ones(65));
    let shown_ids = format!("{ids:?}");
    let shown_groups = format!("{groups:?}");
    for (args, expected) in [
        (
            ["-u", &ids],
            format!("--proxy-uid: {shown_ids}: allowed are at most 16 entries, got 17"),
        ),
        (
            ["-g", &ids],
            format!("--proxy-gid: {shown_ids}: allowed are at most 16 entries, got 17"),
        ),
        (
            ["--outbound-owner-groups", &groups],
            format!(
                "--outbound-owner-groups: number of owner groups whose outgoing traffic should be redirected to Envoy \
                 cannot exceed 64, got 65: {shown_groups}"
            ),
        ),
        (
            ["--outbound-owner-groups-exclude", &groups],
            format!(
                "--outbound-owner-groups-exclude: {shown_groups}: allowed are at most 64 entries, got 65"
            ),
        ),
    ] {
        match try_policy(&args, &[]) {
            Ok(_) => panic!("{args:?} accepted"),
            Err(error) => assert_eq!(error.to_string(), expected),
        }
    }
}

#[test]
fn options_of_istio_iptables_that_are_missing_are_unknown() {
    for flag in [
        "--dry-run",
        "-n",
        "--native-nftables",
        "--drop-invalid",
        "-t=1",
        "--istio-service-cidrs=x",
    ] {
        assert!(Cli::try_parse_from(["redirect", flag]).is_err(), "{flag}");
    }
}

#[test]
fn long_value_is_cut_in_the_message() {
    let long = "x".repeat(100_000);
    let Err(error) = try_policy(&["-b", &long], &[]) else {
        panic!("accepted")
    };
    assert!(error.to_string().len() < 1000, "{error}");
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

/// Text that comes close to what options look like, and any other.
fn value() -> impl Strategy<Value = String> {
    prop_oneof!["[0-9a-f:.,/* +-]{0,24}", ".{0,24}", any::<String>()]
}

proptest! {
    #[test]
    fn any_value_gives_a_policy_or_one_line(value in value()) {
        for &(_, flag, variable, _) in FLAGS {
            let flag = format!("{}={value}", flag.split('=').next().unwrap_or_default());
            let flags = try_policy(&[&flag], &[]);
            let variables = try_policy(&[], &[(variable, &value)]);
            for error in [flags, variables].into_iter().filter_map(Result::err) {
                let text = error.to_string();
                prop_assert!(text.lines().count() == 1 && text.starts_with(|c: char| c == '-' || c.is_ascii_uppercase()), "{text}");
            }
        }
    }

    #[test]
    fn ports_printed_and_read_again_are_the_same(pairs in prop::collection::vec((any::<u16>(), any::<u16>()), 0..20)) {
        let text = pairs.iter().map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))).collect::<Vec<_>>().join(",");
        let first = policy(&["-b", &text]).inbound_ports;
        let printed = first.to_string();
        prop_assert_eq!(&policy(&["-b", &printed]).inbound_ports, &first);
        // A set of ranges changes only at their ends.
        let ends = pairs.iter().flat_map(|&(a, b)| [a, b]);
        for port in ends.flat_map(|end| [end.saturating_sub(1), end, end.saturating_add(1)]) {
            let given = pairs.iter().any(|(a, b)| (a.min(b)..=a.max(b)).contains(&&port));
            let kept = first.listed().iter().any(|range| (range.first..=range.last).contains(&port));
            prop_assert_eq!(given, kept, "{}", port);
        }
    }
}
