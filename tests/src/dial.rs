//! Making a connection and writing down all that can be seen of it.

use std::{
    io::{BufRead as _, BufReader, Error, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr},
    time::Duration,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{IpBindAddressNoPort, TcpFastOpenConnect},
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    patience::patience_ms,
    protocol::{Dial, Dialed, EARLY, Family, Probe, Setting, Way, canonical},
    raw::connect_by_io_uring,
    sockopt::{errno_name, original_dst, original_dst6},
};

/// A new TCP socket of that kind, or an MPTCP one.
pub fn create(family: Family, multipath: bool) -> Result<Socket, Error> {
    let protocol = if multipath {
        Protocol::MPTCP
    } else {
        Protocol::TCP
    };
    create_of(family, Type::STREAM, protocol)
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

/// Creates a socket and connects it.
pub fn dial(dial: &Dial) -> (Dialed, Option<Socket>) {
    match create(dial.family, dial.multipath) {
        Ok(socket) => (connect(&socket, dial), Some(socket)),
        Err(error) => (Dialed::failed(&error), None),
    }
}

/// Connects `socket` and asks whoever answers.
pub fn connect(socket: &Socket, dial: &Dial) -> Dialed {
    match establish(socket, dial) {
        Ok(()) => {
            let mut dialed = look(socket);
            let result = interrogate(socket, dial, &mut dialed);
            dialed.error = result.err().map(|error| errno_name(&error));
            dialed
        }
        Err(error) => Dialed::failed(&error),
    }
}

/// What a socket says about itself.
pub fn look(socket: &Socket) -> Dialed {
    let ip = |name: Result<SockAddr, Error>| name.ok().and_then(|name| name.as_socket());
    Dialed {
        local: ip(socket.local_addr()),
        peer: ip(socket.peer_addr()),
        original: Some(original_dst(socket, 16)),
        original6: Some(original_dst6(socket, 28)),
        ..Dialed::new()
    }
}

fn establish(socket: &Socket, dial: &Dial) -> Result<(), Error> {
    prepare(socket, dial)?;
    let to = SockAddr::from(spell(dial.family, dial.to));
    let early = format!("{EARLY}\n");
    match dial.way {
        // SO_SNDTIMEO bounds a blocking connect too.
        Way::Blocking => socket.connect(&to),
        Way::Nonblocking => socket.connect_timeout(&to, patience_ms(dial.connect_ms)),
        Way::FastOpen => socket
            .send_to_with_flags(early.as_bytes(), &to, libc::MSG_FASTOPEN)
            .map(drop),
        Way::FastOpenConnect => {
            setsockopt(socket, TcpFastOpenConnect, &true)?;
            socket.connect(&to)?;
            (&*socket).write_all(early.as_bytes())
        }
        Way::IoUring => connect_by_io_uring(socket, &to, patience_ms(dial.timeout_ms)),
    }
}

/// `IP_TRANSPARENT` or `IPV6_TRANSPARENT`.
pub fn set_transparent(socket: &Socket, ipv4: bool) -> Result<(), Error> {
    if ipv4 {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_ip_transparent_v6(true)
    }
}

/// Everything that comes before `connect`.
pub fn prepare(socket: &Socket, dial: &Dial) -> Result<(), Error> {
    let timeout = patience_ms(dial.timeout_ms);
    socket.set_read_timeout(Some(timeout))?;
    socket.set_write_timeout(Some(timeout))?;
    if dial.mark != 0 {
        socket.set_mark(dial.mark)?;
    }
    if dial.reset {
        socket.set_linger(Some(Duration::ZERO))?;
    }
    for setting in &dial.settings {
        set(socket, dial.family, setting)?;
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

fn set(socket: &Socket, family: Family, setting: &Setting) -> Result<(), Error> {
    let ipv4 = family == Family::V4;
    match setting {
        Setting::Device(name) => socket.bind_device(Some(name.as_bytes())),
        Setting::BindAddressNoPort => Ok(setsockopt(socket, IpBindAddressNoPort, &true)?),
        Setting::Freebind if ipv4 => socket.set_freebind_v4(true),
        Setting::Freebind => socket.set_freebind_v6(true),
        Setting::Transparent => set_transparent(socket, ipv4),
        Setting::ReusePort => socket.set_reuse_port(true),
    }
}

fn interrogate(socket: &Socket, dial: &Dial, dialed: &mut Dialed) -> Result<(), Error> {
    if !dial.greeting {
        return Ok(());
    }
    let mut reader = BufReader::new(socket);
    dialed.greeting = Some(serde_json::from_str(&line(&mut reader)?)?);
    if matches!(dial.way, Way::FastOpen | Way::FastOpenConnect) && line(&mut reader)? != EARLY {
        return Err(Error::other("the first data was not echoed"));
    }
    for &length in &dial.probe_lengths {
        writeln!(&mut &*socket, "probe {length}")?;
        let (original, original6): (Probe, Probe) = serde_json::from_str(&line(&mut reader)?)?;
        dialed.probes.push((length, original, original6));
    }
    Ok(())
}

/// Sends one line and reads one back.
pub fn ask(socket: &Socket, text: &str) -> Result<String, Error> {
    say(socket, text)?;
    line(&mut BufReader::new(socket))
}

/// Sends one line, stops sending, and reads to the end.
pub fn half_close(socket: &Socket, text: &str) -> Result<String, Error> {
    say(socket, text)?;
    socket.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    (&*socket).read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

/// In one piece: the second of two would wait until the first is acknowledged.
fn say(mut socket: &Socket, text: &str) -> Result<(), Error> {
    socket.write_all(format!("{text}\n").as_bytes())
}

fn line(reader: &mut BufReader<&Socket>) -> Result<String, Error> {
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
