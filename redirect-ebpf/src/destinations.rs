//! Steered ports: each stands for one original destination of the pod.
//!
//! Both ends of a captured connection see the port, so neither has to remember the destination. A
//! pod that has more destinations than ports falls back to `FLOWS` and socket storage.

use core::hint::black_box;

use redirect_common::address::Address;
use redirect_common::connection::{DestinationKey, Original, STEERED_PORT_TRIES, is_steered_port};

use crate::ctx::argument;
use crate::maps;

/// The port that stands for a destination. None if all that were tried stand for others.
/// A socket bound to `source_port` must not get that one: it would connect to itself.
#[inline(always)]
pub fn port_of(netns_cookie: u64, original: &Original, source_port: u16) -> Option<u16> {
    // Opaque: LLVM knows what the function can answer, the verifier does not.
    let port = black_box(standing_port(netns_cookie, original, source_port.into()));
    (port != NONE).then_some(port as u16)
}

/// No port: none is steered to it.
const NONE: u32 = 0;

/// A global function: the verifier walks the tries once, and what follows them once, not again for
/// every try that may have been the last.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn standing_port(netns_cookie: u64, original: *const Original, source_port: u32) -> u32 {
    let Some(original) = argument(&original) else {
        return NONE;
    };
    // A copy: before Linux 6.2 a map takes no value that is the caller's memory.
    let original = &{ *original };
    for attempt in 0..STEERED_PORT_TRIES {
        let port = original.steered_port(attempt);
        if u32::from(port) == source_port {
            continue;
        }
        let key = DestinationKey::new(netns_cookie, port);
        let known = match maps::destination(&key) {
            Some(known) => Some(known),
            None if maps::add_destination(&key, original) => return port.into(),
            // Another CPU was faster.
            None => maps::destination(&key),
        };
        if known.is_some_and(|known| *known == *original) {
            return port.into();
        }
    }
    NONE
}

/// The port that stands for a destination already.
#[inline(always)]
pub fn known_port_of(netns_cookie: u64, original: &Original) -> Option<u16> {
    for attempt in 0..STEERED_PORT_TRIES {
        let port = original.steered_port(attempt);
        if *of_port(netns_cookie, port)? == *original {
            return Some(port);
        }
    }
    None
}

/// The destination that a steered port stands for.
#[inline(always)]
pub fn of_port(netns_cookie: u64, steered_port: u16) -> Option<&'static Original> {
    maps::destination(&DestinationKey::new(netns_cookie, steered_port))
}

/// Could this be a captured connection? They never leave the pod: both ends are the pod's own.
#[inline(always)]
pub fn is_steered(netns_cookie: u64, client: &Address, steered: &Address, port: u16) -> bool {
    is_steered_port(port)
        && (*client == *steered
            || steered.is_loopback()
            || (maps::is_local(netns_cookie, client) && maps::is_local(netns_cookie, steered)))
}
