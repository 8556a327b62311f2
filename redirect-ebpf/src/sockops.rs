//! sockops: hands the original destination from the connecting to the accepted socket, and finds
//! the proxy's listeners as they begin to listen.

use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_SOCK_OPS_TCP_LISTEN_CB,
};
use redirect_common::connection::{
    FlowKey, Original, ROLE_ACCEPTED_DIRECT, ROLE_ACCEPTED_INBOUND, ROLE_ACCEPTED_MACHINE,
    ROLE_ACCEPTED_OUTBOUND, ROLE_CLIENT, ROLE_CLIENT_DIRECT, ROLE_LISTENER, SocketState,
    is_steered_port,
};
use redirect_common::dns::DNS_AGENT_PORT;
use redirect_common::pod::{FLAG_DNS, FLAG_TPROXY};
use redirect_common::verdict::Rule;

use crate::ctx::{Sock, SockOps};
use crate::destinations;
use crate::listeners;
use crate::log;
use crate::machines::{self, Arrival};
use crate::maps;

/// The system call goes on.
const CONTINUE: u32 = 1;
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

/// The source port is chosen, the SYN not yet sent. Most connections are told by the port they are
/// steered to. The others publish where they are meant to go.
#[inline(always)]
fn connecting(ctx: &SockOps) {
    let (local_port, remote_port) = (ctx.local_port(), ctx.remote_port());
    let Some(sock) = ctx.sock() else {
        return;
    };
    match sock.state() {
        Some(state) if is_steered_port(remote_port) || state.original.in_place != 0 => {
            let flow = own_flow(ctx);
            if maps::publish_flow(&flow, &state.original) {
                ctx.watch_state();
            } else {
                let original = &state.original;
                maps::count(flow.netns_cookie, Rule::FlowLost);
                log::flow_lost(flow.netns_cookie, &original.destination, original.port);
            }
        }
        Some(_) => {}
        None if is_steered_port(local_port) => remember_client(ctx, sock),
        None => {}
    }
}

/// The pod's ephemeral ports reach into the steered ones: by its ports alone this socket could be
/// taken for an accepted one.
#[inline(always)]
fn remember_client(ctx: &SockOps, sock: Sock) {
    let netns_cookie = ctx.netns_cookie();
    if maps::pod(netns_cookie).is_none() {
        return;
    }
    let (local, remote) = ctx.addresses();
    let port = ctx.remote_port();
    let original = if destinations::is_steered(netns_cookie, &local, &remote, port) {
        destinations::of_port(netns_cookie, port)
    } else {
        None
    };
    sock.set_state(&SocketState {
        original: original.copied().unwrap_or_default(),
        role: if original.is_some() {
            ROLE_CLIENT
        } else {
            ROLE_CLIENT_DIRECT
        },
        _pad: 0,
    });
}

/// A connecting socket has closed: if the proxy has not taken its flow, nobody will.
#[inline(always)]
fn state_changed(ctx: &SockOps) {
    let (_, new) = ctx.old_and_new_state();
    if new != TCP_CLOSE {
        return;
    }
    let in_place = ctx
        .sock()
        .and_then(Sock::state)
        .is_some_and(|state| state.original.in_place != 0);
    if in_place || is_steered_port(ctx.remote_port()) {
        maps::take_flow(&own_flow(ctx));
    }
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

/// The key under which an accepted socket's peer has published its flow.
#[inline(always)]
fn peers_flow(ctx: &SockOps, netns_cookie: u64) -> FlowKey {
    let (local, remote) = ctx.addresses();
    FlowKey::new(
        netns_cookie,
        (remote, ctx.remote_port()),
        (local, ctx.local_port()),
    )
}

/// The handshake is done on the accepting side, accept() has not returned yet.
#[inline(always)]
fn accepted(ctx: &SockOps) {
    let Some(sock) = ctx.sock() else {
        return;
    };
    let listener = match sock.state() {
        Some(state) if state.role == ROLE_LISTENER => Some(state),
        // The same program may hang on an ancestor cgroup too: the first call has done it.
        Some(_) => return,
        None => None,
    };
    let netns_cookie = ctx.netns_cookie();
    let port = ctx.local_port();
    if is_steered_port(port) {
        let flow = peers_flow(ctx, netns_cookie);
        if handed_over(sock, listener.is_some(), &flow) || made_by_machine(sock, &flow) {
            return;
        }
    }
    let pod = maps::pod(netns_cookie);
    let tproxy = pod.is_some_and(|pod| pod.has(FLAG_TPROXY));
    if tproxy {
        maps::take_flow(&peers_flow(ctx, netns_cookie));
    }
    match listener {
        Some(state) if !tproxy && port != state.original.proxy_port => {
            state.role = ROLE_ACCEPTED_INBOUND;
        }
        // With TPROXY the socket's own address is the one to show.
        Some(state) => state.role = ROLE_ACCEPTED_DIRECT,
        None if pod.is_some() => {
            sock.set_state(&SocketState {
                original: Original::default(),
                role: ROLE_ACCEPTED_DIRECT,
                _pad: 0,
            });
        }
        None => {}
    }
}

/// A connection made in the pod to a steered port: takes over what it was meant for. False if it is
/// none of ours.
#[inline(always)]
fn handed_over(sock: Sock, inherited: bool, flow: &FlowKey) -> bool {
    let (netns_cookie, port) = (flow.netns_cookie, flow.steered_port);
    if !destinations::is_steered(netns_cookie, &flow.client, &flow.steered, port) {
        return false;
    }
    let published = maps::flow(flow);
    let original = match published {
        Some(original) => original,
        None => match destinations::of_port(netns_cookie, port) {
            Some(original) => original,
            None => return false,
        },
    };
    // The port tells all that is to be known, unless the client's lies among the steered ones too
    // or the listener has told something else.
    if published.is_some() || inherited || is_steered_port(flow.client_port) {
        sock.set_state(&SocketState {
            original: *original,
            role: if original.proxy_port == 0 || original.in_place != 0 {
                ROLE_ACCEPTED_DIRECT
            } else {
                ROLE_ACCEPTED_OUTBOUND
            },
            _pad: 0,
        });
    }
    if published.is_some() {
        maps::take_flow(flow);
    }
    true
}

/// A connection that a virtual machine makes: takes over what it was meant for. False if it is none.
#[inline(always)]
fn made_by_machine(sock: Sock, flow: &FlowKey) -> bool {
    let arrival = machines::arrival(
        flow.netns_cookie,
        (flow.client, flow.client_port),
        (flow.steered, flow.steered_port),
    );
    let Some(Arrival::Captured(original)) = arrival else {
        return false;
    };
    sock.set_state(&SocketState {
        original: *original,
        role: ROLE_ACCEPTED_MACHINE,
        _pad: 0,
    })
}

#[inline(always)]
fn listening(ctx: &SockOps) {
    let Some(sock) = ctx.sock() else {
        return;
    };
    // What it was before must not be inherited by what it accepts.
    if sock.state().is_some() {
        sock.forget();
    }
    let netns_cookie = ctx.netns_cookie();
    let Some(pod) = maps::pod(netns_cookie) else {
        return;
    };
    let port = ctx.local_port();
    if port == pod.inbound_port {
        sock.set_state(&SocketState::of_listener(port));
    }
    let of_agent = port == DNS_AGENT_PORT && pod.has(FLAG_DNS);
    if port == pod.outbound_port || port == pod.inbound_port || of_agent {
        listeners::record(ctx, sock, (netns_cookie, pod), port);
    }
}
