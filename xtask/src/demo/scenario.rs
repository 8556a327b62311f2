//! The connections the demo makes, and where iptables would have each of them land.

use std::net::{Ipv4Addr, SocketAddr};

use super::{APP_PORT, HEALTH_PORT, OWN_SERVICE_IP, POD_IP, SERVICE_IP};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A process in the pod, as an ordinary user.
    App,
    /// A process in the pod with the proxy's uid and gid.
    Proxy,
    /// The other side of the pod's network.
    Peer,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Not captured: client and server see each other.
    Direct,
    /// To the proxy's outbound listener, and from there to the original destination.
    Outbound,
    /// To the inbound listener, which calls the app from 127.0.0.6.
    Inbound,
    /// To the outbound listener, whose call to the pod itself lands on the inbound one.
    OwnService,
}

impl Route {
    /// How many connections the proxy accepts, each with a line in its access log.
    pub fn proxied_times(self) -> usize {
        match self {
            Self::Direct => 0,
            Self::Outbound | Self::Inbound => 1,
            Self::OwnService => 2,
        }
    }
}

pub struct Request {
    pub from: Origin,
    pub title: String,
    pub to: SocketAddr,
    pub route: Route,
    /// The name of the server that must answer.
    pub answered_by: &'static str,
}

impl Request {
    fn new(
        from: Origin,
        title: &str,
        to: impl Into<SocketAddr>,
        route: Route,
        answered_by: &'static str,
    ) -> Self {
        Self {
            from,
            title: title.to_owned(),
            to: to.into(),
            route,
            answered_by,
        }
    }
}

/// The rows of Istio's behaviour (`-i * -b * -d 15090,15021,15020 -u 1337 -g 1337`) that people ask about.
pub fn captured() -> Vec<Request> {
    let mapped = SERVICE_IP.to_ipv6_mapped();
    vec![
        Request::new(
            Origin::App,
            "app calls a remote service",
            (SERVICE_IP, 80),
            Route::Outbound,
            "peer",
        ),
        Request::new(
            Origin::App,
            "the same, IPv4-mapped socket",
            (mapped, 80),
            Route::Outbound,
            "peer",
        ),
        Request::new(
            Origin::App,
            "app calls its own service",
            (OWN_SERVICE_IP, 80),
            Route::OwnService,
            "app",
        ),
        Request::new(
            Origin::Peer,
            "peer calls the app",
            (POD_IP, APP_PORT),
            Route::Inbound,
            "app",
        ),
        Request::new(
            Origin::Peer,
            "peer probes an excluded port",
            (POD_IP, HEALTH_PORT),
            Route::Direct,
            "app",
        ),
        Request::new(
            Origin::App,
            "app calls 127.0.0.1",
            (Ipv4Addr::LOCALHOST, APP_PORT),
            Route::Direct,
            "app",
        ),
        Request::new(
            Origin::App,
            "app calls its own pod IP",
            (POD_IP, APP_PORT),
            Route::Direct,
            "app",
        ),
        Request::new(
            Origin::Proxy,
            "the proxy's user calls out",
            (SERVICE_IP, 80),
            Route::Direct,
            "peer",
        ),
    ]
}

/// Calls that are captured only while the pod is.
pub fn control(when: &str) -> Vec<Request> {
    vec![
        Request::new(
            Origin::App,
            &format!("{when}: app calls out"),
            (SERVICE_IP, 80),
            Route::Direct,
            "peer",
        ),
        Request::new(
            Origin::Peer,
            &format!("{when}: peer calls in"),
            (POD_IP, APP_PORT),
            Route::Direct,
            "app",
        ),
    ]
}
