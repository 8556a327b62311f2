//! istio-iptables' options as a test states them: one value, from which the flags and the reference rules are both made.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
};

/// Where Istio's agent answers captured DNS queries; it cannot be chosen.
pub const DNS_PROXY_PORT: u16 = 15053;
/// Istio's default for `--istio-inbound-tproxy-mark`.
pub const TPROXY_MARK: u32 = 1337;
/// What istio-iptables' rules set in TPROXY mode on the proxy's way to its own pod.
pub const SELF_MARK: u32 = 1338;

/// An option set. Fields hold the text of the flag; empty means that the flag is not given.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `-p`
    pub proxy_port: &'static str,
    /// `-z`
    pub inbound_port: &'static str,
    /// `-e`
    pub tunnel_port: &'static str,
    /// `-u`
    pub uids: &'static str,
    /// `-g`
    pub gids: &'static str,
    /// `-b`
    pub include_inbound: &'static str,
    /// `-d`
    pub exclude_inbound: &'static str,
    /// `-i`
    pub include_cidrs: &'static str,
    /// `-x`
    pub exclude_cidrs: &'static str,
    /// `-q`
    pub include_outbound: &'static str,
    /// `-o`
    pub exclude_outbound: &'static str,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS`; unlike the flags, set but empty means: nobody.
    pub owner_groups: Option<&'static str>,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`
    pub owner_groups_exclude: &'static str,
    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`
    pub loopback_cidr: &'static str,
    /// Whether IPv6 is captured.
    pub ipv6: bool,
    /// `-c`
    pub exclude_interfaces: &'static str,
    /// `-k`
    pub virtual_interfaces: &'static str,
    /// `-m TPROXY`
    pub tproxy: bool,
    /// `--redirect-dns`
    pub redirect_dns: bool,
    /// `--capture-all-dns`
    pub capture_all_dns: bool,
    /// `--resolv-conf`: the file that names the servers whose queries are captured.
    pub resolv_conf: &'static str,
    /// `--drop-invalid`
    pub drop_invalid: bool,
}

impl Options {
    /// No flag at all, IPv6 on.
    pub const BARE: Self = Self {
        proxy_port: "",
        inbound_port: "",
        tunnel_port: "",
        uids: "",
        gids: "",
        include_inbound: "",
        exclude_inbound: "",
        include_cidrs: "",
        exclude_cidrs: "",
        include_outbound: "",
        exclude_outbound: "",
        owner_groups: None,
        owner_groups_exclude: "",
        loopback_cidr: "",
        ipv6: true,
        exclude_interfaces: "",
        virtual_interfaces: "",
        tproxy: false,
        redirect_dns: false,
        capture_all_dns: false,
        resolv_conf: "",
        drop_invalid: false,
    };

    /// What Istio's injector gives istio-init: everything, except the proxy's own ports.
    pub const ISTIO: Self = Self {
        uids: "1337",
        gids: "1337",
        include_inbound: "*",
        exclude_inbound: "15090,15021,15020",
        include_cidrs: "*",
        ..Self::BARE
    };

    /// The command line.
    pub fn arguments(&self) -> Vec<String> {
        let flags = [
            ("-p", self.proxy_port),
            ("-z", self.inbound_port),
            ("-e", self.tunnel_port),
            ("-u", self.uids),
            ("-g", self.gids),
            ("-b", self.include_inbound),
            ("-d", self.exclude_inbound),
            ("-i", self.include_cidrs),
            ("-x", self.exclude_cidrs),
            ("-q", self.include_outbound),
            ("-o", self.exclude_outbound),
            ("-c", self.exclude_interfaces),
            ("-k", self.virtual_interfaces),
            ("-m", if self.tproxy { "TPROXY" } else { "" }),
            ("--resolv-conf", self.resolv_conf),
            ("--ipv6", if self.ipv6 { "on" } else { "off" }),
        ];
        let switches = [
            ("--redirect-dns", self.redirect_dns),
            ("--capture-all-dns", self.capture_all_dns),
            ("--drop-invalid", self.drop_invalid),
        ];
        let flags = flags.into_iter().filter(|(_, value)| !value.is_empty());
        let switches = switches.into_iter().filter(|(_, on)| *on);
        flags
            .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()])
            .chain(switches.map(|(switch, _)| switch.to_owned()))
            .collect()
    }

    /// The environment.
    pub fn environment(&self) -> Vec<(&'static str, &'static str)> {
        let mut variables = Vec::new();
        if let Some(groups) = self.owner_groups {
            variables.push(("ISTIO_OUTBOUND_OWNER_GROUPS", groups));
        }
        if !self.owner_groups_exclude.is_empty() {
            variables.push((
                "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE",
                self.owner_groups_exclude,
            ));
        }
        if !self.loopback_cidr.is_empty() {
            variables.push(("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", self.loopback_cidr));
        }
        variables
    }

    /// Whether the loopback CIDR has that address.
    pub fn is_loopback(&self, address: Ipv4Addr) -> bool {
        let cidr = or(self.loopback_cidr, "127.0.0.1/32");
        let (network, bits) = cidr.split_once('/').unwrap();
        let network: Ipv4Addr = network.parse().unwrap();
        let ignored = 32 - bits.parse::<u32>().unwrap();
        (network.to_bits() ^ address.to_bits()) >> ignored == 0
    }

    /// The servers that [`Self::resolv_conf`] names.
    pub fn dns_servers(&self) -> Vec<IpAddr> {
        if !self.redirect_dns || self.resolv_conf.is_empty() {
            return Vec::new();
        }
        let text = fs::read_to_string(self.resolv_conf)
            .unwrap_or_else(|error| panic!("{}: {error}", self.resolv_conf));
        text.lines()
            .filter_map(|line| line.strip_prefix("nameserver ")?.trim().parse().ok())
            .collect()
    }

    /// The port that receives captured outbound connections.
    pub fn outbound_listener(&self) -> u16 {
        or(self.proxy_port, "15001").parse().unwrap()
    }

    /// The port that receives captured inbound connections.
    pub fn inbound_listener(&self) -> u16 {
        or(self.inbound_port, "15006").parse().unwrap()
    }
}

/// `value`, or `default` where it is empty.
pub const fn or(value: &'static str, default: &'static str) -> &'static str {
    if value.is_empty() { default } else { value }
}
