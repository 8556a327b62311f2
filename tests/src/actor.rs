//! The test's end of an actor process.

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use crate::protocol::{
    Answer, Burst, Dial, Dialed, Family, Identity, Listen, Reply, Request, Start, Traffic,
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
        let mut child = Command::new(executable("actor"))
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

    /// Connects a socket made by [`Self::create`].
    pub fn connect(&mut self, name: &str, dial: &Dial) -> Dialed {
        let (name, dial) = (name.to_owned(), dial.clone());
        self.dialed(&Request::Connect { name, dial })
    }

    /// Sends a line on a kept connection and returns the echo, or the name of the error.
    pub fn ask(&mut self, name: &str, line: &str) -> Result<String, String> {
        let (name, line) = (name.to_owned(), line.to_owned());
        match self.request(&Request::Ask { name, line }) {
            Answer::Said(line) => Ok(line),
            Answer::Failed(error) => Err(error),
            other => panic!("{other:?}"),
        }
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
            .recv_timeout(PATIENCE)
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
