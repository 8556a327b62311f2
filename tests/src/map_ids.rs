//! Which maps the kernel has, without opening them.
//!
//! Listing maps otherwise opens each by its id. A program array that is closed a second time before the kernel has begun to
//! clear it is never freed: `prog_array_map_clear` takes a reference for work that is queued already. So a list would keep
//! alive what it is to show the end of, in this test and in every other on the machine.
#![expect(unsafe_code, reason = "aya lists maps only by opening them")]

use std::{collections::BTreeSet, io};

/// `BPF_MAP_GET_NEXT_ID`.
const GET_NEXT_ID: libc::c_long = 12;

/// The part of `union bpf_attr` that the command uses.
#[repr(C)]
#[derive(Default)]
struct Ids {
    start: u32,
    next: u32,
    open_flags: u32,
}

/// The ids of all loaded maps.
pub fn map_ids() -> BTreeSet<u32> {
    let (mut ids, mut last) = (BTreeSet::new(), 0);
    while let Some(next) = next(last) {
        ids.insert(next);
        last = next;
    }
    ids
}

fn next(start: u32) -> Option<u32> {
    let mut ids = Ids {
        start,
        ..Ids::default()
    };
    // SAFETY: the kernel reads and writes as many bytes as it is told.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, GET_NEXT_ID, &raw mut ids, size_of::<Ids>()) };
    if result == 0 {
        return Some(ids.next);
    }
    let error = io::Error::last_os_error();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    None
}
