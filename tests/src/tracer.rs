//! Running a program call by call: it is killed right after any call that changes something outside it, or the kernel seems to
//! refuse that call.

use std::{
    collections::BTreeMap,
    fs,
    io::{IoSliceMut, Read as _, Write as _},
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
        uio::{RemoteIoVec, process_vm_readv},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::patience::patience;

/// No traced run takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

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
}

/// What came of a traced run.
#[derive(Debug)]
pub struct Traced {
    /// The calls that make a kernel object or change something outside the process, in order.
    pub calls: Vec<String>,
    /// The exit code, if it was not killed.
    pub code: Option<i32>,
    /// What it wrote to stderr.
    pub errors: String,
}

/// Runs `command` with all its threads traced.
///
/// Only variables that were set explicitly are passed on.
pub fn run(command: &Command, fault: Option<Fault>) -> Traced {
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
        let late = watched.recv_timeout(patience(PATIENCE)) == Err(RecvTimeoutError::Timeout);
        if late {
            let _already_gone = kill(leader, Signal::SIGKILL);
        }
        late
    });
    let (calls, code) = follow(leader, fault);
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

/// A call that a thread has begun.
struct Begun {
    name: String,
    refused: Option<Errno>,
}

/// Lets the threads run from call to call until all have ended.
fn follow(leader: Pid, fault: Option<Fault>) -> (Vec<String>, Option<i32>) {
    let group = Pid::from_raw(-leader.as_raw());
    let (mut calls, mut code) = (Vec::new(), None);
    let mut pending: BTreeMap<Pid, Begun> = BTreeMap::new();
    loop {
        let (thread, signal) = match waitpid(group, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                if let Some(begun) = pending.remove(&thread) {
                    if let Some(error) = begun.refused {
                        answer(thread, error);
                    }
                    calls.push(begun.name);
                    if let Some(Fault::Kill { after }) = fault
                        && after == calls.len()
                    {
                        let _already_gone = kill(leader, Signal::SIGKILL);
                    }
                } else if is_entry(thread)
                    && let Some(name) = lasting(thread)
                {
                    let number = calls.len() + pending.len() + 1;
                    let refused = match fault {
                        Some(Fault::Refuse { call, error }) if call == number => Some(error),
                        _ => None,
                    };
                    if refused.is_some() {
                        skip(thread);
                    }
                    pending.insert(thread, Begun { name, refused });
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

/// The name of the call that the thread is about to make, if it makes a kernel object or what it does can outlast the process.
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
        libc::SYS_sendto if changes_network(thread, &arguments) => "netlink",
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

/// Calls that only make an object: until it is pinned or attached it goes with its descriptor.
pub const MAKING: [&str; 4] = [
    "bpf MAP_CREATE",
    "bpf PROG_LOAD",
    "bpf BTF_LOAD",
    "bpf OBJ_GET",
];

fn bpf_command(command: u64) -> Option<String> {
    let name = match command {
        0 => "MAP_CREATE",
        2 => "MAP_UPDATE_ELEM",
        3 => "MAP_DELETE_ELEM",
        5 => "PROG_LOAD",
        6 => "OBJ_PIN",
        7 => "OBJ_GET",
        8 => "PROG_ATTACH",
        9 => "PROG_DETACH",
        18 => "BTF_LOAD",
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

/// Whether `sendto` is a request to netlink that changes something.
fn changes_network(thread: Pid, arguments: &[u64]) -> bool {
    // linux/netlink.h: struct nlmsghdr has a 32-bit length, then the type. linux/rtnetlink.h: kinds of four, the third reads.
    const LENGTH: usize = 6;
    const GET: u16 = 2;
    const RTM_BASE: u16 = 16;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let &[descriptor, buffer, length, ..] = arguments else {
        return false;
    };
    let is_netlink = fs::read_link(format!("/proc/{thread}/fd/{descriptor}"))
        .ok()
        .and_then(|path| {
            let inode = path.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            let table = fs::read_to_string(format!("/proc/{thread}/net/netlink")).ok()?;
            Some(table.lines().any(|line| line.ends_with(inode)))
        });
    if is_netlink != Some(true) || length < LENGTH as u64 {
        return false;
    }
    let mut header = [0; LENGTH];
    let remote = RemoteIoVec {
        base: usize::try_from(buffer).unwrap(),
        len: LENGTH,
    };
    process_vm_readv(thread, &mut [IoSliceMut::new(&mut header)], &[remote]).unwrap();
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    kind >= RTM_BASE && kind % 4 != GET && kind != SOCK_DIAG_BY_FAMILY
}
