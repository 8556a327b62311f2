//! Finding the proxy's listener.

use redirect_common::address::Address;
use redirect_common::decide;
use redirect_common::listener::{
    LISTENER_SLOTS, ListenerKey, first_listener_slot, listener_serves,
};
use redirect_common::pod::PodConfig;

use crate::ctx::{Sock, SockLookup, SockOps, random};
use crate::log;
use crate::maps;
use crate::owner;

const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;

/// Remembers a socket that has begun to listen, unless it is bound to an address that is not the
/// pod's: `IP_FREEBIND` lets everybody do so, and no connection could reach it there.
///
/// When all slots of its family are taken, one of the proxy's replaces one of them: the newest must be
/// there after the others have closed. Nobody else pushes the proxy's out.
#[inline(always)]
pub fn record(ctx: &SockOps, sock: Sock, (netns_cookie, pod): (u64, &PodConfig), port: u16) {
    let (bound, _) = ctx.addresses();
    if !bound.is_unspecified() && !maps::is_local(netns_cookie, &bound) {
        return;
    }
    let mut key = ListenerKey::new(netns_cookie, port, 0);
    let first = first_listener_slot(&bound);
    for number in 0..LISTENER_SLOTS {
        key.slot = first + number;
        if ctx.record_listener(&mut key, BPF_NOEXIST) {
            return;
        }
    }
    let owner = owner::of(sock.address());
    if !decide::is_proxy(
        pod,
        owner,
        owner::is_in_proxy_container(pod, sock.address()),
    ) {
        return;
    }
    log::listener_slots_full(netns_cookie, u32::from(port));
    key.slot = first + (random() % u32::from(LISTENER_SLOTS)) as u16;
    ctx.record_listener(&mut key, BPF_ANY);
}

/// Gives the connection for `target` to a listener on `port` that may have it. Those of its family are
/// asked first, then the others: a socket bound to `::` may serve IPv4 too, and former builds used the
/// same slots for both.
#[inline(always)]
pub fn assign(ctx: &SockLookup, netns_cookie: u64, port: u16, target: &Address) -> bool {
    let first = first_listener_slot(target);
    let serves = |number: u16| {
        let key = ListenerKey::new(netns_cookie, port, number ^ first);
        ctx.assign(&key, |bound| listener_serves(bound, target))
    };
    const { assert!(2 * LISTENER_SLOTS == 16) };
    // By fours, which LLVM unrolls: the verifier of Linux 6.1 does not come to the end of a longer loop.
    let four =
        |start: u16| serves(start) || serves(start + 1) || serves(start + 2) || serves(start + 3);
    four(0) || four(4) || four(8) || four(12)
}
