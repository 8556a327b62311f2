//! The reference itself: the text of Istio's rules, and whether the kernel takes it.

use std::io::Write as _;

use redirect_tests::{
    iptables::{self, Variant, rules},
    options::Options,
    pod::Pod,
    skip,
};
use rstest::rstest;

/// Options beyond those that every pod has.
const MORE: Options = Options {
    exclude_interfaces: "eth9",
    virtual_interfaces: "tap0,tap1",
    include_cidrs: "10.0.0.0/8,fd00::/8,172.16.0.0/12",
    exclude_cidrs: "10.9.0.0/16",
    exclude_outbound: "25",
    include_outbound: "9000",
    redirect_dns: true,
    capture_all_dns: true,
    ..Options::ISTIO
};

fn chain<'a>(text: &'a str, table: &str, chain: &str) -> Vec<&'a str> {
    let start = format!("*{table}\n");
    let table = text
        .split("COMMIT\n")
        .find_map(|part| part.strip_prefix(&start));
    let appended = format!("-A {chain} ");
    let inserted = format!("-I {chain} ");
    let lines = table.unwrap_or_default().lines();
    lines
        .filter(|line| line.starts_with(&appended) || line.starts_with(&inserted))
        .map(|line| line.split_at(appended.len()).1)
        .collect()
}

#[test]
fn outbound_rules_with_dns_come_in_istios_order() {
    let text = rules(&MORE, false);
    assert_eq!(
        chain(&text, "nat", "ISTIO_OUTPUT"),
        [
            "-p tcp --dport 25 -j RETURN",
            "-p udp --dport 25 -j RETURN",
            "-o lo -s 127.0.0.6/32 -j RETURN",
            "-o lo ! -d 127.0.0.1/32 -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
            "-o lo -p tcp ! --dport 53 -m owner ! --uid-owner 1337 -j RETURN",
            "-m owner --uid-owner 1337 -j RETURN",
            "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
            "-o lo -p tcp ! --dport 53 -m owner ! --gid-owner 1337 -j RETURN",
            "-m owner --gid-owner 1337 -j RETURN",
            "-j ISTIO_OUTPUT_DNS",
            "-d 127.0.0.1/32 -j RETURN",
            "-d 10.9.0.0/16 -j RETURN",
            "-p tcp --dport 9000 -j ISTIO_REDIRECT",
            "-d 10.0.0.0/8 -j ISTIO_REDIRECT",
            "-d 172.16.0.0/12 -j ISTIO_REDIRECT",
        ]
    );
    assert_eq!(
        chain(&text, "nat", "ISTIO_OUTPUT_DNS"),
        [
            "-p tcp --dport 53 -j REDIRECT --to-ports 15053",
            "-p udp --dport 53 -j REDIRECT --to-ports 15053",
        ]
    );
    assert_eq!(
        chain(&text, "raw", "ISTIO_OUTPUT_DNS"),
        [
            "-p udp --dport 53 -m owner --uid-owner 1337 -j CT --zone 1",
            "-p udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2",
            "-p udp --dport 53 -m owner --gid-owner 1337 -j CT --zone 1",
            "-p udp --sport 15053 -m owner --gid-owner 1337 -j CT --zone 2",
            "-p udp --dport 53 -j CT --zone 2",
        ]
    );
}

#[test]
fn interface_rules_come_in_istios_order() {
    let text = rules(&MORE, false);
    assert_eq!(
        chain(&text, "nat", "PREROUTING"),
        [
            "-i eth9 -j RETURN",
            "1 -i tap0 -j RETURN",
            "1 -i tap1 -j RETURN",
            "-p tcp -j ISTIO_INBOUND",
            "1 -i tap0 -d 10.0.0.0/8 -j ISTIO_REDIRECT",
            "1 -i tap1 -d 10.0.0.0/8 -j ISTIO_REDIRECT",
            "1 -i tap0 -d 172.16.0.0/12 -j ISTIO_REDIRECT",
            "1 -i tap1 -d 172.16.0.0/12 -j ISTIO_REDIRECT",
        ]
    );
    assert_eq!(
        chain(&text, "nat", "OUTPUT"),
        ["-o eth9 -j RETURN", "-j ISTIO_OUTPUT"]
    );
}

#[test]
fn tproxy_rules_come_in_istios_order() {
    let options = Options {
        tproxy: true,
        exclude_inbound: "15020",
        ..Options::ISTIO
    };
    let text = rules(&options, true);
    assert_eq!(
        chain(&text, "mangle", "ISTIO_INBOUND"),
        [
            "-p tcp --dport 15020 -j RETURN",
            "-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
            "-p tcp -j ISTIO_TPROXY",
            "1 -p tcp -m mark --mark 1337 -j RETURN",
            "2 -p tcp -s ::6/128 -i lo -j RETURN",
            "3 -p tcp -i lo -m mark ! --mark 1338 -j RETURN",
        ]
    );
    assert_eq!(
        chain(&text, "mangle", "ISTIO_TPROXY"),
        ["! -d ::1/128 -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006"]
    );
    assert_eq!(
        chain(&text, "mangle", "OUTPUT"),
        [
            "-p tcp -o lo -m mark --mark 1337 -j RETURN",
            "! -d ::1/128 -p tcp -o lo -m owner --uid-owner 1337 -j MARK --set-mark 1338",
            "! -d ::1/128 -p tcp -o lo -m owner --gid-owner 1337 -j MARK --set-mark 1338",
            "-p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark",
        ]
    );
    // Nothing inbound is left to nat.
    assert_eq!(chain(&text, "nat", "PREROUTING"), [""; 0]);
}

#[test]
fn dns_servers_of_the_family_only_are_captured() {
    let path = std::env::temp_dir().join(format!("rd-{}-resolv.conf", std::process::id()));
    let mut file = std::fs::File::create(&path).unwrap();
    writeln!(
        file,
        "search example\nnameserver 10.96.0.10\nnameserver 10.96.0.11"
    )
    .unwrap();
    let options = Options {
        capture_all_dns: false,
        resolv_conf: path.to_str().unwrap().to_owned().leak(),
        ..MORE
    };
    let (four, six) = (rules(&options, false), rules(&options, true));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(
        chain(&four, "nat", "ISTIO_OUTPUT_DNS"),
        [
            "-p tcp --dport 53 -d 10.96.0.10 -j REDIRECT --to-ports 15053",
            "-p tcp --dport 53 -d 10.96.0.11 -j REDIRECT --to-ports 15053",
            "-p udp --dport 53 -d 10.96.0.10 -j REDIRECT --to-ports 15053",
            "-p udp --dport 53 -d 10.96.0.11 -j REDIRECT --to-ports 15053",
        ]
    );
    assert!(!six.contains("ISTIO_OUTPUT_DNS"), "{six}");
    // The rules about owners leave DNS alone in both families.
    assert!(six.contains("! --dports 53,15008"), "{six}");
}

#[rstest]
fn the_kernel_takes_every_rule(
    #[values(Variant::Nft, Variant::Legacy)] variant: Variant,
    #[values(false, true)] tproxy: bool,
    #[values("*", "80,443")] include_inbound: &'static str,
) {
    if !variant.works() {
        skip!("iptables-{} does not work", variant.name());
    }
    let pod = Pod::new();
    let options = Options {
        tproxy,
        include_inbound,
        drop_invalid: true,
        ..MORE
    };
    iptables::apply(&pod, &options, variant);
    iptables::flush(&pod, variant);
}
