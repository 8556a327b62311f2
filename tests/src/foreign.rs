//! Somebody else's eBPF programs on the same hooks: a minimal socket load balancer, as Cilium's and Calico's, and one that
//! chooses sockets.
#![expect(
    unsafe_code,
    reason = "the foreign program must not come through the loader under test, so it is loaded with bare bpf(2) calls"
)]

use std::{
    fs::File,
    io::Error,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};

// linux/bpf.h
const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// Offset of `user_ip4` in `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;
/// Offset of `local_port` in `struct bpf_sk_lookup`.
const LOCAL_PORT: i16 = 60;

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
        let program = load(
            BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
            BPF_CGROUP_INET4_CONNECT,
            &program,
        );
        Self {
            _link: attach(&program, cgroup, BPF_CGROUP_INET4_CONNECT),
        }
    }
}

/// An attached program; detached with this value.
#[derive(Debug)]
pub struct SocketChooser {
    _link: OwnedFd,
}

impl SocketChooser {
    /// Connections to that port in the network namespace get `listener`, unless another program has chosen before.
    pub fn attach(netns: &Path, port: u16, listener: impl AsFd) -> Self {
        let sockets = bpf_fd(
            BPF_MAP_CREATE,
            &MapCreate {
                map_type: BPF_MAP_TYPE_SOCKMAP,
                key_size: 4,
                value_size: 4,
                max_entries: 1,
            },
        );
        let (key, value) = (0_u32, listener.as_fd().as_raw_fd());
        let update = MapUpdate {
            map_fd: sockets.as_raw_fd(),
            key: &raw const key as u64,
            value: &raw const value as u64,
            ..MapUpdate::default()
        };
        bpf(BPF_MAP_UPDATE_ELEM, &update);
        let program = [
            instruction(0xbf, 6, 1, 0, 0),            // r6 = ctx
            instruction(0x61, 2, 1, LOCAL_PORT, 0),   // w2 = ctx->local_port
            instruction(0x56, 2, 0, 14, port.into()), // if w2 != port go on to the end
            instruction(0x62, 10, 0, -4, 0),          // the key: 0
            instruction(0xbf, 2, 10, 0, 0),           // r2 = its address
            instruction(0x07, 2, 0, 0, -4),
            instruction(0x18, 1, BPF_PSEUDO_MAP_FD, 0, sockets.as_raw_fd()), // r1 = sockets
            instruction(0, 0, 0, 0, 0),
            instruction(0x85, 0, 0, 0, MAP_LOOKUP_ELEM),
            instruction(0x15, 0, 0, 7, 0), // if there is none go on to the end
            instruction(0xbf, 7, 0, 0, 0), // r7 = the socket
            instruction(0xbf, 1, 6, 0, 0), // choose it
            instruction(0xbf, 2, 7, 0, 0),
            instruction(0xb7, 3, 0, 0, 0),
            instruction(0x85, 0, 0, 0, SK_ASSIGN),
            instruction(0xbf, 1, 7, 0, 0), // and give it back
            instruction(0x85, 0, 0, 0, SK_RELEASE),
            instruction(0xb7, 0, 0, 0, 1), // r0 = SK_PASS
            instruction(0x95, 0, 0, 0, 0), // exit
        ];
        let program = load(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &program);
        Self {
            _link: attach(&program, netns, BPF_SK_LOOKUP),
        }
    }
}

fn load(prog_type: u32, expected_attach_type: u32, program: &[u64]) -> OwnedFd {
    let license = c"GPL";
    let load = ProgLoad {
        prog_type,
        insn_cnt: u32::try_from(program.len()).unwrap(),
        insns: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected_attach_type,
        ..ProgLoad::default()
    };
    bpf_fd(BPF_PROG_LOAD, &load)
}

fn attach(program: &OwnedFd, target: &Path, attach_type: u32) -> OwnedFd {
    let target = File::open(target).unwrap();
    let create = LinkCreate {
        prog_fd: program.as_raw_fd(),
        target_fd: target.as_raw_fd(),
        attach_type,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &create)
}

/// The part of `union bpf_attr` that `BPF_MAP_CREATE` reads.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The part of `union bpf_attr` that `BPF_MAP_UPDATE_ELEM` reads.
#[repr(C)]
#[derive(Default)]
struct MapUpdate {
    map_fd: RawFd,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
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
fn bpf_fd<T>(command: libc::c_long, attribute: &T) -> OwnedFd {
    let fd = bpf(command, attribute);
    // SAFETY: the commands used with this return a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn bpf<T>(command: libc::c_long, attribute: &T) -> RawFd {
    // SAFETY: the kernel reads size_of::<T>() bytes of the attribute, which is borrowed for the call, as are the buffers it points to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attribute,
            size_of::<T>(),
        )
    };
    assert!(result >= 0, "bpf({command}): {}", Error::last_os_error());
    RawFd::try_from(result).unwrap()
}
