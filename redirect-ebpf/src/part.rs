//! Which part a socket has in a captured connection.

use redirect_common::connection::{Original, ROLE_ACCEPTED_OUTBOUND, ROLE_CLIENT, SocketState};

use crate::ctx::{IPPROTO_MPTCP, IPPROTO_TCP, Sock};
use crate::destinations;

/// What the socket remembers, or else what its ports tell. None if it is not connected.
#[inline(always)]
pub fn of(sock: Sock, netns_cookie: u64) -> Option<SocketState> {
    let (source_port, destination_port) = (sock.source_port(), sock.destination_port());
    let protocol = sock.protocol();
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return None;
    }
    // Disconnected: what it was before must not be told.
    if destination_port == 0 {
        return None;
    }
    if let Some(state) = sock.state() {
        return Some(*state);
    }
    let (source, destination) = (sock.source(), sock.destination());
    if destinations::is_steered(netns_cookie, &source, &destination, destination_port)
        && let Some(original) = destinations::of_port(netns_cookie, destination_port)
    {
        return Some(state(original, ROLE_CLIENT));
    }
    if destinations::is_steered(netns_cookie, &destination, &source, source_port)
        && let Some(original) = destinations::of_port(netns_cookie, source_port)
    {
        return Some(state(original, ROLE_ACCEPTED_OUTBOUND));
    }
    None
}

#[inline(always)]
fn state(original: &Original, role: u32) -> SocketState {
    SocketState {
        original: *original,
        role,
        _pad: 0,
    }
}
