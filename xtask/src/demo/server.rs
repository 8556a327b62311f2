//! A small HTTP server that says who it is and what it sees of the connection.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
pub struct Answer {
    pub name: String,
    /// getpeername(2) of the accepted connection
    pub peer: SocketAddr,
}

/// Listens in the calling thread's network namespace; threads serve from then on.
pub fn start(name: &str, addresses: &[SocketAddr]) -> Result<()> {
    for address in addresses {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("{name} cannot listen on {address}"))?;
        let name = name.to_owned();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let name = name.clone();
                // A client that went away is no reason to stop.
                thread::spawn(move || answer(&name, stream).ok());
            }
        });
    }
    Ok(())
}

pub fn serve_forever(name: &str, addresses: &[SocketAddr]) -> Result<()> {
    start(name, addresses)?;
    loop {
        thread::park();
    }
}

fn answer(name: &str, mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    let mut request = BufReader::new(stream.try_clone()?);
    while request.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = serde_json::to_string(&Answer {
        name: name.to_owned(),
        peer: stream.peer_addr()?,
    })?;
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length:";
    write!(stream, "{head} {}\r\n\r\n{body}", body.len())?;
    Ok(())
}
