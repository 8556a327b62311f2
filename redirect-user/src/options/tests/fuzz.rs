//! Random values: each gives a policy in canonical form, or one line that names where it was given.

use std::net::IpAddr;

use ipnet::IpNet;
use prop::collection::vec;
use prop::sample::{Index, select};
use proptest::prelude::*;

use super::istio_iptables::try_call;
use super::*;
use crate::fuzz::{bytes, config, is_one_line, text};
use crate::options::dns::servers_in;
use crate::options::setting::number;

fn port() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u16>().prop_map(|port| port.to_string()),
        (any::<u16>(), any::<u16>()).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
        (any::<u16>(), any::<u16>()).prop_map(|(a, b)| format!("{}:{}", a.min(b), a.max(b))),
        any::<u16>().prop_map(|port| format!(":{port}")),
        any::<u16>().prop_map(|port| format!("{port}:")),
        select(&["http", "http-alt", "3com-tsmux", "www:443"][..]).prop_map(str::to_owned),
    ]
}

fn net() -> impl Strategy<Value = String> {
    let prefix = |bits: u8| prop_oneof![4 => 0..=bits, 1 => any::<u8>()];
    prop_oneof![
        (any::<[u8; 4]>(), prefix(32)).prop_map(|(ip, n)| format!("{}/{n}", IpAddr::from(ip))),
        (any::<[u16; 8]>(), prefix(128)).prop_map(|(ip, n)| format!("{}/{n}", IpAddr::from(ip))),
        (any::<[u8; 3]>(), 8..=32_u8).prop_map(|([a, b, c], n)| format!("127.{a}.{b}.{c}/{n}")),
    ]
}

fn id() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<u32>().prop_map(|id| id.to_string()),
        (any::<u32>(), any::<u32>()).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b))),
        select(&["envoy", "www-data", "loner", "nobody-here"][..]).prop_map(str::to_owned),
    ]
}

/// A value as some option takes it, or nearly.
fn value() -> impl Strategy<Value = String> {
    let list = |entry: BoxedStrategy<String>| {
        (vec(entry, 0..6), select(&[",", " , ", ",,"][..]))
            .prop_map(|(list, comma)| list.join(comma))
    };
    const WORDS: [&str; 12] = [
        "*", "", "true", "F", "TPROXY", "REDIRECT", "auto", "on", "off", "eth+", "lo,net1", "1337",
    ];
    prop_oneof![
        2 => select(&WORDS[..]).prop_map(str::to_owned),
        2 => list(port().boxed()),
        2 => list(net().boxed()),
        2 => list(id().boxed()),
        1 => text(),
    ]
}

/// Some options, each as a flag or as a variable.
fn call() -> impl Strategy<Value = (Vec<String>, Vec<(&'static str, String)>)> {
    vec((select(FLAGS), value(), any::<bool>()), 0..8).prop_map(|options| {
        let (mut args, mut variables) = (Vec::new(), Vec::new());
        for ((_, flag, variable, _), value, as_flag) in options {
            if as_flag {
                args.push(format!(
                    "{}={value}",
                    flag.split('=').next().unwrap_or_default()
                ));
            } else {
                variables.push((variable, value));
            }
        }
        (args, variables)
    })
}

/// Sorted, with a gap between any two.
fn is_merged(ranges: impl Iterator<Item = (u32, u32)>) -> bool {
    let ranges: Vec<_> = ranges.collect();
    ranges.iter().all(|(first, last)| first <= last)
        && ranges
            .windows(2)
            .all(|pair| u64::from(pair[0].1) + 1 < u64::from(pair[1].0))
}

fn is_sorted_set<T: Ord>(list: &[T]) -> bool {
    list.windows(2).all(|pair| pair[0] < pair[1])
}

/// What the rest of the loader relies on.
fn assert_canonical(policy: &Policy) {
    assert!(policy.outbound_port > 0 && policy.inbound_port > 0 && policy.tunnel_port > 0);
    for ids in [&policy.proxy_uids, &policy.proxy_gids] {
        assert!((1..=16).contains(&ids.len()), "{policy:?}");
        assert!(
            ids.iter()
                .all(|range| range.first <= range.last && range.last < u32::MAX)
        );
    }
    for ports in [
        &policy.include_outbound_ports[..],
        &policy.exclude_outbound_ports,
        policy.inbound_ports.listed(),
        &policy.exclude_inbound_ports,
    ] {
        let pairs = ports
            .iter()
            .map(|range| (range.first.into(), range.last.into()));
        assert!(is_merged(pairs), "{policy:?}");
    }
    for groups in [policy.owner_groups.listed(), &policy.owner_groups_exclude] {
        assert!(
            groups.len() <= 64 && is_merged(groups.iter().map(|range| (range.first, range.last)))
        );
    }
    for nets in [
        policy.include_outbound_cidrs.listed(),
        &policy.exclude_outbound_cidrs,
    ] {
        assert!(is_sorted_set(nets) && nets.iter().all(|net| *net == net.trunc()));
    }
    assert!(is_sorted_set(&policy.exclude_interfaces) && is_sorted_set(&policy.virtual_interfaces));
    assert!(policy.loopback.addr().is_loopback() && policy.loopback.prefix_len() >= 8);
    assert!(!matches!(policy.mode, Mode::Tproxy { mark, table } if mark == 0 || table == 0));
    assert!(
        !matches!(&policy.dns, Dns::Servers(servers) if servers.is_empty() || !is_sorted_set(servers))
    );
    let written = serde_json::to_string(policy).expect("JSON");
    let read: Policy = serde_json::from_str(&written).expect(&written);
    assert_eq!((&read, read.digest()), (policy, policy.digest()));
}

fn assert_names_its_origin(error: &OptionError) {
    let text = error.to_string();
    let origin = text.starts_with("--") || text.starts_with(|c: char| c.is_ascii_uppercase());
    assert!(is_one_line(&text) && origin, "{text}");
    let moved = error.clone().given_as("annotation a", "v").to_string();
    assert!(
        is_one_line(&moved) && moved.starts_with("annotation a: "),
        "{moved}"
    );
}

proptest! {
    #![proptest_config(config(10))]

    #[test]
    fn any_value_gives_a_policy_or_one_line((_, flag, variable, _) in select(FLAGS), value in text()) {
        let flag = format!("{}={value}", flag.split('=').next().unwrap_or_default());
        for result in [try_policy(&[&flag], &[]), try_policy(&[], &[(variable, &value)])] {
            match result {
                Ok(policy) => assert_canonical(&policy),
                Err(error) => assert_names_its_origin(&error),
            }
        }
    }

    #[test]
    fn any_options_together_give_a_policy_or_one_line((args, variables) in call()) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        match try_policy(&args, &variables) {
            Ok(policy) => assert_canonical(&policy),
            Err(error) => assert_names_its_origin(&error),
        }
    }

    #[test]
    fn any_command_line_is_read_or_refused(args in vec(prop_oneof![value(), "-{1,2}[a-z-]{1,20}", "-[pzeugmtrixbdoqck][0-9*,=]{0,6}"], 0..6)) {
        let args = || ["redirect"].into_iter().chain(args.iter().map(String::as_str));
        // A refusal is clap's own text: about words that are no options.
        if let Ok(cli) = Cli::try_parse_from(args())
            && let Err(error) = cli.flags.validate_with(&|_| None, &TestNames)
        {
            assert_names_its_origin(&error);
        }
        drop(crate::cli::Cli::try_parse_from(args()));
    }

    #[test]
    fn any_timeout_is_read_or_refused(text in prop_oneof!["[0-9.hmsunµ +-]{0,12}", any::<String>()]) {
        let timeout = format!("--probe-timeout={text}");
        match try_call(&["--run-validation", &timeout], &[]) {
            Ok(call) => prop_assert!(call.validation.is_some_and(|validation| !validation.timeout.is_zero())),
            Err(error) => prop_assert!(is_one_line(&error.to_string()), "{}", error),
        }
    }

    #[test]
    fn ports_printed_and_read_again_are_the_same(pairs in vec((any::<u16>(), any::<u16>()), 0..20)) {
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

    #[test]
    fn cidrs_and_ids_printed_and_read_again_are_the_same(nets in vec(net(), 0..6), ids in vec(id(), 1..6)) {
        let (nets, ids) = (nets.join(","), ids.join(","));
        let Ok(first) = try_policy(&["-i", &nets, "-u", &ids, "-g", "1", "--outbound-owner-groups-exclude", "1-9,11"], &[]) else {
            return Ok(());
        };
        let printed = |ranges: &[IdRange]| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let (nets, ids) = (first.include_outbound_cidrs.to_string(), printed(&first.proxy_uids));
        let groups = printed(&first.owner_groups_exclude);
        let again = policy(&["-i", &nets, "-u", &ids, "-g", "1", "--outbound-owner-groups-exclude", &groups]);
        prop_assert_eq!(&again.include_outbound_cidrs, &first.include_outbound_cidrs);
        prop_assert_eq!(&again.proxy_uids, &first.proxy_uids);
        prop_assert_eq!(&again.owner_groups_exclude, &first.owner_groups_exclude);
    }
}

proptest! {
    #![proptest_config(config(1))]

    #[test]
    fn any_resolv_conf_is_read(bytes in bytes(), lines in vec((any::<IpAddr>(), 0..5_u8), 0..6), at in any::<Index>()) {
        prop_assert!(is_sorted_set(&servers_in(&String::from_utf8_lossy(&bytes))));
        let mut wanted: Vec<IpAddr> = Vec::new();
        let mut text = String::new();
        for (address, kind) in lines {
            let line = match kind {
                0 => format!("nameserver {address}\n"),
                1 => format!("\tnameserver\t{address}%eth0 and more\r\n"),
                2 => format!("#nameserver {address}\n"),
                3 => format!("search {address}\n"),
                _ => format!("nameserver {address}.example.com\n"),
            };
            if kind < 2 {
                wanted.push(address.to_canonical());
            }
            text.push_str(&line);
        }
        wanted.sort_unstable();
        wanted.dedup();
        prop_assert_eq!(servers_in(&text), wanted);
        // Cut anywhere, it is still read.
        drop(servers_in(&text[..at.index(text.len() + 1)]));
    }

    #[test]
    fn any_services_file_is_searched(text in prop_oneof![text(), "([a-z]{1,3}[ \t]{1,2}[0-9]{1,6}/(tcp|udp)[ a-z#]{0,6}\n){0,5}"], name in "[a-z]{1,3}") {
        if let Some(port) = tcp_service_in(&text, &name) {
            let entry = format!("{port}/tcp");
            prop_assert!(text.contains(&entry) && text.contains(&name));
        }
    }

    #[test]
    fn any_number_is_read_as_it_is_printed(value in any::<u32>(), text in "[0-9+ -]{0,11}") {
        prop_assert_eq!(number(&value.to_string()), Some(value));
        if let Some(value) = number(&text) {
            prop_assert_eq!(value.to_string(), text);
        }
    }

    #[test]
    fn any_cidr_that_is_read_is_the_librarys(text in prop_oneof![net(), "[0-9a-f:./]{0,20}"]) {
        if let Ok(nets) = cidrs::cidr_list(&text) {
            let wanted: Vec<IpNet> = text.parse::<IpNet>().map(|net| net.trunc()).into_iter().collect();
            prop_assert_eq!(nets, wanted);
        }
    }
}
