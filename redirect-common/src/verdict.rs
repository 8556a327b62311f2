//! What was decided about a connection, and by which rule.

/// Where a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Where it was meant to go.
    Pass,
    /// To the proxy's outbound listener (15001).
    CaptureOutbound,
    /// To the proxy's inbound listener (15006).
    CaptureInbound,
    /// To the proxy's inbound listener, with the local address it was meant for: iptables' TPROXY
    /// of a connection that the pod makes to itself.
    CaptureInPlace,
    /// To the agent that answers DNS queries ([`DNS_AGENT_PORT`](crate::dns::DNS_AGENT_PORT)).
    CaptureDns,
}

macro_rules! rules {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal, $action:ident;)+) => {
        /// The rule that decided, in the order of evaluation. The number indexes a pod's counters.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Rule {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Rule {
            /// Every rule.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Short name for people and for metrics.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// The rule of that number.
            #[inline(always)]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }

            /// What the rule does with a connection.
            #[inline(always)]
            pub const fn action(self) -> Action {
                match self { $(Self::$name => Action::$action,)+ }
            }
        }
    };
}

rules! {
    /// IPv6 is not captured in this pod.
    Ipv6Off = 0, "outbound-ipv6-off", Pass;
    /// `-o` names the port.
    ExcludedPort = 1, "outbound-port-excluded", Pass;
    /// The proxy's own hop to the application, from 127.0.0.6 or ::6.
    ProxyPassthrough = 2, "outbound-proxy-passthrough", Pass;
    /// The proxy dials its own pod: to the inbound listener.
    ProxyToSelf = 3, "outbound-proxy-to-self", CaptureInbound;
    /// Not the proxy, and inside the pod.
    PodLocal = 4, "outbound-pod-local", Pass;
    /// The proxy dials out.
    Proxy = 5, "outbound-proxy", Pass;
    /// Owner groups leave this socket's group out.
    OwnerGroup = 6, "outbound-owner-group", Pass;
    /// A DNS query that is captured, over UDP or TCP.
    Dns = 25, "outbound-dns", CaptureDns;
    /// The loopback CIDR.
    Loopback = 7, "outbound-loopback", Pass;
    /// `-x` has the destination.
    ExcludedCidr = 8, "outbound-cidr-excluded", Pass;
    /// `-q` names the port.
    IncludedPort = 9, "outbound-port-included", CaptureOutbound;
    /// `-i` has the destination.
    IncludedCidr = 10, "outbound-captured", CaptureOutbound;
    /// No rule captures it.
    NotIncluded = 11, "outbound-not-included", Pass;
    /// To be captured, but the pod has no route there: refused with ENETUNREACH, as the kernel would.
    NoRoute = 12, "outbound-no-route", Pass;
    /// IPv6 is not captured in this pod.
    InboundIpv6Off = 13, "inbound-ipv6-off", Pass;
    /// `-b` is empty.
    InboundOff = 14, "inbound-off", Pass;
    /// The tunnel port has a listener of its own.
    TunnelPort = 15, "inbound-tunnel-port", Pass;
    /// `-d` names the port.
    InboundPortExcluded = 16, "inbound-port-excluded", Pass;
    /// `-b` has the port.
    InboundCaptured = 17, "inbound-captured", CaptureInbound;
    /// `-b` does not have the port.
    InboundPortNotIncluded = 18, "inbound-port-not-included", Pass;
    /// A captured connection found no listener of the proxy: its peer is refused.
    NoListener = 19, "no-proxy-listener", Pass;
    /// A captured connection could not be handed over (`FLOWS` full): it is refused.
    FlowLost = 20, "flow-lost", Pass;
    /// `-c` names the interface it leaves by.
    ExcludedInterface = 21, "outbound-interface-excluded", Pass;
    /// TPROXY: a proxy's id without a rule of its own dials its own pod.
    ProxyToSelfInPlace = 22, "outbound-proxy-to-self-in-place", CaptureInPlace;
    /// `-c` names the interface it came by.
    InboundInterfaceExcluded = 23, "inbound-interface-excluded", Pass;
    /// TPROXY leaves the loopback CIDR alone.
    InboundLoopback = 24, "inbound-loopback", Pass;
    /// No slot is free for a captured DNS query (`DNS_SLOTS`): its socket remembers only the server asked last.
    NoDnsSlot = 26, "no-dns-slot", Pass;
    /// A virtual machine's connection; `-i` has the destination.
    MachineCaptured = 27, "machine-captured", CaptureOutbound;
    /// A virtual machine's connection; `-i` does not have the destination.
    MachineNotIncluded = 28, "machine-not-included", Pass;
    /// A virtual machine's connection over IPv6, which is not captured in this pod.
    MachineIpv6Off = 29, "machine-ipv6-off", Pass;
    /// A virtual machine's packet would have to be captured and cannot be: it is dropped.
    MachineDropped = 30, "machine-dropped", Pass;
}

/// Counters of a pod: one per [`Rule`], with room to grow.
pub const COUNTERS: usize = if cfg!(feature = "other-layout") {
    40
} else {
    32
};
const _: () = assert!(Rule::ALL.len() <= COUNTERS);
