//! Named servers: each tells every client its name and what the connection looks like from its end, then echoes lines.

use std::{
    io::{BufRead as _, BufReader, Error, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    datagram,
    dial::set_transparent,
    protocol::{Greeting, Listen, Manner},
    sockopt::{original_dst, original_dst6},
};

/// Listening sockets with one name, and their threads.
pub struct Server {
    /// What clients are told.
    pub who: String,
    sockets: Vec<Arc<dyn AsFd + Send + Sync>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Binds, listens and starts answering.
    pub fn open(listen: &Listen) -> Result<Self, Error> {
        let mut server = Self {
            who: listen.who.clone(),
            sockets: Vec::new(),
            threads: Vec::new(),
        };
        if listen.udp {
            let socket = Arc::new(UdpSocket::from(bound(listen)?));
            datagram::tell_destination(&socket, listen.at)?;
            let (serving, who) = (Arc::clone(&socket), listen.who.clone());
            server.sockets.push(socket);
            let serve = move || datagram::serve(&serving, &who);
            server.threads.push(thread::spawn(serve));
            return Ok(server);
        }
        for _ in 0..listen.reuseport.max(1) {
            server.serve(bound(listen)?, listen);
        }
        Ok(server)
    }

    /// Listens on a socket that is bound already, or lets the kernel choose a port.
    pub fn on(socket: Socket, who: &str) -> Result<Self, Error> {
        socket.listen(16)?;
        let at = socket.local_addr()?.as_socket().unwrap();
        let mut server = Self {
            who: who.to_owned(),
            sockets: Vec::new(),
            threads: Vec::new(),
        };
        server.serve(socket, &Listen::new(who, at));
        Ok(server)
    }

    fn serve(&mut self, socket: Socket, listen: &Listen) {
        let socket = Arc::new(TcpListener::from(socket));
        let (accepting, listen) = (Arc::clone(&socket), listen.clone());
        self.sockets.push(socket);
        self.threads
            .push(thread::spawn(move || serve(&accepting, &listen)));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for socket in &self.sockets {
            // Ends the listening and wakes accept(2) with EINVAL; a waiting recvmsg(2) wakes too.
            let descriptor: BorrowedFd<'_> = socket.as_fd();
            let _ignored = SockRef::from(&descriptor).shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            let _ignored = thread.join();
        }
    }
}

fn bound(listen: &Listen) -> Result<Socket, Error> {
    let (kind, protocol) = if listen.udp {
        (Type::DGRAM, Protocol::UDP)
    } else if listen.multipath {
        (Type::STREAM, Protocol::MPTCP)
    } else {
        (Type::STREAM, Protocol::TCP)
    };
    let socket = Socket::new(Domain::for_address(listen.at), kind, Some(protocol))?;
    if listen.at.is_ipv6() {
        socket.set_only_v6(listen.v6_only)?;
    }
    socket.set_reuse_address(true)?;
    if listen.reuseport > 1 {
        socket.set_reuse_port(true)?;
    }
    if listen.transparent {
        set_transparent(&socket, listen.at.is_ipv4())?;
    }
    if listen.freebind {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&listen.at.into())?;
    if !listen.udp {
        socket.listen(listen.backlog)?;
    }
    Ok(socket)
}

fn serve(listener: &TcpListener, listen: &Listen) {
    thread::sleep(Duration::from_millis(listen.delay_ms));
    let mut held = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        match listen.manner {
            Manner::Hold => held.push(stream),
            Manner::HangUp => drop(stream),
            Manner::Converse => {
                let who = listen.who.clone();
                // A client that hangs up early is its own business.
                thread::spawn(move || drop(converse(&stream, who)));
            }
        }
    }
}

fn converse(stream: &TcpStream, who: String) -> Result<(), Error> {
    let greeting = Greeting {
        who,
        peer: stream.peer_addr()?,
        local: stream.local_addr()?,
        original: original_dst(stream, 16),
        original6: original_dst6(stream, 28),
    };
    let mut writer = stream;
    writeln!(writer, "{}", serde_json::to_string(&greeting)?)?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        match line
            .strip_prefix("probe ")
            .and_then(|length| length.parse().ok())
        {
            Some(length) => {
                let probes = (original_dst(stream, length), original_dst6(stream, length));
                writeln!(writer, "{}", serde_json::to_string(&probes)?)?;
            }
            None => writeln!(writer, "{line}")?,
        }
    }
    Ok(())
}
