//! The instructions of small programs that are written out, where there is no need of an object.

use std::os::fd::{AsRawFd, BorrowedFd};

use aya_obj::generated::bpf_func_id;
use aya_obj::generated::{
    BPF_ADD, BPF_ALU64, BPF_CALL, BPF_DW, BPF_EXIT, BPF_IMM, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD,
    BPF_MEM, BPF_MOV, BPF_PSEUDO_MAP_FD, BPF_ST, BPF_STX, BPF_W, BPF_X,
};

use crate::sys::bpf::Instruction;

/// What a helper or the program answers.
pub const R0: u8 = 0;
/// First argument.
pub const R1: u8 = 1;
/// Second argument.
pub const R2: u8 = 2;
/// Third argument.
pub const R3: u8 = 3;
/// Survives calls.
pub const R6: u8 = 6;
/// Top of the stack.
pub const R10: u8 = 10;

fn plain(code: u32, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code: code as u8,
        registers: from << 4 | to,
        offset,
        immediate,
    }
}

/// Copies a register.
pub fn copy(to: u8, from: u8) -> Instruction {
    plain(BPF_ALU64 | BPF_MOV | BPF_X, to, from, 0, 0)
}

/// Sets a register to a number.
pub fn set(to: u8, value: i32) -> Instruction {
    plain(BPF_ALU64 | BPF_MOV | BPF_K, to, 0, 0, value)
}

/// Adds a number to a register.
pub fn add(to: u8, value: i32) -> Instruction {
    plain(BPF_ALU64 | BPF_ADD | BPF_K, to, 0, 0, value)
}

/// Stores 32 bits of zero, `offset` bytes behind where `base` points.
pub fn store_zero(base: u8, offset: i16) -> Instruction {
    plain(BPF_ST | BPF_W | BPF_MEM, base, 0, offset, 0)
}

/// Stores 64 bits where `base` points.
pub fn store(base: u8, from: u8) -> Instruction {
    plain(BPF_STX | BPF_DW | BPF_MEM, base, from, 0, 0)
}

/// Leaves that many instructions out if the register is zero.
pub fn skip_if_zero(register: u8, instructions: i16) -> Instruction {
    plain(BPF_JMP | BPF_JEQ | BPF_K, register, 0, instructions, 0)
}

/// Calls a helper: arguments from [`R1`] on, the answer in [`R0`].
pub fn call(helper: bpf_func_id) -> Instruction {
    plain(BPF_JMP | BPF_CALL, 0, 0, 0, helper as i32)
}

/// Sets a register to 64 bits, which takes two instructions.
pub fn load(to: u8, value: u64) -> [Instruction; 2] {
    [
        plain(BPF_LD | BPF_DW | BPF_IMM, to, 0, 0, value as i32),
        plain(0, 0, 0, 0, (value >> 32) as i32),
    ]
}

/// Sets a register to a map's address.
pub fn load_map(to: u8, map: BorrowedFd<'_>) -> [Instruction; 2] {
    let code = BPF_LD | BPF_DW | BPF_IMM;
    [
        plain(code, to, BPF_PSEUDO_MAP_FD as u8, 0, map.as_raw_fd()),
        plain(0, 0, 0, 0, 0),
    ]
}

/// Ends the program.
pub fn exit() -> Instruction {
    plain(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
}
