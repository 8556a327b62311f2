//! The eBPF programs: loaded once per build of redirect, pinned, and shared by all pods.

mod entry;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use aya_obj::generated::bpf_attach_type;

use crate::kernel::{self, Offsets};
use crate::pins::Pins;
use crate::sys::bpf;
use crate::tables;

/// The object that the build script made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect-ebpf"));

/// What a program hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The cgroup whose connections are captured.
    Client,
    /// The cgroup of the proxy: the same, or an ancestor of it.
    Proxy,
    /// The cgroup of the proxy if it is another one: the program of the client side does this too.
    ProxyElsewhere,
}

/// When a hook is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// In every pod.
    Always,
    /// Where DNS is captured. With such a program anywhere, the kernel locks the socket for every
    /// datagram of the machine.
    Dns,
}

/// A cgroup hook.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// Name of the link's pin.
    pub name: &'static str,
    /// Name of the program in the object.
    pub program: &'static str,
    /// Where it is attached.
    pub side: Side,
    /// When it is attached. Once there it stays until the pod is detached.
    pub need: Need,
    /// The kernel's name of the hook.
    pub attach_type: bpf_attach_type,
}

/// The cgroup hooks, in the order in which they are attached: `connect` comes last, when all that
/// it relies on is there.
pub const HOOKS: &[Hook] = &[
    hook(
        "sockops",
        "redirect_sockops",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    ),
    hook(
        "getsockopt",
        "redirect_getsockopt",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_GETSOCKOPT,
    ),
    hook(
        "getsockname4",
        "redirect_getsockname4",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME,
    ),
    hook(
        "getsockname6",
        "redirect_getsockname6",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME,
    ),
    hook(
        "getpeername4",
        "redirect_getpeername4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    ),
    hook(
        "getpeername6",
        "redirect_getpeername6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    ),
    dns_hook(
        "recvmsg4",
        "redirect_recvmsg4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
    ),
    dns_hook(
        "recvmsg6",
        "redirect_recvmsg6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
    ),
    dns_hook(
        "answer4",
        "redirect_answer4",
        Side::ProxyElsewhere,
        bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    ),
    dns_hook(
        "answer6",
        "redirect_answer6",
        Side::ProxyElsewhere,
        bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    ),
    dns_hook(
        "sendmsg4",
        "redirect_sendmsg4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    ),
    dns_hook(
        "sendmsg6",
        "redirect_sendmsg6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    ),
    dns_hook(
        "dns_connect4",
        "redirect_dns_connect4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    ),
    dns_hook(
        "dns_connect6",
        "redirect_dns_connect6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    ),
    hook(
        "connect4",
        "redirect_connect4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    ),
    hook(
        "connect6",
        "redirect_connect6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    ),
];

/// Name of the pin of a pod's `sk_lookup` link.
pub const SK_LOOKUP: &str = "sk_lookup";

/// A program for whose type no helper tells the network namespace. Every pod has an entry of its own
/// to it, of a few instructions, that knows the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// Steers connections to listeners.
    SkLookup,
    /// Translates packets to virtual machines.
    MachineEgress,
    /// Translates packets of virtual machines.
    MachineIngress,
}

impl Entered {
    const ALL: [Self; 3] = [Self::SkLookup, Self::MachineEgress, Self::MachineIngress];

    /// Name of the program in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::SkLookup => "redirect_sk_lookup",
            Self::MachineEgress => "redirect_machine_egress",
            Self::MachineIngress => "redirect_machine_ingress",
        }
    }

    /// Pin of the one-entry program array through which the pods' entries reach the program.
    fn jump(self) -> String {
        format!("{}_jump", self.program())
    }

    fn load(self, entry: &[bpf::Instruction]) -> io::Result<OwnedFd> {
        match self {
            Self::SkLookup => bpf::load_sk_lookup(entry),
            Self::MachineEgress | Self::MachineIngress => bpf::load_tc(entry),
        }
    }

    /// Lets alone whatever the program is about.
    const fn pass(self) -> i32 {
        match self {
            // SK_PASS
            Self::SkLookup => 1,
            // TC_ACT_UNSPEC: other filters have their say.
            Self::MachineEgress | Self::MachineIngress => -1,
        }
    }
}

const fn hook(
    name: &'static str,
    program: &'static str,
    side: Side,
    attach_type: bpf_attach_type,
) -> Hook {
    Hook {
        name,
        program,
        side,
        need: Need::Always,
        attach_type,
    }
}

const fn dns_hook(
    name: &'static str,
    program: &'static str,
    side: Side,
    attach_type: bpf_attach_type,
) -> Hook {
    Hook {
        need: Need::Dns,
        ..hook(name, program, side, attach_type)
    }
}

/// The shared programs of this build.
#[derive(Debug)]
pub struct Programs {
    fds: Vec<OwnedFd>,
    jumps: Vec<OwnedFd>,
}

/// Names this build's programs: a hash of the object, from the build script.
pub const fn build_id() -> u64 {
    match u64::from_str_radix(env!("REDIRECT_BUILD"), 16) {
        Ok(id) => id,
        Err(_) => panic!("the build script writes 16 hexadecimal digits"),
    }
}

impl Programs {
    /// Opens the pinned programs, or loads and pins them.
    pub fn open_or_load(pins: &Pins) -> Result<Self> {
        let directory = pins.programs(build_id());
        if directory.is_dir() {
            return Self::open(&directory);
        }
        let offsets = Offsets::of_running_kernel()?;
        let port_range_packed = u32::from(offsets.port_range_packed);
        let ancestors_are_ids = u32::from(offsets.ancestors_are_ids);
        let has_ingress_interface = u32::from(kernel::tells_ingress_interface()?);
        let has_set_retval = u32::from(kernel::version()? >= (5, 18));
        let mut object = EbpfLoader::new();
        object
            // What it found, but not the walk to it: that fills megabytes, on which loading itself can fail.
            .verifier_log_level(VerifierLogLevel::STATS)
            .override_global("OFFSET_SOCK_SOCKET", &offsets.sock_socket, true)
            .override_global("OFFSET_SOCKET_FILE", &offsets.socket_file, true)
            .override_global("OFFSET_FILE_CRED", &offsets.file_cred, true)
            .override_global("OFFSET_CRED_FSUID", &offsets.cred_fsuid, true)
            .override_global("OFFSET_SOCK_CGROUP", &offsets.sock_cgroup, true)
            .override_global("OFFSET_CGROUP_LEVEL", &offsets.cgroup_level, true)
            .override_global("OFFSET_CGROUP_ANCESTORS", &offsets.cgroup_ancestors, true)
            .override_global("ANCESTORS_ARE_IDS", &ancestors_are_ids, true)
            .override_global("OFFSET_CGROUP_NODE", &offsets.cgroup_node, true)
            .override_global("OFFSET_NODE_ID", &offsets.node_id, true)
            .override_global("OFFSET_SOCK_NET", &offsets.sock_net, true)
            .override_global("OFFSET_NET_PORT_RANGE", &offsets.net_port_range, true)
            .override_global("PORT_RANGE_PACKED", &port_range_packed, true)
            .override_global("HAS_SET_RETVAL", &has_set_retval, true)
            .override_global("HAS_INGRESS_INTERFACE", &has_ingress_interface, true);
        let mut object = load_object(&mut object, pins)?;
        let staged = pins.stage()?;
        for hook in HOOKS {
            let fd = load_program(&mut object, hook.program)?;
            bpf::pin(fd.as_fd(), &staged.join(hook.program))
                .with_context(|| format!("pinning program {}", hook.program))?;
        }
        for entered in Entered::ALL {
            let name = entered.program();
            let fd = load_program(&mut object, name)?;
            let jump = bpf::program_array(fd.as_fd())
                .with_context(|| format!("making the jump to {name}"))?;
            bpf::pin(jump.as_fd(), &staged.join(entered.jump()))
                .with_context(|| format!("pinning the jump to {name}"))?;
        }
        pins.publish(&staged, &directory)?;
        Self::open(&directory)
    }

    fn open(directory: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = directory.join(name);
            bpf::open_pinned(&path).with_context(|| format!("opening {}", path.display()))
        };
        Ok(Self {
            fds: HOOKS
                .iter()
                .map(|hook| open(hook.program))
                .collect::<Result<_>>()?,
            jumps: Entered::ALL
                .iter()
                .map(|entered| open(&entered.jump()))
                .collect::<Result<_>>()?,
        })
    }

    /// Attaches one hook.
    pub fn attach(&self, hook: usize, cgroup: impl AsFd) -> Result<OwnedFd> {
        let name = HOOKS[hook].name;
        bpf::link_create(
            self.fds[hook].as_fd(),
            cgroup.as_fd(),
            HOOKS[hook].attach_type,
        )
        .with_context(|| format!("attaching {name}"))
    }

    /// Puts this build's program behind an existing link, if another one is there.
    pub fn update(&self, hook: usize, link: &OwnedFd) -> Result<bool> {
        let name = HOOKS[hook].name;
        let wanted = bpf::program_id(self.fds[hook].as_fd())?;
        let observed =
            bpf::cgroup_link(link.as_fd()).with_context(|| format!("reading link {name}"))?;
        if observed.program_id == wanted {
            return Ok(false);
        }
        bpf::link_update(link.as_fd(), self.fds[hook].as_fd())
            .with_context(|| format!("updating link {name}"))?;
        Ok(true)
    }

    /// Loads a pod's entry to a shared program.
    pub fn load_entry(&self, pins: &Pins, netns_cookie: u64, entered: Entered) -> Result<OwnedFd> {
        let path = pins.map("NETNS");
        let netns =
            bpf::open_pinned(&path).with_context(|| format!("opening {}", path.display()))?;
        let jump = self.jumps[entered as usize].as_fd();
        let entry = entry::instructions(netns.as_fd(), netns_cookie, jump, entered.pass());
        entered
            .load(&entry)
            .with_context(|| format!("loading the pod's entry to {}", entered.program()))
    }
}

/// Attaches a pod's `sk_lookup` program.
pub fn attach_sk_lookup(program: &OwnedFd, netns: impl AsFd) -> Result<OwnedFd> {
    bpf::link_create(
        program.as_fd(),
        netns.as_fd(),
        bpf_attach_type::BPF_SK_LOOKUP,
    )
    .context("attaching sk_lookup")
}

fn load_object(loader: &mut EbpfLoader<'_>, pins: &Pins) -> Result<Ebpf> {
    for name in tables::KEPT.iter().chain(tables::RENEWED) {
        loader.map_pin_path(name, pins.map(name));
    }
    loader.load(OBJECT).context("loading the eBPF object")
}

fn load_program(object: &mut Ebpf, name: &str) -> Result<OwnedFd> {
    let program = object
        .program_mut(name)
        .with_context(|| format!("the eBPF object has no program {name}"))?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => bail!("program {name} is of an unexpected type"),
    };
    if let Err(ProgramError::LoadError {
        io_error,
        verifier_log,
    }) = loaded
    {
        let log = verifier_log.to_string();
        let lines: Vec<&str> = log.lines().collect();
        bail!(
            "loading program {name}: {io_error}; the verifier says: {}",
            lines.join("; ")
        );
    }
    loaded.with_context(|| format!("loading program {name}"))?;
    let fd = program.fd().with_context(|| format!("program {name}"))?;
    Ok(fd.as_fd().try_clone_to_owned()?)
}
