//! A pod's own entry to a program that all pods share: leaves the pod's network namespace cookie in
//! `NETNS` and jumps there. Written out here, since loading it from the object would mean to read the
//! object, and the kernel's types, for every pod.

use std::os::fd::BorrowedFd;

use aya_obj::generated::bpf_func_id::{BPF_FUNC_map_lookup_elem, BPF_FUNC_tail_call};

use crate::assembler::{
    R0, R1, R2, R3, R6, R10, add, call, copy, exit, load, load_map, set, skip_if_zero, store,
    store_zero,
};
use crate::sys::bpf::Instruction;

/// The program, for a map `NETNS` and a program array with the shared program in entry 0. `otherwise` is
/// what it returns if the jump fails.
pub(super) fn instructions(
    netns: BorrowedFd<'_>,
    netns_cookie: u64,
    jump: BorrowedFd<'_>,
    otherwise: i32,
) -> Vec<Instruction> {
    let mut program = vec![
        copy(R6, R1),
        store_zero(R10, -4),
        copy(R2, R10),
        add(R2, -4),
    ];
    program.extend(load_map(R1, netns));
    program.push(call(BPF_FUNC_map_lookup_elem));
    let mut with_value = Vec::new();
    with_value.extend(load(R1, netns_cookie));
    with_value.push(store(R0, R1));
    with_value.push(copy(R1, R6));
    with_value.extend(load_map(R2, jump));
    with_value.push(set(R3, 0));
    with_value.push(call(BPF_FUNC_tail_call));
    program.push(skip_if_zero(R0, with_value.len() as i16));
    program.append(&mut with_value);
    // Reached only if the jump has failed.
    program.push(set(R0, otherwise));
    program.push(exit());
    program
}
