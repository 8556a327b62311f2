//! One end of a connection, one system call at a time: for tests about the order in which the two ends act.

use std::{
    collections::BTreeMap,
    io::{Error, ErrorKind, Read as _, Write as _},
    net::Shutdown,
    thread,
    time::Duration,
};

use nix::{
    getsockopt_impl, setsockopt_impl, sockopt_impl,
    sys::socket::{getsockopt, setsockopt},
};
use socket2::{SockAddr, Socket};

use crate::{
    dial::spell,
    patience::patience,
    protocol::{Listen, Step},
    server::bound,
};

/// How long a connection may take to pass on what its buffers have room for: longer than an acknowledgement is delayed, and
/// than it takes until something is sent again.
const SETTLING: Duration = Duration::from_millis(250);
/// No connection has buffers for so many bytes.
const FILL_LIMIT: usize = 64 << 20;

sockopt_impl!(
    /// How many seconds a connection waits for data in the state SYN_RECV.
    TcpDeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    libc::c_int
);
sockopt_impl!(
    /// The first byte of `struct tcp_info`: the state.
    TcpState,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    u8
);

/// How long a step may wait for the other end.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long to wait for a connection that should not come.
const NOBODY: Duration = Duration::from_millis(300);
/// More than any handshake takes.
const DEFERRED_SECONDS: libc::c_int = 30;

/// Takes a step with the socket of that name, and says what came of it.
pub fn take(
    sockets: &mut BTreeMap<String, Socket>,
    name: &str,
    step: &Step,
) -> Result<String, Error> {
    match step {
        Step::Listen { at, deferred } => {
            let socket = bound(&Listen::new(name, *at))?;
            if *deferred {
                setsockopt(&socket, TcpDeferAccept, &DEFERRED_SECONDS)?;
            }
            sockets.insert(name.to_owned(), socket);
            Ok(String::new())
        }
        Step::Accept { listener, expected } => {
            let listener = &sockets[listener];
            listener.set_read_timeout(Some(patience(if *expected { PATIENCE } else { NOBODY })))?;
            let (socket, _) = listener.accept()?;
            socket.set_read_timeout(Some(patience(PATIENCE)))?;
            sockets.insert(name.to_owned(), socket);
            Ok(String::new())
        }
        Step::Begin { family, to } => {
            let socket = &sockets[name];
            socket.set_nonblocking(true)?;
            let result = socket.connect(&SockAddr::from(spell(*family, *to)));
            socket.set_nonblocking(false)?;
            result.map(|()| String::new())
        }
        Step::Fill => fill(&sockets[name]).map(|sent| sent.to_string()),
        Step::Shut => sockets[name]
            .shutdown(Shutdown::Write)
            .map(|()| String::new()),
        Step::Drain => {
            let mut all = Vec::new();
            (&sockets[name]).read_to_end(&mut all)?;
            Ok(all.len().to_string())
        }
        Step::State => Ok(state(getsockopt(&sockets[name], TcpState)?).to_owned()),
    }
}

/// Writes until the socket takes no more; the number of bytes it took.
fn fill(mut socket: &Socket) -> Result<usize, Error> {
    socket.set_nonblocking(true)?;
    let (mut sent, mut before) = (0, None);
    // What waits here has to find no room there either.
    while before != Some(sent) && sent < FILL_LIMIT {
        if before.is_some() {
            thread::sleep(patience(SETTLING));
        }
        before = Some(sent);
        loop {
            match socket.write(&[0; 65_536]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
    socket.set_nonblocking(false)?;
    Ok(sent)
}

/// As in `include/net/tcp_states.h`.
const fn state(number: u8) -> &'static str {
    match number {
        1 => "ESTABLISHED",
        2 => "SYN_SENT",
        4 => "FIN_WAIT1",
        5 => "FIN_WAIT2",
        6 => "TIME_WAIT",
        7 => "CLOSE",
        8 => "CLOSE_WAIT",
        9 => "LAST_ACK",
        11 => "CLOSING",
        _ => "another state",
    }
}
