//! The kernel's memory, maps and clock.

use core::ptr;

use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::maps::{HashMap, LruHashMap, PerCpuHashMap};

/// Reads a value that the loader may have replaced after compilation.
#[inline(always)]
pub fn read_global<T: Copy>(global: &T) -> T {
    // SAFETY: a reference is valid to read.
    unsafe { ptr::read_volatile(global) }
}

#[inline(always)]
pub fn map_get<K, V>(map: &'static HashMap<K, V>, key: &K) -> Option<&'static V> {
    // SAFETY: the map is not preallocated, so the kernel frees a replaced value only after all
    // running programs have ended.
    unsafe { map.get(key) }
}

#[inline(always)]
pub fn lru_get<K, V>(map: &'static LruHashMap<K, V>, key: &K) -> Option<&'static V> {
    // SAFETY: an entry is written once and read by the two ends of one handshake; the kernel may
    // give its memory to another connection only after the accepting end removed it.
    unsafe { map.get(key) }
}

#[expect(
    clippy::mut_from_ref,
    reason = "the kernel owns the value; every CPU has its own"
)]
#[inline(always)]
pub fn map_get_mut<K, V>(map: &'static PerCpuHashMap<K, V>, key: &K) -> Option<&'static mut V> {
    let value = map.get_ptr_mut(key)?;
    // SAFETY: the value is this CPU's own; a program that interrupts this one loses a count at most.
    unsafe { value.as_mut() }
}

/// Reads kernel memory: the value and true; where it faults zero, which the helper leaves, and false.
#[inline(always)]
pub fn read_kernel_or_zero<T: Copy + Default>(address: u64) -> (T, bool) {
    let mut value = T::default();
    // SAFETY: the helper writes at most `size_of::<T>()` bytes to `value` and handles bad addresses.
    let failed = unsafe {
        helpers::bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            address as *const _,
        )
    };
    (value, failed == 0)
}

#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments, no preconditions.
    unsafe { helpers::bpf_get_prandom_u32() }
}

/// What a global function got a pointer to: null, for all the verifier knows of its callers.
#[inline(always)]
pub fn argument<T>(pointer: &*const T) -> Option<&T> {
    // SAFETY: the verifier lets only null or readable memory of that size be passed.
    unsafe { pointer.as_ref() }
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments, no preconditions.
    unsafe { helpers::bpf_ktime_get_ns() }
}
