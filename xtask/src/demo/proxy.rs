//! The proxy for machines without Envoy: accepts, asks SO_ORIGINAL_DST, connects there, copies bytes both ways.
//!
//! It runs as uid 1337 without any capability, like Envoy, and writes the same access log fields.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{APP_PORT, INBOUND_PORT, OUTBOUND_PORT, OWN_SERVICE_IP, POD_IP, access_log};

/// Istio's inbound listener calls the app from here, so that its own calls are told from others'.
const INBOUND_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

#[derive(Clone, Copy)]
struct Listener {
    name: &'static str,
    port: u16,
    source: Ipv4Addr,
}

pub fn serve_forever() -> Result<()> {
    let listeners = [
        Listener {
            name: "outbound",
            port: OUTBOUND_PORT,
            source: Ipv4Addr::UNSPECIFIED,
        },
        Listener {
            name: "inbound",
            port: INBOUND_PORT,
            source: INBOUND_SOURCE,
        },
    ];
    thread::scope(|scope| {
        let accepting = listeners.map(|listener| scope.spawn(move || accept(listener)));
        accepting
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(_) => bail!("a listener's thread panicked"),
            })
    })
}

fn accept(listener: Listener) -> Result<()> {
    let socket = TcpListener::bind((Ipv4Addr::UNSPECIFIED, listener.port))
        .with_context(|| format!("cannot listen on port {}", listener.port))?;
    for stream in socket.incoming().flatten() {
        thread::spawn(move || {
            if let Err(error) = serve(listener, &stream) {
                eprintln!("{}: {error:#}", listener.name);
            }
        });
    }
    Ok(())
}

fn serve(listener: Listener, downstream: &TcpStream) -> Result<()> {
    let client = downstream.peer_addr()?;
    let original = SockRef::from(downstream)
        .original_dst_v4()
        .context("SO_ORIGINAL_DST failed")?;
    let original = original
        .as_socket()
        .context("SO_ORIGINAL_DST gave no IP address")?;
    if original.port() == listener.port {
        bail!("{client} connected to the listener itself: there is nowhere to send that");
    }
    let to = if original == SocketAddr::from((OWN_SERVICE_IP, 80)) {
        SocketAddr::from((POD_IP, APP_PORT))
    } else {
        original
    };
    let upstream = connect(listener.source, to).with_context(|| format!("cannot reach {to}"))?;
    println!(
        "{}",
        access_log::format(
            listener.name,
            &upstream.local_addr()?.to_string(),
            &original.to_string(),
            &client.to_string(),
            &to.to_string(),
        )
    );
    thread::scope(|scope| {
        scope.spawn(|| copy(downstream, &upstream));
        copy(&upstream, downstream);
    });
    Ok(())
}

fn connect(source: Ipv4Addr, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    if !source.is_unspecified() {
        socket.bind(&SocketAddr::from((source, 0)).into())?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// One direction, to its end; the other side is told by closing just that direction.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    io::copy(&mut from, &mut to).ok();
    to.shutdown(Shutdown::Write).ok();
}
