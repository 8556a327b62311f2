//! Sockets passed between processes by `SCM_RIGHTS`.

use std::{
    fs::{self, Permissions},
    io::{Error, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::{fs::PermissionsExt as _, net::UnixDatagram},
    },
    path::Path,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use socket2::Socket;

use crate::{patience::patience, raw::adopt};

/// Where sockets are received: a datagram socket with a path.
pub fn open(path: &Path) -> Result<UnixDatagram, Error> {
    let post = UnixDatagram::bind(path)?;
    // Senders are other users.
    fs::set_permissions(path, Permissions::from_mode(0o666))?;
    post.set_read_timeout(Some(patience(Duration::from_secs(3))))?;
    Ok(post)
}

/// Sends a copy of the socket's descriptor to the owner of `path`.
pub fn give(socket: &Socket, path: &Path) -> Result<(), Error> {
    let post = UnixDatagram::unbound()?;
    sendmsg(
        post.as_raw_fd(),
        &[IoSlice::new(b"!")],
        &[ControlMessage::ScmRights(&[socket.as_raw_fd()])],
        MsgFlags::empty(),
        Some(&UnixAddr::new(path)?),
    )?;
    Ok(())
}

/// Receives one.
pub fn take(post: &UnixDatagram) -> Result<Socket, Error> {
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<UnixAddr>(
        post.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let received = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    let descriptor = received.ok_or_else(|| Error::other("no descriptor came"))?;
    Ok(adopt(descriptor))
}
