//! Finding the TCP header of a packet.

use redirect_common::address::Address;

use crate::ctx::{Family, IPPROTO_TCP, Packet};

/// The first segment of a connection has this flag, and not the other.
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Offset, and whether more follows.
const IPV4_FRAGMENT: u16 = 0x3fff;
const IPV6_FRAGMENT: u16 = 0xfff9;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const IPV6_HEADER: u32 = 40;
/// More IPv6 extension headers than any sender has a use for.
const EXTENSIONS_MAX: usize = 6;

/// What a packet holds. Every field is set whatever that is: the verifier takes no value that may be
/// unset, not even where it is not used.
#[derive(Clone, Copy)]
pub struct Segment {
    pub content: Content,
    /// Address, and port in host order.
    pub source: (Address, u16),
    /// Address, and port in host order.
    pub destination: (Address, u16),
    /// Where the TCP header begins, from the network header.
    pub tcp: u32,
    flags: u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// No TCP.
    Other,
    /// A TCP segment.
    Segment,
    /// TCP, as far as can be told, whose ports cannot be found: a fragment, or too many headers.
    /// Only the destination's address is known.
    Hidden,
}

impl Segment {
    /// Asks for a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Grants one that the other end has asked for.
    #[inline(always)]
    pub fn accepts(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv4Header {
    version_and_length: u8,
    _service: u8,
    _length: u16,
    _id: u16,
    fragment_be: u16,
    _ttl: u8,
    protocol: u8,
    _checksum: u16,
    source_be: u32,
    destination_be: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Ipv6Header {
    _flow: u32,
    _length: u16,
    next: u8,
    _hops: u8,
    source_be: [u32; 4],
    destination_be: [u32; 4],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Extension {
    next: u8,
    /// In units that depend on the kind.
    length: u8,
    /// Of a fragment header: offset and "more" bit.
    fragment_be: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TcpHeader {
    source_be: u16,
    destination_be: u16,
    _sequence: u32,
    _acknowledged: u32,
    _offset: u8,
    flags: u8,
    _window: u16,
}

/// Reads the headers.
#[inline(always)]
pub fn parse(packet: &Packet, family: Family) -> Segment {
    match family {
        Family::V4 => parse_v4(packet),
        Family::V6 => parse_v6(packet),
    }
}

#[inline(always)]
fn parse_v4(packet: &Packet) -> Segment {
    let Some(header) = packet.load::<Ipv4Header>(0) else {
        return OTHER;
    };
    if u32::from(header.protocol) != IPPROTO_TCP {
        return OTHER;
    }
    let destination = Address::from_v4_be(header.destination_be);
    if u16::from_be(header.fragment_be) & IPV4_FRAGMENT != 0 {
        return hidden(destination);
    }
    let source = Address::from_v4_be(header.source_be);
    let tcp = u32::from(header.version_and_length & 0xf) * 4;
    segment(packet, source, destination, tcp)
}

#[inline(always)]
fn parse_v6(packet: &Packet) -> Segment {
    let Some(header) = packet.load::<Ipv6Header>(0) else {
        return OTHER;
    };
    let destination = Address::from_words_be(header.destination_be);
    let mut next = header.next;
    let mut offset = IPV6_HEADER;
    for _ in 0..=EXTENSIONS_MAX {
        if u32::from(next) == IPPROTO_TCP {
            let source = Address::from_words_be(header.source_be);
            return segment(packet, source, destination, offset);
        }
        if !is_extension(next) {
            return OTHER;
        }
        let Some(extension) = packet.load::<Extension>(offset) else {
            return OTHER;
        };
        let length = u32::from(extension.length);
        if next == FRAGMENT && u16::from_be(extension.fragment_be) & IPV6_FRAGMENT != 0 {
            if u32::from(extension.next) == IPPROTO_TCP || is_extension(extension.next) {
                return hidden(destination);
            }
            return OTHER;
        }
        offset += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (length + 2) * 4,
            _ => (length + 1) * 8,
        };
        next = extension.next;
    }
    hidden(destination)
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY
    )
}

#[inline(always)]
fn segment(packet: &Packet, source: Address, destination: Address, tcp: u32) -> Segment {
    let Some(header) = packet.load::<TcpHeader>(tcp) else {
        return OTHER;
    };
    Segment {
        content: Content::Segment,
        source: (source, u16::from_be(header.source_be)),
        destination: (destination, u16::from_be(header.destination_be)),
        tcp,
        flags: header.flags,
    }
}

const OTHER: Segment = Segment {
    content: Content::Other,
    source: (Address::UNSPECIFIED, 0),
    destination: (Address::UNSPECIFIED, 0),
    tcp: 0,
    flags: 0,
};

#[inline(always)]
fn hidden(destination: Address) -> Segment {
    Segment {
        content: Content::Hidden,
        destination: (destination, 0),
        ..OTHER
    }
}
