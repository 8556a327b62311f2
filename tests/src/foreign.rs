//! Somebody else's eBPF program on the same hook: a minimal socket load balancer, as Cilium's and Calico's.
#![expect(
    unsafe_code,
    reason = "the foreign program must not come through the loader under test, so it is loaded with bare bpf(2) calls"
)]

use std::{
    fs::File,
    io::Error,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
/// Offset of `user_ip4` in `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;

/// An attached program; detached with this value.
#[derive(Debug)]
pub struct LoadBalancer {
    _link: OwnedFd,
}

impl LoadBalancer {
    /// Connections of the cgroup to `service` go to `backend` instead.
    pub fn attach(cgroup: &Path, service: Ipv4Addr, backend: Ipv4Addr) -> Self {
        let word = |ip: Ipv4Addr| i32::from_ne_bytes(ip.octets());
        let program = [
            instruction(0x61, 2, 1, USER_IP4, 0),      // w2 = ctx->user_ip4
            instruction(0x56, 2, 0, 2, word(service)), // if w2 != service skip two
            instruction(0xb4, 3, 0, 0, word(backend)), // w3 = backend
            instruction(0x63, 1, 3, USER_IP4, 0),      // ctx->user_ip4 = w3
            instruction(0xb7, 0, 0, 0, 1),             // r0 = 1: go on
            instruction(0x95, 0, 0, 0, 0),             // exit
        ];
        let license = c"GPL";
        let load = ProgLoad {
            prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
            insn_cnt: u32::try_from(program.len()).unwrap(),
            insns: program.as_ptr() as u64,
            license: license.as_ptr() as u64,
            expected_attach_type: BPF_CGROUP_INET4_CONNECT,
            ..ProgLoad::default()
        };
        let program = bpf(BPF_PROG_LOAD, &load);
        let cgroup = File::open(cgroup).unwrap();
        let create = LinkCreate {
            prog_fd: program.as_raw_fd(),
            target_fd: cgroup.as_raw_fd(),
            attach_type: BPF_CGROUP_INET4_CONNECT,
            flags: 0,
        };
        Self {
            _link: bpf(BPF_LINK_CREATE, &create),
        }
    }
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` that `BPF_LINK_CREATE` reads.
#[repr(C)]
struct LinkCreate {
    prog_fd: RawFd,
    target_fd: RawFd,
    attach_type: u32,
    flags: u32,
}

/// `struct bpf_insn`, as the eight bytes it is.
fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let [low, high] = offset.to_ne_bytes();
    let [a, b, c, d] = immediate.to_ne_bytes();
    u64::from_ne_bytes([code, from << 4 | to, low, high, a, b, c, d])
}

/// A `bpf(2)` command that answers with a descriptor.
fn bpf<T>(command: libc::c_long, attribute: &T) -> OwnedFd {
    // SAFETY: the kernel reads size_of::<T>() bytes of the attribute, which is borrowed for the call, as are the buffers it points to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attribute,
            size_of::<T>(),
        )
    };
    let fd = RawFd::try_from(result).unwrap();
    assert!(fd >= 0, "bpf({command}): {}", Error::last_os_error());
    // SAFETY: both commands used here return a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
