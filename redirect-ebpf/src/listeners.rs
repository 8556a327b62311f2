//! Finding the proxy's listener.

use redirect_common::address::Address;
use redirect_common::listener::{LISTENER_SLOTS, ListenerKey, listener_serves};

use crate::ctx::{SockLookup, SockOps, random};
use crate::log;

const BPF_ANY: u64 = 0;
const BPF_NOEXIST: u64 = 1;

/// Remembers a socket that has begun to listen. When all slots are taken it replaces one of them:
/// the newest must be there after the others have closed.
#[inline(always)]
pub fn record(ctx: &SockOps, netns_cookie: u64, port: u16) {
    let mut key = ListenerKey::new(netns_cookie, port, 0);
    for slot in 0..LISTENER_SLOTS {
        key.slot = slot;
        if ctx.record_listener(&mut key, BPF_NOEXIST) {
            return;
        }
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
