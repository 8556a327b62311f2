//! The loader's notes about an attached pod, kept in a map so that they vanish when it does.

use bytemuck::{Pod, Zeroable};

/// Room for a pod's notes, in bytes.
pub const RECORD_BYTES: usize = 16_380;

/// Value of `RECORDS`, keyed by cgroup id: JSON, readable by every version.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Record {
    /// Used bytes of `json`.
    pub length: u32,
    /// UTF-8.
    pub json: [u8; RECORD_BYTES],
}

crate::assert_size!(Record, 16_384);
