//! The text of the rules: what istio-iptables emits for an option set, in its order.
//!
//! Written after `tools/istio-iptables/pkg/capture/run.go` (istio/istio 86c9f01fd735). Every line goes to the end of its chain
//! or to a stated place in it, so that the order inside a chain is Istio's.

use std::{collections::BTreeSet, fmt::Write as _, net::IpAddr};

use crate::options::{DNS_PROXY_PORT, Options, SELF_MARK, TPROXY_MARK, or};

/// The `iptables-restore` input for one family.
pub fn rules(options: &Options, ipv6: bool) -> String {
    let set = RuleSet::new(options, ipv6);
    let mut text = Text::default();
    set.interfaces(&mut text);
    set.drop_invalid(&mut text);
    set.inbound(&mut text);
    set.outbound_exceptions(&mut text);
    set.owners(&mut text);
    set.owner_groups(&mut text);
    set.dns(&mut text);
    set.destinations(&mut text);
    set.tproxy_marks(&mut text);
    text.finish()
}

/// One family's view of the options.
struct RuleSet<'a> {
    options: &'a Options,
    ipv6: bool,
    /// What counts as loopback.
    loopback: &'static str,
    /// The source of the proxy's hop to the application.
    own: &'static str,
    tunnel: &'static str,
    uids: &'static str,
    gids: &'static str,
    loopback_included: bool,
    /// The servers whose port 53 is captured, in this family; `None` is everybody's.
    dns_servers: Option<Vec<String>>,
    dns: bool,
}

impl<'a> RuleSet<'a> {
    fn new(options: &'a Options, ipv6: bool) -> Self {
        let (loopback, own) = if ipv6 {
            ("::1/128", "::6/128")
        } else {
            (or(options.loopback_cidr, "127.0.0.1/32"), "127.0.0.6/32")
        };
        let uids = or(options.uids, "1337");
        let servers = options.dns_servers();
        Self {
            options,
            ipv6,
            loopback,
            own,
            tunnel: or(options.tunnel_port, "15008"),
            uids,
            gids: or(options.gids, uids),
            loopback_included: items(options.include_cidrs).any(is_loopback),
            // Without a server Istio turns the capture of DNS off.
            dns: options.redirect_dns && (options.capture_all_dns || !servers.is_empty()),
            dns_servers: (!options.capture_all_dns).then(|| {
                let ours = servers.iter().filter(|server| server.is_ipv6() == ipv6);
                ours.map(ToString::to_string).collect()
            }),
        }
    }

    fn interfaces(&self, text: &mut Text) {
        for name in items(self.options.exclude_interfaces) {
            text.nat(format!("PREROUTING -i {name} -j RETURN"));
            text.nat(format!("OUTPUT -o {name} -j RETURN"));
            if self.options.tproxy {
                text.mangle(format!("PREROUTING -i {name} -j RETURN"));
                text.mangle(format!("OUTPUT -o {name} -j RETURN"));
            }
        }
        for name in items(self.options.virtual_interfaces) {
            text.insert(Table::Nat, 1, format!("PREROUTING -i {name} -j RETURN"));
        }
    }

    fn drop_invalid(&self, text: &mut Text) {
        if self.options.drop_invalid {
            text.mangle("PREROUTING -m conntrack --ctstate INVALID -j ISTIO_DROP");
            text.mangle("ISTIO_DROP -j DROP");
        }
    }

    fn inbound(&self, text: &mut Text) {
        let options = self.options;
        let capture = or(options.inbound_port, "15006");
        let proxy = or(options.proxy_port, "15001");
        let tunnel = self.tunnel;
        text.nat(format!("ISTIO_INBOUND -p tcp --dport {tunnel} -j RETURN"));
        text.nat(format!(
            "ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {proxy}"
        ));
        text.nat(format!(
            "ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {capture}"
        ));
        if options.include_inbound.is_empty() {
            return;
        }
        // Either all ports, after exceptions, or a list: what decides is handed on to.
        let table = if options.tproxy {
            text.mangle(format!("ISTIO_DIVERT -j MARK --set-mark {TPROXY_MARK}"));
            text.mangle("ISTIO_DIVERT -j ACCEPT");
            text.mangle(format!(
                "ISTIO_TPROXY ! -d {} -p tcp -j TPROXY --tproxy-mark {TPROXY_MARK}/0xffffffff --on-port {capture}",
                self.loopback
            ));
            Table::Mangle
        } else {
            Table::Nat
        };
        let hand_over = |text: &mut Text, port: &str| {
            if options.tproxy {
                text.mangle(format!(
                    "ISTIO_INBOUND -p tcp{port} -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT"
                ));
                text.mangle(format!("ISTIO_INBOUND -p tcp{port} -j ISTIO_TPROXY"));
            } else {
                text.nat(format!("ISTIO_INBOUND -p tcp{port} -j ISTIO_IN_REDIRECT"));
            }
        };
        text.add(table, "PREROUTING -p tcp -j ISTIO_INBOUND");
        if options.include_inbound == "*" {
            for port in items(options.exclude_inbound) {
                text.add(
                    table,
                    format!("ISTIO_INBOUND -p tcp --dport {port} -j RETURN"),
                );
            }
            hand_over(text, "");
        } else {
            for port in items(options.include_inbound) {
                hand_over(text, &format!(" --dport {port}"));
            }
        }
    }

    fn outbound_exceptions(&self, text: &mut Text) {
        text.nat("OUTPUT -j ISTIO_OUTPUT");
        for port in items(self.options.exclude_outbound) {
            text.output(format!("-p tcp --dport {port} -j RETURN"));
            text.output(format!("-p udp --dport {port} -j RETURN"));
        }
        text.output(format!("-o lo -s {} -j RETURN", self.own));
    }

    fn owners(&self, text: &mut Text) {
        let (loopback, tunnel) = (self.loopback, self.tunnel);
        for (kind, owners) in [("uid", self.uids), ("gid", self.gids)] {
            // Only the rule about users leaves DNS to its own rules.
            let port = if self.dns && kind == "uid" {
                format!("-p tcp -m multiport ! --dports 53,{tunnel}")
            } else {
                format!("-p tcp ! --dport {tunnel}")
            };
            let others = if self.dns { "-p tcp ! --dport 53 " } else { "" };
            for id in items(owners) {
                let owner = format!("-m owner --{kind}-owner {id}");
                text.output(format!(
                    "-o lo ! -d {loopback} {port} {owner} -j ISTIO_IN_REDIRECT"
                ));
                if !self.loopback_included {
                    text.output(format!(
                        "-o lo {others}-m owner ! --{kind}-owner {id} -j RETURN"
                    ));
                }
                text.output(format!("{owner} -j RETURN"));
            }
        }
    }

    fn owner_groups(&self, text: &mut Text) {
        match self.options.owner_groups.unwrap_or("*") {
            "*" => {
                for group in items(self.options.owner_groups_exclude) {
                    text.output(format!("-m owner --gid-owner {group} -j RETURN"));
                }
            }
            list => {
                let others: String = items(list)
                    .map(|group| format!("-m owner ! --gid-owner {group} "))
                    .collect();
                text.output(format!("{others}-j RETURN"));
            }
        }
    }

    fn dns(&self, text: &mut Text) {
        if !self.dns || self.dns_servers.as_ref().is_some_and(Vec::is_empty) {
            return;
        }
        let each = |way: &str| match &self.dns_servers {
            None => vec![String::new()],
            Some(servers) => servers
                .iter()
                .map(|server| format!(" {way} {server}"))
                .collect(),
        };
        let raw = Table::Raw;
        text.add(raw, "OUTPUT -j ISTIO_OUTPUT_DNS");
        text.output("-j ISTIO_OUTPUT_DNS");
        for protocol in ["tcp", "udp"] {
            for server in each("-d") {
                text.nat(format!("ISTIO_OUTPUT_DNS -p {protocol} --dport 53{server} -j REDIRECT --to-ports {DNS_PROXY_PORT}"));
            }
        }
        // The application's exchange with the agent and the agent's with its server must not share a conntrack entry.
        for (kind, owners) in [("uid", self.uids), ("gid", self.gids)] {
            for id in items(owners) {
                let owner = format!("-m owner --{kind}-owner {id}");
                text.add(
                    raw,
                    format!("ISTIO_OUTPUT_DNS -p udp --dport 53 {owner} -j CT --zone 1"),
                );
                text.add(
                    raw,
                    format!(
                        "ISTIO_OUTPUT_DNS -p udp --sport {DNS_PROXY_PORT} {owner} -j CT --zone 2"
                    ),
                );
            }
        }
        for server in each("-d") {
            text.add(
                raw,
                format!("ISTIO_OUTPUT_DNS -p udp --dport 53{server} -j CT --zone 2"),
            );
        }
        text.add(raw, "PREROUTING -j ISTIO_INBOUND");
        for server in each("-s") {
            text.add(
                raw,
                format!("ISTIO_INBOUND -p udp --sport 53{server} -j CT --zone 1"),
            );
        }
    }

    fn destinations(&self, text: &mut Text) {
        let options = self.options;
        text.output(format!("-d {} -j RETURN", self.loopback));
        let ours = |cidr: &&str| *cidr == "*" || cidr.contains(':') == self.ipv6;
        for cidr in items(options.exclude_cidrs).filter(ours) {
            text.output(format!("-d {cidr} -j RETURN"));
        }
        for port in items(options.include_outbound) {
            text.output(format!("-p tcp --dport {port} -j ISTIO_REDIRECT"));
        }
        for cidr in items(options.include_cidrs).filter(ours) {
            let destination = match cidr {
                "*" => String::new(),
                cidr => format!("-d {cidr} "),
            };
            for name in items(options.virtual_interfaces) {
                let rule = format!("PREROUTING -i {name} {destination}-j ISTIO_REDIRECT");
                text.insert(Table::Nat, 1, rule);
            }
            text.output(format!("{destination}-j ISTIO_REDIRECT"));
        }
    }

    fn tproxy_marks(&self, text: &mut Text) {
        if !self.options.tproxy {
            return;
        }
        text.mangle(format!(
            "PREROUTING -p tcp -m mark --mark {TPROXY_MARK} -j CONNMARK --save-mark"
        ));
        text.mangle(format!(
            "OUTPUT -p tcp -o lo -m mark --mark {TPROXY_MARK} -j RETURN"
        ));
        for (kind, owners) in [("uid", self.uids), ("gid", self.gids)] {
            for id in items(owners) {
                text.mangle(format!("OUTPUT ! -d {} -p tcp -o lo -m owner --{kind}-owner {id} -j MARK --set-mark {SELF_MARK}", self.loopback));
            }
        }
        text.mangle(format!(
            "OUTPUT -p tcp -m connmark --mark {TPROXY_MARK} -j CONNMARK --restore-mark"
        ));
        for (place, condition) in [
            (1, format!("-m mark --mark {TPROXY_MARK}")),
            (2, format!("-s {} -i lo", self.own)),
            (3, format!("-i lo -m mark ! --mark {SELF_MARK}")),
        ] {
            text.insert(
                Table::Mangle,
                place,
                format!("ISTIO_INBOUND -p tcp {condition} -j RETURN"),
            );
        }
    }
}

/// Which table of the kernel's a rule is in.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Table {
    Raw,
    Mangle,
    Nat,
}

impl Table {
    const ALL: [Self; 3] = [Self::Raw, Self::Mangle, Self::Nat];

    const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }
}

/// Lines of `iptables-restore`, `-A` and `-I`, in the order of emission.
#[derive(Default)]
struct Text(Vec<(Table, String)>);

impl Text {
    fn add(&mut self, table: Table, rule: impl AsRef<str>) {
        self.0.push((table, format!("-A {}", rule.as_ref())));
    }

    /// At that place of its chain, counted from 1.
    fn insert(&mut self, table: Table, place: usize, rule: impl AsRef<str>) {
        let (chain, rule) = rule.as_ref().split_once(' ').unwrap();
        self.0.push((table, format!("-I {chain} {place} {rule}")));
    }

    fn nat(&mut self, rule: impl AsRef<str>) {
        self.add(Table::Nat, rule);
    }

    fn mangle(&mut self, rule: impl AsRef<str>) {
        self.add(Table::Mangle, rule);
    }

    fn output(&mut self, rule: impl AsRef<str>) {
        self.nat(format!("ISTIO_OUTPUT {}", rule.as_ref()));
    }

    /// Each table with the chains that its rules name.
    fn finish(&self) -> String {
        let mut text = String::new();
        for table in Table::ALL {
            let rules: Vec<&str> = self
                .0
                .iter()
                .filter(|(of, _)| *of == table)
                .map(|(_, rule)| rule.as_str())
                .collect();
            if rules.is_empty() {
                continue;
            }
            let words = rules.iter().flat_map(|rule| rule.split(' '));
            let chains: BTreeSet<&str> = words.filter(|word| word.starts_with("ISTIO_")).collect();
            writeln!(text, "*{}", table.name()).unwrap();
            for chain in chains {
                writeln!(text, "-N {chain}").unwrap();
            }
            for rule in rules {
                writeln!(text, "{rule}").unwrap();
            }
            writeln!(text, "COMMIT").unwrap();
        }
        text
    }
}

/// istio's `config.Split`.
fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

fn is_loopback(cidr: &str) -> bool {
    let address = cidr
        .split('/')
        .next()
        .and_then(|address| address.parse().ok());
    address.is_some_and(|address: IpAddr| address.is_loopback())
}
