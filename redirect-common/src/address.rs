//! One address type for both families.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

/// `::ffff:0:0/96` in network order.
const MAPPED_PREFIX_BE: u32 = 0xffff_u32.to_be();

/// An IP address as four 32-bit words in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Address {
    /// The words as the kernel's `bpf_sock_addr.user_ip6` holds them: network byte order.
    pub words_be: [u32; 4],
}

crate::assert_size!(Address, 16);

impl Address {
    /// `::`, and what an unbound IPv6 socket has as its source.
    pub const UNSPECIFIED: Self = Self { words_be: [0; 4] };

    /// From an IPv4 address in network order.
    #[inline(always)]
    pub const fn from_v4_be(v4_be: u32) -> Self {
        Self {
            words_be: [0, 0, MAPPED_PREFIX_BE, v4_be],
        }
    }

    /// From four words in network order.
    #[inline(always)]
    pub const fn from_words_be(words_be: [u32; 4]) -> Self {
        Self { words_be }
    }

    /// True for IPv4, in a plain or in an IPv4-mapped socket.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        // One comparison: the verifier walks everything that follows once for each.
        self.words_be[0] | self.words_be[1] | self.words_be[2] ^ MAPPED_PREFIX_BE == 0
    }

    /// The IPv4 address in network order; meaningful only if [`is_v4`](Self::is_v4).
    #[inline(always)]
    pub const fn v4_be(&self) -> u32 {
        self.words_be[3]
    }

    /// The address in network order, byte by byte; IPv4 as IPv4-mapped.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        bytemuck::must_cast(self.words_be)
    }

    /// True for `0.0.0.0` and `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let high = self.words_be[0] | self.words_be[1] | self.words_be[3];
        high == 0 && (self.words_be[2] == 0 || self.words_be[2] == MAPPED_PREFIX_BE)
    }

    /// True for 127.0.0.0/8 and `::1`: addresses the kernel drops when they come from outside.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.words_be[3] & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be()
        } else {
            self.is_v6_with_last_word(1)
        }
    }

    /// True for IPv4's 224.0.0.0/4 and 255.255.255.255.
    #[inline(always)]
    pub const fn is_v4_multicast_or_limited_broadcast(&self) -> bool {
        let multicast = self.words_be[3] & 0xf000_0000_u32.to_be() == 0xe000_0000_u32.to_be();
        self.is_v4() && (multicast || self.words_be[3] == u32::MAX)
    }

    /// True for fe80::/10.
    #[inline(always)]
    pub const fn is_link_local(&self) -> bool {
        self.words_be[0] & 0xffc0_0000_u32.to_be() == 0xfe80_0000_u32.to_be()
    }

    /// True for 127.0.0.6 and `::6`, from which Istio's proxy dials its own application.
    #[inline(always)]
    pub const fn is_proxy_passthrough(&self) -> bool {
        if self.is_v4() {
            self.words_be[3] == 0x7f00_0006_u32.to_be()
        } else {
            self.is_v6_with_last_word(6)
        }
    }

    /// One of 32 buckets, of which neighbouring addresses have different ones.
    #[inline(always)]
    pub const fn bucket(&self) -> u32 {
        const GOLDEN: u32 = 0x9e37_79b9;
        let [a, b, c, d] = self.words_be;
        u32::from_be(a ^ b ^ c ^ d).wrapping_mul(GOLDEN) >> 27
    }

    #[inline(always)]
    const fn is_v6_with_last_word(&self, last: u32) -> bool {
        let [a, b, c, d] = self.words_be;
        a | b | c | d ^ last.to_be() == 0
    }

    /// The loopback address that iptables REDIRECT sends a locally made connection to, per family
    /// (`nf_nat_redirect.c`).
    #[inline(always)]
    pub const fn loopback_of_family(&self) -> Self {
        if self.is_v4() {
            Self::from_v4_be(0x7f00_0001_u32.to_be())
        } else {
            Self {
                words_be: [0, 0, 0, 1_u32.to_be()],
            }
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        Self {
            words_be: bytemuck::cast(octets),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let octets = address.octets();
        if address.is_v4() {
            let [.., a, b, c, d] = octets;
            Self::V4(Ipv4Addr::new(a, b, c, d))
        } else {
            Self::V6(Ipv6Addr::from(octets))
        }
    }
}
