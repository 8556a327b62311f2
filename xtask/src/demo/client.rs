//! One request, and everything its client can see of the connection.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::server::Answer;

const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
pub struct Seen {
    /// getsockname(2)
    pub local: SocketAddr,
    /// getpeername(2)
    pub peer: SocketAddr,
    pub answer: Answer,
}

pub fn connect(to: SocketAddr) -> Result<Seen> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)
        .with_context(|| format!("cannot connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (local, peer) = (
        stream.local_addr()?,
        stream.peer_addr().context("getpeername failed")?,
    );
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reply = String::new();
    stream
        .read_to_string(&mut reply)
        .with_context(|| format!("no answer from {to}"))?;
    let (_, body) = reply
        .split_once("\r\n\r\n")
        .with_context(|| format!("{to} answered {reply:?}"))?;
    let answer = serde_json::from_str(body).with_context(|| format!("{to} answered {body:?}"))?;
    Ok(Seen {
        local,
        peer,
        answer,
    })
}

/// As a process of the pod: the report goes to the demo through stdout.
pub fn print_one(to: SocketAddr) -> Result<()> {
    println!("{}", serde_json::to_string(&connect(to)?)?);
    Ok(())
}
