//! The `bpf(2)` commands for maps, pins and links, on typed keys and values.
//!
//! aya 0.14 loads the object; it cannot pin or update every kind of link, and it opens a pinned map
//! without comparing its layout.

#![expect(unsafe_code, reason = "bpf(2) takes a union of pointers and numbers")]

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::marker::PhantomData;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_map_type, bpf_prog_info,
    bpf_prog_type,
};
use bytemuck::{Pod, Zeroable};

/// Calls `bpf(2)`.
///
/// # Safety
///
/// Every pointer in `attr` that the command uses must be valid for what the command does with it.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attr` is a valid union of that size; the caller vouches for the pointers in it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn empty() -> bpf_attr {
    // SAFETY: all members are integers or arrays of them; the kernel demands zero where unused.
    unsafe { zeroed() }
}

/// # Safety
///
/// As for [`bpf`], and the command must answer with a new descriptor.
unsafe fn bpf_fd(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for `attr`.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// What can be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Map, Self::Program, Self::Link];

    const fn name(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Program => "program",
            Self::Link => "link",
        }
    }

    /// The kernel tells it by the descriptor's name only.
    fn of(object: BorrowedFd<'_>) -> io::Result<Self> {
        let name = fs::read_link(format!("/proc/thread-self/fd/{}", object.as_raw_fd()))?;
        let name = name.to_string_lossy().into_owned();
        let mut kinds = Self::ALL.into_iter();
        kinds
            .find(|kind| name.contains(kind.word()))
            .ok_or_else(|| io::Error::other(format!("{name} is no BPF object")))
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Map => "bpf-map",
            Self::Program => "bpf-prog",
            // An underscore in some kernels.
            Self::Link => "link",
        }
    }
}

/// Opens a pinned object. An `InvalidData` error if it is of another kind.
pub fn open_pinned(path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let c_path = c_path(path)?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = c_path.as_ptr() as u64;
    // SAFETY: `c_path` lives through the call.
    let fd = unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr) }?;
    let is = Kind::of(fd.as_fd())?;
    if is == kind {
        Ok(fd)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "it is a {}, and has to be a {}: somebody else has pinned it",
                is.name(),
                kind.name()
            ),
        ))
    }
}

/// Pins an object; fails if something is there.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = object.as_raw_fd() as u32;
    // SAFETY: `path` lives through the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// A program array whose entry 0 is `program`.
pub fn program_array(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_PROG_ARRAY as u32;
    attr.__bindgen_anon_1.key_size = size_of::<u32>() as u32;
    attr.__bindgen_anon_1.value_size = size_of::<u32>() as u32;
    attr.__bindgen_anon_1.max_entries = 1;
    // SAFETY: no pointers.
    let map = unsafe { bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr) }?;
    let (key, value) = (0_u32, program.as_raw_fd() as u32);
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = &raw const key as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = &raw const value as u64;
    // SAFETY: key and value are 4 bytes each, as the map was made.
    unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }?;
    Ok(map)
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Instruction {
    /// Class, operation and kind of operand.
    pub code: u8,
    /// Destination in the lower half, source in the upper.
    pub registers: u8,
    /// Of a memory access, in bytes; of a jump, in instructions.
    pub offset: i16,
    /// The constant operand.
    pub immediate: i32,
}

/// Loads a `sk_lookup` program.
pub fn load_sk_lookup(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32;
    attr.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    load(attr, instructions)
}

/// Loads a tc filter.
pub fn load_tc(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS as u32;
    load(attr, instructions)
}

/// Loads a program that [`run`] can run.
pub fn load_raw_tracepoint(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_RAW_TRACEPOINT as u32;
    load(attr, instructions)
}

/// Runs a raw tracepoint's program once, as the calling thread and without arguments; the lower half of what it returns.
pub fn run(program: BorrowedFd<'_>) -> io::Result<u32> {
    let mut attr = empty();
    attr.test.prog_fd = program.as_raw_fd() as u32;
    // SAFETY: no pointers.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }?;
    // SAFETY: the command answers in this member, which is an integer.
    Ok(unsafe { attr.test.retval })
}

fn load(mut attr: bpf_attr, instructions: &[Instruction]) -> io::Result<OwnedFd> {
    const LICENSE: &CStr = c"Dual MIT/GPL";
    const NAME: [libc::c_char; 16] = bytemuck::must_cast(*b"redirect_entry\0\0");
    attr.__bindgen_anon_3.insns = instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = LICENSE.as_ptr() as u64;
    attr.__bindgen_anon_3.prog_name = NAME;
    // SAFETY: the instructions and the licence live through the call; the kernel verifies the former.
    unsafe { bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) }
}

/// Attaches a program to a cgroup or a network namespace.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attr.link_create.__bindgen_anon_2.target_fd = target.as_raw_fd() as u32;
    attr.link_create.attach_type = attach_type as u32;
    // SAFETY: no pointers.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
}

/// Programs attached to one cgroup or network namespace on one hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// In the order in which they run.
    pub program_ids: Vec<u32>,
    /// `BPF_F_ALLOW_…` of a cgroup; 0 of a network namespace.
    pub flags: u32,
}

impl Attached {
    /// `BPF_F_ALLOW_OVERRIDE`.
    pub const OVERRIDE: u32 = 1 << 0;
    /// `BPF_F_ALLOW_MULTI`.
    pub const MULTI: u32 = 1 << 1;

    /// Nothing may be attached beside or below.
    pub fn is_exclusive(&self) -> bool {
        self.flags & (Self::OVERRIDE | Self::MULTI) == 0
    }

    /// What is attached below takes its place.
    pub fn is_overridable(&self) -> bool {
        self.flags & Self::OVERRIDE != 0
    }
}

/// What is attached to a cgroup itself or to a network namespace, whoever did it and however.
pub fn attached(target: BorrowedFd<'_>, hook: bpf_attach_type) -> io::Result<Attached> {
    /// The kernel's limit of both (`BPF_CGROUP_MAX_PROGS`, `netns_bpf_max_progs()`).
    const MOST: usize = 64;
    let mut program_ids = vec![0_u32; MOST];
    let mut attr = empty();
    attr.query.__bindgen_anon_1.target_fd = target.as_raw_fd() as u32;
    attr.query.attach_type = hook as u32;
    attr.query.prog_ids = program_ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = MOST as u32;
    // SAFETY: there is room for `prog_cnt` ids.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) }?;
    // SAFETY: the command answers in these members, which are integers.
    let (count, flags) = unsafe {
        (
            attr.query.__bindgen_anon_2.prog_cnt,
            attr.query.attach_flags,
        )
    };
    program_ids.truncate(count as usize);
    Ok(Attached { program_ids, flags })
}

/// Replaces a link's program in one step.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty();
    attr.link_update.link_fd = link.as_raw_fd() as u32;
    attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    // SAFETY: no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Ends an attachment at once. Without, it would last until the kernel gets around to freeing the
/// last pin or descriptor.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty();
    attr.link_detach.link_fd = link.as_raw_fd() as u32;
    // SAFETY: no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// # Safety
///
/// `T` must be the kernel's info structure for this kind of object.
unsafe fn info<T>(object: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: info structures are integers and arrays of them.
    let mut info: T = unsafe { zeroed() };
    let mut attr = empty();
    attr.info.bpf_fd = object.as_raw_fd() as u32;
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = (&raw mut info) as u64;
    // SAFETY: `info` is writable for `info_len` bytes and asks for no arrays.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// What a link hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTarget {
    /// The attached program.
    pub program_id: u32,
    /// Inode of the cgroup or of the network namespace; 0 if it is gone and with it the attachment.
    pub target: u64,
}

/// Reads what a cgroup link hangs on.
pub fn cgroup_link(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    // SAFETY: `bpf_link_info` belongs to links; the union member is that of cgroup links.
    unsafe {
        let info: bpf_link_info = info(link)?;
        Ok(LinkTarget {
            program_id: info.prog_id,
            target: info.__bindgen_anon_1.cgroup.cgroup_id,
        })
    }
}

/// Reads what a network namespace link hangs on.
pub fn netns_link(link: BorrowedFd<'_>) -> io::Result<LinkTarget> {
    // SAFETY: as above, with the member of network namespace links.
    unsafe {
        let info: bpf_link_info = info(link)?;
        Ok(LinkTarget {
            program_id: info.prog_id,
            target: u64::from(info.__bindgen_anon_1.netns.netns_ino),
        })
    }
}

/// The kernel's number of a program.
pub fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: `bpf_prog_info` belongs to programs.
    let info: bpf_prog_info = unsafe { info(program) }?;
    Ok(info.id)
}

/// Waits until every program that runs now has ended, so that nothing still uses what it found in
/// a map before the call (`membarrier(2)`, `MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu()`).
pub fn wait_for_running_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What the commands on elements of a map take.
fn element(map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> bpf_attr {
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = key;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value;
    attr.__bindgen_anon_2.flags = flags;
    attr
}

/// A map with keys `K` and values `V`, which are exactly the kernel's bytes.
#[derive(Debug)]
pub struct Table<K, V> {
    /// None: a map that nobody has made yet, which is empty.
    fd: Option<OwnedFd>,
    /// How many entries there is room for.
    capacity: usize,
    _types: PhantomData<fn() -> (K, V)>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Opens a pinned map. An `InvalidData` error if it is none, or if its keys or values are of another size.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = open_pinned(path, Kind::Map)?;
        // SAFETY: `bpf_map_info` belongs to maps.
        let info: bpf_map_info = unsafe { info(fd.as_fd()) }?;
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} has keys of {} and values of {} bytes, not {} and {}: another version of redirect left it",
                    path.display(),
                    info.key_size,
                    info.value_size,
                    size_of::<K>(),
                    size_of::<V>(),
                ),
            ));
        }
        Ok(Self {
            fd: Some(fd),
            capacity: info.max_entries as usize,
            _types: PhantomData,
        })
    }

    /// The same, but no error if no map is pinned there: it is empty then, and cannot be written.
    pub fn open_or_empty(path: &Path) -> io::Result<Self> {
        match Self::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self {
                fd: None,
                capacity: 0,
                _types: PhantomData,
            }),
            result => result,
        }
    }

    /// `ENOENT` if there is no map, as for a key that is not in it.
    fn attr(&self, key: *const K, value: u64, flags: u64) -> io::Result<bpf_attr> {
        let Some(fd) = &self.fd else {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        Ok(element(fd.as_fd(), key as u64, value, flags))
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let found = self
            .attr(key, (&raw mut value) as u64, 0)
            // SAFETY: key and value have the sizes that `open` compared.
            .and_then(|mut attr| unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) });
        Ok(some_or_absent(found)?.map(|_| value))
    }

    /// Inserts or replaces.
    pub fn set(&self, key: &K, value: &V) -> io::Result<()> {
        self.update(key, value, 0)
    }

    /// Inserts; false if the key was there.
    pub fn insert(&self, key: &K, value: &V) -> io::Result<bool> {
        const BPF_NOEXIST: u64 = 1;
        match self.update(key, value, BPF_NOEXIST) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn update(&self, key: &K, value: &V, flags: u64) -> io::Result<()> {
        let mut attr = self.attr(key, std::ptr::from_ref(value) as u64, flags)?;
        // SAFETY: key and value have the sizes that `open` compared.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Removes a key; it may be absent.
    pub fn remove(&self, key: &K) -> io::Result<()> {
        let removed = self
            .attr(key, 0, 0)
            // SAFETY: the key has the size that `open` compared.
            .and_then(|mut attr| unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) });
        some_or_absent(removed).map(drop)
    }

    /// All keys, in the map's own order. If entries are removed meanwhile, some may be there twice, and others be missing.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut current: Option<K> = None;
        // A hash map begins again when the current key has gone: that could go on for ever.
        while keys.len() < self.capacity {
            let mut next = K::zeroed();
            let key = current
                .as_ref()
                .map_or(std::ptr::null(), std::ptr::from_ref);
            let found = self
                .attr(key, (&raw mut next) as u64, 0)
                // SAFETY: null or a key, and room for a key.
                .and_then(|mut attr| unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) });
            if some_or_absent(found)?.is_none() {
                return Ok(keys);
            }
            keys.push(next);
            current = Some(next);
        }
        Ok(keys)
    }
}

/// None where there is no such key, or no map.
fn some_or_absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A map with keys `u64` whose values are of any size: one of another build.
#[derive(Debug)]
pub struct OtherTable {
    fd: OwnedFd,
    /// Bytes that a look-up fills.
    bytes: usize,
}

impl OtherTable {
    /// Opens a pinned map; None if there is none. `cpus` is the number of possible CPUs. An `InvalidData` error if its
    /// keys are of another size.
    pub fn open(path: &Path, cpus: usize) -> io::Result<Option<Self>> {
        let Some(fd) = some_or_absent(open_pinned(path, Kind::Map))? else {
            return Ok(None);
        };
        // SAFETY: as in `Table::open`.
        let info: bpf_map_info = unsafe { info(fd.as_fd()) }?;
        if info.key_size as usize != size_of::<u64>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} has keys of {} bytes, not 8",
                    path.display(),
                    info.key_size
                ),
            ));
        }
        // Room for a value of every CPU, which the kernel pads, whether it is such a map or not.
        let bytes = (info.value_size as usize).next_multiple_of(8) * cpus;
        Ok(Some(Self { fd, bytes }))
    }

    /// The bytes of a key's value, one CPU's after the other's if it is a per-CPU map; with zeroes behind.
    pub fn get(&self, key: u64) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0_u8; self.bytes];
        let key = &raw const key;
        let mut attr = element(self.fd.as_fd(), key as u64, value.as_mut_ptr() as u64, 0);
        // SAFETY: `open` compared the key's size, and there is room for the value on every CPU.
        let found = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) };
        Ok(some_or_absent(found)?.map(|_| value))
    }

    /// Removes a key; it may be absent.
    pub fn remove(&self, key: u64) -> io::Result<()> {
        let key = &raw const key;
        let mut attr = element(self.fd.as_fd(), key as u64, 0, 0);
        // SAFETY: `open` compared the key's size.
        let removed = unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) };
        some_or_absent(removed).map(drop)
    }
}

/// A map with one value per possible CPU.
#[derive(Debug)]
pub struct PerCpuTable<K, V> {
    table: Table<K, V>,
    cpus: usize,
}

impl<K: Pod, V: Pod + Zeroable> PerCpuTable<K, V> {
    /// As [`Table::open_or_empty`]; `cpus` is the number of possible CPUs.
    pub fn open_or_empty(path: &Path, cpus: usize) -> io::Result<Self> {
        // The kernel pads each CPU's value to eight bytes.
        const { assert!(size_of::<V>().is_multiple_of(8)) };
        let table = Table::open_or_empty(path)?;
        Ok(Self { table, cpus })
    }

    /// One value per CPU; empty if the key is absent.
    pub fn get(&self, key: &K) -> io::Result<Vec<V>> {
        let mut values = vec![V::zeroed(); self.cpus];
        let found = self
            .table
            .attr(key, values.as_mut_ptr() as u64, 0)
            // SAFETY: there is room for a value of every possible CPU.
            .and_then(|mut attr| unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) });
        Ok(some_or_absent(found)?.map_or(Vec::new(), |_| values))
    }

    /// Inserts zeroes; does nothing if the key is there.
    pub fn insert_zeroed(&self, key: &K) -> io::Result<()> {
        const BPF_NOEXIST: u64 = 1;
        let values = vec![V::zeroed(); self.cpus];
        let mut attr = self.table.attr(key, values.as_ptr() as u64, BPF_NOEXIST)?;
        // SAFETY: there is a value for every possible CPU.
        match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) } {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes a key; it may be absent.
    pub fn remove(&self, key: &K) -> io::Result<()> {
        self.table.remove(key)
    }

    /// All keys.
    pub fn keys(&self) -> io::Result<Vec<K>> {
        self.table.keys()
    }
}
