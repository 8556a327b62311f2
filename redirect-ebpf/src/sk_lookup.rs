//! sk_lookup: steers new connections to the proxy's listeners. Packets are not changed, and those
//! of established connections never come here.

use redirect_common::address::Address;
use redirect_common::connection::FlowKey;
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

#[inline(always)]
pub fn sk_lookup(ctx: &SockLookup) -> u32 {
    if !ctx.is_tcp() {
        return PASS;
    }
    let Some(netns_cookie) = maps::netns_cookie() else {
        return PASS;
    };
    let (local, remote) = ctx.addresses();
    let steered = destinations::is_steered(netns_cookie, &remote, &local, ctx.local_port());
    let pod = maps::pod(netns_cookie);
    if steered || pod.is_some_and(|pod| pod.has(FLAG_TPROXY)) {
        let flow = FlowKey::new(
            netns_cookie,
            (remote, ctx.remote_port()),
            (local, ctx.local_port()),
        );
        let original = match maps::flow(&flow) {
            Some(original) => Some(original),
            None if steered => destinations::of_port(netns_cookie, ctx.local_port()),
            None => None,
        };
        if let Some(original) = original {
            if original.proxy_port == 0 {
                return PASS;
            }
            let target = local.loopback_of_family();
            return to_listener(
                ctx,
                netns_cookie,
                original.proxy_port,
                &target,
                (&original.destination, original.port),
            );
        }
    }
    // By address, not by interface: a connection to the pod's own address has the interface of that
    // address, although it never left. The kernel drops such sources when they come from outside.
    if maps::is_local(netns_cookie, &remote) {
        return PASS;
    }
    let Some(pod) = pod else {
        return PASS;
    };
    let (from, to) = ((remote, ctx.remote_port()), (local, ctx.local_port()));
    if pod.has(FLAG_MACHINES) {
        match machines::arrival(netns_cookie, from, to) {
            Some(Arrival::Captured(original)) => {
                let meant = (original.destination, original.port);
                let rule = Rule::MachineCaptured;
                maps::count(netns_cookie, rule);
                let about = log::inbound(netns_cookie, pod, from, meant, ctx.interface());
                log::decided(&about, rule);
                return to_listener(
                    ctx,
                    netns_cookie,
                    original.proxy_port,
                    &local,
                    (&original.destination, original.port),
                );
            }
            Some(Arrival::LetAlone) => return PASS,
            None => {}
        }
    }
    let lists = PolicyLists { policy: pod.policy };
    let connection = Inbound {
        destination: local,
        port: ctx.local_port(),
        interface: ctx.interface(),
    };
    let rule = decide::inbound(pod, &lists, &connection);
    maps::count(netns_cookie, rule);
    let about = log::inbound(netns_cookie, pod, from, to, connection.interface);
    log::decided(&about, rule);
    if rule.action() != Action::CaptureInbound {
        return PASS;
    }
    let meant = (&local, ctx.local_port());
    to_listener(ctx, netns_cookie, pod.inbound_port, &local, meant)
}

#[inline(always)]
fn to_listener(
    ctx: &SockLookup,
    netns_cookie: u64,
    port: u16,
    target: &Address,
    meant: (&Address, u16),
) -> u32 {
    if listeners::assign(ctx, netns_cookie, port, target) {
        PASS
    } else {
        maps::count(netns_cookie, Rule::NoListener);
        log::no_listener(netns_cookie, meant.0, meant.1);
        DROP
    }
}
