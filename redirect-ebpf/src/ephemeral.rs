//! The ports that the kernel chooses sources from.

use crate::ctx::read_kernel_or_zero;
use crate::globals;

/// Could the kernel choose `port` as the source port of the socket at that address? Reads
/// `net.ipv4.ip_local_port_range` of the network namespace, which may change at any time. True if
/// that cannot be read.
#[inline(always)]
pub fn contains(socket_address: u64, port: u16) -> bool {
    let net: u64 = read_kernel_or_zero(socket_address + globals::offset_sock_net()).0;
    let range = net + globals::offset_net_port_range();
    let ([first, last], read) = if globals::is_port_range_packed() {
        let (packed, read) = read_kernel_or_zero::<u32>(range);
        ([packed & 0xffff, packed >> 16], read)
    } else {
        read_kernel_or_zero(range)
    };
    !read || first <= u32::from(port) && u32::from(port) <= last
}
