//! Context of the programs that see packets (tc).

use core::mem::MaybeUninit;
use core::ptr;

use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, bpf_sock};
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::TcContext;
use redirect_common::address::Address;

use super::connection::has_connection;
use super::{Family, Sock};

/// `skb->protocol` of IPv4 and IPv6.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// Addressed to this host, not only seen by it.
const PACKET_HOST: u32 = 0;
const BPF_HDR_START_NET: u32 = 1;

/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u32 = 16;
/// Offset of the checksum in an IPv4 header.
const IPV4_CHECKSUM: u32 = 10;

/// Which end of a packet is translated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// Context of a tc program.
pub struct Packet {
    pointer: *mut __sk_buff,
}

impl Packet {
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        Self {
            pointer: ctx.skb.skb,
        }
    }

    /// Its family; None for what is neither IPv4 nor IPv6.
    #[inline(always)]
    pub fn family(&self) -> Option<Family> {
        match u16::from_be(read!(self.pointer, protocol) as u16) {
            ETH_P_IP => Some(Family::V4),
            ETH_P_IPV6 => Some(Family::V6),
            _ => None,
        }
    }

    /// False for packets of others that the interface sees: the kernel drops them.
    #[inline(always)]
    pub fn is_for_this_host(&self) -> bool {
        read!(self.pointer, pkt_type) == PACKET_HOST
    }

    /// Index of the interface that runs the program.
    #[inline(always)]
    pub fn interface(&self) -> u32 {
        read!(self.pointer, ifindex)
    }

    /// Reads at an offset from the network header. None where the packet ends before.
    #[inline(always)]
    pub fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper fills all of `value` or fails; T is plain data at every call.
        unsafe {
            let failed = helpers::bpf_skb_load_bytes_relative(
                self.pointer.cast(),
                offset,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
                BPF_HDR_START_NET,
            );
            (failed == 0).then(|| value.assume_init())
        }
    }

    /// Puts `to` in the place of `from`: address, and port in host order. Checksums follow.
    /// `network` and `tcp` are where the headers begin in the packet. False if a helper refused: the
    /// packet is then in pieces and must be dropped.
    #[inline(always)]
    pub fn translate(
        &self,
        end: End,
        (network, tcp): (u32, u32),
        from: &(Address, u16),
        to: &(Address, u16),
    ) -> bool {
        let (from_port_be, to_port_be) = (from.1.to_be(), to.1.to_be());
        let port_offset = tcp + if end == End::Source { 0 } else { 2 };
        let address_done = if from.0.is_v4() {
            self.translate_v4(end, (network, tcp), from.0.v4_be(), to.0.v4_be())
        } else {
            self.translate_v6(end, (network, tcp), &from.0, &to.0)
        };
        address_done
            && self.replace_checksum(
                tcp + TCP_CHECKSUM,
                u64::from(from_port_be),
                u64::from(to_port_be),
                size_of::<u16>() as u64,
            )
            && self.store(port_offset, &to_port_be, 0)
    }

    #[inline(always)]
    fn translate_v4(&self, end: End, (network, tcp): (u32, u32), from: u32, to: u32) -> bool {
        let offset = network + if end == End::Source { 12 } else { 16 };
        let size = size_of::<u32>() as u64;
        let (from, to_u64) = (u64::from(from), u64::from(to));
        let pseudo = u64::from(BPF_F_PSEUDO_HDR) | size;
        // SAFETY: the context is the kernel's; it checks the offset.
        let failed = unsafe {
            helpers::bpf_l3_csum_replace(self.pointer, network + IPV4_CHECKSUM, from, to_u64, size)
        };
        failed == 0
            && self.replace_checksum(tcp + TCP_CHECKSUM, from, to_u64, pseudo)
            && self.store(offset, &to, 0)
    }

    #[inline(always)]
    fn translate_v6(
        &self,
        end: End,
        (network, tcp): (u32, u32),
        from: &Address,
        to: &Address,
    ) -> bool {
        let offset = network + if end == End::Source { 8 } else { 24 };
        let pseudo = u64::from(BPF_F_PSEUDO_HDR) | size_of::<u32>() as u64;
        for word in 0..4 {
            let (from, to) = (from.words_be[word], to.words_be[word]);
            if !self.replace_checksum(tcp + TCP_CHECKSUM, u64::from(from), u64::from(to), pseudo) {
                return false;
            }
        }
        // Without an IP checksum to cancel it, the change of the address counts in a checksum that
        // the network card made over the whole packet (CHECKSUM_COMPLETE).
        self.store(offset, &to.words_be, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    #[inline(always)]
    fn replace_checksum(&self, offset: u32, from: u64, to: u64, flags: u64) -> bool {
        // SAFETY: the context is the kernel's; it checks the offset.
        unsafe { helpers::bpf_l4_csum_replace(self.pointer, offset, from, to, flags) == 0 }
    }

    #[inline(always)]
    fn store<T: Copy>(&self, offset: u32, value: &T, flags: u64) -> bool {
        let length = size_of::<T>() as u32;
        let bytes = ptr::from_ref(value).cast();
        // SAFETY: the helper reads `value`; it checks the offset.
        unsafe { helpers::bpf_skb_store_bytes(self.pointer, offset, bytes, length, flags) == 0 }
    }

    /// The socket that sent it, unless that is a mere request or a closed connection's rest.
    #[inline(always)]
    pub fn sock(&self) -> Option<Sock> {
        let any: *mut bpf_sock = read!(self.pointer, __bindgen_anon_2.sk);
        if any.is_null() {
            return None;
        }
        // SAFETY: not null, as the verifier demands.
        Sock::new(unsafe { helpers::bpf_sk_fullsock(any) })
    }

    /// Is there a connection, of whatever state, from `remote` to `local` in this network namespace?
    /// Addresses of one family, and ports in host order.
    #[inline(always)]
    pub fn has_connection(&self, remote: (&Address, u16), local: (&Address, u16)) -> bool {
        has_connection(self.pointer.cast(), remote, local)
    }
}
