//! What the running kernel offers: capabilities, BTF offsets, helpers.

use std::path::Path;

use anyhow::{Context, Result, bail};
use btfparse::{Offset, Readable, TypeInformation};

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Where `xt_owner`'s way from a socket to its creator's ids lies in this kernel, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// `struct sock.sk_socket`
    pub sock_socket: u32,
    /// `struct socket.file`
    pub socket_file: u32,
    /// `struct file.f_cred`
    pub file_cred: u32,
    /// `struct cred.fsuid`
    pub cred_fsuid: u32,
    /// `struct cred.fsgid`
    pub cred_fsgid: u32,
}

impl Offsets {
    /// Reads them from the running kernel's BTF.
    pub fn of_running_kernel() -> Result<Self> {
        let bytes = std::fs::read(BTF).with_context(|| format!("reading {BTF}"))?;
        let types = TypeInformation::new(&Bytes(bytes))
            .map_err(|error| anyhow::anyhow!("reading {BTF}: {error:?}"))?;
        let offset = |name: &str, member: &str| -> Result<u32> {
            let id = types
                .id_of(name)
                .with_context(|| format!("{BTF} has no struct {name}"))?;
            match types.offset_of(id, member) {
                Ok((_, Offset::ByteOffset(bytes))) => Ok(bytes),
                other => bail!("{BTF} does not tell where struct {name} has {member}: {other:?}"),
            }
        };
        Ok(Self {
            sock_socket: offset("sock", "sk_socket")?,
            socket_file: offset("socket", "file")?,
            file_cred: offset("file", "f_cred")?,
            cred_fsuid: offset("cred", "fsuid")?,
            cred_fsgid: offset("cred", "fsgid")?,
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

/// Refuses a kernel or a process that cannot do it, naming what is missing.
pub fn require() -> Result<()> {
    let (major, minor) = version()?;
    if (major, minor) < (5, 15) {
        bail!(
            "Linux {major}.{minor} is too old: redirect needs 5.15 or later (network namespace cookies in sockops and sockopt programs)"
        );
    }
    if !Path::new(BTF).exists() {
        bail!("this kernel has no BTF at {BTF}: redirect needs CONFIG_DEBUG_INFO_BTF=y");
    }
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .context("/proc/self/status tells no CapEff")?;
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        bail!("missing capability {}: run as root", missing.join(", "))
    }
}

/// Bit and name (linux/capability.h) of what loading, attaching and looking around takes.
const CAPABILITIES: &[(u32, &str)] = &[
    (12, "CAP_NET_ADMIN"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
];
