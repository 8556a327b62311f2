//! Very many connections of one process: what each is asked to do, and what came of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Error, ErrorKind},
    net::{Shutdown, SocketAddr},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use nix::errno::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use crate::{
    dial::{ask, connect, create, half_close, look, prepare, spell},
    protocol::{Dial, Dialed, Probe, canonical},
    sockopt::errno_name,
};

/// What is done with a connection once its server has greeted.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Then {
    /// Close it.
    Close,
    /// Reset it.
    Reset,
    /// Say something, stop sending, read to the end.
    HalfClose,
    /// Not even wait until it is there: reset it after connect(2) has begun.
    Abandon,
    /// Say so many lines, with so many milliseconds before each, and look at both ends each time.
    Converse {
        /// How many.
        lines: u32,
        /// Milliseconds.
        pause_ms: u64,
    },
    /// Leave it open, under this number.
    Hold(u32),
}

/// One connection.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Call {
    /// How it is made.
    pub dial: Dial,
    /// What is done with it.
    pub then: Then,
}

/// Calls that are made in turn.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Part {
    /// The calls. With several callers, the first one makes the first call, and so on.
    pub calls: Vec<Call>,
    /// How many call at the same time.
    pub callers: usize,
    /// For how long the calls are made again from the beginning, in milliseconds; `None`: each is made once.
    pub for_ms: Option<u64>,
    /// How long each caller rests after a call, in microseconds.
    pub rest_us: u64,
}

/// Calls that are made at the same time.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Play {
    /// All begin together.
    pub parts: Vec<Part>,
}

/// What came of one call.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Played {
    /// Which part, and which of its calls.
    pub call: (usize, usize),
    /// Before connect(2), on the machine's monotonic clock, in nanoseconds.
    pub began: u64,
    /// When both ends had been looked at.
    pub greeted: u64,
    /// When it was closed, or left open.
    pub ended: u64,
    /// What was seen of it at first.
    pub dialed: Dialed,
    /// What ended it afterwards, and what it looked like then if that had changed.
    pub afterwards: Result<(), String>,
}

/// What a connection that is held says, or the error that has ended it. Such a one is held no longer.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Held {
    /// Its number.
    pub number: u32,
    /// The client's peer, and the server's `SO_ORIGINAL_DST` in the connection's family.
    pub says: Result<Ends, String>,
}

/// What both ends tell of a connection's destination.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Ends {
    /// `getpeername` of the client.
    pub peer: Option<SocketAddr>,
    /// `SO_ORIGINAL_DST` of the server.
    pub original: Option<SocketAddr>,
}

impl Ends {
    /// As seen when the connection was made.
    pub fn of(dialed: &Dialed) -> Self {
        let ipv4 = dialed.peer.is_some_and(|peer| canonical(peer).is_ipv4());
        let greeting = dialed.greeting.as_ref();
        let original = greeting.and_then(|greeting| {
            let probe = if ipv4 {
                &greeting.original
            } else {
                &greeting.original6
            };
            probe.address
        });
        Self {
            peer: dialed.peer,
            original,
        }
    }

    fn ask(socket: &Socket) -> Result<Self, String> {
        let error = |error: Error| errno_name(&error);
        let text = ask(socket, "probe 28").map_err(error)?;
        let probes: (Probe, Probe) =
            serde_json::from_str(&text).map_err(|wrong| format!("{wrong}: {text}"))?;
        let peer = socket.peer_addr().map_err(error)?.as_socket();
        let ipv4 = peer.is_some_and(|peer| canonical(peer).is_ipv4());
        let probe = if ipv4 { probes.0 } else { probes.1 };
        Ok(Self {
            peer,
            original: probe.address,
        })
    }
}

/// The machine's monotonic clock, in nanoseconds.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// Makes calls, and holds some of their connections.
#[derive(Default)]
pub struct Player {
    held: BTreeMap<u32, Socket>,
}

impl Player {
    /// Makes all calls, and waits until the last one has ended.
    pub fn play(&mut self, play: &Play) -> Vec<Played> {
        let begun = now();
        let (held, played) = (Mutex::new(&mut self.held), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for (part, index) in play.parts.iter().zip(0..) {
                let (held, played) = (&held, &played);
                for caller in 0..part.callers {
                    scope.spawn(move || {
                        let mut hold = |number, socket| {
                            let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
                            held.insert(number, socket);
                        };
                        let mine = part.calls.iter().enumerate().skip(caller);
                        let mine = mine.step_by(part.callers);
                        let mut made = Vec::new();
                        match part.for_ms {
                            None => made.extend(
                                mine.map(|(nth, call)| perform((index, nth), call, &mut hold)),
                            ),
                            Some(limit) => {
                                let until = begun + limit * 1_000_000;
                                for (nth, call) in mine.cycle().take_while(|_| now() < until) {
                                    made.push(perform((index, nth), call, &mut hold));
                                    thread::sleep(Duration::from_micros(part.rest_us));
                                }
                            }
                        }
                        let mut played = played.lock().unwrap_or_else(PoisonError::into_inner);
                        played.append(&mut made);
                    });
                }
            }
        });
        played.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every server speak whose connection is held.
    pub fn ask_held(&mut self) -> Vec<Held> {
        let ask = |(number, socket): (&u32, &Socket)| Held {
            number: *number,
            says: Ends::ask(socket),
        };
        let answers: Vec<Held> = self.held.iter().map(ask).collect();
        for held in answers.iter().filter(|held| held.says.is_err()) {
            self.held.remove(&held.number);
        }
        answers
    }

    /// Closes those of these numbers.
    pub fn release(&mut self, numbers: &BTreeSet<u32>) {
        self.held.retain(|number, _| !numbers.contains(number));
    }
}

fn perform(nth: (usize, usize), call: &Call, hold: &mut dyn FnMut(u32, Socket)) -> Played {
    let began = now();
    let failed = |error: &Error| Played {
        call: nth,
        began,
        greeted: now(),
        ended: now(),
        dialed: Dialed::failed(error),
        afterwards: Ok(()),
    };
    let socket = match create(call.dial.family, call.dial.multipath) {
        Ok(socket) => socket,
        Err(error) => return failed(&error),
    };
    if call.then == Then::Abandon {
        return match abandon(&socket, &call.dial) {
            Ok(()) => Played {
                dialed: Dialed::new(),
                ..failed(&ErrorKind::Other.into())
            },
            Err(error) => failed(&error),
        };
    }
    let dialed = connect(&socket, &call.dial);
    let greeted = now();
    let mut afterwards = Ok(());
    if dialed.error.is_none() {
        afterwards = go_on(&socket, call.then, &dialed);
        if let (Then::Hold(number), Ok(())) = (call.then, &afterwards) {
            hold(number, socket);
        }
    }
    Played {
        call: nth,
        began,
        greeted,
        ended: now(),
        dialed,
        afterwards,
    }
}

fn abandon(socket: &Socket, dial: &Dial) -> Result<(), Error> {
    prepare(socket, dial)?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_nonblocking(true)?;
    match socket.connect(&spell(dial.family, dial.to).into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(()),
    }
}

fn go_on(socket: &Socket, then: Then, dialed: &Dialed) -> Result<(), String> {
    const LINE: &str = "hello";
    let error = |error: Error| errno_name(&error);
    match then {
        Then::Close | Then::Abandon | Then::Hold(_) => Ok(()),
        Then::Reset => socket.set_linger(Some(Duration::ZERO)).map_err(error),
        Then::HalfClose => match half_close(socket, LINE).map_err(error)? {
            echo if echo == LINE => Ok(()),
            // A server that is killed before it reads ends the connection as if all were well.
            echo if echo.is_empty() => Err(error(ErrorKind::UnexpectedEof.into())),
            other => Err(format!("{LINE:?} came back as {other:?}")),
        },
        Then::Converse { lines, pause_ms } => {
            for _ in 0..lines {
                thread::sleep(Duration::from_millis(pause_ms));
                let (was, is) = (Ends::of(dialed), Ends::ask(socket)?);
                if is != was {
                    return Err(format!("{CHANGED}{was:?} became {is:?}"));
                }
                let local = look(socket).local;
                if local != dialed.local {
                    return Err(format!("its own address became {local:?}"));
                }
            }
            // In order, so that neither end sends to one that has gone.
            drop(socket.shutdown(Shutdown::Write));
            Ok(())
        }
    }
}

/// How [`Played::afterwards`] begins if what the ends tell has changed.
pub const CHANGED: &str = "changed: ";
