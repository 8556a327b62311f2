//! One question and one answer over UDP, and the server for it.

use std::{
    io::{Error, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::{Protocol, Type};

use crate::{
    dial::{create_of, prepare, spell},
    protocol::{Dial, Dialed, Family, Greeting, Transport},
    sockopt::{errno_name, original_dst, original_dst6},
};

/// More than any greeting, in bytes.
const LARGEST: usize = 2048;

/// Asks whoever answers at the destination.
pub fn exchange(dial: &Dial) -> Dialed {
    let mut dialed = Dialed::new();
    dialed.error = attempt(dial, &mut dialed)
        .err()
        .map(|error| errno_name(&error));
    dialed
}

fn attempt(dial: &Dial, dialed: &mut Dialed) -> Result<(), Error> {
    let socket = create_of(dial.family, Type::DGRAM, Protocol::UDP)?;
    prepare(&socket, dial)?;
    let to = spell(dial.family, dial.to);
    let connected = dial.transport == Transport::ConnectedUdp;
    if connected {
        socket.connect(&to.into())?;
        dialed.peer = Some(peer(&socket)?);
    } else if dial.family == Family::V4 {
        // Only then is a socket that is not connected told of a refusal, and need not wait.
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    }
    dialed.local = Some(local(&socket)?);
    dialed.original = Some(original_dst(&socket, 16));
    dialed.original6 = Some(original_dst6(&socket, 28));
    let socket = UdpSocket::from(socket);
    if connected {
        socket.send(b"who")?;
    } else {
        socket.send_to(b"who", to)?;
        // The port is chosen by now.
        dialed.local = Some(socket.local_addr()?);
    }
    let mut answer = [0; LARGEST];
    let (length, from) = socket.recv_from(&mut answer)?;
    dialed.replied = Some(from);
    dialed.greeting = Some(serde_json::from_slice(&answer[..length])?);
    Ok(())
}

fn local(socket: &socket2::Socket) -> Result<SocketAddr, Error> {
    socket.local_addr()?.as_socket().ok_or_else(not_internet)
}

fn peer(socket: &socket2::Socket) -> Result<SocketAddr, Error> {
    socket.peer_addr()?.as_socket().ok_or_else(not_internet)
}

fn not_internet() -> Error {
    Error::other("not an internet address")
}

/// Asks the kernel to tell where each datagram was sent to: the answer has to come from there.
pub fn tell_destination(socket: &UdpSocket, at: SocketAddr) -> Result<(), Error> {
    if at.is_ipv4() {
        setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(())
}

/// Answers every datagram with a greeting, until the socket is shut down.
pub fn serve(socket: &UdpSocket, who: &str) {
    // After shutdown(2) there is no sender any more.
    while let Ok(Some((peer, to))) = receive(socket) {
        // A client that does not listen any more is its own business.
        drop(answer(socket, who, &peer, to));
    }
}

/// The next datagram's sender and the address it was sent to.
fn receive(socket: &UdpSocket) -> Result<Option<(SockaddrStorage, Option<IpAddr>)>, Error> {
    let mut question = [0; LARGEST];
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let mut buffer = [IoSliceMut::new(&mut question)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut buffer,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let to = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(u32::from_be(info.ipi_addr.s_addr).into()))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::V6(info.ipi6_addr.s6_addr.into()))
        }
        _ => None,
    });
    Ok((message.bytes > 0)
        .then_some(message.address)
        .flatten()
        .map(|peer| (peer, to)))
}

fn answer(
    socket: &UdpSocket,
    who: &str,
    peer: &SockaddrStorage,
    to: Option<IpAddr>,
) -> Result<(), Error> {
    let bound = socket.local_addr()?;
    let to = to.unwrap_or(bound.ip());
    let greeting = Greeting {
        who: who.to_owned(),
        peer: internet(peer).ok_or_else(not_internet)?,
        local: SocketAddr::new(to, bound.port()),
        original: original_dst(socket, 16),
        original6: original_dst6(socket, 28),
    };
    let text = serde_json::to_vec(&greeting)?;
    let buffer = [IoSlice::new(&text)];
    match to {
        IpAddr::V4(ip) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from(ip).to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(
                socket.as_raw_fd(),
                &buffer,
                &control,
                MsgFlags::empty(),
                Some(peer),
            )?;
        }
        IpAddr::V6(ip) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: ip.octets(),
                },
                ipi6_ifindex: 0,
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(
                socket.as_raw_fd(),
                &buffer,
                &control,
                MsgFlags::empty(),
                Some(peer),
            )?;
        }
    }
    Ok(())
}

fn internet(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(ipv4) = address.as_sockaddr_in() {
        return Some(SocketAddr::V4((*ipv4).into()));
    }
    address
        .as_sockaddr_in6()
        .map(|ipv6| SocketAddr::V6((*ipv6).into()))
}
