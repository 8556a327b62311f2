//! A pod's own entry to a program that all pods share: leaves the pod's network namespace cookie in
//! `NETNS` and jumps there. Written out here, since loading it from the object would mean to read the
//! object, and the kernel's types, for every pod.

use std::os::fd::{AsRawFd, BorrowedFd};

use aya_obj::generated::bpf_func_id::{self, BPF_FUNC_map_lookup_elem, BPF_FUNC_tail_call};
use aya_obj::generated::{
    BPF_ADD, BPF_ALU64, BPF_CALL, BPF_DW, BPF_EXIT, BPF_IMM, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD,
    BPF_MEM, BPF_MOV, BPF_PSEUDO_MAP_FD, BPF_ST, BPF_STX, BPF_W, BPF_X,
};

use crate::sys::bpf::Instruction;

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
/// Survives calls.
const R6: u8 = 6;
/// Top of the stack.
const R10: u8 = 10;

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
    program.push(plain(BPF_JMP | BPF_EXIT, 0, 0, 0, 0));
    program
}

fn plain(code: u32, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code: code as u8,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

fn copy(to: u8, from: u8) -> Instruction {
    plain(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0)
}

fn set(to: u8, value: i32) -> Instruction {
    plain(BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, value)
}

fn add(to: u8, value: i32) -> Instruction {
    plain(BPF_ALU64 | BPF_ADD | BPF_K, to, 0, 0, value)
}

/// 32 bits of zero.
fn store_zero(base: u8, offset: i16) -> Instruction {
    plain(BPF_ST | BPF_W | BPF_MEM, base, 0, offset, 0)
}

/// 64 bits.
fn store(base: u8, from: u8) -> Instruction {
    plain(BPF_STX | BPF_DW | BPF_MEM, base, from, 0, 0)
}

fn skip_if_zero(register: u8, instructions: i16) -> Instruction {
    plain(BPF_JMP | BPF_JEQ | BPF_K, register, 0, instructions, 0)
}

fn call(helper: bpf_func_id) -> Instruction {
    plain(BPF_JMP | BPF_CALL, 0, 0, 0, helper as i32)
}

/// A 64-bit constant takes two instructions.
fn load(to: u8, value: u64) -> [Instruction; 2] {
    [
        plain(BPF_LD | BPF_DW | BPF_IMM, to, 0, 0, value as i32),
        plain(0, 0, 0, 0, (value >> 32) as i32),
    ]
}

fn load_map(to: u8, map: BorrowedFd<'_>) -> [Instruction; 2] {
    let code = BPF_LD | BPF_DW | BPF_IMM;
    [
        plain(code, to, BPF_PSEUDO_MAP_FD as u8, 0, map.as_raw_fd()),
        plain(0, 0, 0, 0, 0),
    ]
}
