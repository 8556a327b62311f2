//! Opening what is pinned: any object, and nothing more of it.

use std::{io::Error, path::Path};

use aya::{
    programs::links::{LinkError, PinnedLink},
    sys::SyscallError,
};

/// `BPF_OBJ_GET`.
pub fn open(path: &Path) -> Result<(), Error> {
    // Whatever kind it is of: nothing is asked of a link.
    match PinnedLink::from_pin(path) {
        Ok(_opened) => Ok(()),
        Err(LinkError::SyscallError(SyscallError { io_error, .. })) => Err(io_error),
        Err(error) => panic!("{error}"),
    }
}
