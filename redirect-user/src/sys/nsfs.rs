//! The nsfs ioctls that no crate wraps safely (ioctl_nsfs(2)).

#![expect(
    unsafe_code,
    reason = "ioctls, one of which answers with a new descriptor"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

nix::ioctl_none!(
    /// `NS_GET_USERNS`.
    ns_get_userns, 0xb7, 0x1
);
nix::ioctl_none!(
    /// `NS_GET_NSTYPE`.
    ns_get_nstype, 0xb7, 0x3
);

/// The kind of a namespace as its `CLONE_NEW…` flag.
pub(crate) fn namespace_kind(namespace: &impl AsFd) -> io::Result<i32> {
    // SAFETY: the ioctl takes no argument and touches none of our memory.
    Ok(unsafe { ns_get_nstype(namespace.as_fd().as_raw_fd()) }?)
}

/// A descriptor of the user namespace that owns this namespace; `EPERM` when it is outside of ours.
pub(crate) fn owning_user_namespace(namespace: &impl AsFd) -> io::Result<OwnedFd> {
    let fd = namespace.as_fd();
    // SAFETY: the ioctl takes no argument and touches none of our memory.
    let owner = unsafe { ns_get_userns(fd.as_raw_fd()) }?;
    // SAFETY: on success the kernel answers with a new close-on-exec descriptor (fs/nsfs.c open_related_ns) that
    // nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(owner) })
}
