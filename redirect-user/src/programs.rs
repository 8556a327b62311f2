//! The eBPF programs: loaded once per build of redirect, pinned, and shared by all pods.

mod entry;
mod group;
mod hooks;
mod pinned_maps;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use aya_obj::generated::bpf_attach_type;

use self::group::Group;
pub use self::hooks::{HOOKS, Hook, Side};
use crate::options::{Dns, Policy};
use crate::pins::{self, Pins};
use crate::sys::bpf::{self, Kind};

/// Which pods need a program. Those of one need are loaded together, when the first pod has it: the verifier takes
/// as long for those of DNS as for all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Every pod.
    Always,
    /// Where DNS is captured. With such a program anywhere, the kernel locks the socket for every
    /// datagram of the machine.
    Dns,
}

impl Need {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Always, Self::Dns];

    /// Whether a pod with this policy has it.
    pub fn is_of(self, policy: &Policy) -> bool {
        match self {
            Self::Always => true,
            Self::Dns => policy.dns != Dns::Off,
        }
    }

    /// Ends the name of the directory where a build's programs of this need are pinned.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Always => "",
            Self::Dns => "-dns",
        }
    }
}

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

/// The shared programs of this build.
#[derive(Debug)]
pub struct Programs<'a> {
    pins: &'a Pins,
    /// By [`Need`].
    groups: [Option<Group>; Need::ALL.len()],
}

/// Names this build's programs: a hash of the object, from the build script.
pub const fn build_id() -> u64 {
    match u64::from_str_radix(env!("REDIRECT_BUILD"), 16) {
        Ok(id) => id,
        Err(_) => panic!("the build script writes 16 hexadecimal digits"),
    }
}

impl<'a> Programs<'a> {
    /// Opens the pinned programs of these needs, or loads and pins them.
    pub fn open_or_load(pins: &'a Pins, needs: &[Need]) -> Result<Self> {
        let mut groups = [const { None }; Need::ALL.len()];
        for need in needs {
            groups[*need as usize] = Some(Group::open_or_load(pins, *need)?);
        }
        Ok(Self { pins, groups })
    }

    fn group(&self, need: Need) -> Result<&Group> {
        let group = self.groups[need as usize].as_ref();
        group.with_context(|| format!("the programs of need {need:?} were not opened"))
    }

    /// Attaches one hook.
    pub fn attach(&self, hook: &Hook, cgroup: impl AsFd) -> Result<OwnedFd> {
        let program = self.group(hook.need)?.pinned(&hook.program())?;
        bpf::link_create(program, cgroup.as_fd(), hook.attach_type)
            .with_context(|| format!("attaching {}", hook.name))
    }

    /// Puts this build's program behind an existing link, if another one is there.
    pub fn update(&self, hook: &Hook, link: &OwnedFd) -> Result<bool> {
        let program = self.group(hook.need)?.pinned(&hook.program())?;
        let wanted = bpf::program_id(program)?;
        let observed = bpf::cgroup_link(link.as_fd())
            .with_context(|| format!("reading link {}", hook.name))?;
        if observed.program_id == wanted {
            return Ok(false);
        }
        bpf::link_update(link.as_fd(), program)
            .with_context(|| format!("updating link {}", hook.name))?;
        Ok(true)
    }

    /// Loads a pod's entry to a shared program.
    pub fn load_entry(&self, netns_cookie: u64, entered: Entered) -> Result<OwnedFd> {
        let netns = pins::open_existing(&self.pins.map("NETNS"), Kind::Map)?;
        let jump = self.group(Need::Always)?.pinned(&entered.jump())?;
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
