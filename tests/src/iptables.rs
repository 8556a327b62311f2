//! The reference: Istio's rules in the kernel's own iptables.

mod rules;

use std::{
    env,
    io::Write as _,
    process::{self, Stdio},
    sync::OnceLock,
};

use crate::{
    namespace::{Namespace, errors},
    options::{Options, TPROXY_MARK},
    pod::Pod,
};
pub use rules::rules;

/// Istio's default for `--istio-inbound-tproxy-route-table`.
const TPROXY_TABLE: &str = "133";

/// Which of iptables' two implementations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Variant {
    /// Over nftables: today's default.
    Nft,
    /// The kernel's ip_tables.
    Legacy,
}

impl Variant {
    /// What `REDIRECT_IPTABLES` says, or nft.
    pub fn from_environment() -> Self {
        match env::var("REDIRECT_IPTABLES").as_deref() {
            Ok("legacy") => Self::Legacy,
            Ok("nft") | Err(_) => Self::Nft,
            Ok(other) => panic!("REDIRECT_IPTABLES={other}: allowed are nft and legacy"),
        }
    }

    /// Whether this machine has it: the programs, and what they need of the kernel.
    pub fn works(self) -> bool {
        static WORKS: [OnceLock<bool>; 2] = [OnceLock::new(), OnceLock::new()];
        *WORKS[self as usize].get_or_init(|| {
            let namespace = Namespace::new(&format!("rd-{}-{}", process::id(), self.name()));
            ["iptables", "ip6tables"].iter().all(|program| {
                let program = format!("{program}-{}", self.name());
                let list = ["-t", "nat", "-S"];
                let output = namespace.command(&program).args(list).output();
                output.is_ok_and(|output| output.status.success())
            })
        })
    }

    /// As in the programs' names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }
}

/// Loads the rules for `options` into the pod.
pub fn apply(pod: &Pod, options: &Options, variant: Variant) {
    restore(pod, variant, false, &rules(options, false));
    if options.ipv6 {
        // As istio-iptables does whenever IPv6 is on.
        pod.netns.ip("addr replace ::6/128 dev lo nodad");
        restore(pod, variant, true, &rules(options, true));
    }
    if options.tproxy && !options.include_inbound.is_empty() {
        for (family, all) in [("-4", "0.0.0.0/0"), ("-6", "::/0")] {
            if family == "-4" || options.ipv6 {
                // A batch of `ip` commands cannot choose the family.
                for command in [
                    format!("{family} rule add fwmark {TPROXY_MARK} lookup {TPROXY_TABLE}"),
                    format!("{family} route replace local {all} dev lo table {TPROXY_TABLE}"),
                ] {
                    assert!(pod.netns.try_ip(&command), "ip {command}");
                }
            }
        }
    }
}

/// Empties the pod's tables.
pub fn flush(pod: &Pod, variant: Variant) {
    for ipv6 in [false, true] {
        flush_family(pod, variant, ipv6);
    }
    for family in ["-4", "-6"] {
        let _was_there_in_tproxy_mode = pod.netns.try_ip(&format!(
            "{family} rule del fwmark {TPROXY_MARK} lookup {TPROXY_TABLE}"
        ));
    }
}

/// Empties the pod's tables of one family.
pub fn flush_family(pod: &Pod, variant: Variant, ipv6: bool) {
    const EMPTY: &str = "\
*raw
:PREROUTING ACCEPT
:OUTPUT ACCEPT
COMMIT
*mangle
:PREROUTING ACCEPT
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
COMMIT
";
    restore(pod, variant, ipv6, EMPTY);
}

fn restore(pod: &Pod, variant: Variant, ipv6: bool, text: &str) {
    let program = format!(
        "{}-{}-restore",
        if ipv6 { "ip6tables" } else { "iptables" },
        variant.name()
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
