//! Every option has values that are refused, each with one line that names the option, the value and what is allowed.

use super::*;

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
const MODE: &str = "allowed are REDIRECT and TPROXY";
const NUMBER: &str = "allowed are 1-4294967295";
const INTERFACES: &str =
    "allowed are interface names of 1-15 characters, and prefixes of names such as eth+";
const BOOLEAN: &str = "allowed are true and false";
const IPV6: &str = "allowed are auto, on and off";

/// Arguments; the message up to what is allowed; what is allowed.
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
    (&["--capture-all-dns=maybe"], r#"--capture-all-dns: "maybe" is not a boolean"#, BOOLEAN),
    (&["-t", "abc"], r#"--istio-inbound-tproxy-mark: "abc" is not a mark"#, NUMBER),
    (&["-t", "0"], r#"--istio-inbound-tproxy-mark: "0" is not a mark"#, NUMBER),
    (&["-t", "0x539"], r#"--istio-inbound-tproxy-mark: "0x539" is not a mark"#, NUMBER),
    (&["-t", "4294967296"], r#"--istio-inbound-tproxy-mark: "4294967296" is not a mark"#, NUMBER),
    (&["-t", ""], r#"--istio-inbound-tproxy-mark: "" is not a mark"#, NUMBER),
    (&["-r", "main"], r#"--istio-inbound-tproxy-route-table: "main" is not a routing table"#, NUMBER),
    (&["-r", "-1"], r#"--istio-inbound-tproxy-route-table: "-1" is not a routing table"#, NUMBER),
    // Interfaces.
    (&["-c", "eth0,abcdefghijklmnop"], r#"--istio-exclude-interfaces: "eth0,abcdefghijklmnop": "abcdefghijklmnop" is longer than 15 characters"#, INTERFACES),
    (&["-c", "eth*"], r#"--istio-exclude-interfaces: "eth*" has a *, where a + at the end means any ending"#, INTERFACES),
    (&["-c", "!eth0"], r#"--istio-exclude-interfaces: "!eth0" has a !, but names cannot be negated"#, INTERFACES),
    (&["-k", "a/b"], r#"--kube-virt-interfaces: "a/b" is not a name that an interface can have"#, INTERFACES),
    (&["-k", "eth0 eth1"], r#"--kube-virt-interfaces: "eth0 eth1" is not a name that an interface can have"#, INTERFACES),
    (&["-k", ".."], r#"--kube-virt-interfaces: ".." is not a name that an interface can have"#, INTERFACES),
    (&["-k", "eth0:1"], r#"--kube-virt-interfaces: "eth0:1" is not a name that an interface can have"#, INTERFACES),
];

/// Variable and value; the message up to what is allowed; what is allowed.
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
    ("CAPTURE_ALL_DNS", "yes", r#"CAPTURE_ALL_DNS: "yes" is not a boolean"#, BOOLEAN),
    ("REDIRECT_DNS", "yes", r#"REDIRECT_DNS: "yes" is not a boolean"#, BOOLEAN),
    ("ISTIO_META_DNS_CAPTURE", "x", r#"ISTIO_META_DNS_CAPTURE: "x" is not a boolean"#, BOOLEAN),
    ("ISTIO_INBOUND_TPROXY_MARK", "-1", r#"ISTIO_INBOUND_TPROXY_MARK: "-1" is not a mark"#, NUMBER),
    ("ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "", r#"ISTIO_INBOUND_TPROXY_ROUTE_TABLE: "" is not a routing table"#, NUMBER),
    ("ISTIO_EXCLUDE_INTERFACES", "eth0/1", r#"ISTIO_EXCLUDE_INTERFACES: "eth0/1" is not a name that an interface can have"#, INTERFACES),
    ("KUBE_VIRT_INTERFACES", "tap0,*", r#"KUBE_VIRT_INTERFACES: "tap0,*": "*" has a *, where a + at the end means any ending"#, INTERFACES),
    ("DUAL_STACK", "2", r#"DUAL_STACK: "2" is not a boolean"#, BOOLEAN),
    ("ISTIO_DUAL_STACK", "on", r#"ISTIO_DUAL_STACK: "on" is not a boolean"#, BOOLEAN),
];

/// Long names of a command's flags, and the variables that their help texts name.
pub(super) fn flags_and_variables(command: &clap::Command) -> (Vec<String>, Vec<String>) {
    let (mut flags, mut variables) = (Vec::new(), Vec::new());
    for argument in command.get_arguments() {
        flags.extend(argument.get_long().map(|long| format!("--{long}")));
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        if let Some((_, names)) = help.split_once("[env: ") {
            variables.extend(names.trim_end_matches(']').split(", ").map(str::to_owned));
        }
    }
    (flags, variables)
}

#[test]
fn every_flag_and_variable_has_a_refused_value() {
    let (flags, variables) = flags_and_variables(&Cli::command());
    let named = |rows: &[&str], name: &str| {
        let start = format!("{name}: ");
        rows.iter().any(|row| row.starts_with(&start))
    };
    let rows: Vec<_> = REFUSED_FLAGS.iter().map(|row| row.1).collect();
    for flag in &flags {
        // Its file is refused, not its value: see below.
        assert!(named(&rows, flag) || flag == "--resolv-conf", "{flag}");
    }
    let rows: Vec<_> = REFUSED_VARIABLES.iter().map(|row| row.2).collect();
    for variable in &variables {
        assert!(named(&rows, variable), "{variable}");
    }
    assert!(
        flags.len() >= 23 && variables.len() >= 23,
        "{flags:?} {variables:?}"
    );
}

fn assert_refused(args: &[&str], variables: &[(&str, &str)], fault: &str, rest: &str) {
    match try_policy(args, variables) {
        Ok(policy) => panic!("{args:?} {variables:?} accepted: {policy:?}"),
        Err(error) => assert_eq!(
            error.to_string(),
            format!("{fault}: {rest}"),
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
fn unreadable_resolv_conf_is_refused_when_it_is_needed() {
    let args = ["--redirect-dns", "--resolv-conf", "/no/such/file"];
    match try_policy(&args, &[]) {
        Ok(_) => panic!("accepted"),
        Err(error) => assert_eq!(
            error.to_string(),
            r#"--resolv-conf: "/no/such/file" cannot be read: No such file or directory (os error 2)"#
        ),
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
