//! Who created a socket, and in which container.

use core::hint::black_box;

use redirect_common::decide::Owner;
use redirect_common::pod::{FLAG_PROXY_CONTAINER, PodConfig};

use crate::ctx::read_kernel_or_zero;
use crate::globals;

/// Reads what `xt_owner` reads: `fsuid` and `fsgid` in the credentials of the socket's file, taken
/// when it was created. The caller of connect() may be somebody else by now.
///
/// `address` is the socket's. None for a socket without a file, which belongs to the kernel.
///
/// A null pointer is followed like any other, which comes to null again. Turning back halfway would leave the ids
/// without a value, and verifiers before Linux 6.3 refuse a program that as much as copies such a thing.
#[inline(always)]
pub fn of(address: u64) -> Option<Owner> {
    let socket: u64 = read_kernel_or_zero(address + globals::offset_sock_socket()).0;
    let file: u64 = read_kernel_or_zero(socket + globals::offset_socket_file()).0;
    let cred: u64 = read_kernel_or_zero(file + globals::offset_file_cred()).0;
    let ([uid, gid], read) =
        read_kernel_or_zero::<[u32; 2]>(cred + globals::offset_cred_fsuid_and_fsgid());
    read.then_some(Owner { uid, gid })
}

/// Was the socket created in the container of the pod's proxy? No where the proxy is known by its ids.
///
/// `address` is the socket's. Asked is the cgroup that the kernel noted in the socket when it was created, by
/// which it also chooses the cgroup programs that run for it. No helper tells that one in these programs:
/// theirs are about whoever calls connect() now.
#[inline(always)]
pub fn is_in_proxy_container(pod: &PodConfig, address: u64) -> bool {
    // Opaque: LLVM knows what the function can answer, the verifier does not.
    pod.has(FLAG_PROXY_CONTAINER)
        && black_box(created_below(
            address,
            pod.proxy_cgroup,
            u64::from(pod.proxy_cgroup_level),
        )) != 0
}

/// 1 if the socket at `address` was created in the cgroup with this id, which has `level` cgroups above it,
/// or anywhere below it. A global function: the verifier walks it once, and its stack is free again.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn created_below(address: u64, id: u64, level: u64) -> u32 {
    let cgroup: u64 = read_kernel_or_zero(address + globals::offset_sock_cgroup()).0;
    let own: u32 = read_kernel_or_zero(cgroup + globals::offset_cgroup_level()).0;
    // Behind its own level a cgroup's list of ancestors ends.
    if id == 0 || u64::from(own) < level {
        return 0;
    }
    let ancestors = cgroup + globals::offset_cgroup_ancestors();
    let ancestor: u64 = read_kernel_or_zero(ancestors + 8 * level).0;
    let found = if globals::are_ancestors_ids() {
        ancestor
    } else {
        let node: u64 = read_kernel_or_zero(ancestor + globals::offset_cgroup_node()).0;
        read_kernel_or_zero(node + globals::offset_node_id()).0
    };
    u32::from(found == id)
}
