//! What no safe wrapper offers: ways to connect, and descriptors that arrive as numbers.
#![expect(
    unsafe_code,
    reason = "io_uring takes pointers, connect(2) to AF_UNSPEC has no wrapper, recvmsg gives numbers"
)]

use std::{
    io::Error,
    os::fd::{AsRawFd as _, FromRawFd as _, RawFd},
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue::Flags, types};
use socket2::{SockAddr, Socket};

/// Dissolves the socket's connection: connect(2) to `AF_UNSPEC`.
pub fn disconnect(socket: &Socket) -> Result<(), Error> {
    let nowhere = libc::sockaddr {
        sa_family: 0,
        sa_data: [0; 14],
    };
    let length = libc::socklen_t::try_from(size_of_val(&nowhere)).unwrap();
    // SAFETY: the descriptor is open; `nowhere` has `length` bytes and outlives the call.
    match unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, length) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Connects by `IORING_OP_CONNECT`, with a timeout linked to it.
pub fn connect_by_io_uring(
    socket: &Socket,
    to: &SockAddr,
    patience: Duration,
) -> Result<(), Error> {
    let mut ring = IoUring::new(2)?;
    let timeout = types::Timespec::from(patience);
    let descriptor: RawFd = socket.as_raw_fd();
    let connect = opcode::Connect::new(types::Fd(descriptor), to.as_ptr().cast(), to.len())
        .build()
        .flags(Flags::IO_LINK)
        .user_data(1);
    let limit = opcode::LinkTimeout::new(&raw const timeout)
        .build()
        .user_data(2);
    // SAFETY: `to` and `timeout` outlive the ring's use of them: both completions are waited for.
    unsafe { ring.submission().push_multiple(&[connect, limit]) }
        .map_err(|full| Error::other(full.to_string()))?;
    ring.submit_and_wait(2)?;
    let result = ring
        .completion()
        .find(|completion| completion.user_data() == 1)
        .map_or(-libc::EIO, |completion| completion.result());
    if result == 0 {
        Ok(())
    } else {
        Err(Error::from_raw_os_error(-result))
    }
}

/// Owns a descriptor that has just come by `recvmsg`.
pub fn adopt(descriptor: RawFd) -> Socket {
    // SAFETY: the kernel has just made it for this process, and nothing else knows of it.
    unsafe { Socket::from_raw_fd(descriptor) }
}

/// Why io_uring cannot be used here; `None` if it can.
pub fn io_uring_refused() -> Option<Error> {
    IoUring::new(2).err()
}
