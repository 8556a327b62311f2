//! The test's end of an actor process.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use crate::{
    patience::patience,
    protocol::{
        Answer, Burst, Dial, Dialed, Family, Identity, Listen, Reply, Request, Start, Step, Traffic,
    },
    scene::wildcards,
};

/// No single request takes longer; the largest crowd is by far the slowest.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that dials and listens on request, and dies with this value.
#[derive(Debug)]
pub struct Actor {
    identity: Identity,
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Actor {
    /// Starts one in a namespace and, maybe, a cgroup.
    pub fn start(netns: &Path, cgroup: Option<PathBuf>, identity: Identity) -> Self {
        Self::start_as(Start {
            cgroup,
            netns: netns.to_owned(),
            net_admin: false,
            identity,
        })
    }

    /// Starts one.
    pub fn start_as(start: Start) -> Self {
        Self::start_by(&mut Command::new(executable("actor")), start)
    }

    /// Starts one by a command that ends in running the actor's program.
    pub fn start_by(command: &mut Command, start: Start) -> Self {
        let mut child = command
            // An interrupt from the keyboard is for the test, which then ends its actors.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut actor = Self {
            identity: start.identity.clone(),
            child,
            stdin,
            answers,
        };
        actor.send(&serde_json::to_string(&start).unwrap());
        actor.receive();
        actor
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it come to its end, and waits for what it was started by.
    pub fn end(mut self) -> ExitStatus {
        drop(self.stdin.take());
        let deadline = Instant::now() + patience(PATIENCE);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the actor does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks for something.
    pub fn request(&mut self, request: &Request) -> Answer {
        self.order(request);
        self.receive()
    }

    /// Asks for something without waiting; [`Self::receive`] has to follow.
    pub fn order(&mut self, request: &Request) {
        self.send(&serde_json::to_string(request).unwrap());
    }

    /// Makes a connection.
    pub fn dial(&mut self, dial: &Dial) -> Dialed {
        self.dialed(&Request::Dial(dial.clone()))
    }

    /// Asks questions over UDP; the error is the name of the errno that ended it.
    pub fn burst(&mut self, burst: &Burst) -> Result<Vec<Reply>, String> {
        match self.request(&Request::Burst(burst.clone())) {
            Answer::Replies(replies) => Ok(replies),
            Answer::Failed(error) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    /// Opens a UDP server that answers `count` questions in the reverse order.
    pub fn reverse(&mut self, who: &str, at: SocketAddr, count: usize) {
        let who = who.to_owned();
        self.done(&Request::Reverse { who, at, count });
    }

    /// Closes the servers that [`Self::reverse`] opened.
    pub fn unreverse(&mut self) {
        self.done(&Request::Unreverse);
    }

    /// Opens a listener.
    pub fn listen(&mut self, listen: Listen) {
        self.done(&Request::Listen(listen));
    }

    /// Closes the listeners of that name.
    pub fn unlisten(&mut self, who: &str) {
        self.done(&Request::Unlisten {
            who: who.to_owned(),
        });
    }

    /// Creates a socket for later.
    pub fn create(&mut self, name: &str, family: Family) {
        let name = name.to_owned();
        self.done(&Request::Create { name, family });
    }

    /// Takes another identity.
    pub fn assume(&mut self, identity: &Identity) {
        self.done(&Request::Assume(identity.clone()));
    }

    /// Opens a pinned eBPF object; the name of the error if it may not.
    pub fn open_pin(&mut self, path: &Path) -> Result<(), String> {
        match self.request(&Request::OpenPin(path.to_owned())) {
            Answer::Done => Ok(()),
            Answer::Failed(error) => Err(error),
            other => panic!("{:?}: {other:?}", self.identity),
        }
    }

    /// Connects a socket made by [`Self::create`], or kept after a connection. It is kept.
    pub fn connect(&mut self, name: &str, dial: &Dial) -> Dialed {
        let (name, dial) = (name.to_owned(), dial.clone());
        self.dialed(&Request::Connect { name, dial })
    }

    /// Dissolves a connection and keeps the socket.
    pub fn disconnect(&mut self, name: &str) {
        self.done(&Request::Disconnect {
            name: name.to_owned(),
        });
    }

    /// Listens on a socket made before.
    pub fn serve(&mut self, name: &str, who: &str) {
        let (name, who) = (name.to_owned(), who.to_owned());
        self.done(&Request::Serve { name, who });
    }

    /// Makes a connection in a child process, on a socket it inherits or on its own.
    pub fn spawn(&mut self, name: Option<&str>, dial: &Dial) -> Dialed {
        let (name, dial) = (name.map(str::to_owned), dial.clone());
        self.dialed(&Request::Spawn { name, dial })
    }

    /// Connects to consecutive addresses and returns what went wrong.
    pub fn sweep(&mut self, to: SocketAddr, addresses: u32) -> Vec<Dialed> {
        match self.request(&Request::Sweep { to, addresses }) {
            Answer::Several(wrong) => wrong,
            other => panic!("{other:?}"),
        }
    }

    /// Connects a UDP socket and looks at it.
    pub fn datagram(&mut self, to: SocketAddr) -> Dialed {
        self.datagrams(wildcards(0)[usize::from(to.is_ipv6())], &[to])
    }

    /// Connects a UDP socket bound to `bind` to one destination after another, and looks at it.
    pub fn datagrams(&mut self, bind: SocketAddr, to: &[SocketAddr]) -> Dialed {
        let to = to.to_vec();
        self.dialed(&Request::Datagram { bind, to })
    }

    /// Makes connections at the same time.
    pub fn together(&mut self, dials: Vec<Dial>) -> Vec<Dialed> {
        match self.request(&Request::Together(dials)) {
            Answer::Several(dialed) => dialed,
            other => panic!("{other:?}"),
        }
    }

    /// Hands a copy of a socket to another process.
    pub fn give(&mut self, name: &str, other: &mut Self) {
        let place = env::temp_dir().join(format!("redirect-{}", other.pid()));
        let name = name.to_owned();
        other.done(&Request::Expect(place.clone()));
        self.done(&Request::Give {
            name: name.clone(),
            to: place.clone(),
        });
        other.done(&Request::Take { name });
        std::fs::remove_file(place).unwrap();
    }

    /// Sends a line, stops sending, and returns all that comes.
    pub fn half_close(&mut self, name: &str, line: &str) -> Result<String, String> {
        let (name, line) = (name.to_owned(), line.to_owned());
        self.said(&Request::HalfClose { name, line })
    }

    /// Sends a line on a kept connection and returns the echo, or the name of the error.
    pub fn ask(&mut self, name: &str, line: &str) -> Result<String, String> {
        let (name, line) = (name.to_owned(), line.to_owned());
        self.said(&Request::Ask { name, line })
    }

    /// Takes one step with a kept socket and returns what came of it, or the name of the error.
    pub fn step(&mut self, name: &str, step: Step) -> Result<String, String> {
        let name = name.to_owned();
        self.said(&Request::Step { name, step })
    }

    /// Looks at a kept connection again.
    pub fn look(&mut self, name: &str) -> Dialed {
        self.dialed(&Request::Look {
            name: name.to_owned(),
        })
    }

    /// Closes a kept connection.
    pub fn hang(&mut self, name: &str) {
        self.done(&Request::Hang {
            name: name.to_owned(),
        });
    }

    /// Dials again and again, until [`Self::traffic_stop`].
    pub fn traffic_start(&mut self, dial: Dial) {
        self.done(&Request::TrafficStart(dial));
    }

    /// Stops dialling.
    pub fn traffic_stop(&mut self) -> Traffic {
        match self.request(&Request::TrafficStop) {
            Answer::Traffic(traffic) => traffic,
            other => panic!("{other:?}"),
        }
    }

    fn dialed(&mut self, request: &Request) -> Dialed {
        match self.request(request) {
            Answer::Dialed(dialed) => *dialed,
            other => panic!("{:?}: {request:?}: {other:?}", self.identity),
        }
    }

    fn said(&mut self, request: &Request) -> Result<String, String> {
        match self.request(request) {
            Answer::Said(text) => Ok(text),
            Answer::Failed(error) => Err(error),
            other => panic!("{:?}: {request:?}: {other:?}", self.identity),
        }
    }

    fn done(&mut self, request: &Request) {
        match self.request(request) {
            Answer::Done => (),
            other => panic!("{:?}: {request:?}: {other:?}", self.identity),
        }
    }

    fn send(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for the answer to [`Self::order`].
    pub fn receive(&self) -> Answer {
        let line = self
            .answers
            .recv_timeout(patience(PATIENCE))
            .expect("the actor is gone or hangs");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A program of this workspace, next to the running test: `target/<profile>/deps/test` → `target/<profile>/name`.
pub fn executable(name: &str) -> PathBuf {
    let test = env::current_exe().unwrap();
    let profile = test.ancestors().find(|path| path.join(name).is_file());
    profile
        .unwrap_or_else(|| {
            panic!(
                "no `{name}` above {}: run `cargo build` first",
                test.display()
            )
        })
        .join(name)
}
