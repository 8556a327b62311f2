//! istio-iptables' own flags.

use std::path::Path;
use std::time::Duration;

use super::*;

/// The drop-in's flags as a program has them.
#[derive(Parser)]
struct DropIn {
    #[command(flatten)]
    flags: IstioIptablesFlags,
}

pub(super) fn try_call(
    args: &[&str],
    variables: &[(&str, &str)],
) -> Result<IstioIptables, OptionError> {
    match DropIn::try_parse_from([&["istio-iptables"], args].concat()) {
        Ok(call) => call.flags.validate_with(&env_of(variables), &TestNames),
        Err(error) => panic!("{args:?}: {error}"),
    }
}

fn call(args: &[&str], variables: &[(&str, &str)]) -> IstioIptables {
    try_call(args, variables).unwrap_or_else(|error| panic!("{args:?} {variables:?}: {error}"))
}

/// What Istio's injector writes.
#[rustfmt::skip]
const INJECTED: [&str; 17] = [
    "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*",
    "-d", "15090,15021,15020", "--log_output_level=default:info",
];

#[test]
fn definition_is_consistent() {
    DropIn::command().debug_assert();
}

#[test]
fn injected_arguments_attach() {
    let plain = call(&INJECTED, &[]);
    assert_eq!(plain.policy.include_outbound_cidrs, Scope::All);
    assert_eq!(plain.policy.inbound_ports, Scope::All);
    assert_eq!(
        plain.policy.exclude_inbound_ports,
        ports(&[(15020, 15021), (15090, 15090)])
    );
    assert_eq!(plain.change, Change::Attach);
    assert_eq!((plain.dry_run, plain.validation), (None, None));
}

#[test]
fn injected_arguments_with_cni_only_validate() {
    let cni = [&INJECTED[..], &["--run-validation", "--skip-rule-apply"]].concat();
    let call = call(&cni, &[]);
    let expected = Validation {
        port: 15002,
        timeout: Duration::from_secs(5),
    };
    assert_eq!(
        (call.change, call.validation),
        (Change::None, Some(expected))
    );
}

#[test]
fn variables_mean_what_their_flags_mean() {
    for (flag, variable, expected) in [
        ("--skip-rule-apply", "SKIP_RULE_APPLY", Change::None),
        ("--cleanup-only", "CLEANUP_ONLY", Change::Detach),
    ] {
        assert_eq!(call(&[flag], &[]).change, expected, "{flag}");
        assert_eq!(call(&[], &[(variable, "true")]).change, expected);
        let off = format!("{flag}=false");
        assert_eq!(call(&[&off], &[(variable, "true")]).change, Change::Attach);
    }
    assert_eq!(
        call(&["--skip-rule-apply", "--cleanup-only"], &[]).change,
        Change::None
    );
    let path = ("DRY_RUN_FILE_PATH", "/tmp/rules");
    assert_eq!(call(&[], &[path]).dry_run, None);
    for (args, variables) in [
        (&["-n"][..], &[path][..]),
        (&["--dry-run"], &[path]),
        (&[], &[path, ("DRY_RUN", "1")]),
    ] {
        let transcript = call(args, variables).dry_run.and_then(|dry| dry.transcript);
        assert_eq!(transcript.as_deref(), Some(Path::new("/tmp/rules")));
    }
    let variables = [
        ("RUN_VALIDATION", "T"),
        ("IPTABLES_PROBE_PORT", "1"),
        ("PROBE_TIMEOUT", "2s"),
    ];
    let validation = |args: &[&str]| {
        let validation = call(args, &variables).validation?;
        Some((validation.port, validation.timeout.as_secs()))
    };
    assert_eq!(validation(&[]), Some((1, 2)));
    assert_eq!(
        validation(&["--iptables-probe-port", "3", "--probe-timeout=4s"]),
        Some((3, 4))
    );
    assert_eq!(validation(&["--run-validation=false"]), None);
}

#[test]
fn timeouts_are_gos_durations() {
    for (text, milliseconds) in [
        ("5s", 5000),
        ("500ms", 500),
        ("1m30s", 90_000),
        ("1.5h", 5_400_000),
        (".5s", 500),
        ("1s500000us", 1500),
        ("1s500000µs", 1500),
        ("1000000000ns", 1000),
    ] {
        let args = ["--run-validation", "--probe-timeout", text];
        let timeout = call(&args, &[])
            .validation
            .map(|validation| validation.timeout);
        assert_eq!(timeout, Some(Duration::from_millis(milliseconds)), "{text}");
    }
}

#[test]
fn flags_without_effect_have_none() {
    let expected = call(&[], &[]);
    for args in [
        &["--reconcile"][..],
        &["--force-apply=true"],
        &["--drop-invalid"],
        &["--force-iptables-binary", "legacy"],
        &["--force-iptables-binary=nft"],
        &["--force-iptables-binary", ""],
        &["--native-nftables"],
        &["--cni-mode"],
        &["--network-namespace", "/run/netns/x"],
        &["--log_output_level", "default:debug,xds:none"],
        &["--log_as_json"],
    ] {
        assert_eq!(call(args, &[]), expected, "{args:?}");
    }
    for (variable, value) in [
        ("RECONCILE", "true"),
        ("FORCE_APPLY", "1"),
        ("DROP_INVALID", "t"),
        ("INVALID_DROP", "TRUE"),
        ("FORCE_IPTABLES_BINARY", "nft"),
        ("NATIVE_NFTABLES", "True"),
        ("CNI_MODE", "true"),
        ("NETWORK_NAMESPACE", "x"),
    ] {
        assert_eq!(call(&[], &[(variable, value)]), expected, "{variable}");
    }
}

const BOOLEAN: &str = "allowed are true and false";
const PORT: &str = "allowed are 1-65535";
const DURATION: &str = "allowed are durations above 0 such as 5s, 500ms or 1m30s";
const BINARY: &str = "allowed are legacy and nft";

/// Flag, its variable, a value; the message behind the origin; what is allowed; whether istio-iptables' flag parser ends with 255.
#[rustfmt::skip]
const REFUSED: &[(&str, &str, &str, &str, &str, bool)] = &[
    ("--dry-run", "DRY_RUN", "maybe", "is not a boolean", BOOLEAN, true),
    ("--skip-rule-apply", "SKIP_RULE_APPLY", "yes", "is not a boolean", BOOLEAN, true),
    ("--cleanup-only", "CLEANUP_ONLY", "2", "is not a boolean", BOOLEAN, true),
    ("--run-validation", "RUN_VALIDATION", "on", "is not a boolean", BOOLEAN, true),
    ("--iptables-probe-port", "IPTABLES_PROBE_PORT", "abc", "is not a port to connect to", PORT, true),
    ("--iptables-probe-port", "IPTABLES_PROBE_PORT", "0", "is not a port to connect to", PORT, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "5", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "0s", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "-5s", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "1.2.3s", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", ".s", "is not a time to wait", DURATION, true),
    ("--probe-timeout", "PROBE_TIMEOUT", "5d", "is not a time to wait", DURATION, true),
    ("--reconcile", "RECONCILE", "x", "is not a boolean", BOOLEAN, true),
    ("--force-apply", "FORCE_APPLY", "x", "is not a boolean", BOOLEAN, true),
    ("--drop-invalid", "DROP_INVALID", "x", "is not a boolean", BOOLEAN, true),
    ("--drop-invalid", "INVALID_DROP", "x", "is not a boolean", BOOLEAN, true),
    ("--native-nftables", "NATIVE_NFTABLES", "x", "is not a boolean", BOOLEAN, true),
    ("--cni-mode", "CNI_MODE", "x", "is not a boolean", BOOLEAN, true),
    ("--log_as_json", "", "x", "is not a boolean", BOOLEAN, true),
    ("--force-iptables-binary", "FORCE_IPTABLES_BINARY", "nftables", "is not an iptables binary", BINARY, false),
    ("--dual-stack", "ISTIO_DUAL_STACK", "x", "is not a boolean", BOOLEAN, true),
    ("--envoy-port", "", "0", "is not a port to listen on", PORT, false),
];

#[test]
fn bad_values_are_refused_with_their_message() {
    for &(flag, variable, value, problem, allowed, unparsable) in REFUSED {
        let typed = format!("{flag}={value}");
        let mut refusals = vec![(flag, try_call(&[&typed], &[]), unparsable)];
        if !variable.is_empty() {
            refusals.push((variable, try_call(&[], &[(variable, value)]), false));
        }
        for (origin, refused, unparsable) in refusals {
            let Err(error) = refused else {
                panic!("{origin} {value:?} accepted");
            };
            let expected = format!("{origin}: {value:?} {problem}: {allowed}");
            assert_eq!(error.to_string(), expected);
            assert_eq!(error.is_unparsable_flag(), unparsable, "{error}");
        }
    }
}

#[test]
fn every_flag_and_variable_has_a_refused_value() {
    let (all, all_variables) = refused::flags_and_variables(&DropIn::command());
    let (capture, capture_variables) = refused::flags_and_variables(&Cli::command());
    // Any path and any log level will do: nothing is done with them.
    let anything = [
        "--network-namespace",
        "--log_output_level",
        "NETWORK_NAMESPACE",
    ];
    let names = all.iter().chain(&all_variables);
    let own: Vec<_> = names
        .filter(|name| !capture.contains(name) && !capture_variables.contains(name))
        .filter(|name| !anything.contains(&name.as_str()))
        .collect();
    for name in &own {
        let refused = REFUSED
            .iter()
            .any(|row| [row.0, row.1].contains(&name.as_str()));
        assert!(refused, "{name}");
    }
    assert!(own.len() >= 25, "{own:?}");
}
