//! Per-connection state: the hand-over from the connecting to the accepted socket, and what each
//! socket remembers.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;

/// First of the ports that captured connections are sent to on their own source address.
///
/// The program attached to `sk_lookup` steers them to the proxy's listener, so nothing has to
/// listen here. They lie above the default ephemeral range. Every captured connection draws one at
/// random: a pod can hold 28,232 connections per port instead of 28,232 in all.
pub const STEERED_PORT_FIRST: u16 = 61_000;
/// How many steered ports there are.
pub const STEERED_PORTS: u16 = u16::MAX - STEERED_PORT_FIRST;

/// True if `port` is one that captured connections are sent to.
#[inline(always)]
pub const fn is_steered_port(port: u16) -> bool {
    port >= STEERED_PORT_FIRST && port < u16::MAX
}

/// Key of `FLOWS`: a captured connection on its way from connect() to accept().
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
    /// The port the proxy listens on, host order.
    pub proxy_port: u16,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(Original, 24);

/// A socket's part in a connection. Kept in the socket's own storage; dies with it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SocketState {
    /// Where the connection was meant to go.
    pub original: Original,
    /// One of the `ROLE_` constants.
    pub role: u32,
    /// 1 while state changes of the socket are watched on our behalf.
    pub watching: u32,
}

crate::assert_size!(SocketState, 32);

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
