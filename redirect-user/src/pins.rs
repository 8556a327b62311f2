//! The pin directory: where maps, programs and links live when no process of ours does.
//!
//! ```text
//! /sys/fs/bpf/redirect/v2/maps/NAME               shared by all pods and builds
//!                         maps-LAYOUT/NAME        shared by all pods of builds with that layout of them
//!                         programs-HASH/NAME      shared by all pods, one directory per build
//!                         programs-HASH-dns/NAME  those of one need
//!                         pods/CGROUP_ID/NAME     one link per hook
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};
use redirect_common::{LAYOUT_VERSION, POLICY_LAYOUT_VERSION};

use crate::programs::Need;
use crate::sys::bpf::{self, Kind, LinkTarget};
use crate::tables;

const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// bpffs reserves names with dots.
const STAGING: &str = "staging";

/// The pin directory, locked: one loader changes things at a time.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Opens the directory, making it (and mounting bpffs) if needed, and waits for the lock.
    pub fn open() -> Result<Self> {
        mount_bpffs()?;
        refuse_other_layouts()?;
        make(&root())?;
        let pins = Self::lock()?;
        // Under the lock: the last detach removes these.
        make(&pins.root.join("maps"))?;
        make(&pins.renewed(POLICY_LAYOUT_VERSION))?;
        make(&pins.root.join("pods"))?;
        Ok(pins)
    }

    /// Opens the directory if it is there, in whatever state. Waits for the lock.
    pub fn open_any() -> Result<Option<Self>> {
        if root().is_dir() {
            Self::lock().map(Some)
        } else {
            Ok(None)
        }
    }

    /// Opens the directory if anything can be attached. Waits for the lock.
    pub fn open_existing() -> Result<Option<Self>> {
        Ok(Self::open_any()?.filter(Self::is_complete))
    }

    /// False after a kill while the maps were made or removed: nothing is attached then.
    pub fn is_complete(&self) -> bool {
        self.root.join("pods").is_dir() && tables::KEPT.iter().all(|name| self.map(name).exists())
    }

    fn lock() -> Result<Self> {
        let root = root();
        let file = File::open(&root).with_context(|| format!("opening {}", root.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {}", root.display()))?;
        let pins = Self { root, _lock: lock };
        pins.remove_staging()?;
        Ok(pins)
    }

    /// Where this build's map of that name is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        if tables::RENEWED.contains(&name) {
            self.renewed(POLICY_LAYOUT_VERSION).join(name)
        } else {
            self.root.join("maps").join(name)
        }
    }

    /// Where the maps of that layout are pinned that an upgrade renews.
    pub fn renewed(&self, layout: u32) -> PathBuf {
        self.root.join(format!("maps-{layout}"))
    }

    /// Directories of those maps, of all layouts but these.
    pub fn renewed_but(&self, layouts: &[u32]) -> Result<Vec<PathBuf>> {
        let kept: Vec<PathBuf> = layouts.iter().map(|layout| self.renewed(*layout)).collect();
        let mut directories = entries(&self.root)?;
        directories.retain(|path| file_name(path).starts_with("maps-") && !kept.contains(path));
        Ok(directories)
    }

    /// Directories of programs, one per build and need.
    pub fn all_programs(&self) -> Result<Vec<PathBuf>> {
        let mut directories = entries(&self.root)?;
        directories.retain(|path| file_name(path).starts_with("programs-"));
        Ok(directories)
    }

    /// Every pinned program, of whatever build.
    pub fn all_program_pins(&self) -> Result<Vec<PathBuf>> {
        let mut pins = Vec::new();
        for directory in self.all_programs()? {
            pins.append(&mut entries(&directory)?);
        }
        Ok(pins)
    }

    /// Where the programs of one build and need are pinned.
    pub fn programs(&self, build: u64, need: Need) -> PathBuf {
        self.root
            .join(format!("programs-{build:016x}{}", need.suffix()))
    }

    /// Directories of the programs of all builds but these.
    pub fn programs_but(&self, builds: &[u64]) -> Result<Vec<PathBuf>> {
        let all_of = |build: &u64| Need::ALL.map(|need| self.programs(*build, need));
        let kept: Vec<PathBuf> = builds.iter().flat_map(all_of).collect();
        let mut directories = self.all_programs()?;
        directories.retain(|path| !kept.contains(path));
        Ok(directories)
    }

    /// Where a pod's links are pinned.
    pub fn pod(&self, cgroup_id: u64) -> PathBuf {
        self.root.join("pods").join(format!("{cgroup_id:016x}"))
    }

    /// Cgroup ids of all pods with links.
    pub fn pods(&self) -> Result<Vec<u64>> {
        let directory = self.root.join("pods");
        if !directory.is_dir() {
            return Ok(Vec::new());
        }
        Ok(entries(&directory)?
            .iter()
            .filter_map(|path| u64::from_str_radix(&file_name(path), 16).ok())
            .collect())
    }

    /// A fresh directory beside the others, not yet visible as a pod's or a build's.
    pub fn stage(&self) -> Result<PathBuf> {
        let path = self.root.join(STAGING);
        make(&path)?;
        Ok(path)
    }

    /// Makes a staged directory visible under its name, in one step.
    pub fn publish(&self, staged: &Path, name: &Path) -> Result<()> {
        fs::rename(staged, name)
            .with_context(|| format!("renaming {} to {}", staged.display(), name.display()))
    }

    /// Removes what was staged and not published. Links end at once: unpinned ones stay attached for a while, and attached again
    /// meanwhile, a connection would meet both programs.
    pub fn remove_staging(&self) -> Result<()> {
        let staging = self.root.join(STAGING);
        if !staging.is_dir() {
            return Ok(());
        }
        for path in entries(&staging)? {
            if let Ok(link) = bpf::open_pinned(&path, Kind::Link) {
                drop(bpf::link_detach(link.as_fd()));
            }
        }
        remove(&staging)
    }

    /// Removes everything once no pod is left, but for the directory itself: it holds the lock.
    pub fn remove_all(&self) -> Result<()> {
        entries(&self.root)?
            .iter()
            .try_for_each(|path| self.withdraw(path))
    }

    /// Removes a directory beside the others in one step, so that none is ever met with half of its pins.
    pub fn withdraw(&self, directory: &Path) -> Result<()> {
        let staging = self.root.join(STAGING);
        self.publish(directory, &staging)?;
        remove(&staging)
    }
}

/// The directory of the maps, if there is one: whoever reads their ring buffers locks it.
pub fn open_maps_directory() -> Result<Option<File>> {
    let path = root().join("maps");
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("opening {}", path.display())),
    }
}

/// Opens a pinned object of that kind; None if there is no such pin.
pub fn open(path: &Path, kind: Kind) -> Result<Option<OwnedFd>> {
    match bpf::open_pinned(path, kind) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => in_words(opened, path).map(Some),
    }
}

/// Opens a pinned object of that kind that ought to be there.
pub fn open_existing(path: &Path, kind: Kind) -> Result<OwnedFd> {
    in_words(bpf::open_pinned(path, kind), path)
}

/// Whether the error is that something of another kind is pinned there.
pub fn is_strange(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::InvalidData)
}

fn in_words(opened: io::Result<OwnedFd>, path: &Path) -> Result<OwnedFd> {
    opened.with_context(|| format!("opening {}", path.display()))
}

/// Ends what is attached by a pinned link, and removes its pin, which may be absent. What is pinned there instead of a link
/// goes too.
pub fn detach_link(path: &Path) -> Result<()> {
    match bpf::open_pinned(path, Kind::Link) {
        // Fails if its cgroup or namespace has gone, and with it the attachment.
        Ok(link) => drop(bpf::link_detach(link.as_fd())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!("removing {}: {error}", path.display());
        }
        Err(error) => return in_words(Err(error), path).map(drop),
    }
    // If it stays it goes with the directory, or that tells why not.
    drop(fs::remove_file(path));
    Ok(())
}

/// Opens a cgroup's pinned link; None if there is no such pin. One that is cut off, by a detach that was killed or with the
/// proxy's cgroup, is removed.
pub fn open_link(path: &Path) -> Result<Option<OwnedFd>> {
    let Some(link) = open(path, Kind::Link)? else {
        return Ok(None);
    };
    if !hangs_nowhere(&link, path, bpf::cgroup_link)? {
        return Ok(Some(link));
    }
    fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    Ok(None)
}

/// Whether the kernel has cut a pinned link off, as what it hung on has gone; None if there is no such pin.
pub fn is_cut_off(
    path: &Path,
    target: fn(BorrowedFd<'_>) -> io::Result<LinkTarget>,
) -> Result<Option<bool>> {
    open(path, Kind::Link)?
        .map(|link| hangs_nowhere(&link, path, target))
        .transpose()
}

fn hangs_nowhere(
    link: &OwnedFd,
    path: &Path,
    target: fn(BorrowedFd<'_>) -> io::Result<LinkTarget>,
) -> Result<bool> {
    let link = target(link.as_fd()).with_context(|| format!("reading {}", path.display()))?;
    Ok(link.target == 0)
}

/// Removes a directory of pins; it may be absent.
pub fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

fn all_roots() -> PathBuf {
    Path::new(BPFFS).join("redirect")
}

/// The node, as long as this value lives: two daemons with different settings would undo what the other does.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held, not read")] Flock<File>);

impl Claim {
    /// Refused while another process has it.
    pub fn new() -> Result<Self> {
        mount_bpffs()?;
        // Not the directory of this release: another daemon may be of another.
        let directory = all_roots();
        make(&directory)?;
        let file =
            File::open(&directory).with_context(|| format!("opening {}", directory.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another daemon keeps this node: one runs on a node (it has locked {})",
                directory.display()
            ),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("locking {}", directory.display()))
            }
        }
    }
}

fn root() -> PathBuf {
    all_roots().join(format!("v{LAYOUT_VERSION}"))
}

/// A pod that is attached by a build with other kept maps would be attached twice.
fn refuse_other_layouts() -> Result<()> {
    if !all_roots().is_dir() {
        return Ok(());
    }
    for other in entries(&all_roots())? {
        let pods = other.join("pods");
        ensure!(
            other == root() || !pods.is_dir() || entries(&pods)?.is_empty(),
            "{}: pods are attached by a release whose connections this one cannot take over; detach them with that one first (`redirect detach --all`)",
            pods.display()
        );
    }
    Ok(())
}

fn make(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("making {}", path.display()))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(directory)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    };
    read().with_context(|| format!("reading {}", directory.display()))
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn mount_bpffs() -> Result<()> {
    if is_bpffs()? {
        return Ok(());
    }
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .with_context(|| format!("mounting the BPF file system at {BPFFS}"))?;
    tracing::info!("mounted the BPF file system at {BPFFS}");
    if is_bpffs()? {
        Ok(())
    } else {
        bail!("{BPFFS} is no BPF file system although mounting one succeeded")
    }
}

/// Refuses to go on without a BPF file system: one that a container mounts itself ends with it, and the capture too.
pub fn require_bpffs() -> Result<()> {
    ensure!(
        is_bpffs()?,
        "no BPF file system is mounted at {BPFFS}: mount the host's there (hostPath)"
    );
    Ok(())
}

fn is_bpffs() -> Result<bool> {
    let stat = statfs(BPFFS).with_context(|| {
        format!("{BPFFS}: this kernel has no sysfs there, or no CONFIG_BPF_SYSCALL")
    })?;
    Ok(stat.filesystem_type() == FsType(BPF_FS_MAGIC))
}
