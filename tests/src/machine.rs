//! A virtual machine behind an interface of the pod: a third namespace, whose packets the pod forwards.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{
    actor::Actor,
    backend::Backend,
    namespace::Namespace,
    pod::Pod,
    protocol::{Dial, Dialed, Family, Identity, canonical},
};

/// How the machine's link ends in the pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Link {
    /// At the interface itself.
    Plain,
    /// At a port of a bridge, as KubeVirt does: the interface is the bridge.
    Bridge,
}

/// A virtual machine; all of it goes away with this value, and its link with the pod.
pub struct Machine {
    /// A process of the machine.
    pub actor: Actor,
    /// The pod's interface.
    pub interface: String,
    /// The machine's own address.
    pub ipv4: Ipv4Addr,
    /// The same over IPv6.
    pub ipv6: Ipv6Addr,
    /// The first address of the pod's interface.
    pub gateway4: Ipv4Addr,
    /// The same over IPv6.
    pub gateway6: Ipv6Addr,
    /// Where the machine lives.
    pub netns: Namespace,
}

impl Machine {
    /// A machine behind a new interface of the pod; `number` tells the machines of a pod apart.
    pub fn new(pod: &Pod, interface: &str, number: u8, link: Link) -> Self {
        let netns = Namespace::new(&format!("{}-{interface}", pod.netns.name()));
        let (gateway4, ipv4) = (
            Ipv4Addr::new(172, 30, number, 1),
            Ipv4Addr::new(172, 30, number, 2),
        );
        let network6 = 0x100 + u16::from(number);
        let gateway6 = Ipv6Addr::new(0xfd30, network6, 0, 0, 0, 0, 0, 1);
        let ipv6 = Ipv6Addr::new(0xfd30, network6, 0, 0, 0, 0, 0, 2);
        // Nothing is forwarded over IPv6 while link-local addresses are tentative.
        for namespace in [&pod.netns, &netns] {
            namespace.sysctl(&[("ipv6/conf/default/accept_dad", "0")]);
        }
        match link {
            Link::Plain => pod.netns.ip(&format!(
                "link add {interface} type veth peer name eth0 netns {}",
                netns.name()
            )),
            Link::Bridge => pod.netns.ip(&format!(
                "link add {interface} type bridge mcast_snooping 0\n\
                 link add {interface}p type veth peer name eth0 netns {}\n\
                 link set {interface}p master {interface} up",
                netns.name()
            )),
        }
        // The second address is not the one that connections are sent to.
        pod.netns.ip(&format!(
            "addr add {gateway4}/24 dev {interface}\naddr add 172.29.{number}.1/24 dev {interface}\n\
             addr add {gateway6}/64 dev {interface} nodad\nlink set {interface} up"
        ));
        netns.ip(&format!(
            "addr add {ipv4}/24 dev eth0\naddr add {ipv6}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via {gateway4}\nroute add default via {gateway6}"
        ));
        pod.netns
            .sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")]);
        let (pod4, pod6) = (pod.ipv4, pod.ipv6);
        pod.peer.ip(&format!(
            "route add {ipv4}/32 via {pod4}\nroute add {ipv6}/128 via {pod6}"
        ));
        Self {
            actor: Actor::start(&netns.path(), None, Identity::ROOT),
            interface: interface.to_owned(),
            ipv4,
            ipv6,
            gateway4,
            gateway6,
            netns,
        }
    }

    /// The machine's address in that family.
    pub fn own(&self, family: Family) -> IpAddr {
        if family.is_ipv4() {
            self.ipv4.into()
        } else {
            self.ipv6.into()
        }
    }

    /// The first address of the pod's interface in that family.
    pub fn gateway(&self, family: Family) -> IpAddr {
        if family.is_ipv4() {
            self.gateway4.into()
        } else {
            self.gateway6.into()
        }
    }

    /// Dials, and compares who answered with `who`. `captured` tells who captures, and at which address and port
    /// the proxy is to see the connection; where nothing is captured, the destination is.
    pub fn check(
        &mut self,
        family: Family,
        dial: &Dial,
        who: &str,
        captured: Option<(Backend, SocketAddr)>,
    ) -> Dialed {
        let dialed = self.actor.dial(dial);
        let case = format!("{family:?} to {} expecting {who}: {dialed:?}", dial.to);
        assert_eq!(dialed.outcome(), who, "{case}");
        let greeting = dialed.greeting.clone().unwrap();
        let local = canonical(dialed.local.unwrap());
        assert_eq!(local.ip(), self.own(family), "{case}");
        assert_eq!(canonical(dialed.peer.unwrap()), dial.to, "{case}");
        let (captured_by, server) = captured.unzip();
        let peer = canonical(greeting.peer);
        assert_eq!(peer, Backend::shown(captured_by, local, peer), "{case}");
        assert_eq!(
            canonical(greeting.local),
            server.unwrap_or(dial.to),
            "{case}"
        );
        if captured.is_some() {
            let asked = if family.is_ipv4() {
                greeting.original
            } else {
                greeting.original6
            };
            assert_eq!(asked.address, Some(dial.to), "{case}");
        }
        dialed
    }
}
