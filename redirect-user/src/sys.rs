//! System calls that no crate offers: the only `unsafe` code of the loader.

pub mod bpf;
pub mod nsfs;
