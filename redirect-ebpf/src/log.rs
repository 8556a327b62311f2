//! Telling what happens, while somebody listens (`redirect log`, `redirect run`).
//!
//! Rare troubles are messages, formatted by aya-log. Decisions are typed records in a ring buffer of
//! their own: they are many, and a message of so many parts does not fit a program's stack.

use core::hint::black_box;

use aya_log_ebpf::warn;
use redirect_common::address::Address;
use redirect_common::decide::{Outbound, Owner, Protocol};
use redirect_common::listener::LISTENER_SLOTS;
use redirect_common::log::{
    DECISION_BY_CONTAINER, DECISION_IN_PROXY_CONTAINER, DECISION_LOCAL, Decision, FOLLOWER_LOG,
    FOLLOWER_RUN, NO_OWNER, Trouble,
};
use redirect_common::pod::{FLAG_PROXY_CONTAINER, PodConfig};
use redirect_common::verdict::Rule;

use crate::ctx::{argument, now_ns};
use crate::maps::{DECISIONS, FOLLOWERS};

/// Readers look several times a second: nobody has to be woken.
const BPF_RB_NO_WAKEUP: u64 = 1;

const NOBODY: Owner = Owner {
    uid: NO_OWNER,
    gid: NO_OWNER,
};

/// A captured connection, whose destination this was, finds no listener of the proxy.
#[inline(always)]
pub fn no_listener(netns_cookie: u64, destination: &Address, port: u16) {
    warn_about(netns_cookie, destination, port, Trouble::NoListener);
}

/// A connection that is to be captured goes where no route was known at attach.
#[inline(always)]
pub fn no_route(netns_cookie: u64, destination: &Address, port: u16) {
    warn_about(netns_cookie, destination, port, Trouble::NoRoute);
}

/// A captured connection could not be announced to its accepting end.
#[inline(always)]
pub fn flow_lost(netns_cookie: u64, destination: &Address, port: u16) {
    warn_about(netns_cookie, destination, port, Trouble::FlowLost);
}

/// A virtual machine's packet would have to be captured and cannot be.
#[inline(always)]
pub fn machine_dropped(netns_cookie: u64, destination: &Address, port: u16) {
    warn_about(netns_cookie, destination, port, Trouble::MachineDropped);
}

/// The kernel has no memory to remember a socket by.
#[inline(always)]
pub fn socket_storage_refused(netns_cookie: u64, destination: &Address, port: u16) {
    warn_about(
        netns_cookie,
        destination,
        port,
        Trouble::SocketStorageRefused,
    );
}

/// All slots that could stand for a DNS query stand for others.
#[inline(always)]
pub fn no_dns_slot(netns_cookie: u64, server: &Address, port: u16) {
    warn_about(netns_cookie, server, port, Trouble::NoDnsSlot);
}

#[inline(always)]
fn warn_about(netns_cookie: u64, destination: &Address, port: u16, trouble: Trouble) {
    let [a, b, c, d] = destination.words_be.map(u64::from);
    trouble_with_connection(
        netns_cookie,
        a << 32 | b,
        c << 32 | d,
        u32::from(port),
        trouble as u32,
    );
}

/// A global function, of numbers only: the verifier walks it once, and not again on every path that
/// leads here.
///
/// Readers take the network namespace cookie from the front of the message.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn trouble_with_connection(
    netns_cookie: u64,
    high: u64,
    low: u64,
    port: u32,
    trouble: u32,
) -> i32 {
    if !somebody_reads(netns_cookie) {
        return 0;
    }
    let address = Address::from_words_be([
        (high >> 32) as u32,
        high as u32,
        (low >> 32) as u32,
        low as u32,
    ])
    .octets();
    warn!(
        (),
        "netns {}: connection to {:i} port {}: trouble {}", netns_cookie, address, port, trouble
    );
    0
}

/// More sockets of a family listen on a port of the proxy than are remembered. Global for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn listener_slots_full(netns_cookie: u64, port: u32) -> i32 {
    if somebody_reads(netns_cookie) {
        warn!(
            (),
            "netns {}: more than {} sockets of one family listen on port {}: the new one replaces one of them",
            netns_cookie,
            LISTENER_SLOTS,
            port
        );
    }
    0
}

/// What can be told about a connection made in the pod. Built before the decision, whose many ways
/// the verifier would otherwise have to tell apart up to [`decided`].
#[inline(always)]
pub fn outbound(netns_cookie: u64, pod: &PodConfig, connection: &Outbound) -> Decision {
    let owner = match connection.owner {
        // Opaque: LLVM would read the ids of nobody too before it chooses, and the verifier refuses.
        Some(owner) => black_box(owner),
        None => NOBODY,
    };
    let flag = |on: bool, flag: u16| if on { flag } else { 0 };
    Decision {
        time_ns: 0,
        netns_cookie,
        source: connection.source,
        destination: connection.destination,
        source_port: 0,
        port: connection.port,
        rule: 0,
        uid: owner.uid,
        gid: owner.gid,
        outbound_port: pod.outbound_port,
        inbound_port: pod.inbound_port,
        protocol: connection.protocol.number(),
        flags: flag(connection.local, DECISION_LOCAL)
            | flag(pod.has(FLAG_PROXY_CONTAINER), DECISION_BY_CONTAINER)
            | flag(connection.in_proxy_container, DECISION_IN_PROXY_CONTAINER),
        interface: connection.interface,
        mark: connection.mark,
    }
}

/// Tells the decision about a connection from outside, if somebody reads: addresses, and ports in
/// host order. Looks first whether anybody does, since the record takes longer to build.
#[inline(always)]
pub fn inbound(
    netns_cookie: u64,
    pod: &PodConfig,
    source: (Address, u16),
    destination: (Address, u16),
    interface: u32,
    rule: Rule,
) {
    let wanted = FOLLOWERS
        .get(FOLLOWER_LOG)
        .is_some_and(|follower| follower.wants_decisions(netns_cookie));
    if !wanted {
        return;
    }
    let about = Decision {
        time_ns: 0,
        netns_cookie,
        source: source.0,
        destination: destination.0,
        source_port: source.1,
        port: destination.1,
        rule: 0,
        uid: NOBODY.uid,
        gid: NOBODY.gid,
        outbound_port: pod.outbound_port,
        inbound_port: pod.inbound_port,
        protocol: Protocol::Tcp.number(),
        flags: 0,
        interface,
        mark: 0,
    };
    decided(&about, rule);
}

/// Tells a decision, if somebody reads.
#[inline(always)]
pub fn decided(about: &Decision, rule: Rule) {
    tell_decision(about, rule as u32);
}

/// Global as well: of everything before it, the verifier keeps only that `about` is readable.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_decision(about: *const Decision, rule: u32) -> i32 {
    let (Some(about), Some(follower)) = (argument(&about), FOLLOWERS.get(FOLLOWER_LOG)) else {
        return 0;
    };
    if !follower.wants_decisions(about.netns_cookie) {
        return 0;
    }
    let time_ns = now_ns();
    if follower.reads_at(time_ns) {
        let decision = Decision {
            time_ns,
            rule,
            ..*about
        };
        // No room: the reader is too slow, and the connection does not wait for it.
        let _ = DECISIONS.output::<Decision>(&decision, BPF_RB_NO_WAKEUP);
    }
    0
}

#[inline(always)]
fn somebody_reads(netns_cookie: u64) -> bool {
    [FOLLOWER_RUN, FOLLOWER_LOG].into_iter().any(|index| {
        FOLLOWERS
            .get(index)
            .is_some_and(|follower| follower.wants(netns_cookie) && follower.reads_at(now_ns()))
    })
}
