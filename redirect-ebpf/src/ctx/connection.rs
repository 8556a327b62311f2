//! Asking the kernel for a TCP connection.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::bindings::{BPF_TCP_LISTEN, bpf_sock_tuple};
use aya_ebpf::helpers::generated as helpers;
use redirect_common::address::Address;

/// `BPF_F_CURRENT_NETNS`, which is negative.
const CURRENT_NETNS: u64 = u64::MAX;

/// `struct bpf_sock_tuple` of one family: addresses and ports in network order.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tuple<A> {
    source: A,
    destination: A,
    source_port: u16,
    destination_port: u16,
}

/// Is there a socket, or what is left of one, of the connection from `remote` to `local` in the
/// network namespace of the context? A listener is none. Addresses are of one family, ports in host
/// order.
#[inline(always)]
pub fn has_connection(ctx: *mut c_void, remote: (&Address, u16), local: (&Address, u16)) -> bool {
    let (mut v4, mut v6);
    let (tuple, length): (*mut bpf_sock_tuple, usize) = if local.0.is_v4() {
        v4 = Tuple {
            source: remote.0.v4_be(),
            destination: local.0.v4_be(),
            source_port: remote.1.to_be(),
            destination_port: local.1.to_be(),
        };
        (ptr::from_mut(&mut v4).cast(), size_of::<Tuple<u32>>())
    } else {
        v6 = Tuple {
            source: remote.0.words_be,
            destination: local.0.words_be,
            source_port: remote.1.to_be(),
            destination_port: local.1.to_be(),
        };
        (ptr::from_mut(&mut v6).cast(), size_of::<Tuple<[u32; 4]>>())
    };
    // SAFETY: `tuple` has `length` bytes; the context is the kernel's.
    let sk = unsafe { helpers::bpf_skc_lookup_tcp(ctx, tuple, length as u32, CURRENT_NETNS, 0) };
    if sk.is_null() {
        return false;
    }
    let state = read!(sk, state);
    // SAFETY: the socket was found above and is not used any more; the verifier demands its release.
    let _ = unsafe { helpers::bpf_sk_release(sk.cast()) };
    state != BPF_TCP_LISTEN
}
