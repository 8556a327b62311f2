//! The command line, with istio-iptables' names.

use clap::Args;

/// istio-iptables' capture flags, as typed.
///
/// Every value is text: our own validation writes the messages. A flag given twice counts as its
/// last, and takes the next word whatever it looks like, as with istio-iptables. clap reads no
/// environment here, so that tests need not change the process'. Flatten it as the last field: its
/// help heading holds for what follows.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Capture (as istio-iptables)")]
pub struct CaptureFlags {
    /// Port outbound connections are redirected to [default: 15001]
    #[arg(
        short = 'p',
        long,
        value_name = "PORT",
        allow_hyphen_values = true,
        overrides_with = "envoy_port"
    )]
    pub envoy_port: Option<String>,

    /// Port inbound connections are redirected to [default: 15006] [env: INBOUND_CAPTURE_PORT]
    #[arg(
        short = 'z',
        long,
        value_name = "PORT",
        allow_hyphen_values = true,
        overrides_with = "inbound_capture_port"
    )]
    pub inbound_capture_port: Option<String>,

    /// Port of the HBONE tunnel, never captured inbound [default: 15008] [env: INBOUND_TUNNEL_PORT]
    #[arg(
        short = 'e',
        long,
        value_name = "PORT",
        allow_hyphen_values = true,
        overrides_with = "inbound_tunnel_port"
    )]
    pub inbound_tunnel_port: Option<String>,

    /// Users that are the proxy: uids, ranges, names; 16 at most
    /// [default: uid of $ENVOY_USER or istio-proxy, else 1337] [env: PROXY_UID]
    #[arg(
        short = 'u',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "proxy_uid"
    )]
    pub proxy_uid: Option<String>,

    /// Groups that are the proxy: gids, ranges, names; 16 at most [default: as --proxy-uid] [env: PROXY_GID]
    #[arg(
        short = 'g',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "proxy_gid"
    )]
    pub proxy_gid: Option<String>,

    /// How inbound connections reach the proxy: REDIRECT, or TPROXY, which keeps their local address
    /// [default: REDIRECT] [env: ISTIO_INBOUND_INTERCEPTION_MODE]
    #[arg(
        short = 'm',
        long,
        value_name = "MODE",
        allow_hyphen_values = true,
        overrides_with = "istio_inbound_interception_mode"
    )]
    pub istio_inbound_interception_mode: Option<String>,

    /// With -m TPROXY: connections with this mark are not captured [default: 1337] [env: ISTIO_INBOUND_TPROXY_MARK]
    #[arg(
        short = 't',
        long,
        value_name = "MARK",
        allow_hyphen_values = true,
        overrides_with = "istio_inbound_tproxy_mark"
    )]
    pub istio_inbound_tproxy_mark: Option<String>,

    /// With -m TPROXY: Istio's routing table for marked packets [default: 133] [env: ISTIO_INBOUND_TPROXY_ROUTE_TABLE]
    #[arg(
        short = 'r',
        long,
        value_name = "TABLE",
        allow_hyphen_values = true,
        overrides_with = "istio_inbound_tproxy_route_table"
    )]
    pub istio_inbound_tproxy_route_table: Option<String>,

    /// Destinations captured: CIDRs, or * for all [default: none] [env: ISTIO_SERVICE_CIDR]
    #[arg(
        short = 'i',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_service_cidr"
    )]
    pub istio_service_cidr: Option<String>,

    /// Destinations never captured: CIDRs [default: none] [env: ISTIO_SERVICE_EXCLUDE_CIDR]
    #[arg(
        short = 'x',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_service_exclude_cidr"
    )]
    pub istio_service_exclude_cidr: Option<String>,

    /// Ports captured inbound, or * for all [default: none] [env: ISTIO_INBOUND_PORTS]
    #[arg(
        short = 'b',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_inbound_ports"
    )]
    pub istio_inbound_ports: Option<String>,

    /// Ports not captured inbound; only looked at with -b '*' [default: none] [env: ISTIO_LOCAL_EXCLUDE_PORTS]
    #[arg(
        short = 'd',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_local_exclude_ports"
    )]
    pub istio_local_exclude_ports: Option<String>,

    /// Ports never captured outbound [default: none] [env: ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE]
    #[arg(
        short = 'o',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_local_outbound_ports_exclude"
    )]
    pub istio_local_outbound_ports_exclude: Option<String>,

    /// Ports captured outbound whatever -i says; -x and -o are stronger [default: none] [env: ISTIO_OUTBOUND_PORTS]
    #[arg(
        short = 'q',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_outbound_ports"
    )]
    pub istio_outbound_ports: Option<String>,

    /// Destinations that count as the pod talking to itself
    /// [default: 127.0.0.1/32] [env: ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR]
    #[arg(
        long,
        value_name = "CIDR",
        allow_hyphen_values = true,
        overrides_with = "outbound_ipv4_loopback_cidr"
    )]
    pub outbound_ipv4_loopback_cidr: Option<String>,

    /// Groups whose outbound connections are captured: gids, ranges, names, or * for all; 64 at most
    /// [default: *] [env: ISTIO_OUTBOUND_OWNER_GROUPS]
    #[arg(
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "outbound_owner_groups"
    )]
    pub outbound_owner_groups: Option<String>,

    /// Groups whose outbound connections are not captured, if all others are; 64 at most
    /// [default: none] [env: ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE]
    #[arg(
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "outbound_owner_groups_exclude"
    )]
    pub outbound_owner_groups_exclude: Option<String>,

    /// Capture IPv6: auto (if the pod's first global address is IPv6), on, off [default: auto]
    #[arg(
        long,
        value_name = "WHEN",
        allow_hyphen_values = true,
        overrides_with = "ipv6"
    )]
    pub ipv6: Option<String>,

    /// With --ipv6 auto: capture IPv6 if any global address is IPv6 [env: DUAL_STACK, ISTIO_DUAL_STACK]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "dual_stack")]
    pub dual_stack: Option<String>,

    /// Capture DNS, for an agent on 127.0.0.1:15053 and [::1]:15053 [env: REDIRECT_DNS, ISTIO_META_DNS_CAPTURE]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "redirect_dns")]
    pub redirect_dns: Option<String>,

    /// With --redirect-dns: capture DNS to any server [env: CAPTURE_ALL_DNS]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "capture_all_dns")]
    pub capture_all_dns: Option<String>,

    /// Where the DNS servers to capture are listed, if not all are [default: /etc/resolv.conf]
    #[arg(
        long,
        value_name = "FILE",
        allow_hyphen_values = true,
        overrides_with = "resolv_conf"
    )]
    pub resolv_conf: Option<String>,

    /// Interfaces without capture; eth+ means all that begin with eth; needs Linux 5.17 [default: none] [env: ISTIO_EXCLUDE_INTERFACES]
    #[arg(
        short = 'c',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "istio_exclude_interfaces"
    )]
    pub istio_exclude_interfaces: Option<String>,

    /// Interfaces with virtual machines behind them, whose connections are captured by -i alone;
    /// eth+ means all that begin with eth; not with TPROXY [default: none] [env: KUBE_VIRT_INTERFACES]
    #[arg(
        short = 'k',
        long,
        value_name = "LIST",
        allow_hyphen_values = true,
        overrides_with = "kube_virt_interfaces"
    )]
    pub kube_virt_interfaces: Option<String>,
}
