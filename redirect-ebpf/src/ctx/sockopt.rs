//! Context of the program that answers getsockopt().

use core::ptr;

use aya_ebpf::bindings::bpf_sockopt;
use aya_ebpf::helpers::generated as helpers;
use aya_ebpf::programs::SockoptContext;

use super::Sock;

/// Context of a `getsockopt` program.
pub struct SockOpt {
    pointer: *mut bpf_sockopt,
}

impl SockOpt {
    #[inline(always)]
    pub fn new(ctx: SockoptContext) -> Self {
        Self {
            pointer: ctx.sockopt,
        }
    }

    #[inline(always)]
    pub fn level(&self) -> i32 {
        read!(self.pointer, level)
    }

    #[inline(always)]
    pub fn name(&self) -> i32 {
        read!(self.pointer, optname)
    }

    #[inline(always)]
    pub fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the kernel's.
        unsafe { helpers::bpf_get_netns_cookie(self.pointer.cast()) }
    }

    #[inline(always)]
    pub fn sock(&self) -> Option<Sock> {
        Sock::new(read!(self.pointer, __bindgen_anon_1.sk))
    }

    /// Answers the call with `value`. The length stays the caller's, as netfilter leaves it.
    /// Returns false if the caller's buffer is too small.
    #[inline(always)]
    pub fn answer<T: Copy>(&self, value: &T) -> bool {
        let start = read!(self.pointer, __bindgen_anon_2.optval);
        let end = read!(self.pointer, __bindgen_anon_3.optval_end);
        // SAFETY: the verifier checks the comparison that keeps the write inside of the buffer.
        unsafe {
            if start.cast::<u8>().add(size_of::<T>()) > end.cast::<u8>() {
                return false;
            }
            ptr::write_unaligned(start.cast::<T>(), *value);
        }
        // The kernel copies at most a page back and refuses to return more than it copied.
        if read!(self.pointer, optlen) > 4096 {
            write!(self.pointer, size_of::<T>() as i32, optlen);
        }
        write!(self.pointer, 0, retval);
        true
    }
}
