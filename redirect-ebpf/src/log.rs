//! Telling what happens, while somebody listens (`redirect log`, `redirect run`).
//!
//! Rare troubles are messages, formatted by aya-log. Decisions are typed records in a ring buffer of
//! their own: they are many, and a message of so many parts does not fit a program's stack.

use aya_log_ebpf::warn;
use redirect_common::address::Address;
use redirect_common::decide::Outbound;
use redirect_common::listener::LISTENER_SLOTS;
use redirect_common::log::{Decision, FOLLOWER_LOG, FOLLOWER_RUN, NO_OWNER};
use redirect_common::verdict::Rule;

use crate::ctx::now_ns;
use crate::maps::{DECISIONS, FOLLOWERS};

/// Readers look several times a second: nobody has to be woken.
const BPF_RB_NO_WAKEUP: u64 = 1;

/// Warns about a connection: where it was meant to go, and `text`. Readers take the network
/// namespace cookie from the front.
macro_rules! warn_about {
    ($netns_cookie:expr, $destination:expr, $port:expr, $text:literal) => {
        let destination: &Address = $destination;
        if destination.is_v4() {
            let address = u32::from_be(destination.v4_be());
            warn!(
                (),
                "netns {}: connection to {:i} port {}: {}", $netns_cookie, address, $port, $text
            );
        } else {
            let address = destination.octets();
            warn!(
                (),
                "netns {}: connection to {:i} port {}: {}", $netns_cookie, address, $port, $text
            );
        }
    };
}

/// A captured connection, whose destination this was, finds no listener of the proxy.
#[inline(always)]
pub fn no_listener(netns_cookie: u64, destination: &Address, port: u16) {
    if somebody_reads(netns_cookie) {
        warn_about!(
            netns_cookie,
            destination,
            port,
            "refused: no proxy listens where it is to go"
        );
    }
}

/// A connection that is to be captured goes where no route was known at attach.
#[inline(always)]
pub fn no_route(netns_cookie: u64, destination: &Address, port: u16) {
    if somebody_reads(netns_cookie) {
        warn_about!(
            netns_cookie,
            destination,
            port,
            "refused: no route was known there at attach"
        );
    }
}

/// A captured connection could not be announced to its accepting end.
#[inline(always)]
pub fn flow_lost(netns_cookie: u64, destination: &Address, port: u16) {
    if somebody_reads(netns_cookie) {
        warn_about!(
            netns_cookie,
            destination,
            port,
            "refused: it could not be written to FLOWS"
        );
    }
}

/// A virtual machine's packet would have to be captured and cannot be.
#[inline(always)]
pub fn machine_dropped(netns_cookie: u64, destination: &Address, port: u16) {
    if somebody_reads(netns_cookie) {
        warn_about!(
            netns_cookie,
            destination,
            port,
            "a virtual machine's packet is dropped: its interface has no such address, no steered port is free, or it is a fragment"
        );
    }
}

/// The kernel has no memory to remember a socket by.
#[inline(always)]
pub fn socket_storage_refused(netns_cookie: u64, destination: &Address, port: u16) {
    if somebody_reads(netns_cookie) {
        warn_about!(
            netns_cookie,
            destination,
            port,
            "no memory for the socket's storage"
        );
    }
}

/// More sockets listen on a port of the proxy than are remembered.
#[inline(always)]
pub fn listener_slots_full(netns_cookie: u64, port: u16) {
    if somebody_reads(netns_cookie) {
        warn!(
            (),
            "netns {}: more than {} sockets listen on port {}: the new one replaces one of them",
            netns_cookie,
            LISTENER_SLOTS,
            port
        );
    }
}

/// A decision about a connection made in the pod. `proxy_port` is 0 if it is let alone.
#[inline(always)]
pub fn decided_outbound(netns_cookie: u64, rule: Rule, connection: &Outbound, proxy_port: u16) {
    if !decisions_wanted(netns_cookie) {
        return;
    }
    let (uid, gid) = match connection.owner {
        Some(owner) => (owner.uid, owner.gid),
        None => (NO_OWNER, NO_OWNER),
    };
    tell(&Decision {
        time_ns: now_ns(),
        netns_cookie,
        source: connection.source,
        destination: connection.destination,
        source_port: 0,
        port: connection.port,
        rule: rule as u32,
        uid,
        gid,
        proxy_port,
        _pad: [0; 3],
    });
}

/// A decision about a connection from outside: addresses, and ports in host order.
#[inline(always)]
pub fn decided_inbound(
    netns_cookie: u64,
    rule: Rule,
    source: (Address, u16),
    destination: (Address, u16),
    proxy_port: u16,
) {
    if !decisions_wanted(netns_cookie) {
        return;
    }
    tell(&Decision {
        time_ns: now_ns(),
        netns_cookie,
        source: source.0,
        destination: destination.0,
        source_port: source.1,
        port: destination.1,
        rule: rule as u32,
        uid: NO_OWNER,
        gid: NO_OWNER,
        proxy_port,
        _pad: [0; 3],
    });
}

#[inline(always)]
fn tell(decision: &Decision) {
    // No room: the reader is too slow, and the connection does not wait for it.
    let _ = DECISIONS.output::<Decision>(decision, BPF_RB_NO_WAKEUP);
}

#[inline(always)]
fn somebody_reads(netns_cookie: u64) -> bool {
    [FOLLOWER_RUN, FOLLOWER_LOG].into_iter().any(|index| {
        FOLLOWERS
            .get(index)
            .is_some_and(|follower| follower.wants(netns_cookie) && follower.reads_at(now_ns()))
    })
}

#[inline(always)]
fn decisions_wanted(netns_cookie: u64) -> bool {
    FOLLOWERS.get(FOLLOWER_LOG).is_some_and(|follower| {
        follower.decisions != 0 && follower.wants(netns_cookie) && follower.reads_at(now_ns())
    })
}
