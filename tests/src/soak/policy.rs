//! The policies of the soak test, the connections that are made, and where each of them ends.

use std::net::{IpAddr, Ipv4Addr};

use crate::{
    options::Options,
    protocol::{Family, Identity},
    scene::{Attempt, Lands, To},
};

/// Nobody listens on it.
pub const CLOSED: u16 = 4444;
/// Ports of the application, in the pod.
pub const APP_PORTS: [u16; 4] = [8080, 9000, 15008, 15021];
/// Ports of the service, outside.
pub const SERVICE_PORTS: [u16; 3] = [80, 443, 9000];
/// Ports of the proxy under any policy.
pub const PROXY_PORTS: [u16; 4] = [15001, 15006, 15101, 15106];

/// Who connects.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Caller {
    /// The application.
    App,
    /// The proxy.
    Proxy,
    /// Somebody outside of the pod.
    Outside,
}

impl Caller {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::App, Self::Proxy, Self::Outside];

    /// As whom; `None` outside of the pod.
    pub const fn identity(self) -> Option<Identity> {
        match self {
            Self::App => Some(Identity::APP),
            Self::Proxy => Some(Identity::PROXY),
            Self::Outside => None,
        }
    }
}

/// A kind of connection.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Who connects.
    pub caller: Caller,
    /// Where to.
    pub to: To,
    /// From 127.0.0.6, as the proxy does on its hop to the application; IPv4 only.
    pub passthrough: bool,
    /// Where it ends, and which rule counts it, with [`Options::ISTIO`].
    usual: Expected,
}

/// Where a connection ends, and the label of the rule that counts it.
pub type Expected = (Lands, &'static str);

impl Route {
    /// What the check of one connection has to know.
    pub fn attempt(&self, lands: Lands) -> Attempt {
        let passthrough = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
        Attempt {
            from: self.caller.identity(),
            bind: self.passthrough.then(|| (passthrough, 0).into()),
            mark: 0,
            to: self.to,
            lands,
        }
    }

    /// Which families it is made in.
    pub const fn families(&self) -> &'static [Family] {
        match self {
            Self {
                passthrough: true, ..
            } => &[Family::V4],
            _ => &[Family::V4, Family::V6, Family::Mapped],
        }
    }
}

const fn route(caller: Caller, to: To, lands: Lands, label: &'static str) -> Route {
    Route {
        caller,
        to,
        passthrough: false,
        usual: (lands, label),
    }
}

use Lands::{Direct, InPlace, Inbound, Outbound};

const CAPTURED: Expected = (Outbound, "outbound-captured");

/// Every kind of connection.
pub const ROUTES: [Route; 17] = [
    route(Caller::App, To::Service(80), CAPTURED.0, CAPTURED.1),
    route(Caller::App, To::Service(443), CAPTURED.0, CAPTURED.1),
    route(Caller::App, To::Service(9000), CAPTURED.0, CAPTURED.1),
    route(Caller::App, To::Service(CLOSED), CAPTURED.0, CAPTURED.1),
    route(Caller::App, To::Elsewhere(80), CAPTURED.0, CAPTURED.1),
    route(Caller::App, To::Own(8080), Direct, "outbound-pod-local"),
    route(
        Caller::App,
        To::Localhost(8080),
        Direct,
        "outbound-pod-local",
    ),
    route(Caller::Proxy, To::Service(80), Direct, "outbound-proxy"),
    route(Caller::Proxy, To::Service(CLOSED), Direct, "outbound-proxy"),
    route(Caller::Proxy, To::Localhost(8080), Direct, "outbound-proxy"),
    route(
        Caller::Proxy,
        To::Own(8080),
        Inbound,
        "outbound-proxy-to-self",
    ),
    Route {
        passthrough: true,
        ..route(
            Caller::Proxy,
            To::Own(8080),
            Direct,
            "outbound-proxy-passthrough",
        )
    },
    route(Caller::Outside, To::Own(8080), Inbound, "inbound-captured"),
    route(Caller::Outside, To::Own(9000), Inbound, "inbound-captured"),
    route(
        Caller::Outside,
        To::Own(CLOSED),
        Inbound,
        "inbound-captured",
    ),
    route(
        Caller::Outside,
        To::Own(15021),
        Direct,
        "inbound-port-excluded",
    ),
    route(
        Caller::Outside,
        To::Own(15008),
        Direct,
        "inbound-tunnel-port",
    ),
];

/// A policy, and how it differs from [`Options::ISTIO`].
pub struct Policy {
    /// What the schedule calls it.
    pub name: &'static str,
    /// The options.
    pub options: Options,
    /// Where a connection ends if not where it usually does.
    otherwise: fn(&Route, Family) -> Option<Expected>,
}

impl Policy {
    /// Where a connection ends, and which rule counts it.
    pub fn expected(&self, route: &Route, family: Family) -> Expected {
        (self.otherwise)(route, family).unwrap_or(route.usual)
    }
}

/// Every policy; the first one is that of Istio's injector.
pub const POLICIES: [Policy; 8] = [
    Policy {
        name: "istio",
        options: Options::ISTIO,
        otherwise: |_, _| None,
    },
    Policy {
        name: "ports",
        options: Options {
            exclude_outbound: "9000",
            exclude_inbound: "15090,15021,15020,8080",
            ..Options::ISTIO
        },
        otherwise: |route, _| match (route.caller, route.to) {
            (Caller::App, To::Service(9000)) => Some((Direct, "outbound-port-excluded")),
            (Caller::Outside, To::Own(8080)) => Some((Direct, "inbound-port-excluded")),
            _ => None,
        },
    },
    Policy {
        name: "networks",
        options: Options {
            exclude_cidrs: "203.0.113.0/24",
            ..Options::ISTIO
        },
        otherwise: |route, family| match (route.caller, route.to) {
            (Caller::App, To::Service(_)) if family.is_ipv4() => {
                Some((Direct, "outbound-cidr-excluded"))
            }
            _ => None,
        },
    },
    Policy {
        name: "few",
        options: Options {
            include_cidrs: "198.51.100.0/24,2001:db8:51::/48",
            include_outbound: "443",
            include_inbound: "9000",
            ..Options::ISTIO
        },
        otherwise: |route, _| match (route.caller, route.to) {
            (Caller::App, To::Service(443)) => Some((Outbound, "outbound-port-included")),
            (Caller::App, To::Service(_)) => Some((Direct, "outbound-not-included")),
            (Caller::Outside, To::Own(9000 | 15008)) => None,
            (Caller::Outside, _) => Some((Direct, "inbound-port-not-included")),
            _ => None,
        },
    },
    Policy {
        name: "outbound only",
        options: Options {
            include_inbound: "",
            ..Options::ISTIO
        },
        otherwise: |route, _| match route.caller {
            Caller::Outside => Some((Direct, "inbound-off")),
            _ => None,
        },
    },
    Policy {
        name: "IPv4",
        options: Options {
            ipv6: false,
            ..Options::ISTIO
        },
        otherwise: |route, family| match route.caller {
            _ if family.is_ipv4() => None,
            Caller::Outside => Some((Direct, "inbound-ipv6-off")),
            _ => Some((Direct, "outbound-ipv6-off")),
        },
    },
    Policy {
        name: "other proxy ports",
        options: Options {
            proxy_port: "15101",
            inbound_port: "15106",
            ..Options::ISTIO
        },
        otherwise: |_, _| None,
    },
    Policy {
        name: "TPROXY",
        options: Options {
            tproxy: true,
            ..Options::ISTIO
        },
        otherwise: |route, _| match (route.caller, route.to) {
            (Caller::Outside, To::Own(15021)) => None,
            (Caller::Outside, _) => Some((InPlace, "inbound-captured")),
            _ => None,
        },
    },
];
