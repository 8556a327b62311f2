//! `SO_ORIGINAL_DST` with any level and any buffer length.
#![expect(
    unsafe_code,
    reason = "no safe wrapper passes a caller's own buffer length to getsockopt, which is what is tested, or knows SO_NETNS_COOKIE"
)]

use std::{
    io::Error,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _},
};

use nix::errno::Errno;

use crate::protocol::Probe;

/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST` (linux/netfilter_ipv4.h): the same number.
const SO_ORIGINAL_DST: libc::c_int = 80;

/// Asks at `SOL_IP` with a buffer of `length` bytes.
pub fn original_dst(socket: &impl AsFd, length: usize) -> Probe {
    probe(socket, libc::SOL_IP, length)
}

/// Asks at `SOL_IPV6` with a buffer of `length` bytes.
pub fn original_dst6(socket: &impl AsFd, length: usize) -> Probe {
    probe(socket, libc::SOL_IPV6, length)
}

fn probe(socket: &impl AsFd, level: libc::c_int, length: usize) -> Probe {
    let mut buffer = vec![0u8; length];
    let mut given = libc::socklen_t::try_from(length).unwrap();
    // SAFETY: the descriptor is borrowed for the call; `buffer` has `given` writable bytes and outlives it; `given` is a local.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            SO_ORIGINAL_DST,
            buffer.as_mut_ptr().cast(),
            &raw mut given,
        )
    };
    let errno = (result != 0).then(|| errno_name(&Error::last_os_error()));
    Probe {
        address: errno.is_none().then(|| parse(&buffer)).flatten(),
        errno,
        length: given as usize,
    }
}

/// The cookie of the network namespace that this thread's sockets are in.
pub fn netns_cookie() -> u64 {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut cookie = 0u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).unwrap();
    // SAFETY: the descriptor is open; `cookie` has `length` writable bytes; both are locals.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "{}", Error::last_os_error());
    cookie
}

/// Reads a `sockaddr_in` or `sockaddr_in6`.
fn parse(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some((Ipv4Addr::from(octets), port).into())
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            Some((Ipv6Addr::from(octets), port).into())
        }
        _ => None,
    }
}

/// The symbolic name of an I/O error: `ECONNREFUSED`, or its kind where there is no errno.
pub fn errno_name(error: &Error) -> String {
    error.raw_os_error().map_or_else(
        || format!("{:?}", error.kind()),
        |code| format!("{:?}", Errno::from_raw(code)),
    )
}
