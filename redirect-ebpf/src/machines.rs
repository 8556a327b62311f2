//! Virtual machines behind interfaces of the pod (`-k`). Their packets are only forwarded, so no
//! connect() can be changed and no socket look-up happens: the packets' addresses are translated.
//!
//! On its way in, a captured segment gets the interface's address and the steered port of its
//! destination, and so arrives at the pod itself; on its way back, the destination takes its place
//! again. Only connections whose first segment was seen are translated: what a machine answers to
//! others, and what it had open before, has nothing to do with the proxy.

use redirect_common::address::Address;
use redirect_common::connection::{FlowKey, Original, ROLE_ACCEPTED_MACHINE, is_steered_port};
use redirect_common::decide;
use redirect_common::pod::{FLAG_MACHINES, PodConfig};
use redirect_common::verdict::{Action, Rule};
use redirect_common::virtual_machine::{Interface, InterfaceKey, Translation};

use crate::ctx::{End, Family, Packet, Sock};
use crate::destinations;
use crate::log;
use crate::maps::{self, PolicyLists};
use crate::segment::{self, Content, Segment};

/// Other filters on the interface have their say (`TC_ACT_UNSPEC`).
const PASS: i32 = -1;
/// `TC_ACT_SHOT`.
const DROP: i32 = 2;

/// Address, and port in host order.
type Endpoint = (Address, u16);

/// A packet comes in from a machine.
#[inline(always)]
pub fn ingress(packet: &Packet) -> i32 {
    let Some(netns_cookie) = maps::netns_cookie() else {
        return PASS;
    };
    let Some((pod, interface, family)) = look(packet, netns_cookie) else {
        return PASS;
    };
    if !packet.is_for_this_host() {
        return PASS;
    }
    let segment = segment::parse(packet, family);
    if segment.content == Content::Other {
        return PASS;
    }
    if segment.content == Content::Hidden {
        let lists = PolicyLists(pod);
        return match decide::machine(pod, &lists, &segment.destination.0).action() {
            Action::Pass => PASS,
            _ => drop(netns_cookie, &segment.destination),
        };
    }
    // The kernel drops these, as long as they are what they are.
    if segment.destination.0.is_loopback() {
        return PASS;
    }
    let flow = FlowKey::new(netns_cookie, segment.source, segment.destination);
    let translation = if segment.opens() {
        match opened(packet, pod, interface, &flow, &segment) {
            Ok(translation) => translation,
            Err(()) => return drop(netns_cookie, &segment.destination),
        }
    } else if segment.accepts() {
        forget(&flow);
        return PASS;
    } else {
        match maps::machine_flow(&flow) {
            Some(translation) => translation,
            None => continued(packet, pod, interface, &flow, &segment),
        }
    };
    if translation.port == 0 {
        return PASS;
    }
    let to = (translation.address, translation.port);
    let headers = (interface.link_header, interface.link_header + segment.tcp);
    if packet.translate(End::Destination, headers, &segment.destination, &to) {
        PASS
    } else {
        DROP
    }
}

/// A packet goes out to a machine.
#[inline(always)]
pub fn egress(packet: &Packet) -> i32 {
    let Some(netns_cookie) = maps::netns_cookie() else {
        return PASS;
    };
    let Some((_, interface, family)) = look(packet, netns_cookie) else {
        return PASS;
    };
    let segment = segment::parse(packet, family);
    if segment.content != Content::Segment || !is_steered_port(segment.source.1) {
        return PASS;
    }
    let Some(original) = destinations::of_port(netns_cookie, segment.source.1) else {
        return PASS;
    };
    let to = (original.destination, original.port);
    let flow = FlowKey::new(netns_cookie, segment.destination, to);
    let ours = match maps::machine_flow(&flow) {
        Some(translation) => (translation.address, translation.port) == segment.source,
        None => false,
    };
    if !ours && !packet.sock().is_some_and(is_accepted) {
        return PASS;
    }
    let headers = (interface.link_header, interface.link_header + segment.tcp);
    if packet.translate(End::Source, headers, &segment.source, &to) {
        PASS
    } else {
        DROP
    }
}

/// What a connection that arrives at the pod is, if a machine makes it.
pub enum Arrival {
    /// Captured: it was meant to go there.
    Captured(&'static Original),
    /// To the pod itself, and let alone.
    LetAlone,
}

/// Looks for the machine's connection from `remote` to `local`.
#[inline(always)]
pub fn arrival(netns_cookie: u64, remote: Endpoint, local: Endpoint) -> Option<Arrival> {
    if is_steered_port(local.1)
        && let Some(original) = destinations::of_port(netns_cookie, local.1)
    {
        let meant = (original.destination, original.port);
        let flow = FlowKey::new(netns_cookie, remote, meant);
        if maps::machine_flow(&flow).is_some_and(|to| (to.address, to.port) == local) {
            return Some(Arrival::Captured(original));
        }
    }
    let flow = FlowKey::new(netns_cookie, remote, local);
    maps::machine_flow(&flow)
        .is_some_and(|to| to.port == 0)
        .then_some(Arrival::LetAlone)
}

/// The settings, and the packet's family; None if the packet is none of our business.
#[inline(always)]
fn look(
    packet: &Packet,
    netns_cookie: u64,
) -> Option<(&'static PodConfig, &'static Interface, Family)> {
    let pod = maps::pod(netns_cookie).filter(|pod| pod.has(FLAG_MACHINES))?;
    let interface = maps::interface(&InterfaceKey::new(netns_cookie, packet.interface()))?;
    let family = packet.family()?;
    Some((pod, interface, family))
}

/// A machine asks for a connection. An error if it would have to be captured and cannot be.
#[inline(always)]
fn opened(
    packet: &Packet,
    pod: &PodConfig,
    interface: &Interface,
    flow: &FlowKey,
    segment: &Segment,
) -> Result<Translation, ()> {
    let netns_cookie = flow.netns_cookie;
    let lists = PolicyLists(pod);
    let rule = decide::machine(pod, &lists, &segment.destination.0);
    if rule.action() == Action::Pass {
        maps::count(netns_cookie, rule);
        log::inbound(
            netns_cookie,
            pod,
            segment.source,
            segment.destination,
            packet.interface(),
            rule,
        );
        // Those to the pod itself have to be known there: they are not inbound.
        if maps::is_local(netns_cookie, &segment.destination.0) {
            maps::set_machine_flow(flow, &Translation::NONE);
        } else {
            forget(flow);
        }
        return Ok(Translation::NONE);
    }
    let address = interface.address_for(&segment.destination.0).ok_or(())?;
    let port = destinations::port_of(netns_cookie, &original(pod, segment), 0).ok_or(())?;
    let translation = Translation::to(address, port);
    if maps::set_machine_flow(flow, &translation) {
        Ok(translation)
    } else {
        Err(())
    }
}

/// A segment of a connection that is not known (any more). If the pod has it, it goes on: idle
/// connections are forgotten for newer ones.
#[inline(always)]
fn continued(
    packet: &Packet,
    pod: &PodConfig,
    interface: &Interface,
    flow: &FlowKey,
    segment: &Segment,
) -> Translation {
    let port = destinations::known_port_of(flow.netns_cookie, &original(pod, segment));
    let (Some(address), Some(port)) = (interface.address_for(&segment.destination.0), port) else {
        return Translation::NONE;
    };
    if !packet.has_connection((&segment.source.0, segment.source.1), (&address, port)) {
        return Translation::NONE;
    }
    let translation = Translation::to(address, port);
    maps::set_machine_flow(flow, &translation);
    translation
}

#[inline(always)]
fn original(pod: &PodConfig, segment: &Segment) -> Original {
    Original {
        destination: segment.destination.0,
        port: segment.destination.1,
        proxy_port: pod.outbound_port,
        in_place: 0,
    }
}

#[inline(always)]
fn is_accepted(sock: Sock) -> bool {
    sock.state()
        .is_some_and(|state| state.role == ROLE_ACCEPTED_MACHINE)
}

#[inline(always)]
fn forget(flow: &FlowKey) {
    if maps::machine_flow(flow).is_some() {
        maps::take_machine_flow(flow);
    }
}

#[inline(always)]
fn drop(netns_cookie: u64, destination: &Endpoint) -> i32 {
    maps::count(netns_cookie, Rule::MachineDropped);
    log::machine_dropped(netns_cookie, &destination.0, destination.1);
    DROP
}
