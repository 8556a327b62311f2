//! istio-iptables' options as a test states them: one value, from which the flags and the reference rules are both made.

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
    /// `-k`
    pub virtual_interfaces: &'static str,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS`; unlike the flags, set but empty means: nobody.
    pub owner_groups: Option<&'static str>,
    /// `ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE`
    pub owner_groups_exclude: &'static str,
    /// `ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR`
    pub loopback_cidr: &'static str,
    /// Whether IPv6 is captured.
    pub ipv6: bool,
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
        virtual_interfaces: "",
        owner_groups: None,
        owner_groups_exclude: "",
        loopback_cidr: "",
        ipv6: true,
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
            ("-k", self.virtual_interfaces),
            ("--ipv6", if self.ipv6 { "on" } else { "off" }),
        ];
        flags
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()])
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
