//! Programs that are loaded together.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};

use super::{Entered, HOOKS, Hook, Need, build_id, pinned_maps};
use crate::kernel::{self, Offsets};
use crate::pins::{self, Pins};
use crate::sys::bpf::{self, Kind};
use crate::tables;

/// The object that the build script made.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect-ebpf"));

/// The programs of one need: of hooks, and jumps to the others.
#[derive(Debug)]
pub(super) struct Group(HashMap<String, OwnedFd>);

impl Group {
    /// Opens the pinned programs, or loads and pins them.
    pub(super) fn open_or_load(pins: &Pins, need: Need) -> Result<Self> {
        let directory = pins.programs(build_id(), need);
        if directory.is_dir() {
            return Self::open(&directory, need);
        }
        let mut object = load_object(pins)?;
        let staged = pins.stage()?;
        for name in programs(need) {
            let fd = load_program(&mut object, &name)?;
            bpf::pin(fd.as_fd(), &staged.join(&name))
                .with_context(|| format!("pinning program {name}"))?;
        }
        for entered in entered(need) {
            let name = entered.program();
            let fd = load_program(&mut object, name)?;
            let jump = bpf::program_array(fd.as_fd())
                .with_context(|| format!("making the jump to {name}"))?;
            bpf::pin(jump.as_fd(), &staged.join(entered.jump()))
                .with_context(|| format!("pinning the jump to {name}"))?;
        }
        pins.publish(&staged, &directory)?;
        Self::open(&directory, need)
    }

    fn open(directory: &Path, need: Need) -> Result<Self> {
        let programs = programs(need).map(|name| (name, Kind::Program));
        let jumps = entered(need)
            .iter()
            .map(|entered| (entered.jump(), Kind::Map));
        let open = |(name, kind): (String, Kind)| {
            let fd = pins::open_existing(&directory.join(&name), kind)?;
            Ok((name, fd))
        };
        programs
            .chain(jumps)
            .map(open)
            .collect::<Result<_>>()
            .map(Self)
    }

    /// What is pinned by that name.
    pub(super) fn pinned(&self, name: &str) -> Result<BorrowedFd<'_>> {
        let fd = self
            .0
            .get(name)
            .with_context(|| format!("no program {name}"))?;
        Ok(fd.as_fd())
    }
}

fn programs(need: Need) -> impl Iterator<Item = String> {
    let hooks = HOOKS.iter().filter(move |hook| hook.need == need);
    hooks.map(Hook::program)
}

fn entered(need: Need) -> &'static [Entered] {
    match need {
        Need::Always => &Entered::ALL,
        Need::Dns => &[],
    }
}

fn load_object(pins: &Pins) -> Result<Ebpf> {
    pinned_maps::compare(OBJECT, pins)?;
    let offsets = Offsets::of_running_kernel()?;
    let port_range_packed = u32::from(offsets.port_range_packed);
    let ancestors_are_ids = u32::from(offsets.ancestors_are_ids);
    let has_ingress_interface = u32::from(kernel::tells_ingress_interface()?);
    let has_set_retval = u32::from(kernel::version()? >= (5, 18));
    let mut loader = EbpfLoader::new();
    loader
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
