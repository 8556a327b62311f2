//! Who created a socket.

use redirect_common::decide::Owner;

use crate::ctx::{Sock, read_kernel};
use crate::globals;

/// Reads what `xt_owner` reads: `fsuid` and `fsgid` in the credentials of the socket's file, taken
/// when it was created. The caller of connect() may be somebody else by now.
///
/// None for a socket without a file, which belongs to the kernel.
#[inline(always)]
pub fn of(sock: Sock) -> Option<Owner> {
    let socket: u64 = pointer(sock.address(), globals::offset_sock_socket())?;
    let file: u64 = pointer(socket, globals::offset_socket_file())?;
    let cred: u64 = pointer(file, globals::offset_file_cred())?;
    Some(Owner {
        uid: read_kernel(cred + globals::offset_cred_fsuid())?,
        gid: read_kernel(cred + globals::offset_cred_fsgid())?,
    })
}

#[inline(always)]
fn pointer(base: u64, offset: u64) -> Option<u64> {
    read_kernel::<u64>(base + offset).filter(|pointer| *pointer != 0)
}
