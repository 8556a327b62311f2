//! Running a program call by call, and killing it right after any call that changes something outside it.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// No traced run takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for the go-ahead, so that no call is made before the tracer is there.
const GATE: &str = "read -r go && exec \"$@\"";

/// What came of a traced run.
#[derive(Debug)]
pub struct Traced {
    /// The calls that change something outside the process, in order.
    pub calls: Vec<String>,
    /// The exit code, if it was not killed.
    pub code: Option<i32>,
    /// What it wrote to stderr.
    pub errors: String,
}

/// Runs `command` with all its threads traced. With `kill_after`, it gets SIGKILL when that many calls have been made.
///
/// Only variables that were set explicitly are passed on.
pub fn run(command: &Command, kill_after: Option<usize>) -> Traced {
    let mut child = start(command);
    let leader = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(leader, options).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();

    let (ended, watched) = channel::<()>();
    let watchdog = thread::spawn(move || {
        let late = watched.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        if late {
            let _already_gone = kill(leader, Signal::SIGKILL);
        }
        late
    });
    let (calls, code) = follow(leader, kill_after);
    // Reaped already, with its threads.
    let _no_child = child.wait();
    drop(ended);
    let late = watchdog.join().unwrap();
    let mut errors = String::new();
    // What the program writes fits a pipe's buffer.
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert!(!late, "{command:?} hangs after {calls:?}: {errors}");
    Traced {
        calls,
        code,
        errors,
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
        // The group tells its threads from the test's other children.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Lets the threads run from call to call until all have ended.
fn follow(leader: Pid, kill_after: Option<usize>) -> (Vec<String>, Option<i32>) {
    let group = Pid::from_raw(-leader.as_raw());
    let (mut calls, mut code) = (Vec::new(), None);
    let mut pending: BTreeMap<Pid, String> = BTreeMap::new();
    loop {
        let (thread, signal) = match waitpid(group, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                if let Some(call) = pending.remove(&thread) {
                    calls.push(call);
                    if kill_after == Some(calls.len()) {
                        let _already_gone = kill(leader, Signal::SIGKILL);
                    }
                } else if is_entry(thread)
                    && let Some(call) = lasting(thread)
                {
                    pending.insert(thread, call);
                }
                (thread, None)
            }
            Ok(WaitStatus::PtraceEvent(thread, _, _)) => (thread, None),
            Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
            Ok(WaitStatus::Exited(thread, status)) => {
                if thread == leader {
                    code = Some(status);
                }
                continue;
            }
            Ok(_) => continue,
            Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) => return (calls, code),
            Err(error) => panic!("waitpid: {error}"),
        };
        match ptrace::syscall(thread, signal) {
            // Killed meanwhile: waitpid tells.
            Ok(()) | Err(Errno::ESRCH) => (),
            Err(error) => panic!("ptrace: {error}"),
        }
    }
}

fn is_entry(thread: Pid) -> bool {
    // linux/ptrace.h
    const PTRACE_SYSCALL_INFO_ENTRY: u8 = 1;
    ptrace::syscall_info(thread).is_ok_and(|info| info.op == PTRACE_SYSCALL_INFO_ENTRY)
}

/// The name of the call that the thread is about to make, if what it does can outlast the process.
fn lasting(thread: Pid) -> Option<String> {
    // proc_pid_syscall(5): the number in decimal, then six arguments in hexadecimal.
    let text = fs::read_to_string(format!("/proc/{thread}/syscall")).ok()?;
    let mut words = text.split(' ');
    let number: libc::c_long = words.next()?.parse().ok()?;
    let arguments: Vec<u64> = words
        .map_while(|word| u64::from_str_radix(word.trim().strip_prefix("0x")?, 16).ok())
        .collect();
    let name = match number {
        libc::SYS_bpf => return bpf_command(*arguments.first()?),
        libc::SYS_openat if arguments.get(2)? & O_CREAT != 0 => "openat",
        libc::SYS_write if is_kernel_file(thread, *arguments.first()?) => "write",
        libc::SYS_mkdirat => "mkdirat",
        libc::SYS_renameat | libc::SYS_renameat2 => "rename",
        libc::SYS_unlinkat => "unlinkat",
        libc::SYS_linkat => "linkat",
        libc::SYS_mount | libc::SYS_umount2 => "mount",
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir => "mkdir",
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rename => "rename",
        #[cfg(target_arch = "x86_64")]
        libc::SYS_unlink => "unlink",
        #[cfg(target_arch = "x86_64")]
        libc::SYS_rmdir => "rmdir",
        #[cfg(target_arch = "x86_64")]
        libc::SYS_link => "link",
        _ => return None,
    };
    Some(name.to_owned())
}

const O_CREAT: u64 = libc::O_CREAT as u64;

/// Commands that only make an object, such as `BPF_PROG_LOAD`, are left out: until it is pinned or attached it goes with
/// its descriptor, so being killed there is the same as being killed after the call before.
fn bpf_command(command: u64) -> Option<String> {
    let name = match command {
        2 => "MAP_UPDATE_ELEM",
        3 => "MAP_DELETE_ELEM",
        6 => "OBJ_PIN",
        8 => "PROG_ATTACH",
        9 => "PROG_DETACH",
        21 => "MAP_LOOKUP_AND_DELETE_ELEM",
        26 => "MAP_UPDATE_BATCH",
        27 => "MAP_DELETE_BATCH",
        28 => "LINK_CREATE",
        29 => "LINK_UPDATE",
        34 => "LINK_DETACH",
        _ => return None,
    };
    Some(format!("bpf {name}"))
}

/// Whether a descriptor is a file of the kernel's: pins, cgroups, parameters.
fn is_kernel_file(thread: Pid, descriptor: u64) -> bool {
    fs::read_link(format!("/proc/{thread}/fd/{descriptor}"))
        .is_ok_and(|path| path.starts_with("/sys") || path.starts_with("/proc"))
}
