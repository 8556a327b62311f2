//! How a captured connection is told from others at both ends: by the port it is steered to, and
//! where that is not enough by what each socket remembers.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// First of the ports that captured connections are sent to on their own source address.
///
/// The program attached to `sk_lookup` steers them to the proxy's listener, so nothing has to
/// listen here. They lie above the default ephemeral range. In each pod a port stands for one
/// original destination, so that neither socket has to remember it, and a pod can hold as many
/// connections to a destination as without capture.
pub const STEERED_PORT_FIRST: u16 = 61_000;
/// How many steered ports stand for destinations.
pub const STEERED_PORTS: u16 = 4_000;
/// How many ports are tried for a destination before its connections are told apart one by one.
pub const STEERED_PORT_TRIES: u32 = 8;
/// First of the steered ports that stand for nothing: for connections told apart one by one. A
/// range of their own, so that these never take the place of the others.
pub const SPARE_PORT_FIRST: u16 = STEERED_PORT_FIRST + STEERED_PORTS;
/// How many there are.
pub const SPARE_PORTS: u16 = u16::MAX - SPARE_PORT_FIRST;
/// How many of them are tried for a socket that is bound to a port.
pub const SPARE_PORT_TRIES: u32 = 12;

/// True if `port` is one that captured connections are sent to.
#[inline(always)]
pub const fn is_steered_port(port: u16) -> bool {
    port >= STEERED_PORT_FIRST && port < u16::MAX
}

/// Key of `DESTINATIONS`: what a steered port of a pod stands for. An entry never changes while the
/// pod is attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct DestinationKey {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// The steered port, host order.
    pub port: u32,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(DestinationKey, 16);

impl DestinationKey {
    /// Key of a steered port in host order.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, port: u16) -> Self {
        Self {
            netns_cookie,
            port: port as u32,
            _pad: 0,
        }
    }
}

/// Key of `FLOWS`: a connection on its way from connect() to accept() whose steered port does not
/// tell where it goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct FlowKey {
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// The connecting socket's address.
    pub client: Address,
    /// The address connected to: one of the pod's own.
    pub steered: Address,
    /// The connecting socket's port, host order.
    pub client_port: u16,
    /// The port connected to, host order.
    pub steered_port: u16,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(FlowKey, 48);

impl FlowKey {
    /// Key of the connection from `client` to `steered`: addresses, and ports in host order.
    #[inline(always)]
    pub const fn new(netns_cookie: u64, client: (Address, u16), steered: (Address, u16)) -> Self {
        Self {
            netns_cookie,
            client: client.0,
            steered: steered.0,
            client_port: client.1,
            steered_port: steered.1,
            _pad: 0,
        }
    }
}

/// What the application asked for, and who is to get the connection instead.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Original {
    /// The original destination.
    pub destination: Address,
    /// The original destination's port, host order.
    pub port: u16,
    /// The port the proxy listens on, host order; 0 if the connection is let alone.
    pub proxy_port: u16,
    /// 1 if the connection is not steered to another port but goes where it was meant to, and is
    /// known by its flow alone.
    pub in_place: u32,
}

crate::assert_size!(Original, 24);

impl Original {
    /// The steered port that stands for this destination if the ones of the tries before are taken.
    /// `attempt` counts from 0.
    #[inline(always)]
    pub const fn steered_port(&self, attempt: u32) -> u16 {
        // Odd constants of the golden ratio and of MurmurHash: neighbouring addresses and ports
        // spread well, which is all that is asked.
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        const MURMUR: u64 = 0xff51_afd7_ed55_8ccd;
        let words = self.destination.words_be;
        let high = (words[0] as u64) << 32 | words[1] as u64;
        let low = (words[2] as u64) << 32 | words[3] as u64;
        let ports = (self.port as u64) << 16 | self.proxy_port as u64;
        let mixed =
            (high.wrapping_mul(GOLDEN) ^ low).wrapping_mul(MURMUR) ^ ports.wrapping_mul(GOLDEN);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(MURMUR);
        let hash = (mixed >> 33) as u32;
        STEERED_PORT_FIRST + (hash.wrapping_add(attempt * 977) % STEERED_PORTS as u32) as u16
    }
}

/// A socket's part in a connection. Kept in the socket's own storage where the ports do not tell;
/// dies with it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SocketState {
    /// Where the connection was meant to go.
    pub original: Original,
    /// One of the `ROLE_` constants.
    pub role: u32,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(SocketState, 32);

impl SocketState {
    /// Of a listener on `port`, host order.
    #[inline(always)]
    pub const fn of_listener(port: u16) -> Self {
        Self {
            original: Original {
                destination: Address::UNSPECIFIED,
                port: 0,
                proxy_port: port,
                in_place: 0,
            },
            role: ROLE_LISTENER,
            _pad: 0,
        }
    }
}

/// Nothing known.
pub const ROLE_NONE: u32 = 0;
/// A captured connection's connecting socket.
pub const ROLE_CLIENT: u32 = 1;
/// The proxy's socket of a connection captured on its way out.
pub const ROLE_ACCEPTED_OUTBOUND: u32 = 2;
/// The proxy's socket of a connection captured on its way in.
pub const ROLE_ACCEPTED_INBOUND: u32 = 3;
/// An accepted socket of a connection that was not captured.
pub const ROLE_ACCEPTED_DIRECT: u32 = 4;
/// A connecting socket that is not captured, although its ports could belong to one that is.
pub const ROLE_CLIENT_DIRECT: u32 = 5;
/// A listener of the proxy that gets connections from outside, on the port `original.proxy_port`.
/// The sockets it accepts inherit this, and so are known to be steered if their port is another.
pub const ROLE_LISTENER: u32 = 6;
/// The proxy's socket of a connection that a virtual machine makes.
pub const ROLE_ACCEPTED_MACHINE: u32 = 7;
/// A UDP socket whose DNS queries are captured: `original` is the server that it is connected to, or
/// that it asked last.
pub const ROLE_DNS_CLIENT: u32 = 16;
/// The same of a socket that the application itself has bound to a loopback address.
pub const ROLE_DNS_CLIENT_ON_LOOPBACK: u32 = 17;
