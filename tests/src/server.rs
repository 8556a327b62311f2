//! Named servers: each tells every client its name and what the connection looks like from its end, then echoes lines.

use std::{
    io::{BufRead as _, BufReader, Error, ErrorKind, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

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
            server.serve(bound(listen)?, listen)?;
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
        server.serve(socket, &Listen::new(who, at))?;
        Ok(server)
    }

    fn serve(&mut self, socket: Socket, listen: &Listen) -> Result<(), Error> {
        let socket = Arc::new(TcpListener::from(socket));
        self.sockets.push(Arc::clone(&socket) as _);
        if listen.manner == Manner::Multiplex {
            return multiplex::serve(&socket, &listen.who);
        }
        let listen = listen.clone();
        self.threads
            .push(thread::spawn(move || serve(&socket, &listen)));
        Ok(())
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

/// A socket bound as asked, and listening if it is one for connections.
pub fn bound(listen: &Listen) -> Result<Socket, Error> {
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
    socket.set_reuse_address(listen.reuse_address)?;
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
            Manner::Converse | Manner::Multiplex => {
                let who = listen.who.clone();
                // A client that hangs up early is its own business.
                thread::spawn(move || drop(converse(&stream, who)));
            }
        }
    }
}

fn converse(stream: &TcpStream, who: String) -> Result<(), Error> {
    let mut writer = stream;
    writeln!(writer, "{}", greeting(stream, who)?)?;
    for line in BufReader::new(stream).lines() {
        writeln!(writer, "{}", reply(stream, line?)?)?;
    }
    Ok(())
}

/// What a client is told first.
fn greeting(socket: &impl AsFd, who: String) -> Result<String, Error> {
    let address = |name: SockAddr| name.as_socket().ok_or(ErrorKind::Unsupported);
    let descriptor = socket.as_fd();
    let named = SockRef::from(&descriptor);
    let greeting = Greeting {
        who,
        peer: address(named.peer_addr()?)?,
        local: address(named.local_addr()?)?,
        original: original_dst(socket, 16),
        original6: original_dst6(socket, 28),
    };
    Ok(serde_json::to_string(&greeting)?)
}

/// What a client is told when it has said `line`.
fn reply(socket: &impl AsFd, line: String) -> Result<String, Error> {
    let asked = line.strip_prefix("probe ");
    let Some(length) = asked.and_then(|length| length.parse().ok()) else {
        return Ok(line);
    };
    let probes = (original_dst(socket, length), original_dst6(socket, length));
    Ok(serde_json::to_string(&probes)?)
}

/// Very many conversations on one thread.
mod multiplex {
    use std::{
        io::Error,
        net::TcpListener,
        sync::{Arc, OnceLock},
    };

    use tokio::{
        io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
        net::TcpStream,
        runtime::{Builder, Runtime},
    };

    /// Begins to accept, until the listener is shut down. Connections go on after that.
    pub(super) fn serve(listener: &Arc<TcpListener>, who: &str) -> Result<(), Error> {
        let _context = runtime().enter();
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
        let who = who.to_owned();
        runtime().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let who = who.clone();
                // A client that hangs up early is its own business.
                tokio::spawn(async move { drop(converse(stream, who).await) });
            }
        });
        Ok(())
    }

    fn runtime() -> &'static Runtime {
        static RUNTIME: OnceLock<Runtime> = OnceLock::new();
        RUNTIME.get_or_init(|| {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(1).enable_io().build().unwrap()
        })
    }

    async fn converse(stream: TcpStream, who: String) -> Result<(), Error> {
        let mut stream = BufReader::new(stream);
        let mut text = super::greeting(stream.get_ref(), who)?;
        loop {
            text.push('\n');
            stream.write_all(text.as_bytes()).await?;
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            text = super::reply(stream.get_ref(), line.trim_end().to_owned())?;
        }
    }
}
