//! Running a program call by call: it is killed right after any call that changes something outside it, the kernel seems to refuse
//! that call, or the program is held there while something else happens.

mod calls;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{RecvTimeoutError, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};

pub use self::calls::MAKING;
use crate::patience::patience;

/// No traced run takes longer, and none waits longer for what it is to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked at threads that are held.
const LOOK: Duration = Duration::from_millis(1);

/// Waits for the go-ahead, so that no call is made before the tracer is there.
const GATE: &str = "read -r go && exec \"$@\"";

/// What happens to a traced program.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// It gets SIGKILL when so many calls have been made.
    Kill {
        /// How many.
        after: usize,
    },
    /// That call, counted from 1, is not made: the program is told the error instead.
    Refuse {
        /// Which.
        call: usize,
        /// What the program is told.
        error: Errno,
    },
    /// That call, counted from 1, waits until [`Tracer::release`].
    Hold {
        /// Which.
        call: usize,
    },
}

/// What came of a traced run.
#[derive(Debug)]
pub struct Traced {
    /// Its process id.
    pub process: u32,
    /// The calls that make a kernel object or change something outside the process, in order.
    pub calls: Vec<String>,
    /// Whether what was to happen to it has happened.
    pub struck: bool,
    /// The exit code, if it was not killed.
    pub code: Option<i32>,
    /// What it wrote to stderr.
    pub errors: String,
}

/// Runs `command` with all its threads traced.
///
/// Only variables that were set explicitly are passed on.
pub fn run(command: &Command, fault: Option<Fault>) -> Traced {
    run_while(command, fault, || ())
}

/// The same, with something done while that call, counted from 1, waits.
pub fn run_held(command: &Command, call: usize, meanwhile: impl FnOnce()) -> Traced {
    run_while(command, Some(Fault::Hold { call }), meanwhile)
}

/// What is done `meanwhile` is done while the program is held; if it never is, not at all.
fn run_while(command: &Command, fault: Option<Fault>, meanwhile: impl FnOnce()) -> Traced {
    let progress = Progress::default();
    progress.lock().fault = fault;
    let (started, leader) = channel();
    thread::scope(|scope| {
        let (ended, end) = channel();
        let tracer = scope.spawn(|| {
            let (ended, started) = (ended, started);
            let mut child = start(command);
            let leader = pid_of(child.id());
            ptrace::seize(leader, OPTIONS).unwrap();
            started.send(leader).unwrap();
            child.stdin.take().unwrap().write_all(b"\n").unwrap();
            follow(leader, &progress);
            ended.send(()).unwrap();
            child.wait().unwrap();
            let mut errors = String::new();
            // What the program writes fits a pipe's buffer.
            let mut stderr = child.stderr.take().unwrap();
            stderr.read_to_string(&mut errors).unwrap();
            errors
        });
        let leader = leader.recv().unwrap();
        if let Some(Fault::Hold { .. }) = fault {
            while !progress.lock().struck && !tracer.is_finished() {
                thread::sleep(LOOK);
            }
            if progress.lock().struck {
                meanwhile();
                progress.lock().holds = false;
            }
        }
        let late = end.recv_timeout(patience(PATIENCE)) == Err(RecvTimeoutError::Timeout);
        if late {
            let _already_gone = kill(leader, Signal::SIGKILL);
        }
        let errors = tracer.join().unwrap();
        let made = progress.lock();
        assert!(!late, "{command:?} hangs after {:?}: {errors}", made.calls);
        Traced {
            process: leader.as_raw().cast_unsigned(),
            calls: made.calls.clone(),
            struck: made.struck,
            code: made.code,
            errors,
        }
    })
}

/// A program that runs already, and from now on with all its threads traced.
///
/// Until it has ended, nobody else may wait for it: a stop would be taken for its end.
#[derive(Debug)]
pub struct Tracer {
    progress: Arc<Progress>,
    thread: JoinHandle<()>,
}

impl Tracer {
    /// Calls count from now on, and nothing happens to them until [`Self::arm`].
    pub fn follow(process: u32) -> Self {
        let progress = Arc::new(Progress::default());
        let (begun, begin) = channel();
        let shared = progress.clone();
        let thread = thread::spawn(move || {
            let leader = pid_of(process);
            seize(leader);
            begun.send(()).unwrap();
            follow(leader, &shared);
        });
        begin.recv().unwrap();
        Self { progress, thread }
    }

    /// Calls count anew, and that is to happen to one of them.
    pub fn arm(&self, fault: Option<Fault>) {
        let mut made = self.progress.lock();
        made.calls.clear();
        (made.fault, made.struck) = (fault, false);
    }

    /// The calls that it has made so far.
    pub fn calls(&self) -> Vec<String> {
        self.progress.lock().calls.clone()
    }

    /// Whether what was to happen to it has happened.
    pub fn has_struck(&self) -> bool {
        self.progress.lock().struck
    }

    /// Lets no call begin from now on, apart from those that change nothing, and waits for those that have begun.
    pub fn hold(&self) {
        self.progress.lock().holds = true;
        let deadline = Instant::now() + PATIENCE;
        while self.progress.lock().under_way > 0 && !self.has_ended() {
            assert!(Instant::now() < deadline, "a call does not end");
            thread::sleep(LOOK);
        }
    }

    /// Lets it go on.
    pub fn release(&self) {
        self.progress.lock().holds = false;
    }

    /// Whether the program has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the program has ended, which it has been asked to.
    pub fn wait(&self) {
        let deadline = Instant::now() + patience(PATIENCE);
        while !self.has_ended() {
            assert!(Instant::now() < deadline, "a traced program does not end");
            thread::sleep(LOOK);
        }
    }
}

const OPTIONS: Options = Options::PTRACE_O_TRACESYSGOOD
    .union(Options::PTRACE_O_TRACECLONE)
    .union(Options::PTRACE_O_TRACEEXEC)
    .union(Options::PTRACE_O_EXITKILL);

fn pid_of(process: u32) -> Pid {
    Pid::from_raw(process.cast_signed())
}

/// Takes hold of all threads: none makes another call untraced.
fn seize(leader: Pid) {
    let mut seized = Vec::new();
    loop {
        let tasks = fs::read_dir(format!("/proc/{leader}/task")).unwrap();
        let names = tasks.map(|task| task.unwrap().file_name());
        let found: Vec<Pid> = names
            .map(|name| Pid::from_raw(name.to_str().unwrap().parse().unwrap()))
            .filter(|thread| !seized.contains(thread))
            .collect();
        if found.is_empty() {
            return;
        }
        for thread in found {
            // One that has been started by a thread of ours is seized already.
            if ptrace::seize(thread, OPTIONS).is_ok() {
                let _ended_just_now = ptrace::interrupt(thread);
            }
            seized.push(thread);
        }
    }
}

fn start(command: &Command) -> Child {
    let mut gated = Command::new("sh");
    gated.args(["-c", GATE, "sh"]).arg(command.get_program());
    gated.args(command.get_args()).env_clear();
    gated.envs(
        command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    gated
        // An interrupt from the keyboard is for the test.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// How far a program has come.
#[derive(Debug, Default)]
struct Progress(Mutex<Made>);

#[derive(Debug, Default)]
struct Made {
    fault: Option<Fault>,
    calls: Vec<String>,
    code: Option<i32>,
    struck: bool,
    holds: bool,
    /// Calls that have begun, and are not held.
    under_way: usize,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, Made> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that a thread has begun.
struct Begun {
    name: String,
    refused: Option<Errno>,
}

/// Lets the threads run from call to call until all have ended. The program itself is left to be waited for.
fn follow(leader: Pid, progress: &Progress) {
    let mut pending: BTreeMap<Pid, Begun> = BTreeMap::new();
    let mut held: Vec<Pid> = Vec::new();
    loop {
        if !held.is_empty() && !progress.lock().holds {
            progress.lock().under_way += held.len();
            held.drain(..).for_each(|thread| go_on(thread, None));
        }
        let stop = match wait(leader, held.is_empty(), progress) {
            Next::Stop(stop) => stop,
            Next::Nothing => {
                thread::sleep(LOOK);
                continue;
            }
            Next::End => return,
        };
        match stop {
            WaitStatus::PtraceSyscall(thread) => {
                let mut made = progress.lock();
                if let Some(begun) = pending.remove(&thread) {
                    if let Some(error) = begun.refused {
                        answer(thread, error);
                        made.struck = true;
                    }
                    made.calls.push(begun.name);
                    made.under_way = made.under_way.saturating_sub(1);
                    if let Some(Fault::Kill { after }) = made.fault
                        && after == made.calls.len()
                    {
                        made.struck = true;
                        let _already_gone = kill(leader, Signal::SIGKILL);
                    }
                } else if is_entry(thread)
                    && let Some(name) = calls::lasting(thread)
                {
                    let number = made.calls.len() + pending.len() + 1;
                    let mut refused = None;
                    match made.fault {
                        Some(Fault::Refuse { call, error }) if call == number => {
                            skip(thread);
                            refused = Some(error);
                        }
                        Some(Fault::Hold { call }) if call == number => {
                            (made.holds, made.struck) = (true, true);
                        }
                        _ => {}
                    }
                    pending.insert(thread, Begun { name, refused });
                    if made.holds {
                        held.push(thread);
                        continue;
                    }
                    made.under_way += 1;
                }
                drop(made);
                go_on(thread, None);
            }
            WaitStatus::PtraceEvent(thread, _, _) => go_on(thread, None),
            WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal)),
            _ => {}
        }
    }
}

fn go_on(thread: Pid, signal: Option<Signal>) {
    match ptrace::syscall(thread, signal) {
        // Killed meanwhile: the next wait tells.
        Ok(()) | Err(Errno::ESRCH) => (),
        Err(error) => panic!("ptrace: {error}"),
    }
}

enum Next {
    Stop(WaitStatus),
    Nothing,
    End,
}

/// The next stop of a thread, or end of one. The leader ends last.
fn wait(leader: Pid, blocks: bool, progress: &Progress) -> Next {
    // Other threads of this process have other children.
    let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    let mut look = ours | WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
    if !blocks {
        look |= WaitPidFlag::WNOHANG;
    }
    match waitid(Id::All, look) {
        Ok(WaitStatus::StillAlive) => Next::Nothing,
        Ok(WaitStatus::Exited(thread, code)) if thread == leader => {
            progress.lock().code = Some(code);
            Next::End
        }
        Ok(WaitStatus::Signaled(thread, ..)) if thread == leader => Next::End,
        Ok(seen) => match waitpid(seen.pid(), Some(ours)) {
            Ok(stop) => Next::Stop(stop),
            Err(Errno::ECHILD | Errno::EINTR) => Next::Nothing,
            Err(error) => panic!("waitpid: {error}"),
        },
        Err(Errno::EINTR) => Next::Nothing,
        Err(Errno::ECHILD) => Next::End,
        Err(error) => panic!("waitid: {error}"),
    }
}

fn is_entry(thread: Pid) -> bool {
    // linux/ptrace.h
    const PTRACE_SYSCALL_INFO_ENTRY: u8 = 1;
    ptrace::syscall_info(thread).is_ok_and(|info| info.op == PTRACE_SYSCALL_INFO_ENTRY)
}

/// Has the kernel make no call where the thread was about to make one.
fn skip(thread: Pid) {
    let mut registers = ptrace::getregs(thread).unwrap();
    registers.orig_rax = u64::MAX;
    ptrace::setregs(thread, registers).unwrap();
}

/// What the thread takes for the kernel's answer.
fn answer(thread: Pid, error: Errno) {
    let mut registers = ptrace::getregs(thread).unwrap();
    registers.rax = i64::from(-(error as i32)).cast_unsigned();
    ptrace::setregs(thread, registers).unwrap();
}
