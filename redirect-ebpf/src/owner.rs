//! Who created a socket.

use redirect_common::decide::Owner;

use crate::ctx::read_kernel_or_zero;
use crate::globals;

/// Reads what `xt_owner` reads: `fsuid` and `fsgid` in the credentials of the socket's file, taken
/// when it was created. The caller of connect() may be somebody else by now.
///
/// `address` is the socket's. None for a socket without a file, which belongs to the kernel.
///
/// A null pointer is followed like any other, which comes to null again. Turning back halfway would leave the ids
/// without a value, and verifiers before Linux 6.3 refuse a program that as much as copies such a thing.
#[inline(always)]
pub fn of(address: u64) -> Option<Owner> {
    let socket: u64 = read_kernel_or_zero(address + globals::offset_sock_socket()).0;
    let file: u64 = read_kernel_or_zero(socket + globals::offset_socket_file()).0;
    let cred: u64 = read_kernel_or_zero(file + globals::offset_file_cred()).0;
    let ([uid, gid], read) =
        read_kernel_or_zero::<[u32; 2]>(cred + globals::offset_cred_fsuid_and_fsgid());
    read.then_some(Owner { uid, gid })
}
