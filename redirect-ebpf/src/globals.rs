//! Read-only values that the loader sets before it loads the programs; the verifier then knows
//! them as constants.

use crate::ctx::read_global;

/// Byte offsets of kernel structure members, from the running kernel's BTF.
#[unsafe(no_mangle)]
static OFFSET_SOCK_SOCKET: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_SOCKET_FILE: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_FILE_CRED: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_CRED_FSUID: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_SOCK_CGROUP: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_CGROUP_LEVEL: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_CGROUP_ANCESTORS: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_CGROUP_NODE: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_NODE_ID: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_SOCK_NET: u32 = 0;
#[unsafe(no_mangle)]
static OFFSET_NET_PORT_RANGE: u32 = 0;

/// 1 if the ephemeral range is one word, the last port in its upper half (since Linux 6.8), and
/// not two.
#[unsafe(no_mangle)]
static PORT_RANGE_PACKED: u32 = 0;

/// 1 if a cgroup's `ancestors` are their ids (before Linux 6.1), and not pointers to them.
#[unsafe(no_mangle)]
static ANCESTORS_ARE_IDS: u32 = 0;

/// 1 if `bpf_set_retval` is offered to `connect` programs.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 0;

/// 1 if the context of `sk_lookup` tells the interface.
#[unsafe(no_mangle)]
static HAS_INGRESS_INTERFACE: u32 = 0;

#[inline(always)]
pub fn offset_sock_socket() -> u64 {
    u64::from(read_global(&OFFSET_SOCK_SOCKET))
}

#[inline(always)]
pub fn offset_socket_file() -> u64 {
    u64::from(read_global(&OFFSET_SOCKET_FILE))
}

#[inline(always)]
pub fn offset_file_cred() -> u64 {
    u64::from(read_global(&OFFSET_FILE_CRED))
}

#[inline(always)]
pub fn offset_cred_fsuid_and_fsgid() -> u64 {
    u64::from(read_global(&OFFSET_CRED_FSUID))
}

#[inline(always)]
pub fn offset_sock_cgroup() -> u64 {
    u64::from(read_global(&OFFSET_SOCK_CGROUP))
}

#[inline(always)]
pub fn offset_cgroup_level() -> u64 {
    u64::from(read_global(&OFFSET_CGROUP_LEVEL))
}

#[inline(always)]
pub fn offset_cgroup_ancestors() -> u64 {
    u64::from(read_global(&OFFSET_CGROUP_ANCESTORS))
}

#[inline(always)]
pub fn offset_cgroup_node() -> u64 {
    u64::from(read_global(&OFFSET_CGROUP_NODE))
}

#[inline(always)]
pub fn offset_node_id() -> u64 {
    u64::from(read_global(&OFFSET_NODE_ID))
}

#[inline(always)]
pub fn are_ancestors_ids() -> bool {
    read_global(&ANCESTORS_ARE_IDS) != 0
}

#[inline(always)]
pub fn offset_sock_net() -> u64 {
    u64::from(read_global(&OFFSET_SOCK_NET))
}

#[inline(always)]
pub fn offset_net_port_range() -> u64 {
    u64::from(read_global(&OFFSET_NET_PORT_RANGE))
}

#[inline(always)]
pub fn is_port_range_packed() -> bool {
    read_global(&PORT_RANGE_PACKED) != 0
}

#[inline(always)]
pub fn has_set_retval() -> bool {
    read_global(&HAS_SET_RETVAL) != 0
}

#[inline(always)]
pub fn has_ingress_interface() -> bool {
    read_global(&HAS_INGRESS_INTERFACE) != 0
}
