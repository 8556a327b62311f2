//! A process of one identity in one pod, which dials and listens as its test asks.
//!
//! Reads [`Start`] and then [`Request`]s from stdin, one JSON document a line, and answers each on stdout. Ends with its stdin.
#![allow(
    clippy::unwrap_used,
    reason = "the test that started this process reports its panic"
)]

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    io::{BufRead as _, Error, Read as _, Write as _, stdin, stdout},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixDatagram,
    },
    process::{Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::resource::{Resource, setrlimit},
    unistd::{Gid, Uid, getgroups, setgroups, setresgid, setresuid},
};
use redirect_tests::{
    burst::{self, Reverser},
    by_hand, datagram,
    dial::{self, ask, connect, create, half_close, look},
    parcel, pin,
    play::Player,
    protocol::{Answer, Dial, Dialed, Family, Identity, Request, Start, Traffic, Transport},
    raw::disconnect,
    server::Server,
    sockopt::errno_name,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities};
use socket2::Socket;

/// Enough for the largest crowd; below the usual `fs.nr_open`.
const DESCRIPTORS: u64 = 400_000;

/// First argument of a child process that dials on its stdin.
const ON_STDIN: &str = "on-stdin";
/// First argument of a child process that dials on a socket of its own.
const ON_ITS_OWN: &str = "on-its-own";

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, how, dial] = &arguments[..] {
        return child(how, &serde_json::from_str(dial).unwrap());
    }
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

fn child(how: &str, dial: &Dial) {
    let dialed = if how == ON_STDIN {
        let socket: OwnedFd = stdin().as_fd().try_clone_to_owned().unwrap();
        connect(&socket.into(), dial)
    } else {
        dial::dial(dial).0
    };
    say(&Answer::Dialed(Box::new(dialed)));
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
    post: Option<UnixDatagram>,
    servers: Vec<Server>,
    reversers: Vec<Reverser>,
    traffic: Option<(Arc<AtomicBool>, JoinHandle<Traffic>)>,
    crowd: Vec<Socket>,
    player: Player,
}

impl Actor {
    fn perform(&mut self, request: Request) -> Answer {
        match request {
            Request::Dial(dial) if dial.transport != Transport::Tcp => {
                Answer::Dialed(Box::new(datagram::exchange(&dial)))
            }
            Request::Dial(dial) => {
                let (dialed, socket) = dial::dial(&dial);
                if let (Some(name), Some(socket)) = (dial.keep, socket) {
                    self.sockets.insert(name, socket);
                }
                Answer::Dialed(Box::new(dialed))
            }
            Request::Create { name, family } => match create(family, false) {
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
            Request::OpenPin(path) => done(pin::open(&path)),
            Request::Connect { name, dial } => {
                Answer::Dialed(Box::new(connect(&self.sockets[&name], &dial)))
            }
            Request::Ask { name, line } => said(ask(&self.sockets[&name], &line)),
            Request::HalfClose { name, line } => said(half_close(&self.sockets[&name], &line)),
            Request::Look { name } => Answer::Dialed(Box::new(look(&self.sockets[&name]))),
            Request::Step { name, step } => said(by_hand::take(&mut self.sockets, &name, &step)),
            Request::Hang { name } => {
                self.sockets.remove(&name);
                Answer::Done
            }
            Request::Disconnect { name } => done(disconnect(&self.sockets[&name])),
            Request::Serve { name, who } => {
                let socket = self.sockets.remove(&name).unwrap();
                done(Server::on(socket, &who).map(|server| self.servers.push(server)))
            }
            Request::Spawn { name, dial } => self.spawn(name.as_deref(), &dial),
            Request::Sweep { to, addresses } => sweep(to, addresses),
            Request::Datagram { bind, to } => {
                let socket = UdpSocket::bind(bind).unwrap();
                match to.iter().try_for_each(|to| socket.connect(to)) {
                    Ok(()) => Answer::Dialed(Box::new(look(&socket.into()))),
                    Err(error) => Answer::Failed(errno_name(&error)),
                }
            }
            Request::Together(dials) => together(&dials),
            Request::Expect(place) => done(parcel::open(&place).map(|post| self.post = Some(post))),
            Request::Give { name, to } => done(parcel::give(&self.sockets[&name], &to)),
            Request::Take { name } => {
                let taken = parcel::take(self.post.as_ref().unwrap());
                done(taken.map(|socket| drop(self.sockets.insert(name, socket))))
            }
            Request::Burst(burst) => match burst::ask(&burst) {
                Ok(replies) => Answer::Replies(replies),
                Err(error) => Answer::Failed(errno_name(&error)),
            },
            Request::Reverse { who, at, count } => {
                done(Reverser::open(&who, at, count).map(|reverser| self.reversers.push(reverser)))
            }
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
            Request::Play(play) => Answer::Played(self.player.play(&play)),
            Request::AskHeld => Answer::Held(self.player.ask_held()),
            Request::Release(numbers) => {
                self.player.release(&numbers);
                Answer::Done
            }
            Request::Crowd {
                to,
                addresses,
                count,
            } => self.crowd(to, addresses, count),
        }
    }

    fn spawn(&self, name: Option<&str>, dial: &Dial) -> Answer {
        let mut child = Command::new("/proc/self/exe");
        match name {
            Some(name) => {
                let socket: OwnedFd = self.sockets[name].try_clone().unwrap().into();
                child.arg(ON_STDIN).stdin(Stdio::from(socket))
            }
            None => child.arg(ON_ITS_OWN).stdin(Stdio::null()),
        };
        let output = child.arg(serde_json::to_string(dial).unwrap()).output();
        serde_json::from_slice(&output.unwrap().stdout).unwrap()
    }

    fn crowd(&mut self, to: SocketAddr, addresses: u32, count: u32) -> Answer {
        let IpAddr::V4(first) = to.ip() else {
            return Answer::Failed("EAFNOSUPPORT".to_owned());
        };
        let error = (0..count).find_map(|index| {
            let ip = first.to_bits() + index % addresses;
            let address = SocketAddr::new(Ipv4Addr::from_bits(ip).into(), to.port());
            let attempt = create(Family::V4, false).and_then(|socket| {
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

fn done(result: Result<(), Error>) -> Answer {
    match result {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Failed(errno_name(&error)),
    }
}

fn said(result: Result<String, Error>) -> Answer {
    match result {
        Ok(line) => Answer::Said(line),
        Err(error) => Answer::Failed(errno_name(&error)),
    }
}

fn sweep(first: SocketAddr, addresses: u32) -> Answer {
    let IpAddr::V4(ip) = first.ip() else {
        return Answer::Failed("EAFNOSUPPORT".to_owned());
    };
    let all = (0..addresses).map(|index| {
        let ip = Ipv4Addr::from_bits(ip.to_bits() + index);
        SocketAddr::new(ip.into(), first.port())
    });
    let wrong = all.filter_map(|to| {
        let (dialed, _) = dial::dial(&Dial::new(Family::V4, to));
        let both = [
            &dialed.original,
            &dialed.greeting.as_ref().map(|g| g.original.clone()),
        ];
        let told = both.map(|probe| probe.as_ref().and_then(|probe| probe.address));
        (told != [Some(to); 2] || dialed.peer != Some(to)).then_some(dialed)
    });
    Answer::Several(wrong.collect())
}

fn together(dials: &[Dial]) -> Answer {
    let start = Barrier::new(dials.len());
    let dialed: Vec<Dialed> = thread::scope(|scope| {
        let threads: Vec<_> = dials
            .iter()
            .map(|dial| {
                scope.spawn(|| {
                    start.wait();
                    dial::dial(dial).0
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    Answer::Several(dialed)
}

fn churn(dial: &Dial, count: u32) -> Answer {
    let mut traffic = Traffic::default();
    for _ in 0..count {
        let socket = create(dial.family, dial.multipath).unwrap();
        // Reset on close: no TIME_WAIT, so that the source ports do not run out.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        let dialed = connect(&socket, dial);
        if dialed.error.is_some() {
            traffic.count(dialed.outcome());
            continue;
        }
        match (&socket).read(&mut [0]) {
            Ok(0) => traffic.count("closed"),
            Ok(_) => traffic.count("data"),
            Err(error) => traffic.count(&errno_name(&error)),
        }
    }
    Answer::Traffic(traffic)
}

fn flow(dial: &Dial, stop: &AtomicBool) -> Traffic {
    let mut traffic = Traffic::default();
    while !stop.load(Ordering::Relaxed) {
        let outcome = match create(dial.family, dial.multipath) {
            Ok(socket) => {
                // Reset on close: no TIME_WAIT, so that the source ports do not run out.
                socket.set_linger(Some(Duration::ZERO)).unwrap();
                connect(&socket, dial).outcome().to_owned()
            }
            Err(error) => errno_name(&error),
        };
        traffic.count(&outcome);
    }
    traffic
}
