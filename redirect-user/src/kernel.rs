//! What the running kernel offers: capabilities, BTF offsets, helpers.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use btfparse::{Offset, Readable, TypeInformation};

use crate::observe::identity::INITIAL_USER_NAMESPACE;

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Where things lie in this kernel's structures, in bytes: `xt_owner`'s way from a socket to its
/// creator's ids, the way to its creator's cgroup and those above it, and the way to the network
/// namespace's ephemeral ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// `struct sock.sk_socket`
    pub sock_socket: u32,
    /// `struct socket.file`
    pub socket_file: u32,
    /// `struct file.f_cred`
    pub file_cred: u32,
    /// `struct cred.fsuid`, which `fsgid` follows.
    pub cred_fsuid: u32,
    /// `struct sock.sk_cgrp_data.cgroup`
    pub sock_cgroup: u32,
    /// `struct cgroup.level`
    pub cgroup_level: u32,
    /// `struct cgroup.ancestors`, or `ancestor_ids` before Linux 6.1.
    pub cgroup_ancestors: u32,
    /// Whether these are ids and not pointers.
    pub ancestors_are_ids: bool,
    /// `struct cgroup.kn`
    pub cgroup_node: u32,
    /// `struct kernfs_node.id`
    pub node_id: u32,
    /// `struct sock.__sk_common.skc_net.net`
    pub sock_net: u32,
    /// `struct net.ipv4.ip_local_ports.range`
    pub net_port_range: u32,
    /// Whether `range` is one word (since Linux 6.8) and not two.
    pub port_range_packed: bool,
}

impl Offsets {
    /// Reads them from the running kernel's BTF.
    pub fn of_running_kernel() -> Result<Self> {
        let bytes = std::fs::read(BTF).with_context(|| format!("reading {BTF}"))?;
        let types = TypeInformation::new(&Bytes(bytes))
            .map_err(|error| anyhow::anyhow!("reading {BTF}: {error:?}"))?;
        let member = |name: &str, member: &str| -> Result<(u32, u32)> {
            let id = types
                .id_of(name)
                .with_context(|| format!("{BTF} has no struct {name}"))?;
            match types.offset_of(id, member) {
                Ok((kind, Offset::ByteOffset(bytes))) => Ok((kind, bytes)),
                other => bail!("{BTF} does not tell where struct {name} has {member}: {other:?}"),
            }
        };
        let offset = |name: &str, path: &str| member(name, path).map(|(_, bytes)| bytes);
        let (port_range, net_port_range) = member("net", "ipv4.ip_local_ports.range")?;
        let port_range_bytes = types
            .size_of(port_range)
            .map_err(|error| anyhow::anyhow!("reading {BTF}: {error:?}"))?;
        let (cgroup_ancestors, ancestors_are_ids) = match offset("cgroup", "ancestors") {
            Ok(offset) => (offset, false),
            Err(_) => (offset("cgroup", "ancestor_ids")?, true),
        };
        let cred_fsuid = offset("cred", "fsuid")?;
        if offset("cred", "fsgid")? != cred_fsuid + 4 {
            bail!(
                "{BTF}: fsgid does not follow fsuid in struct cred, as it does in every kernel known"
            );
        }
        Ok(Self {
            sock_socket: offset("sock", "sk_socket")?,
            socket_file: offset("socket", "file")?,
            file_cred: offset("file", "f_cred")?,
            cred_fsuid,
            sock_cgroup: offset("sock", "sk_cgrp_data.cgroup")?,
            cgroup_level: offset("cgroup", "level")?,
            cgroup_ancestors,
            ancestors_are_ids,
            cgroup_node: offset("cgroup", "kn")?,
            node_id: offset("kernfs_node", "id")?,
            sock_net: offset("sock", "__sk_common.skc_net.net")?,
            net_port_range,
            port_range_packed: port_range_bytes == 4,
        })
    }
}

/// BTF in memory.
struct Bytes(Vec<u8>);

impl Readable for Bytes {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> btfparse::Result<()> {
        let start = offset as usize;
        match self.0.get(start..start + buffer.len()) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(btfparse::Error::new(
                btfparse::ErrorKind::IOError,
                "past the end",
            )),
        }
    }
}

/// Major and minor version.
pub fn version() -> Result<(u32, u32)> {
    let uname = nix::sys::utsname::uname().context("uname")?;
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => bail!("cannot read the kernel's version from {release:?}"),
    }
}

/// Whether `sk_lookup` programs can read the interface a packet came by.
pub fn tells_ingress_interface() -> Result<bool> {
    Ok(version()? >= (5, 17))
}

/// What a call is about to do, which decides what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// To manage any pod of this machine: enters namespaces, takes descriptors of other processes.
    AnyPod,
    /// To capture the pod that this process runs in.
    OwnPod,
}

/// Refuses a kernel or a process that cannot do it, naming what is missing.
pub fn require(task: Task) -> Result<()> {
    require_version()?;
    if !Path::new(BTF).exists() {
        bail!("this kernel has no BTF at {BTF}: redirect needs CONFIG_DEBUG_INFO_BTF=y");
    }
    require_rights(task)
}

/// What no pod can be captured without, and the first Linux that has it.
const NEEDED: [((u32, u32), &str); 3] = [
    (
        (5, 12),
        "memory as an argument of global functions in BPF programs",
    ),
    (
        (5, 14),
        "SO_NETNS_COOKIE, the network namespace cookie of a socket",
    ),
    (
        (5, 15),
        "network namespace cookies in sockops and sockopt programs",
    ),
];

/// Refuses a kernel that is too old, naming what it lacks.
pub fn require_version() -> Result<()> {
    let version = version()?;
    let lacks: Vec<String> = NEEDED
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|((major, minor), what)| format!("{what} (Linux {major}.{minor})"))
        .collect();
    let (major, minor) = version;
    ensure!(
        lacks.is_empty(),
        "Linux {major}.{minor} is too old, redirect needs 5.15 or later: it lacks {}",
        lacks.join(", ")
    );
    Ok(())
}

/// Refuses a process that lacks capabilities, or has them in a user namespace of its own only.
pub fn require_rights(task: Task) -> Result<()> {
    if std::fs::metadata("/proc/self/ns/user")
        .context("/proc/self/ns/user")?
        .ino()
        != INITIAL_USER_NAMESPACE
    {
        bail!(
            "this process is in a user namespace of its own (hostUsers: false), whose capabilities the kernel does not accept for eBPF: attach the pod from the node"
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let effective = effective_in(&status).context("/proc/self/status tells no CapEff")?;
    let missing = missing(task, effective);
    let advice = match task {
        Task::AnyPod => "run as root",
        Task::OwnPod => "run as root, and add it to the container's securityContext",
    };
    ensure!(
        missing.is_empty(),
        "missing capability {}: {advice}",
        missing.join(", ")
    );
    Ok(())
}

/// The mask of effective capabilities in `/proc/PID/status`.
fn effective_in(status: &str) -> Option<u64> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

/// A bit of linux/capability.h and its name.
type Capability = (u32, &'static str);

const NET_ADMIN: Capability = (12, "CAP_NET_ADMIN");
const SYS_PTRACE: Capability = (19, "CAP_SYS_PTRACE");
const SYS_ADMIN: Capability = (21, "CAP_SYS_ADMIN");
const PERFMON: Capability = (38, "CAP_PERFMON");
const BPF: Capability = (39, "CAP_BPF");

/// Names of what the mask of effective capabilities lacks.
fn missing(task: Task, effective: u64) -> Vec<&'static str> {
    let has = |(bit, _): &Capability| effective & (1 << bit) != 0;
    let needed: &[Capability] = match task {
        Task::AnyPod => &[NET_ADMIN, SYS_PTRACE, SYS_ADMIN],
        // The kernel takes CAP_SYS_ADMIN for the other two.
        Task::OwnPod if has(&SYS_ADMIN) => &[NET_ADMIN],
        Task::OwnPod => &[NET_ADMIN, BPF, PERFMON],
    };
    needed
        .iter()
        .filter(|capability| !has(capability))
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let mask = |capabilities: &[Capability]| capabilities.iter().map(|(bit, _)| 1 << bit).sum();
        for (task, has, expected) in [
            (
                Task::AnyPod,
                &[NET_ADMIN, SYS_PTRACE, SYS_ADMIN][..],
                &[][..],
            ),
            (
                Task::AnyPod,
                &[NET_ADMIN, BPF, PERFMON],
                &["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"],
            ),
            (Task::OwnPod, &[NET_ADMIN, BPF, PERFMON], &[]),
            (Task::OwnPod, &[NET_ADMIN, SYS_ADMIN], &[]),
            (Task::OwnPod, &[NET_ADMIN], &["CAP_BPF", "CAP_PERFMON"]),
            (
                Task::OwnPod,
                &[],
                &["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"],
            ),
        ] {
            assert_eq!(missing(task, mask(has)), expected, "{task:?} {has:?}");
        }
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, edits};

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_mask_is_read_as_the_kernel_writes_it(name in "[!-~]{0,15}", mask: u64, other: u64, edits in edits()) {
            let status = format!("Name:\t{name}\nCapPrm:\t{other:016x}\nCapEff:\t{mask:016x}\nCapBnd:\t{other:016x}\n");
            prop_assert_eq!(effective_in(&status), Some(mask));
            let _read_or_not = effective_in(&edits.of(&status));
        }
    }
}
