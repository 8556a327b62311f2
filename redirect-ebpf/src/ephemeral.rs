//! The ports that the kernel chooses sources from.

use crate::ctx::{Sock, read_kernel};
use crate::globals;

/// Could the kernel choose `port` as the socket's source port? Reads `net.ipv4.ip_local_port_range`
/// of the network namespace, which may change at any time. True if that cannot be read.
#[inline(always)]
pub fn contains(sock: Sock, port: u16) -> bool {
    match range(sock) {
        Some([first, last]) => first <= u32::from(port) && u32::from(port) <= last,
        None => true,
    }
}

#[inline(always)]
fn range(sock: Sock) -> Option<[u32; 2]> {
    let net = read_kernel::<u64>(sock.address() + globals::offset_sock_net())?;
    let range = net + globals::offset_net_port_range();
    if globals::is_port_range_packed() {
        let packed = read_kernel::<u32>(range)?;
        Some([packed & 0xffff, packed >> 16])
    } else {
        read_kernel(range)
    }
}
