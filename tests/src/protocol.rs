//! What a test and its actor say to each other: one JSON document per line, a request down, an answer up.

use std::{
    collections::BTreeSet,
    io::Error,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::{
    play::{Held, Play, Played},
    sockopt::errno_name,
};

/// The user and group ids a process runs with.
///
/// Owner matches look at the *effective* ids (strictly: fsuid and fsgid) of whoever creates a socket.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Identity {
    /// Real user id.
    pub ruid: u32,
    /// Effective user id.
    pub euid: u32,
    /// Real group id.
    pub rgid: u32,
    /// Effective group id.
    pub egid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Identity {
    /// The superuser.
    pub const ROOT: Self = Self::new(0, 0);
    /// An ordinary application.
    pub const APP: Self = Self::new(1000, 1000);
    /// The proxy, as Istio runs it.
    pub const PROXY: Self = Self::new(1337, 1337);
    /// The proxy, as Istio runs it for TPROXY: it needs a superuser's rights.
    pub const TPROXY: Self = Self::new(0, 1337);

    /// `uid` and `gid`, real and effective, no supplementary groups.
    pub const fn new(uid: u32, gid: u32) -> Self {
        Self {
            ruid: uid,
            euid: uid,
            rgid: gid,
            egid: gid,
            groups: Vec::new(),
        }
    }

    /// Another effective user id.
    pub const fn effective_user(mut self, uid: u32) -> Self {
        self.euid = uid;
        self
    }

    /// Another effective group id.
    pub const fn effective_group(mut self, gid: u32) -> Self {
        self.egid = gid;
        self
    }

    /// The same ids as seen from outside a user namespace that begins at `offset`.
    pub fn shifted(mut self, offset: u32) -> Self {
        for id in [
            &mut self.ruid,
            &mut self.euid,
            &mut self.rgid,
            &mut self.egid,
        ] {
            *id += offset;
        }
        self.groups.iter_mut().for_each(|id| *id += offset);
        self
    }

    /// One supplementary group.
    pub fn supplementary(mut self, gid: u32) -> Self {
        self.groups.push(gid);
        self
    }
}

/// Which kind of socket, and so which hook, a connection uses.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Family {
    /// An `AF_INET` socket.
    V4,
    /// An `AF_INET6` socket and an IPv6 address.
    V6,
    /// An `AF_INET6` socket and an IPv4-mapped address: what most Java programs use.
    Mapped,
}

impl Family {
    /// Whether packets of this family are IPv4.
    pub const fn is_ipv4(self) -> bool {
        matches!(self, Self::V4 | Self::Mapped)
    }
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP on a connected socket.
    ConnectedUdp,
    /// UDP on a socket that names the destination with every datagram.
    Udp,
}

/// How a connection is asked for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Way {
    /// connect(2).
    Blocking,
    /// connect(2) on a non-blocking socket, then poll(2).
    Nonblocking,
    /// sendto(2) with `MSG_FASTOPEN`; sends [`EARLY`].
    FastOpen,
    /// connect(2) with `TCP_FASTOPEN_CONNECT`, which waits for the first write: [`EARLY`].
    FastOpenConnect,
    /// `IORING_OP_CONNECT`.
    IoUring,
}

/// What fast-open connections send first; servers echo it after their greeting.
pub const EARLY: &str = "early";

/// A socket option, set before binding and connecting.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Setting {
    /// `SO_BINDTODEVICE`.
    Device(String),
    /// `IP_BIND_ADDRESS_NO_PORT`.
    BindAddressNoPort,
    /// `IP_FREEBIND`.
    Freebind,
    /// `IP_TRANSPARENT`.
    Transparent,
    /// `SO_REUSEPORT`.
    ReusePort,
}

/// A connection to make.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Dial {
    /// The protocol.
    pub transport: Transport,
    /// The kind of socket.
    pub family: Family,
    /// The destination; IPv4 addresses are mapped where `family` says so.
    pub to: SocketAddr,
    /// Address and port to bind before connecting. An unspecified address or port 0 leave that half to the kernel.
    pub bind: Option<SocketAddr>,
    /// `SO_MARK`, which needs `CAP_NET_ADMIN`; 0 leaves it alone.
    pub mark: u32,
    /// Reset the connection when it is closed, so that neither end waits in TIME_WAIT.
    pub reset: bool,
    /// How it is asked for.
    pub way: Way,
    /// Options of the socket.
    pub settings: Vec<Setting>,
    /// Whether the socket is of `IPPROTO_MPTCP`.
    pub multipath: bool,
    /// How long connecting may take, in milliseconds, if it is asked for on a non-blocking socket.
    pub connect_ms: u64,
    /// How long connecting may take on a blocking socket, and then reading, in milliseconds.
    pub timeout_ms: u64,
    /// Keep the connection under this name.
    pub keep: Option<String>,
    /// Buffer sizes with which the server is to repeat its `SO_ORIGINAL_DST` queries.
    pub probe_lengths: Vec<usize>,
    /// Whether to wait for the server's greeting.
    pub greeting: bool,
}

impl Dial {
    /// A blocking connection with three seconds of patience.
    pub const fn new(family: Family, to: SocketAddr) -> Self {
        Self {
            transport: Transport::Tcp,
            family,
            to,
            bind: None,
            mark: 0,
            reset: false,
            way: Way::Blocking,
            settings: Vec::new(),
            multipath: false,
            connect_ms: 3000,
            timeout_ms: 3000,
            keep: None,
            probe_lengths: Vec::new(),
            greeting: true,
        }
    }

    /// Bind to `source` first.
    pub const fn bind(mut self, source: SocketAddr) -> Self {
        self.bind = Some(source);
        self
    }

    /// Set `SO_MARK`.
    pub const fn mark(mut self, mark: u32) -> Self {
        self.mark = mark;
        self
    }

    /// Come from an address that need not be the pod's own.
    pub fn transparent(self, source: SocketAddr) -> Self {
        self.setting(Setting::Transparent).bind(source)
    }

    /// Leave by that interface.
    pub fn device(self, name: &str) -> Self {
        self.setting(Setting::Device(name.to_owned()))
    }

    /// Keep the connection open under `name`.
    pub fn keep(mut self, name: &str) -> Self {
        self.keep = Some(name.to_owned());
        self
    }

    /// Connect in another way.
    pub const fn way(mut self, way: Way) -> Self {
        self.way = way;
        self
    }

    /// Set a socket option first.
    pub fn setting(mut self, setting: Setting) -> Self {
        self.settings.push(setting);
        self
    }

    /// Use an MPTCP socket.
    pub const fn multipath(mut self) -> Self {
        self.multipath = true;
        self
    }

    /// Give up after this many milliseconds.
    pub const fn timeout_ms(mut self, timeout: u64) -> Self {
        self.connect_ms = timeout;
        self.timeout_ms = timeout;
        self
    }

    /// Repeat the server's `SO_ORIGINAL_DST` queries with these buffer sizes.
    pub fn probe(mut self, lengths: &[usize]) -> Self {
        self.probe_lengths = lengths.to_vec();
        self
    }
}

/// Questions from one UDP socket.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Burst {
    /// The kind of socket.
    pub family: Family,
    /// Address and port to bind before.
    pub bind: Option<SocketAddr>,
    /// Whom to connect to before; every question names its destination all the same.
    pub connect: Option<SocketAddr>,
    /// The destinations; each is asked its index in this list.
    pub to: Vec<SocketAddr>,
    /// Whether every answer is awaited before the next question.
    pub lockstep: bool,
    /// How long to wait for an answer, in milliseconds.
    pub timeout_ms: u64,
}

impl Burst {
    /// Questions from a socket that is neither bound nor connected, all at once.
    pub const fn new(family: Family, to: Vec<SocketAddr>) -> Self {
        Self {
            family,
            bind: None,
            connect: None,
            to,
            lockstep: false,
            timeout_ms: 3000,
        }
    }

    /// One question after the other.
    pub const fn lockstep(mut self) -> Self {
        self.lockstep = true;
        self
    }
}

/// An answer to a question of a [`Burst`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Reply {
    /// Where it came from, as the socket's kind writes it.
    pub from: SocketAddr,
    /// Who answered, and the question.
    pub text: String,
}

/// Where to listen.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Listen {
    /// Who a client is told it has reached.
    pub who: String,
    /// Address and port.
    pub at: SocketAddr,
    /// How many `SO_REUSEPORT` sockets; 0 and 1 mean a plain socket without the option.
    pub reuseport: usize,
    /// `SO_REUSEADDR`.
    pub reuse_address: bool,
    /// `IPV6_V6ONLY`.
    pub v6_only: bool,
    /// What is done with a connection.
    pub manner: Manner,
    /// Whether this is a UDP socket, which answers every datagram with a greeting.
    pub udp: bool,
    /// `IP_TRANSPARENT`; needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Length of the queue of connections not accepted yet.
    pub backlog: i32,
    /// How long to wait before the first is accepted, in milliseconds.
    pub delay_ms: u64,
    /// Whether the socket is of `IPPROTO_MPTCP`.
    pub multipath: bool,
    /// `IP_FREEBIND`: the address need not be there.
    pub freebind: bool,
}

/// What a listener does with a connection.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Manner {
    /// Greets, then echoes what it is told.
    Converse,
    /// The same on one thread: for very many connections at once that are spoken to.
    Multiplex,
    /// Holds it without a word, all in one thread: for very many connections at once.
    Hold,
    /// Closes it at once: for very many connections one after another.
    HangUp,
}

impl Listen {
    /// A plain listener; IPv6 ones serve IPv6 only.
    pub fn new(who: &str, at: SocketAddr) -> Self {
        Self {
            who: who.to_owned(),
            at,
            reuseport: 0,
            reuse_address: true,
            v6_only: true,
            manner: Manner::Converse,
            transparent: false,
            udp: false,
            backlog: 4096,
            delay_ms: 0,
            multipath: false,
            freebind: false,
        }
    }

    /// At an address that nobody has, with `IP_FREEBIND`.
    pub const fn freebind(mut self) -> Self {
        self.freebind = true;
        self
    }

    /// With `IP_TRANSPARENT`, as iptables' TPROXY asks for.
    pub const fn transparent(mut self) -> Self {
        self.transparent = true;
        self
    }

    /// UDP in place of TCP.
    pub const fn udp(mut self) -> Self {
        self.udp = true;
        self
    }

    /// Serve IPv4 on an IPv6 socket too.
    pub const fn dual_stack(mut self) -> Self {
        self.v6_only = false;
        self
    }

    /// Several sockets on the same port.
    pub const fn reuseport(mut self, sockets: usize) -> Self {
        self.reuseport = sockets;
        self
    }

    /// Treat connections in another way.
    pub const fn manner(mut self, manner: Manner) -> Self {
        self.manner = manner;
        self
    }

    /// Keep few connections waiting, and for so many milliseconds.
    pub const fn slow(mut self, backlog: i32, delay_ms: u64) -> Self {
        (self.backlog, self.delay_ms) = (backlog, delay_ms);
        self
    }

    /// Use an MPTCP socket.
    pub const fn multipath(mut self) -> Self {
        self.multipath = true;
        self
    }
}

/// One system call on one end of a connection.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Step {
    /// Listen on a socket of that name.
    Listen {
        /// Address and port.
        at: SocketAddr,
        /// Whether a connection stays in the state SYN_RECV until data comes (`TCP_DEFER_ACCEPT`).
        deferred: bool,
    },
    /// Accept a connection and keep it under that name.
    Accept {
        /// The listener's name.
        listener: String,
        /// Whether one should come: otherwise the wait is short.
        expected: bool,
    },
    /// Call connect(2) once, without waiting.
    Begin {
        /// The socket's kind.
        family: Family,
        /// The destination.
        to: SocketAddr,
    },
    /// Send until the socket takes no more; says how many bytes it took.
    Fill,
    /// Stop sending.
    Shut,
    /// Read to the end; says how many bytes came.
    Drain,
    /// Say which state TCP is in.
    State,
}

/// One thing an actor is asked to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Request {
    /// Make a connection.
    Dial(Dial),
    /// Create a socket and keep it, unconnected.
    Create {
        /// Name to keep it under.
        name: String,
        /// Kind of socket.
        family: Family,
    },
    /// Take another identity, for good.
    Assume(Identity),
    /// Open a pinned eBPF object.
    OpenPin(PathBuf),
    /// Dissolve a socket's connection: connect(2) to `AF_UNSPEC`.
    Disconnect {
        /// Name of the connection.
        name: String,
    },
    /// Listen on a socket that is there, and serve.
    Serve {
        /// Name of the socket, which is gone afterwards.
        name: String,
        /// Who a client is told it has reached.
        who: String,
    },
    /// Make a connection in a child process.
    Spawn {
        /// On this socket, which it inherits; else on one of its own.
        name: Option<String>,
        /// How.
        dial: Dial,
    },
    /// Connect to consecutive addresses, one after another, and tell of those where an end did not
    /// see the right destination.
    Sweep {
        /// The first.
        to: SocketAddr,
        /// How many.
        addresses: u32,
    },
    /// Connect a UDP socket to one address after another, and look at it.
    Datagram {
        /// Address and port to bind before.
        bind: SocketAddr,
        /// The destinations, all of its family.
        to: Vec<SocketAddr>,
    },
    /// Make connections at the same time, each in its own thread.
    Together(Vec<Dial>),
    /// Open a place where sockets of other processes arrive.
    Expect(PathBuf),
    /// Send a socket to such a place.
    Give {
        /// Name of the socket, which is kept too.
        name: String,
        /// The place.
        to: PathBuf,
    },
    /// Receive a socket at the place opened.
    Take {
        /// Name to keep it under.
        name: String,
    },
    /// Send a line, stop sending, and read all that comes.
    HalfClose {
        /// Name of the connection.
        name: String,
        /// What to send.
        line: String,
    },
    /// Connect a socket that was created before.
    Connect {
        /// Its name.
        name: String,
        /// How; `family` has to be the same as at creation.
        dial: Dial,
    },
    /// Send a line on a kept connection and read the echo.
    Ask {
        /// Name of the connection.
        name: String,
        /// What to send.
        line: String,
    },
    /// Look at a kept connection again.
    Look {
        /// Name of the connection.
        name: String,
    },
    /// Take one step with a kept socket.
    Step {
        /// Its name.
        name: String,
        /// What to do.
        step: Step,
    },
    /// Close a kept connection.
    Hang {
        /// Name of the connection.
        name: String,
    },
    /// Ask many questions over UDP.
    Burst(Burst),
    /// Open a UDP server that answers in the reverse order.
    Reverse {
        /// Who a client is told it has reached.
        who: String,
        /// Address and port.
        at: SocketAddr,
        /// How many questions are collected before they are answered.
        count: usize,
    },
    /// Close every such server.
    Unreverse,
    /// Open a listener.
    Listen(Listen),
    /// Close every listener with this name.
    Unlisten {
        /// Its name.
        who: String,
    },
    /// Dial over and over in a thread of its own, until [`Request::TrafficStop`].
    TrafficStart(Dial),
    /// Stop dialling and tell what happened.
    TrafficStop,
    /// Connect, wait until the other side hangs up and reset, this many times.
    Churn {
        /// How.
        dial: Dial,
        /// How many connections.
        count: u32,
    },
    /// Make calls, many at a time.
    Play(Play),
    /// Ask the server of every connection that [`Request::Play`] has left open.
    AskHeld,
    /// Close those of these numbers.
    Release(BTreeSet<u32>),
    /// Open this many connections and hold them, spread over destinations.
    Crowd {
        /// Destination of the first.
        to: SocketAddr,
        /// How many destinations: consecutive addresses.
        addresses: u32,
        /// How many connections.
        count: u32,
    },
}

/// What the actor answers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum Answer {
    /// Nothing to tell.
    Done,
    /// It could not be done: the errno's name.
    Failed(String),
    /// A connection was attempted.
    Dialed(Box<Dialed>),
    /// Several were.
    Several(Vec<Dialed>),
    /// The echo.
    Said(String),
    /// The answers to a [`Burst`], in the order in which they came.
    Replies(Vec<Reply>),
    /// What the traffic met.
    Traffic(Traffic),
    /// What came of each call.
    Played(Vec<Played>),
    /// What the connections that are held say.
    Held(Vec<Held>),
    /// How many connections are held, and the first error.
    Crowd {
        /// Connections held now.
        held: u32,
        /// What stopped it.
        error: Option<String>,
    },
}

/// The result of `getsockopt(SO_ORIGINAL_DST)`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Probe {
    /// The errno's name if the call failed.
    pub errno: Option<String>,
    /// The address it gave.
    pub address: Option<SocketAddr>,
    /// The length it gave back.
    pub length: usize,
}

/// What a server says about a connection.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Greeting {
    /// The listener's name.
    pub who: String,
    /// `getpeername`.
    pub peer: SocketAddr,
    /// `getsockname`; for UDP, the address that the datagram was sent to as it arrived.
    pub local: SocketAddr,
    /// `SO_ORIGINAL_DST` at `SOL_IP` with a `sockaddr_in`.
    pub original: Probe,
    /// `SO_ORIGINAL_DST` at `SOL_IPV6` with a `sockaddr_in6`.
    pub original6: Probe,
}

/// What a client saw of a connection.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Dialed {
    /// Name of the errno that ended it.
    pub error: Option<String>,
    /// Who answered.
    pub greeting: Option<Greeting>,
    /// `getsockname`.
    pub local: Option<SocketAddr>,
    /// `getpeername`.
    pub peer: Option<SocketAddr>,
    /// Where the answer to a datagram came from.
    pub replied: Option<SocketAddr>,
    /// The client's own `SO_ORIGINAL_DST` at `SOL_IP`.
    pub original: Option<Probe>,
    /// The client's own `SO_ORIGINAL_DST` at `SOL_IPV6`.
    pub original6: Option<Probe>,
    /// The server's repeated queries: buffer length, `SOL_IP`, `SOL_IPV6`.
    pub probes: Vec<(usize, Probe, Probe)>,
}

impl Dialed {
    /// Nothing seen yet.
    pub const fn new() -> Self {
        Self {
            error: None,
            greeting: None,
            local: None,
            peer: None,
            replied: None,
            original: None,
            original6: None,
            probes: Vec::new(),
        }
    }

    /// One that did not come about.
    pub fn failed(error: &Error) -> Self {
        Self {
            error: Some(errno_name(error)),
            ..Self::new()
        }
    }

    /// The name of whoever answered, or of the error, for messages and comparisons.
    pub fn outcome(&self) -> &str {
        match (&self.error, &self.greeting) {
            (_, Some(greeting)) => &greeting.who,
            (Some(error), None) => error,
            (None, None) => "connected",
        }
    }
}

/// What continuous traffic met: counts by outcome.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Traffic {
    /// Who answered or which error came, in the order first met.
    pub outcomes: Vec<(String, u64)>,
}

impl Traffic {
    /// One more connection with that outcome.
    pub fn count(&mut self, outcome: &str) {
        match self.outcomes.iter_mut().find(|(name, _)| name == outcome) {
            Some((_, count)) => *count += 1,
            None => self.outcomes.push((outcome.to_owned(), 1)),
        }
    }
}

/// How an actor is started: the first line it reads.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Start {
    /// The cgroup to join, if any.
    pub cgroup: Option<PathBuf>,
    /// The network namespace to enter.
    pub netns: PathBuf,
    /// Keep `CAP_NET_ADMIN`, and no other capability, whatever the identity is.
    pub net_admin: bool,
    /// The identity to take at last.
    pub identity: Identity,
}

/// `address` without the IPv4-in-IPv6 mapping.
pub const fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}
