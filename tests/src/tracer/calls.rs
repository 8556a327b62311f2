//! Which calls to the kernel change something outside the process.

use std::{fs, io::IoSliceMut};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use rustix::fs::getxattr;

/// The name of the call that the thread is about to make, if it makes a kernel object or what it does can outlast the process.
pub(super) fn lasting(thread: Pid) -> Option<String> {
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
    // A socket that has not sent anything yet may be missing in /proc/net/netlink.
    let mut protocol = [0; 16];
    let socket = format!("/proc/{thread}/fd/{descriptor}");
    let named = getxattr(socket, "system.sockprotoname", &mut protocol).unwrap_or(0);
    let is_netlink = protocol[..named].starts_with(b"NETLINK");
    if !is_netlink || length < LENGTH as u64 {
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
