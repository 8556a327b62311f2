//! Finding the proxy's listener.

use redirect_common::address::Address;
use redirect_common::decide;
use redirect_common::listener::{LISTENER_SLOTS, ListenerKey, listener_serves};
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
/// When all slots are taken, one of the proxy's replaces one of them: the newest must be there after
/// the others have closed. Nobody else pushes the proxy's out.
#[inline(always)]
pub fn record(ctx: &SockOps, sock: Sock, (netns_cookie, pod): (u64, &PodConfig), port: u16) {
    let (bound, _) = ctx.addresses();
    if !bound.is_unspecified() && !maps::is_local(netns_cookie, &bound) {
        return;
    }
    let mut key = ListenerKey::new(netns_cookie, port, 0);
    for slot in 0..LISTENER_SLOTS {
        key.slot = slot;
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
    key.slot = (random() % u32::from(LISTENER_SLOTS)) as u16;
    ctx.record_listener(&mut key, BPF_ANY);
}

/// Gives the connection for `target` to a listener on `port` that may have it.
#[inline(always)]
pub fn assign(ctx: &SockLookup, netns_cookie: u64, port: u16, target: &Address) -> bool {
    for slot in 0..LISTENER_SLOTS {
        let key = ListenerKey::new(netns_cookie, port, slot);
        if ctx.assign(&key, |bound| listener_serves(bound, target)) {
            return true;
        }
    }
    false
}
