//! The validated result: what to capture.

use std::fmt;
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use redirect_common::dns::DNS_AGENT_PORT;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::dns::Dns;
use super::interception::Mode;
use super::interfaces::InterfacePattern;
use super::ranges::{IdRange, PortRange, Scope};
use crate::digest;

/// What a pod's traffic is captured by.
///
/// Canonical: lists that are sets are sorted, ports and groups also merged, so that equal sets compare and hash equal.
/// The proxy's ids are not sets: the rules walk them in the order given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// `-p`: the proxy's listener for outbound connections, host order.
    pub outbound_port: u16,
    /// `-z`: the proxy's listener for inbound connections, host order.
    pub inbound_port: u16,
    /// `-e`: the tunnel port that is never captured inbound, host order.
    pub tunnel_port: u16,
    /// `-u`: the proxy's users; 1 to 16 of them.
    pub proxy_uids: Vec<IdRange>,
    /// `-g`: the proxy's groups; 1 to 16 of them.
    pub proxy_gids: Vec<IdRange>,
    /// `-i`: destinations captured.
    pub include_outbound_cidrs: Scope<IpNet>,
    /// An entry of `-i` was written with a loopback address: pod-local traffic then runs through all rules (O4b is left out).
    /// Kept apart because masking can lose it: `127.0.0.1/1` becomes `0.0.0.0/1`.
    pub loopback_included: bool,
    /// `-x`: destinations never captured.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// `-q`: ports captured whatever `-i` says.
    pub include_outbound_ports: Vec<PortRange>,
    /// `-o`: ports never captured outbound.
    pub exclude_outbound_ports: Vec<PortRange>,
    /// `-b`: ports captured inbound.
    pub inbound_ports: Scope<PortRange>,
    /// `-d`: ports not captured inbound. Has no effect unless `inbound_ports` is everything, as in Istio.
    pub exclude_inbound_ports: Vec<PortRange>,
    /// Groups whose outbound traffic is captured; at most 64.
    pub owner_groups: Scope<IdRange>,
    /// Groups whose outbound traffic is not captured; at most 64. Has no effect unless `owner_groups` is everything, as in Istio.
    pub owner_groups_exclude: Vec<IdRange>,
    /// Destinations that count as the pod talking to itself; IPv6 always has `::1/128`.
    pub loopback: Ipv4Net,
    /// Whether IPv6 is captured; IPv4 always is.
    pub ipv6: Ipv6,
    /// `-m`, with `-t` and `-r`: how inbound connections reach the proxy.
    #[serde(default)]
    pub mode: Mode,
    /// `--redirect-dns`: whose DNS queries are captured.
    #[serde(default)]
    pub dns: Dns,
    /// `-c`: interfaces without capture, in or out.
    #[serde(default)]
    pub exclude_interfaces: Vec<InterfacePattern>,
    /// `-k`: interfaces whose inbound connections are treated as outbound; stronger than `-c`.
    #[serde(default)]
    pub virtual_interfaces: Vec<InterfacePattern>,
}

/// Whether IPv6 is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ipv6 {
    /// If the pod's first global address is IPv6.
    Auto,
    /// If any of the pod's global addresses is IPv6.
    DualStack,
    /// Yes.
    On,
    /// No.
    Off,
}

/// Istio's defaults with no flag and no variable set, for a system without an `istio-proxy` user. They capture nothing.
impl Default for Policy {
    fn default() -> Self {
        let proxy = IdRange {
            first: 1337,
            last: 1337,
        };
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            tunnel_port: 15008,
            proxy_uids: vec![proxy],
            proxy_gids: vec![proxy],
            include_outbound_cidrs: Scope::Listed(Vec::new()),
            loopback_included: false,
            exclude_outbound_cidrs: Vec::new(),
            include_outbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            inbound_ports: Scope::Listed(Vec::new()),
            exclude_inbound_ports: Vec::new(),
            owner_groups: Scope::All,
            owner_groups_exclude: Vec::new(),
            loopback: Ipv4Net::from(Ipv4Addr::LOCALHOST),
            ipv6: Ipv6::Auto,
            mode: Mode::Redirect,
            dns: Dns::Off,
            exclude_interfaces: Vec::new(),
            virtual_interfaces: Vec::new(),
        }
    }
}

impl Policy {
    /// The TCP ports that the proxy and its agent are to listen on, host order, and what is captured for each.
    pub fn listeners(&self) -> impl Iterator<Item = (u16, &'static str)> {
        let dns = (self.dns != Dns::Off).then_some((DNS_AGENT_PORT, "DNS queries over TCP"));
        [
            (self.outbound_port, "outbound connections"),
            (self.inbound_port, "inbound connections"),
        ]
        .into_iter()
        .chain(dns)
    }

    /// Names the contents of the lists of ports, CIDRs and DNS servers: policies with equal lists share them in the kernel.
    /// Stable across runs and builds; not affected by the rest.
    ///
    /// 64 bits of a SHA-256: whoever writes a pod's annotations must not find a policy that shares another pod's lists.
    pub fn digest(&self) -> u64 {
        let mut hash = Sha256::new();
        // A tag and a length in front of each list keep entries from moving between lists unnoticed.
        hash_cidrs(&mut hash, b'i', self.include_outbound_cidrs.listed());
        hash_cidrs(&mut hash, b'x', &self.exclude_outbound_cidrs);
        hash_ports(&mut hash, b'q', &self.include_outbound_ports);
        hash_ports(&mut hash, b'o', &self.exclude_outbound_ports);
        hash_ports(&mut hash, b'b', self.inbound_ports.listed());
        hash_ports(&mut hash, b'd', &self.exclude_inbound_ports);
        let servers: Vec<IpNet> = self
            .dns
            .servers()
            .iter()
            .copied()
            .map(IpNet::from)
            .collect();
        if !servers.is_empty() {
            hash_cidrs(&mut hash, b'r', &servers);
        }
        digest::first_64_bits(hash)
    }
}

/// As istio-iptables' flags. Empty lists and defaults are left out, except for the two ports.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        let unless =
            |is_default: bool, value: String| if is_default { String::new() } else { value };
        write!(f, "-p {} -z {}", self.outbound_port, self.inbound_port)?;
        let flags = [
            (
                "-e",
                unless(
                    self.tunnel_port == default.tunnel_port,
                    self.tunnel_port.to_string(),
                ),
            ),
            ("-u", join(&self.proxy_uids)),
            ("-g", join(&self.proxy_gids)),
            ("-i", self.include_outbound_cidrs.to_string()),
            ("-x", join(&self.exclude_outbound_cidrs)),
            ("-q", join(&self.include_outbound_ports)),
            ("-o", join(&self.exclude_outbound_ports)),
            ("-b", self.inbound_ports.to_string()),
            ("-d", join(&self.exclude_inbound_ports)),
            ("-c", join(&self.exclude_interfaces)),
            ("-k", join(&self.virtual_interfaces)),
            (
                "--outbound-ipv4-loopback-cidr",
                unless(self.loopback == default.loopback, self.loopback.to_string()),
            ),
            (
                "--outbound-owner-groups-exclude",
                join(&self.owner_groups_exclude),
            ),
        ];
        for (flag, value) in flags.iter().filter(|(_, value)| !value.is_empty()) {
            write!(f, " {flag} {value}")?;
        }
        // Nobody's group is something else than everybody's.
        if !self.owner_groups.is_all() {
            write!(f, " --outbound-owner-groups '{}'", self.owner_groups)?;
        }
        if let Mode::Tproxy { mark, table } = self.mode {
            write!(f, " -m TPROXY -t {mark} -r {table}")?;
        }
        match &self.dns {
            Dns::Off => Ok(()),
            Dns::Servers(servers) => write!(f, " --redirect-dns ({})", join(servers)),
            Dns::All => f.write_str(" --redirect-dns --capture-all-dns"),
        }
    }
}

fn join(items: &[impl ToString]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(",")
}

fn hash_cidrs(hash: &mut Sha256, tag: u8, nets: &[IpNet]) {
    hash_head(hash, tag, nets.len());
    for net in nets {
        let octets = match net {
            IpNet::V4(net) => net.addr().octets().to_vec(),
            IpNet::V6(net) => net.addr().octets().to_vec(),
        };
        hash.update([octets.len() as u8, net.prefix_len()]);
        hash.update(octets);
    }
}

fn hash_ports(hash: &mut Sha256, tag: u8, ranges: &[PortRange]) {
    hash_head(hash, tag, ranges.len());
    for range in ranges {
        hash.update(range.first.to_be_bytes());
        hash.update(range.last.to_be_bytes());
    }
}

fn hash_head(hash: &mut Sha256, tag: u8, count: usize) {
    hash.update([tag]);
    hash.update((count as u64).to_be_bytes());
}
