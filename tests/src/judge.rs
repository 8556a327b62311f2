//! What both ends of a connection are to see.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{
    backend::Backend,
    options::Options,
    pod::Pod,
    protocol::{Dialed, canonical},
    scene::{APP, Attempt, Lands, SERVICE, loopback},
};

/// A pod, and what is captured in it.
#[derive(Clone, Copy, Debug)]
pub struct Judge<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// What is captured.
    pub options: &'a Options,
    /// By whom, if anything is.
    pub attached: Option<Backend>,
}

impl Judge<'_> {
    /// Compares one connection with its expectation: who answered, and what both ends saw, as with iptables' REDIRECT.
    pub fn judge(&self, dialed: &Dialed, to: SocketAddr, attempt: &Attempt) -> Result<(), String> {
        let inward = attempt.from.is_none();
        let real = match to.ip() {
            // connect(2) to the unspecified address means this host.
            ip if ip.is_unspecified() && ip.is_ipv4() => {
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port())
            }
            ip if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), to.port()),
            _ => to,
        };
        let local_destination = inward || self.pod.is_local(real.ip());
        let (outbound, inbound) = (
            self.options.outbound_listener(),
            self.options.inbound_listener(),
        );
        let (who, server) = match attempt.lands {
            Lands::Direct if !local_destination => (SERVICE.to_owned(), real),
            Lands::Direct if [outbound, inbound].contains(&to.port()) => {
                (to.port().to_string(), real)
            }
            Lands::Direct => (APP.to_owned(), real),
            Lands::Outbound => (outbound.to_string(), loopback(real, outbound)),
            // PREROUTING redirects to the ingress interface's address, OUTPUT to loopback.
            Lands::Inbound if inward => (inbound.to_string(), SocketAddr::new(real.ip(), inbound)),
            Lands::InPlace => (inbound.to_string(), real),
            Lands::Inbound => (inbound.to_string(), loopback(real, inbound)),
        };
        let source = match attempt.bind {
            Some(source) if !source.ip().is_unspecified() => source.ip(),
            _ if inward => self.peer_of(real),
            _ if real.ip().is_loopback() => loopback(real, 0).ip(),
            _ if real.is_ipv4() => self.pod.ipv4.into(),
            _ => self.pod.ipv6.into(),
        };
        equal("who answered", dialed.outcome(), &who)?;
        let greeting = dialed.greeting.as_ref().unwrap();
        let (local, peer) = (
            canonical(dialed.local.unwrap()),
            canonical(dialed.peer.unwrap()),
        );
        equal("the client's own address", &local.ip(), &source)?;
        equal("the client's peer", &peer, &real)?;
        let captured_by = self.attached.filter(|_| attempt.lands != Lands::Direct);
        let seen = canonical(greeting.peer);
        let shown = Backend::shown(captured_by, local, seen);
        equal("the server's peer", &seen, &shown)?;
        equal(
            "the server's own address",
            &canonical(greeting.local),
            &server,
        )?;
        // A server outside the pod, or in a family that is not captured, has nobody to ask.
        let captured_family = real.is_ipv4() || self.options.ipv6;
        if self.attached.is_some()
            && captured_family
            && local_destination | (attempt.lands != Lands::Direct)
        {
            let asked = if real.is_ipv4() {
                &greeting.original
            } else {
                &greeting.original6
            };
            equal("SO_ORIGINAL_DST", &asked.address, &Some(real))?;
        }
        Ok(())
    }

    const fn peer_of(&self, to: SocketAddr) -> IpAddr {
        if to.is_ipv4() {
            IpAddr::V4(self.pod.peer4)
        } else {
            IpAddr::V6(self.pod.peer6)
        }
    }
}

fn equal<T: PartialEq + std::fmt::Debug + ?Sized>(
    what: &str,
    seen: &T,
    expected: &T,
) -> Result<(), String> {
    if seen == expected {
        Ok(())
    } else {
        Err(format!("{what} is {seen:?}, expected {expected:?}"))
    }
}
