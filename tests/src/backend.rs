//! The capture under test, and the reference that vouches for the expectations.

use std::net::SocketAddr;

use aya::util::KernelVersion;

use crate::{
    iptables::{self, Variant},
    loader,
    namespace::errors,
    options::Options,
    pod::{Pod, Regrets},
};

/// Who captures.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Backend {
    /// This project's eBPF data plane.
    Redirect,
    /// Istio's rules in the kernel's own iptables.
    Iptables,
}

/// The first kernel tested whose NAT finds another source port for a connection that would become like one that it has already. With
/// the older ones its first packet is lost.
const NAT_FINDS_PORTS: KernelVersion = KernelVersion::new(6, 12, 0);

impl Backend {
    /// Whether two connections of one source port reach one listener of the proxy.
    pub fn serves_one_source_port_twice(self) -> bool {
        self == Self::Redirect || KernelVersion::current().unwrap() >= NAT_FINDS_PORTS
    }

    /// The peer that a server is to see, by who has captured the connection of a client with this address. `seen` is the one that
    /// it saw: NAT takes another source port if a connection to the same listener has it already.
    pub fn shown(captured_by: Option<Self>, client: SocketAddr, seen: SocketAddr) -> SocketAddr {
        match captured_by {
            Some(Self::Iptables) => SocketAddr::new(client.ip(), seen.port()),
            _ => client,
        }
    }

    /// Captures the pod's traffic, until the returned value is dropped; the pod is remembered by reference.
    pub fn attach(self, pod: &Pod, options: &Options) {
        match self {
            Self::Redirect => drop(loader::attach(pod, options)),
            Self::Iptables => iptables::apply(pod, options, Variant::from_environment()),
        }
    }

    /// Ends the capture.
    pub fn detach(self, pod: &Pod) {
        match self {
            Self::Redirect => {
                let output = loader::detach(pod.cgroup.path());
                if !output.status.success() {
                    Regrets::new("the attachment").add(errors(&output));
                }
            }
            Self::Iptables => iptables::flush(pod, Variant::from_environment()),
        }
    }
}
