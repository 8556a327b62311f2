//! A process of one identity in one pod, which dials and listens as its test asks.
//!
//! Reads [`Start`] and then [`Request`]s from stdin, one JSON document a line, and answers each on stdout. Ends with its stdin.
#![allow(
    clippy::unwrap_used,
    reason = "the test that started this process reports its panic"
)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead as _, Write as _, stdin, stdout},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, getgroups, setgroups, setresgid, setresuid},
};
use redirect_tests::{
    burst::{self, Reverser},
    datagram,
    dial::{ask, connect, create},
    protocol::{Answer, Dial, Dialed, Identity, Request, Start, Traffic, Transport},
    server::Server,
    sockopt::{errno_name, original_dst, original_dst6},
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities};
use socket2::Socket;

/// Enough for the largest crowd; below the usual `fs.nr_open`.
const DESCRIPTORS: u64 = 400_000;

fn main() {
    let mut lines = stdin().lock().lines();
    let start: Start = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    become_part_of(&start);
    say(&Answer::Done);
    let mut actor = Actor::default();
    for line in lines {
        let request = serde_json::from_str(&line.unwrap()).unwrap();
        say(&actor.perform(request));
    }
}

fn say(answer: &Answer) {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer).unwrap()).unwrap();
    out.flush().unwrap();
}

/// Cgroup first, then namespace, then identity: each needs the rights that the next gives up.
fn become_part_of(start: &Start) {
    if let Some(cgroup) = &start.cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    }
    setns(File::open(&start.netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
    let _fewer_descriptors_do_for_most =
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
    if start.net_admin {
        set_keep_capabilities(true).unwrap();
    }
    assume(&start.identity).unwrap();
    if start.net_admin {
        let net_admin = CapabilitySet::NET_ADMIN;
        let sets = CapabilitySets {
            effective: net_admin,
            permitted: net_admin,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets).unwrap();
    }
}

fn assume(identity: &Identity) -> Result<(), Errno> {
    let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    let (rgid, egid) = (Gid::from_raw(identity.rgid), Gid::from_raw(identity.egid));
    let (ruid, euid) = (Uid::from_raw(identity.ruid), Uid::from_raw(identity.euid));
    // Without the superuser's effective id this is only allowed if nothing changes, and not even then by the kernel.
    if getgroups()? != groups {
        setgroups(&groups)?;
    }
    setresgid(rgid, egid, egid)?;
    setresuid(ruid, euid, euid)
}

#[derive(Default)]
struct Actor {
    sockets: BTreeMap<String, Socket>,
    streams: BTreeMap<String, TcpStream>,
    servers: Vec<Server>,
    reversers: Vec<Reverser>,
    traffic: Option<(Arc<AtomicBool>, JoinHandle<Traffic>)>,
    crowd: Vec<Socket>,
}

impl Actor {
    fn perform(&mut self, request: Request) -> Answer {
        match request {
            Request::Dial(dial) if dial.transport != Transport::Tcp => {
                Answer::Dialed(Box::new(datagram::exchange(&dial)))
            }
            Request::Dial(dial) => match create(dial.family) {
                Ok(socket) => self.connect(socket, &dial),
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Create { name, family } => match create(family) {
                Ok(socket) => {
                    self.sockets.insert(name, socket);
                    Answer::Done
                }
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Assume(identity) => match assume(&identity) {
                Ok(()) => Answer::Done,
                Err(errno) => Answer::Failed(format!("{errno:?}")),
            },
            Request::Connect { name, dial } => {
                let socket = self.sockets.remove(&name).unwrap();
                self.connect(socket, &dial)
            }
            Request::Ask { name, line } => match ask(&self.streams[&name], &line) {
                Ok(line) => Answer::Said(line),
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Look { name } => Answer::Dialed(Box::new(look(&self.streams[&name]))),
            Request::Hang { name } => {
                self.streams.remove(&name);
                Answer::Done
            }
            Request::Burst(burst) => match burst::ask(&burst) {
                Ok(replies) => Answer::Replies(replies),
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Reverse { who, at, count } => match Reverser::open(&who, at, count) {
                Ok(reverser) => {
                    self.reversers.push(reverser);
                    Answer::Done
                }
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Unreverse => {
                self.reversers.clear();
                Answer::Done
            }
            Request::Listen(listen) => match Server::open(&listen) {
                Ok(server) => {
                    self.servers.push(server);
                    Answer::Done
                }
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Unlisten { who } => {
                self.servers.retain(|server| server.who != who);
                Answer::Done
            }
            Request::TrafficStart(dial) => {
                let stop = Arc::new(AtomicBool::new(false));
                let watched = Arc::clone(&stop);
                self.traffic = Some((stop, thread::spawn(move || flow(&dial, &watched))));
                Answer::Done
            }
            Request::TrafficStop => {
                let (stop, thread) = self.traffic.take().unwrap();
                stop.store(true, Ordering::Relaxed);
                Answer::Traffic(thread.join().unwrap())
            }
            Request::Churn { dial, count } => churn(&dial, count),
            Request::Crowd {
                to,
                addresses,
                count,
            } => self.crowd(to, addresses, count),
        }
    }

    fn connect(&mut self, socket: Socket, dial: &Dial) -> Answer {
        let (dialed, stream) = connect(socket, dial);
        if let (Some(name), Some(stream)) = (&dial.keep, stream) {
            self.streams.insert(name.clone(), stream);
        }
        Answer::Dialed(Box::new(dialed))
    }

    fn crowd(&mut self, to: SocketAddr, addresses: u32, count: u32) -> Answer {
        let IpAddr::V4(first) = to.ip() else {
            return Answer::Failed("EAFNOSUPPORT".to_owned());
        };
        let error = (0..count).find_map(|index| {
            let ip = first.to_bits() + index % addresses;
            let address = SocketAddr::new(std::net::Ipv4Addr::from_bits(ip).into(), to.port());
            let attempt = create(redirect_tests::protocol::Family::V4).and_then(|socket| {
                socket.connect(&address.into())?;
                self.crowd.push(socket);
                Ok(())
            });
            attempt.err()
        });
        Answer::Crowd {
            held: u32::try_from(self.crowd.len()).unwrap(),
            error: error.map(|error| errno_name(&error)),
        }
    }
}

fn look(stream: &TcpStream) -> Dialed {
    Dialed {
        local: stream.local_addr().ok(),
        peer: stream.peer_addr().ok(),
        original: Some(original_dst(stream, 16)),
        original6: Some(original_dst6(stream, 28)),
        ..Dialed::new()
    }
}

fn churn(dial: &Dial, count: u32) -> Answer {
    let mut traffic = Traffic::default();
    let mut times = Vec::new();
    for _ in 0..count {
        let socket = create(dial.family).unwrap();
        // Reset on close: no TIME_WAIT, so that the source ports do not run out.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        let begun = Instant::now();
        let (dialed, stream) = connect(socket, dial);
        times.push(u64::try_from(begun.elapsed().as_nanos()).unwrap());
        drop(stream);
        traffic.count(dialed.outcome());
    }
    let tenth = times.len().div_ceil(10);
    Answer::Churned {
        first: median(&mut times[..tenth].to_vec()),
        last: median(&mut times[(count as usize - tenth)..].to_vec()),
        traffic,
    }
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn flow(dial: &Dial, stop: &AtomicBool) -> Traffic {
    let mut traffic = Traffic::default();
    while !stop.load(Ordering::Relaxed) {
        let outcome = match create(dial.family) {
            Ok(socket) => {
                // Reset on close: no TIME_WAIT, so that the source ports do not run out.
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                connect(socket, dial).0.outcome().to_owned()
            }
            Err(error) => errno_name(&error),
        };
        traffic.count(&outcome);
    }
    traffic
}
