//! sk_lookup: steers new connections to the proxy's listeners. Packets are not changed, and those
//! of established connections never come here.

use redirect_common::address::Address;
use redirect_common::connection::{FlowKey, Original};
use redirect_common::decide::{self, Inbound};
use redirect_common::pod::{FLAG_MACHINES, FLAG_TPROXY};
use redirect_common::verdict::{Action, Rule};

use crate::ctx::SockLookup;
use crate::destinations;
use crate::listeners;
use crate::log;
use crate::machines::{self, Arrival};
use crate::maps::{self, PolicyLists};

const PASS: u32 = 1;
const DROP: u32 = 0;

/// Who is to get a connection.
struct Taker {
    /// The port it listens on, host order.
    port: u16,
    /// What it has to serve.
    target: Address,
    /// Where the connection was meant to go: address, and port in host order.
    meant: (Address, u16),
}

#[inline(always)]
pub fn sk_lookup(ctx: &SockLookup) -> u32 {
    if !ctx.is_tcp() {
        return PASS;
    }
    let Some(netns_cookie) = maps::netns_cookie() else {
        return PASS;
    };
    let Some(taker) = taker(ctx, netns_cookie) else {
        return PASS;
    };
    if listeners::assign(ctx, netns_cookie, taker.port, &taker.target) {
        return PASS;
    }
    maps::count(netns_cookie, Rule::NoListener);
    log::no_listener(netns_cookie, &taker.meant.0, taker.meant.1);
    DROP
}

/// None if the connection is let alone.
#[inline(always)]
fn taker(ctx: &SockLookup, netns_cookie: u64) -> Option<Taker> {
    let (local, remote) = ctx.addresses();
    let (from, to) = ((remote, ctx.remote_port()), (local, ctx.local_port()));
    let flow = FlowKey::new(netns_cookie, from, to);
    let steered = destinations::is_steered(netns_cookie, &remote, &local, to.1);
    // Before the pod's settings, which are not needed: connect() has decided.
    if steered
        && let Some(original) =
            maps::flow(&flow).or_else(|| destinations::of_port(netns_cookie, to.1))
    {
        return told(original, local.loopback_of_family());
    }
    let pod = maps::pod(netns_cookie)?;
    if !steered
        && pod.has(FLAG_TPROXY)
        && let Some(original) = maps::flow(&flow)
    {
        return told(original, local.loopback_of_family());
    }
    // By address, not by interface: a connection to the pod's own address has the interface of that
    // address, although it never left. The kernel drops such sources when they come from outside.
    if !pod.is_foreign(&remote) && maps::is_local(netns_cookie, &remote) {
        return None;
    }
    if pod.has(FLAG_MACHINES) {
        match machines::arrival(netns_cookie, from, to) {
            Some(Arrival::Captured(original)) => {
                let meant = (original.destination, original.port);
                let rule = Rule::MachineCaptured;
                maps::count(netns_cookie, rule);
                log::inbound(netns_cookie, pod, from, meant, ctx.interface(), rule);
                return told(original, local);
            }
            Some(Arrival::LetAlone) => return None,
            None => {}
        }
    }
    let lists = PolicyLists(pod);
    let connection = Inbound {
        destination: local,
        port: to.1,
        interface: ctx.interface(),
    };
    let rule = decide::inbound(pod, &lists, &connection);
    maps::count(netns_cookie, rule);
    log::inbound(netns_cookie, pod, from, to, connection.interface, rule);
    (rule.action() == Action::CaptureInbound).then_some(Taker {
        port: pod.inbound_port,
        target: local,
        meant: to,
    })
}

/// Who gets a connection that was decided about before it came here.
#[inline(always)]
fn told(original: &Original, target: Address) -> Option<Taker> {
    (original.proxy_port != 0).then_some(Taker {
        port: original.proxy_port,
        target,
        meant: (original.destination, original.port),
    })
}
