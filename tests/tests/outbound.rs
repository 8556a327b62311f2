//! Which outbound connections are captured, and by which listener: semantics.md 2.3 and 2.4.
//!
//! Each test runs its table against `redirect` and against Istio's own rules, over every kind of socket, and before, while and after capturing.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use redirect_tests::{
    backend::Backend,
    options::Options,
    protocol::{Family, Identity},
    scene::{Lands, Scene, To, out},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

const APP: Identity = Identity::APP;
const PROXY: Identity = Identity::PROXY;

/// An address of 127.0.0.0/8 on the application's port.
const fn loopback(c: u8, d: u8) -> To {
    To::Address(
        IpAddr::V4(Ipv4Addr::new(127, c, if c == 0 { 0 } else { 2 }, d)),
        8080,
    )
}

/// The source Envoy uses for connections to the application.
const fn passthrough(family: Family) -> IpAddr {
    if family.is_ipv4() {
        IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6))
    } else {
        IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6))
    }
}

#[rstest]
fn default_options_capture_what_istio_captures(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let attempts = [
        out(APP, To::Service(80), Outbound),
        out(APP, To::Service(15001), Outbound),
        out(APP, To::Service(15006), Outbound),
        out(APP, To::Service(15008), Outbound),
        out(APP, To::Service(53), Outbound),
        out(APP, To::Own(8080), Direct),
        out(APP, To::Own(15006), Direct),
        out(APP, To::Localhost(8080), Direct),
        out(APP, To::Localhost(15001), Direct),
        out(APP, To::Unspecified(8080), Direct),
        out(PROXY, To::Own(8080), Inbound),
        out(PROXY, To::Own(15020), Inbound),
        out(PROXY, To::Own(15001), Inbound),
        out(PROXY, To::Own(15006), Inbound),
        out(PROXY, To::Own(15008), Direct),
        out(PROXY, To::Own(8080), Direct).source(passthrough(family)),
        out(PROXY, To::Localhost(8080), Direct),
        out(PROXY, To::Unspecified(8080), Direct),
        out(PROXY, To::Service(80), Direct),
        out(Identity::new(1000, 1337), To::Service(80), Direct),
        out(Identity::new(1000, 1337), To::Own(8080), Direct),
        out(Identity::new(0, 1337), To::Own(8080), Direct),
        out(Identity::new(0, 1337), To::Service(80), Direct),
        out(Identity::new(1337, 1000), To::Own(8080), Inbound),
        out(Identity::new(1337, 1000), To::Service(80), Direct),
        out(Identity::ROOT, To::Service(80), Outbound),
    ];
    Scene::run(backend, family, Options::ISTIO, &attempts);
}

#[rstest]
fn no_include_option_captures_only_the_proxys_calls_to_its_own_pod(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let attempts = [
        out(APP, To::Service(80), Direct),
        out(APP, To::Own(8080), Direct),
        out(PROXY, To::Own(8080), Inbound),
        out(PROXY, To::Own(15008), Direct),
        out(PROXY, To::Service(80), Direct),
    ];
    Scene::run(backend, family, Options::BARE, &attempts);
}

#[rstest]
fn ipv6_off_passes_ipv6_and_captures_mapped_sockets(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let (there, own) = if family == V6 {
        (Direct, Direct)
    } else {
        (Outbound, Inbound)
    };
    let attempts = [
        out(APP, To::Service(80), there),
        out(PROXY, To::Own(8080), own),
        out(APP, To::Own(8080), Direct),
    ];
    Scene::run(
        backend,
        family,
        Options {
            ipv6: false,
            ..Options::ISTIO
        },
        &attempts,
    );
}

#[rstest]
fn proxys_other_loopback_addresses_are_inbound(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
) {
    let attempts = [
        out(PROXY, loopback(0, 5), Inbound),
        out(PROXY, loopback(0, 6), Inbound),
        out(PROXY, loopback(0, 1), Direct),
        out(APP, loopback(0, 5), Direct),
    ];
    Scene::run(backend, family, Options::ISTIO, &attempts);
}

#[rstest]
fn wide_loopback_cidr_exempts_all_loopback_addresses(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
) {
    let attempts = [
        out(PROXY, loopback(0, 5), Direct),
        out(PROXY, loopback(0, 6), Direct),
        out(PROXY, To::Own(8080), Inbound),
        out(APP, loopback(0, 5), Direct),
        out(APP, To::Service(80), Outbound),
    ];
    Scene::run(
        backend,
        family,
        Options {
            loopback_cidr: "127.0.0.1/8",
            ..Options::ISTIO
        },
        &attempts,
    );
}

#[rstest]
fn loopback_cidr_in_include_list_captures_pod_local_traffic(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
) {
    let attempts = [
        out(APP, loopback(1, 3), Outbound),
        out(APP, loopback(0, 9), Direct),
        out(APP, To::Localhost(8080), Direct),
        out(APP, To::Own(8080), Direct),
        out(APP, To::Service(80), Direct),
        out(PROXY, loopback(1, 3), Inbound),
        out(PROXY, To::Own(8080), Inbound),
    ];
    Scene::run(
        backend,
        family,
        Options {
            include_cidrs: "127.1.2.3/32",
            ..Options::ISTIO
        },
        &attempts,
    );
}

#[rstest]
fn loopback_cidr_in_include_list_wakes_the_group_rules_for_loopback(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        include_cidrs: "0.0.0.0/0,::/0,127.1.2.3/32",
        gids: "1337,1338",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Own(8080), Outbound),
        out(APP, To::Localhost(8080), Direct),
        out(APP, To::Own(8080), Direct).source(passthrough(family)),
        out(Identity::new(1000, 1337), To::Own(8080), Inbound),
        out(Identity::new(1000, 1338), To::Own(8080), Inbound),
        out(Identity::new(0, 1337), To::Own(8080), Inbound),
        out(Identity::new(1000, 1337), To::Own(15008), Direct),
        out(Identity::new(1000, 1338), To::Service(80), Direct),
        out(PROXY, To::Own(8080), Inbound),
        out(APP, To::Service(80), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn excluded_outbound_ports_pass_before_everything(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        exclude_outbound: "443,8000:8010",
        include_outbound: "443",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(443), Direct),
        out(APP, To::Service(7999), Outbound),
        out(APP, To::Service(8000), Direct),
        out(APP, To::Service(8005), Direct),
        out(APP, To::Service(8010), Direct),
        out(APP, To::Service(8011), Outbound),
        out(PROXY, To::Own(8005), Direct),
        out(PROXY, To::Own(8080), Inbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn excluded_cidrs_pass_even_with_included_ports_and_lists(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values("*", "0.0.0.0/0,::/0")] include_cidrs: &'static str,
) {
    let options = Options {
        include_cidrs,
        exclude_cidrs: "203.0.113.77/24,2001:db8:113::/48",
        include_outbound: "80",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(80), Direct),
        out(APP, To::Service(443), Direct),
        out(APP, To::Elsewhere(80), Outbound),
        out(APP, To::Elsewhere(443), Outbound),
        out(PROXY, To::Own(8080), Inbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
#[case::included("::/0", "", Direct, Outbound)]
#[case::included_ipv4("0.0.0.0/0", "", Outbound, Direct)]
#[case::excluded("*", "::/0", Outbound, Direct)]
#[case::excluded_ipv4("*", "0.0.0.0/0", Direct, Outbound)]
fn a_cidr_is_about_its_own_family_only(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[case] include_cidrs: &'static str,
    #[case] exclude_cidrs: &'static str,
    #[case] ipv4: Lands,
    #[case] ipv6: Lands,
) {
    let options = Options {
        include_cidrs,
        exclude_cidrs,
        ..Options::ISTIO
    };
    let lands = if family.is_ipv4() { ipv4 } else { ipv6 };
    let attempts = [out(APP, To::Service(80), lands)];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn excluded_cidr_of_the_pod_itself_still_hands_the_proxys_call_inbound(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, Mapped)] family: Family,
) {
    let options = Options {
        exclude_cidrs: "10.0.0.0/8",
        ..Options::ISTIO
    };
    let attempts = [
        out(PROXY, To::Own(8080), Inbound),
        out(APP, To::Own(8080), Direct),
        out(APP, To::Service(80), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn included_ports_are_captured_without_included_cidrs(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        include_cidrs: "",
        include_outbound: "80,8000:8010",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(80), Outbound),
        out(APP, To::Elsewhere(80), Outbound),
        out(APP, To::Service(443), Direct),
        out(APP, To::Service(7999), Direct),
        out(APP, To::Service(8000), Outbound),
        out(APP, To::Service(8010), Outbound),
        out(APP, To::Service(8011), Direct),
        out(APP, To::Own(80), Direct),
        out(APP, To::Localhost(80), Direct),
        out(PROXY, To::Service(80), Direct),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn included_cidrs_and_ports_add_up(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        include_cidrs: "203.0.113.10/32,2001:db8:113::10/128,192.0.2.0/24",
        include_outbound: "443",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(80), Outbound),
        out(APP, To::Service(443), Outbound),
        out(APP, To::Elsewhere(80), Direct),
        out(APP, To::Elsewhere(443), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn first_of_several_proxy_uids_decides_for_loopback(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(["3,4", "3", "4"], ["4,3", "4", "3"])] order: [&'static str; 3],
) {
    let [uids, first, second] = order.map(|uid| uid);
    let [first, second] = [first, second].map(|uid| Identity::new(uid.parse().unwrap(), 100));
    let options = Options {
        uids,
        ..Options::ISTIO
    };
    let attempts = [
        out(first.clone(), To::Own(8080), Inbound),
        out(second.clone(), To::Own(8080), Direct),
        out(first, To::Service(80), Direct),
        out(second, To::Service(80), Direct),
        out(Identity::new(5, 100), To::Service(80), Outbound),
        out(Identity::new(1337, 100), To::Service(80), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn proxy_gids_default_to_the_uids(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let attempts = [
        out(Identity::new(1000, 2102), To::Service(80), Direct),
        out(Identity::new(1000, 1337), To::Service(80), Outbound),
        out(Identity::new(2102, 1000), To::Service(80), Direct),
    ];
    Scene::run(
        backend,
        family,
        Options {
            uids: "2102",
            gids: "",
            ..Options::ISTIO
        },
        &attempts,
    );
}

#[rstest]
fn several_proxy_gids_are_exempt(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let attempts = [
        out(Identity::new(1000, 5), To::Service(80), Direct),
        out(Identity::new(1000, 6), To::Service(80), Direct),
        out(Identity::new(1000, 7), To::Service(80), Outbound),
        out(Identity::new(1000, 5), To::Own(8080), Direct),
        out(Identity::new(1337, 5), To::Own(8080), Inbound),
        out(
            Identity::new(1000, 7).supplementary(5),
            To::Service(80),
            Outbound,
        ),
    ];
    Scene::run(
        backend,
        family,
        Options {
            gids: "5,6",
            ..Options::ISTIO
        },
        &attempts,
    );
}

#[rstest]
fn owner_groups_included_are_the_only_ones_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        owner_groups: Some("2000,2001"),
        // Ignored next to a list.
        owner_groups_exclude: "2000",
        ..Options::ISTIO
    };
    let attempts = [
        out(Identity::new(1000, 2000), To::Service(80), Outbound),
        out(Identity::new(1000, 2001), To::Service(80), Outbound),
        out(APP, To::Service(80), Direct),
        out(Identity::new(2000, 1000), To::Service(80), Direct),
        out(APP.supplementary(2000), To::Service(80), Direct),
        out(PROXY, To::Own(8080), Inbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn owner_groups_excluded_pass(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        owner_groups_exclude: "2000,2001",
        ..Options::ISTIO
    };
    let attempts = [
        out(Identity::new(1000, 2000), To::Service(80), Direct),
        out(Identity::new(1000, 2001), To::Service(80), Direct),
        out(APP.supplementary(2000), To::Service(80), Outbound),
        out(APP, To::Service(80), Outbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn owner_groups_empty_pass_everybody(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        owner_groups: Some(""),
        include_outbound: "80",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(80), Direct),
        out(Identity::ROOT, To::Service(443), Direct),
        out(PROXY, To::Own(8080), Inbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn custom_ports_receive_what_is_captured(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let options = Options {
        proxy_port: "12001",
        inbound_port: "12006",
        tunnel_port: "9000",
        ..Options::ISTIO
    };
    let attempts = [
        out(APP, To::Service(80), Outbound),
        out(APP, To::Service(15001), Outbound),
        out(PROXY, To::Own(8080), Inbound),
        out(PROXY, To::Own(9000), Direct),
        out(PROXY, To::Own(15008), Inbound),
    ];
    Scene::run(backend, family, options, &attempts);
}

#[rstest]
fn validators_probe_reaches_the_inbound_listener(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values("127.0.0.1/32", "127.0.0.1/8")] loopback_cidr: &'static str,
) {
    // istio-validation binds 127.0.0.1 and dials 127.0.0.6:15002 as the proxy; a wide loopback CIDR breaks it (semantics.md 1.5).
    let mut scene = Scene::new();
    scene.attach(
        backend,
        &Options {
            loopback_cidr,
            ..Options::ISTIO
        },
    );
    let to = To::Address(Ipv4Addr::new(127, 0, 0, 6).into(), 15002);
    let attempt = out(PROXY, to, Inbound).source(Ipv4Addr::LOCALHOST.into());
    let result = scene.attempt(V4, &attempt);
    if loopback_cidr == "127.0.0.1/32" {
        result.unwrap();
    } else {
        assert!(result.unwrap_err().contains("ECONNREFUSED"));
    }
}
