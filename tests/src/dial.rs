//! Making a connection and writing down all that can be seen of it.

use std::{
    io::{BufRead as _, BufReader, Error, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    protocol::{Dial, Dialed, Family, Probe, canonical},
    sockopt::{errno_name, original_dst, original_dst6},
};

/// A new TCP socket of that kind.
pub fn create(family: Family) -> Result<Socket, Error> {
    create_of(family, Type::STREAM, Protocol::TCP)
}

/// A new socket of that kind, for any protocol.
pub fn create_of(family: Family, kind: Type, protocol: Protocol) -> Result<Socket, Error> {
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 | Family::Mapped => Domain::IPV6,
    };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    if family == Family::Mapped {
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}

/// Connects `socket` and asks whoever answers. Hands the connection back if it stands.
pub fn connect(socket: Socket, dial: &Dial) -> (Dialed, Option<TcpStream>) {
    let mut dialed = Dialed::new();
    match establish(&socket, dial) {
        Ok(()) => {
            let stream = TcpStream::from(socket);
            let result = interrogate(&stream, dial, &mut dialed);
            dialed.error = result.err().map(|error| errno_name(&error));
            (dialed, Some(stream))
        }
        Err(error) => {
            dialed.error = Some(errno_name(&error));
            (dialed, None)
        }
    }
}

fn establish(socket: &Socket, dial: &Dial) -> Result<(), Error> {
    prepare(socket, dial)?;
    let to = spell(dial.family, dial.to).into();
    if dial.nonblocking {
        socket.connect_timeout(&to, Duration::from_millis(dial.timeout_ms))
    } else {
        // SO_SNDTIMEO bounds a blocking connect too.
        socket.connect(&to)
    }
}

/// Everything that comes before `connect`.
pub fn prepare(socket: &Socket, dial: &Dial) -> Result<(), Error> {
    let timeout = Duration::from_millis(dial.timeout_ms);
    socket.set_read_timeout(Some(timeout))?;
    socket.set_write_timeout(Some(timeout))?;
    if dial.mark != 0 {
        socket.set_mark(dial.mark)?;
    }
    if dial.reset {
        socket.set_linger(Some(Duration::ZERO))?;
    }
    if let Some(source) = dial.bind {
        socket.set_reuse_address(true)?;
        let any = dial.family == Family::Mapped && source.ip().is_unspecified();
        // The mapped 0.0.0.0 would bind IPv4 only, which no real program asks for.
        let source = if any {
            (Ipv6Addr::UNSPECIFIED, source.port()).into()
        } else {
            spell(dial.family, source)
        };
        socket.bind(&source.into())?;
    }
    Ok(())
}

fn interrogate(stream: &TcpStream, dial: &Dial, dialed: &mut Dialed) -> Result<(), Error> {
    dialed.local = Some(stream.local_addr()?);
    dialed.peer = Some(stream.peer_addr()?);
    dialed.original = Some(original_dst(stream, 16));
    dialed.original6 = Some(original_dst6(stream, 28));
    if !dial.greeting {
        return Ok(());
    }
    let mut reader = BufReader::new(stream);
    dialed.greeting = Some(serde_json::from_str(&line(&mut reader)?)?);
    for &length in &dial.probe_lengths {
        writeln!(&mut &*stream, "probe {length}")?;
        let (original, original6): (Probe, Probe) = serde_json::from_str(&line(&mut reader)?)?;
        dialed.probes.push((length, original, original6));
    }
    Ok(())
}

/// Sends one line and reads one back.
pub fn ask(stream: &TcpStream, text: &str) -> Result<String, Error> {
    writeln!(&mut &*stream, "{text}")?;
    line(&mut BufReader::new(stream))
}

fn line(reader: &mut BufReader<&TcpStream>) -> Result<String, Error> {
    let mut text = String::new();
    if reader.read_line(&mut text)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(text.trim_end().to_owned())
}

/// How an address has to be written for a socket of that family.
pub fn spell(family: Family, address: SocketAddr) -> SocketAddr {
    match (family, canonical(address).ip()) {
        (Family::Mapped, IpAddr::V4(ip)) => (ip.to_ipv6_mapped(), address.port()).into(),
        _ => address,
    }
}
