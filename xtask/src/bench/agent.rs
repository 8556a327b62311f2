//! The processes in the pods: a proxy that only listens, and clients that take orders on stdin.

use std::fs::{self, File};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// One connection's first byte tells the server what will follow.
const PING: u8 = b'p';
const BULK: u8 = b'b';
const CHUNK: usize = 64 * 1024;
/// How long to wait for an answer: one that never comes is the application's.
const PATIENCE: Duration = Duration::from_secs(5);
const MEBIBYTE: u64 = 1024 * 1024;
/// More than a round makes: a full queue would drop SYNs, and measure their retransmission.
const BACKLOG: i32 = 4096;

/// A process of a pod or peer, started by the bench.
#[derive(Args)]
pub struct Agent {
    #[arg(long)]
    netns: PathBuf,
    #[arg(long)]
    cgroup: Option<PathBuf>,
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    id: u32,
    /// Listen on these ports and serve as the proxy
    #[arg(long, value_delimiter = ',')]
    listen: Vec<u16>,
    /// Listen on this port and never answer, as an application that must not be reached
    #[arg(long, conflicts_with = "listen")]
    silent: Option<u16>,
}

/// An order to a client, one line of text.
#[derive(Clone, Copy)]
pub enum Work {
    /// So many connections, one after the other: the median of connect() and close().
    Connect(u64),
    /// So many round trips of one byte: the median of one.
    RoundTrip(u64),
    /// So many MiB: the time until the server has read all.
    Bulk(u64),
}

impl Work {
    pub fn order(self, to: SocketAddr) -> String {
        let (word, count) = match self {
            Self::Connect(count) => ("connect", count),
            Self::RoundTrip(count) => ("trip", count),
            Self::Bulk(count) => ("bulk", count),
        };
        format!("{word} {count} {to}\n")
    }

    fn parse(line: &str) -> Result<(Self, SocketAddr)> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [word, count, to] = words[..] else {
            bail!("not an order: {line:?}")
        };
        let count = u64::from_str(count)?;
        let work = match word {
            "connect" => Self::Connect(count),
            "trip" => Self::RoundTrip(count),
            "bulk" => Self::Bulk(count),
            _ => bail!("not an order: {line:?}"),
        };
        Ok((work, to.parse()?))
    }

    fn run(self, to: SocketAddr) -> Result<u64> {
        let nanoseconds = match self {
            Self::Connect(count) => connect(&to.into(), count),
            Self::RoundTrip(count) => round_trips(to, count),
            Self::Bulk(count) => bulk(to, count),
        };
        nanoseconds.with_context(|| format!("connections to {to} fail"))
    }
}

impl Agent {
    pub fn run(self) -> Result<()> {
        if let Some(cgroup) = &self.cgroup {
            let file = cgroup.join("cgroup.procs");
            fs::write(&file, "0").with_context(|| format!("cannot join {}", file.display()))?;
        }
        let namespace = File::open(&self.netns).context("no network namespace")?;
        setns(namespace, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
        let mut cpus = CpuSet::new();
        cpus.set(self.cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).context("cannot choose a CPU")?;
        let (uid, gid) = (Uid::from_raw(self.id), Gid::from_raw(self.id));
        setgroups(&[])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        if let Some(port) = self.silent {
            let _listener = listener(port)?;
            ready()
        } else if self.listen.is_empty() {
            take_orders()
        } else {
            serve_all(&self.listen)
        }
    }
}

fn take_orders() -> Result<()> {
    println!("ready");
    for line in io::stdin().lock().lines() {
        let (work, to) = Work::parse(&line?)?;
        println!("{}", work.run(to)?);
    }
    Ok(())
}

fn tcp() -> io::Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
}

fn connect(to: &SockAddr, count: u64) -> io::Result<u64> {
    let mut times = Vec::new();
    for _ in 0..count {
        let socket = tcp()?;
        // Closing resets: no TIME_WAIT, so ports do not run out.
        socket.set_linger(Some(Duration::ZERO))?;
        let started = Instant::now();
        socket.connect(to)?;
        drop(socket);
        times.push(started.elapsed());
    }
    Ok(median(times))
}

fn round_trips(to: SocketAddr, count: u64) -> io::Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[PING])?;
    let mut times = Vec::new();
    let mut byte = [0];
    for _ in 0..count {
        let started = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(started.elapsed());
    }
    Ok(median(times))
}

fn bulk(to: SocketAddr, mebibytes: u64) -> io::Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    stream.write_all(&[BULK])?;
    let chunk = vec![0; CHUNK];
    let started = Instant::now();
    for _ in 0..mebibytes * MEBIBYTE / CHUNK as u64 {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed().as_nanos() as u64)
}

fn median(mut times: Vec<Duration>) -> u64 {
    times.sort_unstable();
    let middle = times.get(times.len() / 2);
    middle.map_or(0, |time| time.as_nanos() as u64)
}

fn listener(port: u16) -> Result<Socket> {
    let listener = tcp()?;
    listener.set_reuse_address(true)?;
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let bound = listener.bind(&address.into());
    bound.with_context(|| format!("cannot listen on port {port}"))?;
    listener.listen(BACKLOG)?;
    Ok(listener)
}

fn serve_all(ports: &[u16]) -> Result<()> {
    for port in ports {
        let listener = listener(*port)?;
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while let Ok((socket, _)) = listener.accept() {
                // Clients that only connect reset the connection.
                serve(socket.into(), &mut buffer).ok();
            }
        });
    }
    ready()
}

/// Says so, and stays until the bench lets go of the other end, at its death at the latest.
fn ready() -> Result<()> {
    println!("ready");
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    Ok(())
}

fn serve(mut stream: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut first = [0];
    stream.read_exact(&mut first)?;
    match first[0] {
        PING => {
            stream.set_nodelay(true)?;
            loop {
                stream.read_exact(&mut first)?;
                stream.write_all(&first)?;
            }
        }
        _ => {
            while stream.read(buffer)? > 0 {}
            stream.write_all(&first)
        }
    }
}
