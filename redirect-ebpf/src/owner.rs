//! Who created a socket.

use redirect_common::decide::Owner;

use crate::ctx::{Sock, read_kernel_or_zero};
use crate::globals;

/// Reads what `xt_owner` reads: `fsuid` and `fsgid` in the credentials of the socket's file, taken
/// when it was created. The caller of connect() may be somebody else by now.
///
/// None for a socket without a file, which belongs to the kernel.
///
/// A null pointer is followed like any other, which comes to null again. Turning back halfway would leave the ids
/// without a value, and verifiers before Linux 6.3 refuse a program that as much as copies such a thing.
#[inline(always)]
pub fn of(sock: Sock) -> Option<Owner> {
    let socket: u64 = read_kernel_or_zero(sock.address() + globals::offset_sock_socket()).0;
    let file: u64 = read_kernel_or_zero(socket + globals::offset_socket_file()).0;
    let cred: u64 = read_kernel_or_zero(file + globals::offset_file_cred()).0;
    let (uid, uid_read) = read_kernel_or_zero(cred + globals::offset_cred_fsuid());
    let (gid, gid_read) = read_kernel_or_zero(cred + globals::offset_cred_fsgid());
    (uid_read && gid_read).then_some(Owner { uid, gid })
}
