//! sockops: hands the original destination from the connecting to the accepted socket, and finds
//! the proxy's listeners as they begin to listen.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_SOCK_OPS_TCP_LISTEN_CB,
};
use redirect_common::connection::{
    FlowKey, Original, ROLE_ACCEPTED_DIRECT, ROLE_ACCEPTED_INBOUND, ROLE_ACCEPTED_OUTBOUND,
    ROLE_CLIENT, SocketState, is_steered_port,
};
use redirect_common::decide;
use redirect_common::verdict::{Action, Rule};

use crate::ctx::{Sock, SockOps};
use crate::listeners;
use crate::log;
use crate::maps::{self, PolicyLists};

/// The system call goes on.
const CONTINUE: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;

#[inline(always)]
pub fn sockops(ctx: &SockOps) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(ctx),
        _ => {}
    }
    CONTINUE
}

/// The source port is chosen, the SYN not yet sent: publish where it is meant to go.
#[inline(always)]
fn connecting(ctx: &SockOps) {
    let Some(state) = ctx.sock().and_then(Sock::state) else {
        return;
    };
    if state.role != ROLE_CLIENT || !is_steered_port(ctx.remote_port()) {
        return;
    }
    let flow = own_flow(ctx);
    if maps::publish_flow(&flow, &state.original) {
        state.watching = u32::from(ctx.watch_state());
    } else {
        maps::count(flow.netns_cookie, Rule::FlowLost);
        log::flow_lost(
            flow.netns_cookie,
            &state.original.destination,
            state.original.port,
        );
    }
}

/// An attempt to connect has ended. If it failed, nobody will take its flow; if not, there is
/// nothing more to watch.
#[inline(always)]
fn state_changed(ctx: &SockOps) {
    let (old, new) = ctx.old_and_new_state();
    if old != TCP_SYN_SENT || !is_steered_port(ctx.remote_port()) {
        return;
    }
    if let Some(state) = ctx.sock().and_then(Sock::state)
        && state.watching != 0
    {
        state.watching = 0;
        ctx.unwatch_state();
    }
    if new != TCP_CLOSE {
        return;
    }
    maps::take_flow(&own_flow(ctx));
}

/// The key under which a connecting socket's flow is published.
#[inline(always)]
fn own_flow(ctx: &SockOps) -> FlowKey {
    let (local, remote) = ctx.addresses();
    FlowKey::new(
        ctx.netns_cookie(),
        (local, ctx.local_port()),
        (remote, ctx.remote_port()),
    )
}

/// The handshake is done on the accepting side, accept() has not returned yet.
#[inline(always)]
fn accepted(ctx: &SockOps) {
    let Some(sock) = ctx.sock() else {
        return;
    };
    // The same program may hang on an ancestor cgroup too: the first call has done it.
    if sock.state().is_some() {
        return;
    }
    let netns_cookie = ctx.netns_cookie();
    let (local, remote) = ctx.addresses();
    if is_steered_port(ctx.local_port()) {
        let flow = FlowKey::new(
            netns_cookie,
            (remote, ctx.remote_port()),
            (local, ctx.local_port()),
        );
        if let Some(original) = maps::flow(&flow) {
            sock.set_state(&SocketState {
                original: *original,
                role: ROLE_ACCEPTED_OUTBOUND,
                watching: 0,
            });
            maps::take_flow(&flow);
            return;
        }
    }
    let Some(pod) = maps::pod(netns_cookie) else {
        return;
    };
    let mut state = SocketState {
        original: Original::default(),
        role: ROLE_ACCEPTED_DIRECT,
        watching: 0,
    };
    if !maps::is_local(netns_cookie, &remote) {
        let lists = PolicyLists { policy: pod.policy };
        let rule = decide::inbound(pod, &lists, &local, ctx.local_port());
        maps::count(netns_cookie, rule);
        if rule.action() == Action::CaptureInbound {
            state.role = ROLE_ACCEPTED_INBOUND;
            state.original.proxy_port = pod.inbound_port;
        }
        let (from, to) = ((remote, ctx.remote_port()), (local, ctx.local_port()));
        log::decided(&log::inbound(netns_cookie, pod, from, to), rule);
    }
    sock.set_state(&state);
}

#[inline(always)]
fn listening(ctx: &SockOps) {
    let netns_cookie = ctx.netns_cookie();
    if let Some(pod) = maps::pod(netns_cookie) {
        let port = ctx.local_port();
        if port == pod.outbound_port || port == pod.inbound_port {
            listeners::record(ctx, netns_cookie, port);
        }
    }
}
