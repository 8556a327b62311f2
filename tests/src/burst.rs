//! Many questions from one UDP socket, and a server that answers them in the reverse order.

use std::{
    collections::VecDeque,
    io::{Error, IoSliceMut},
    net::{Ipv6Addr, Shutdown, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
    thread::{self, JoinHandle},
};

use nix::sys::socket::{MsgFlags, SockaddrStorage, recvmsg};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    dial::{create_of, prepare, spell},
    protocol::{Burst, Dial, Family, Reply},
};

/// More than any text, in bytes.
const LARGEST: usize = 256;

/// Asks every destination its index in the list, and waits for as many answers.
pub fn ask(burst: &Burst) -> Result<Vec<Reply>, Error> {
    let socket = create_of(burst.family, Type::DGRAM, Protocol::UDP)?;
    let first = burst
        .to
        .first()
        .copied()
        .unwrap_or((Ipv6Addr::LOCALHOST, 0).into());
    let mut dial = Dial::new(burst.family, first).timeout_ms(burst.timeout_ms);
    dial.bind = burst.bind;
    prepare(&socket, &dial)?;
    if let Some(peer) = burst.connect {
        socket.connect(&spell(burst.family, peer).into())?;
    }
    let socket = UdpSocket::from(socket);
    let mut replies = Vec::new();
    for (index, to) in burst.to.iter().enumerate() {
        socket.send_to(index.to_string().as_bytes(), spell(burst.family, *to))?;
        if burst.lockstep {
            replies.push(receive(&socket, burst.family)?);
        }
    }
    while replies.len() < burst.to.len() {
        replies.push(receive(&socket, burst.family)?);
    }
    Ok(replies)
}

/// By recvmsg(2), and for IPv4 sockets by recvfrom(2): both tell the sender.
fn receive(socket: &UdpSocket, family: Family) -> Result<Reply, Error> {
    let mut text = [0; LARGEST];
    let (length, from) = if family == Family::V4 {
        socket.recv_from(&mut text)?
    } else {
        let mut buffer = [IoSliceMut::new(&mut text)];
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer, None, MsgFlags::empty())?;
        let address = message.address.ok_or(std::io::ErrorKind::NotConnected)?;
        let from = address
            .as_sockaddr_in6()
            .ok_or(std::io::ErrorKind::InvalidData)?;
        (message.bytes, SocketAddr::V6((*from).into()))
    };
    let text = String::from_utf8_lossy(&text[..length]).into_owned();
    Ok(Reply { from, text })
}

/// A server that collects questions and answers the last one first.
pub struct Reverser {
    socket: Arc<UdpSocket>,
    thread: Option<JoinHandle<()>>,
}

impl Reverser {
    /// Answers with `who` and the question, whenever `count` of them have come.
    pub fn open(who: &str, at: SocketAddr, count: usize) -> Result<Self, Error> {
        let socket = Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?;
        if at.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&at.into())?;
        let socket = Arc::new(UdpSocket::from(socket));
        let (serving, who) = (Arc::clone(&socket), who.to_owned());
        Ok(Self {
            socket,
            thread: Some(thread::spawn(move || serve(&serving, &who, count))),
        })
    }
}

impl Drop for Reverser {
    fn drop(&mut self) {
        // Wakes a waiting recvfrom(2), although the socket is not connected.
        let _ignored = SockRef::from(&*self.socket).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ignored = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, who: &str, count: usize) {
    let mut questions = VecDeque::new();
    let mut text = [0; LARGEST];
    while let Ok((length @ 1.., from)) = socket.recv_from(&mut text) {
        questions.push_front((String::from_utf8_lossy(&text[..length]).into_owned(), from));
        if questions.len() < count {
            continue;
        }
        for (question, from) in questions.drain(..) {
            // A client that does not listen any more is its own business.
            drop(socket.send_to(format!("{who} {question}").as_bytes(), from));
        }
    }
}
