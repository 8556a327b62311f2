//! The reference: the rules istio-iptables emits for an option set, in its order, in REDIRECT mode.
//!
//! Written after `tools/istio-iptables/pkg/capture/run.go` (istio/istio 86c9f01fd735), without DNS, TPROXY and `-c`.

use std::{env, fmt::Write as _, io::Write as _, net::IpAddr, process::Stdio};

use crate::{
    namespace::errors,
    options::{Options, or},
    pod::Pod,
};

/// The `iptables-restore` input for one family.
pub fn rules(options: &Options, ipv6: bool) -> String {
    let proxy = or(options.proxy_port, "15001");
    let capture = or(options.inbound_port, "15006");
    let tunnel = or(options.tunnel_port, "15008");
    let uids = or(options.uids, "1337");
    let gids = or(options.gids, uids);
    let (loopback, own) = if ipv6 {
        ("::1/128", "::6/128")
    } else {
        (or(options.loopback_cidr, "127.0.0.1/32"), "127.0.0.6/32")
    };
    let mut rules = Rules::default();
    for name in items(options.virtual_interfaces) {
        rules.front(format!("-i {name} -j RETURN"));
    }
    rules.nat(format!("ISTIO_INBOUND -p tcp --dport {tunnel} -j RETURN"));
    rules.nat(format!(
        "ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {proxy}"
    ));
    rules.nat(format!(
        "ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {capture}"
    ));
    match options.include_inbound {
        "" => (),
        "*" => {
            rules.nat("PREROUTING -p tcp -j ISTIO_INBOUND");
            for port in items(options.exclude_inbound) {
                rules.nat(format!("ISTIO_INBOUND -p tcp --dport {port} -j RETURN"));
            }
            rules.nat("ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT");
        }
        list => {
            rules.nat("PREROUTING -p tcp -j ISTIO_INBOUND");
            for port in items(list) {
                rules.nat(format!(
                    "ISTIO_INBOUND -p tcp --dport {port} -j ISTIO_IN_REDIRECT"
                ));
            }
        }
    }
    rules.nat("OUTPUT -j ISTIO_OUTPUT");
    for port in items(options.exclude_outbound) {
        rules.output(format!("-p tcp --dport {port} -j RETURN"));
        rules.output(format!("-p udp --dport {port} -j RETURN"));
    }
    rules.output(format!("-o lo -s {own} -j RETURN"));
    let loopback_included = items(options.include_cidrs).any(is_loopback);
    for (kind, owners) in [("uid", uids), ("gid", gids)] {
        for id in items(owners) {
            let owner = format!("-m owner --{kind}-owner {id}");
            rules.output(format!(
                "-o lo ! -d {loopback} -p tcp ! --dport {tunnel} {owner} -j ISTIO_IN_REDIRECT"
            ));
            if !loopback_included {
                rules.output(format!("-o lo -m owner ! --{kind}-owner {id} -j RETURN"));
            }
            rules.output(format!("{owner} -j RETURN"));
        }
    }
    match options.owner_groups.unwrap_or("*") {
        "*" => {
            for group in items(options.owner_groups_exclude) {
                rules.output(format!("-m owner --gid-owner {group} -j RETURN"));
            }
        }
        list => {
            let others: String = items(list)
                .map(|group| format!("-m owner ! --gid-owner {group} "))
                .collect();
            rules.output(format!("{others}-j RETURN"));
        }
    }
    rules.output(format!("-d {loopback} -j RETURN"));
    let (included, excluded): (Vec<_>, Vec<_>) = (
        items(options.include_cidrs)
            .filter(|cidr| of_family(cidr, ipv6))
            .collect(),
        items(options.exclude_cidrs)
            .filter(|cidr| of_family(cidr, ipv6))
            .collect(),
    );
    for cidr in excluded {
        rules.output(format!("-d {cidr} -j RETURN"));
    }
    for port in items(options.include_outbound) {
        rules.output(format!("-p tcp --dport {port} -j ISTIO_REDIRECT"));
    }
    for cidr in included {
        match cidr {
            "*" => {
                rules.output("-j ISTIO_REDIRECT");
                for name in items(options.virtual_interfaces) {
                    rules.front(format!("-i {name} -j ISTIO_REDIRECT"));
                }
            }
            cidr => {
                for name in items(options.virtual_interfaces) {
                    rules.front(format!("-i {name} -d {cidr} -j ISTIO_REDIRECT"));
                }
                rules.output(format!("-d {cidr} -j ISTIO_REDIRECT"));
            }
        }
    }
    rules.text()
}

#[derive(Default)]
struct Rules(Vec<String>);

impl Rules {
    fn nat(&mut self, rule: impl Into<String>) {
        self.0.push(format!("-A {}", rule.into()));
    }

    fn output(&mut self, rule: impl AsRef<str>) {
        self.nat(format!("ISTIO_OUTPUT {}", rule.as_ref()));
    }

    /// In front of everything that comes in.
    fn front(&mut self, rule: impl AsRef<str>) {
        self.0.push(format!("-I PREROUTING 1 {}", rule.as_ref()));
    }

    fn text(&self) -> String {
        let mut text = String::from("*nat\n");
        for chain in [
            "ISTIO_INBOUND",
            "ISTIO_REDIRECT",
            "ISTIO_IN_REDIRECT",
            "ISTIO_OUTPUT",
        ] {
            writeln!(text, "-N {chain}").unwrap();
        }
        for rule in &self.0 {
            writeln!(text, "{rule}").unwrap();
        }
        text.push_str("COMMIT\n");
        text
    }
}

/// istio's `config.Split`.
fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

fn of_family(cidr: &str, ipv6: bool) -> bool {
    cidr == "*" || cidr.contains(':') == ipv6
}

fn is_loopback(cidr: &str) -> bool {
    let address = cidr
        .split('/')
        .next()
        .and_then(|address| address.parse().ok());
    address.is_some_and(|address: IpAddr| address.is_loopback())
}

/// Loads the rules for `options` into the pod.
pub fn apply(pod: &Pod, options: &Options) {
    restore(pod, false, &rules(options, false));
    if options.ipv6 {
        // As istio-iptables does whenever IPv6 is on.
        pod.netns.ip("addr replace ::6/128 dev lo nodad");
        restore(pod, true, &rules(options, true));
    }
}

/// Empties the nat table of the pod.
pub fn flush(pod: &Pod) {
    for ipv6 in [false, true] {
        restore(
            pod,
            ipv6,
            "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n",
        );
    }
}

fn restore(pod: &Pod, ipv6: bool, text: &str) {
    let variant = env::var("REDIRECT_IPTABLES").unwrap_or_else(|_| "nft".to_owned());
    let program = format!(
        "{}-{variant}-restore",
        if ipv6 { "ip6tables" } else { "iptables" }
    );
    let flush = if text.contains("-N ") {
        &["--noflush"][..]
    } else {
        &[]
    };
    let mut child = pod
        .netns
        .command(&program)
        .args(["-w", "20"])
        // The legacy variant's lock is the host's, and closed to a user namespace; each pod is alone with its tables.
        .env("XTABLES_LOCKFILE", "/dev/null")
        .args(flush)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}\n{text}",
        errors(&output)
    );
}
