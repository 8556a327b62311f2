//! What the programs tell while somebody listens: who listens, what is told about a decision, and what may go wrong.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;
use crate::decide::{Outbound, Owner, Protocol};

/// Index in `FOLLOWERS` of `redirect run`: it wants messages.
pub const FOLLOWER_RUN: u32 = 0;
/// Index in `FOLLOWERS` of `redirect log`: it wants messages, and decisions if asked to.
pub const FOLLOWER_LOG: u32 = 1;
/// How many there are.
pub const FOLLOWERS: u32 = 2;

/// Value of `FOLLOWERS`: somebody reads, and says so again and again. Ends by itself, so that a
/// reader which was killed costs nothing for long.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Follower {
    /// Nanoseconds of `CLOCK_MONOTONIC`; 0 if nobody reads.
    pub until_ns: u64,
    /// Only this network namespace's; 0 for all.
    pub netns_cookie: u64,
    /// 1 if decisions are wanted too.
    pub decisions: u32,
    /// Padding, zero.
    pub _pad: u32,
}

crate::assert_size!(Follower, 24);

impl Follower {
    /// Might this one read what concerns the network namespace? If so, the time has to be asked:
    /// [`reads_at`](Self::reads_at).
    #[inline(always)]
    pub const fn wants(&self, netns_cookie: u64) -> bool {
        self.until_ns != 0 && (self.netns_cookie == 0 || self.netns_cookie == netns_cookie)
    }

    /// Might this one read decisions about the network namespace?
    #[inline(always)]
    pub const fn wants_decisions(&self, netns_cookie: u64) -> bool {
        self.decisions != 0 && self.wants(netns_cookie)
    }

    /// Does it still read at this time, nanoseconds of `CLOCK_MONOTONIC`?
    #[inline(always)]
    pub const fn reads_at(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }
}

/// What may go wrong with one connection. Programs write the number, since the verifier walks every byte of a text again in each
/// program that may write it; readers have the words.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It is captured, and finds no listener of the proxy.
    NoListener = 0,
    /// It is to be captured, and goes where no route was known at attach.
    NoRoute = 1,
    /// It could not be announced to its accepting end.
    FlowLost = 2,
    /// The kernel has no memory to remember its socket by.
    SocketStorageRefused = 3,
    /// It is a virtual machine's, and would have to be captured, and cannot be.
    MachineDropped = 4,
    /// All slots that could stand for a DNS query stand for others.
    NoDnsSlot = 5,
}

impl Trouble {
    /// All of them, by number.
    pub const ALL: [Self; 6] = [
        Self::NoListener,
        Self::NoRoute,
        Self::FlowLost,
        Self::SocketStorageRefused,
        Self::MachineDropped,
        Self::NoDnsSlot,
    ];

    /// What has become of the connection.
    pub const fn text(self) -> &'static str {
        match self {
            Self::NoListener => "refused: no proxy listens where it is to go",
            Self::NoRoute => "refused: no route was known there at attach",
            Self::FlowLost => "refused: it could not be written to FLOWS",
            Self::SocketStorageRefused => "no memory for the socket's storage",
            Self::MachineDropped => {
                "a virtual machine's packet is dropped: its interface has no such address, no steered port is free, or it is a fragment"
            }
            Self::NoDnsSlot => {
                "DNS_SLOTS is full: its socket may take the answers of several servers for one's"
            }
        }
    }
}

/// No owner, or not known on this side.
pub const NO_OWNER: u32 = u32::MAX;

/// The destination is one of the pod's own addresses, and it is the pod that connects.
pub const DECISION_LOCAL: u16 = 1 << 0;
/// The pod connects, and its proxy is known by its container.
pub const DECISION_BY_CONTAINER: u16 = 1 << 1;
/// The connecting socket was created in that container.
pub const DECISION_IN_PROXY_CONTAINER: u16 = 1 << 2;

/// A record of `DECISIONS`: one decision.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Decision {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// Who connects: the address that the connection has, or will have, as its source.
    pub source: Address,
    /// Where it is meant to go.
    pub destination: Address,
    /// Host order; 0 if the kernel has not chosen it yet.
    pub source_port: u16,
    /// Host order.
    pub port: u16,
    /// The number of a [`Rule`](crate::verdict::Rule).
    pub rule: u32,
    /// The user who created the connecting socket, as the kernel counts; [`NO_OWNER`] for
    /// connections from outside.
    pub uid: u32,
    /// The group, likewise.
    pub gid: u32,
    /// The pod's `-p`, host order.
    pub outbound_port: u16,
    /// The pod's `-z`, host order.
    pub inbound_port: u16,
    /// IP protocol number: TCP's or UDP's.
    pub protocol: u16,
    /// `DECISION_` bits.
    pub flags: u16,
    /// Index of the interface it leaves or came by; 0 if that is not known.
    pub interface: u32,
    /// The connecting socket's `SO_MARK`; 0 for connections from outside.
    pub mark: u32,
}

crate::assert_size!(Decision, 80);

impl Decision {
    /// Is the destination one of the pod's own addresses?
    #[inline(always)]
    pub const fn is_local(&self) -> bool {
        self.flags & DECISION_LOCAL != 0
    }

    /// What is decided about, of a connection made in the pod.
    #[inline(always)]
    pub const fn connection(&self) -> Outbound {
        Outbound {
            protocol: if self.protocol == Protocol::Udp.number() {
                Protocol::Udp
            } else {
                Protocol::Tcp
            },
            source: self.source,
            destination: self.destination,
            port: self.port,
            local: self.is_local(),
            interface: self.interface,
            mark: self.mark,
            owner: if self.uid == NO_OWNER {
                None
            } else {
                Some(Owner {
                    uid: self.uid,
                    gid: self.gid,
                })
            },
            in_proxy_container: self.flags & DECISION_IN_PROXY_CONTAINER != 0,
        }
    }
}
