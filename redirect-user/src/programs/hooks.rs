//! The cgroup hooks.

use aya_obj::generated::bpf_attach_type::{self, *};

use super::Need;

/// What a program hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The cgroup whose connections are captured.
    Client,
    /// The cgroup of the proxy: the same, or an ancestor of it.
    Proxy,
    /// The cgroup of the proxy if it is another one: the program of the client side does this too.
    ProxyElsewhere,
}

/// A cgroup hook.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// Name of the link's pin.
    pub name: &'static str,
    /// Where it is attached.
    pub side: Side,
    /// When it is attached. Once there it stays until the pod is detached.
    pub need: Need,
    /// The kernel's name of the hook.
    pub attach_type: bpf_attach_type,
}

impl Hook {
    /// Name of the program in the object.
    pub fn program(&self) -> String {
        format!("redirect_{}", self.name)
    }

    const fn for_dns(self) -> Self {
        Self {
            need: Need::Dns,
            ..self
        }
    }
}

const fn hook(name: &'static str, side: Side, attach_type: bpf_attach_type) -> Hook {
    Hook {
        name,
        side,
        need: Need::Always,
        attach_type,
    }
}

/// The cgroup hooks, in the order in which they are attached: `connect` comes last, when all that
/// it relies on is there.
pub const HOOKS: &[Hook] = &[
    hook("sockops", Side::Proxy, BPF_CGROUP_SOCK_OPS),
    hook("getsockopt", Side::Proxy, BPF_CGROUP_GETSOCKOPT),
    hook("getsockname4", Side::Proxy, BPF_CGROUP_INET4_GETSOCKNAME),
    hook("getsockname6", Side::Proxy, BPF_CGROUP_INET6_GETSOCKNAME),
    hook("getpeername4", Side::Client, BPF_CGROUP_INET4_GETPEERNAME),
    hook("getpeername6", Side::Client, BPF_CGROUP_INET6_GETPEERNAME),
    hook("recvmsg4", Side::Client, BPF_CGROUP_UDP4_RECVMSG).for_dns(),
    hook("recvmsg6", Side::Client, BPF_CGROUP_UDP6_RECVMSG).for_dns(),
    hook("answer4", Side::ProxyElsewhere, BPF_CGROUP_UDP4_SENDMSG).for_dns(),
    hook("answer6", Side::ProxyElsewhere, BPF_CGROUP_UDP6_SENDMSG).for_dns(),
    hook("sendmsg4", Side::Client, BPF_CGROUP_UDP4_SENDMSG).for_dns(),
    hook("sendmsg6", Side::Client, BPF_CGROUP_UDP6_SENDMSG).for_dns(),
    hook("dns_connect4", Side::Client, BPF_CGROUP_INET4_CONNECT).for_dns(),
    hook("dns_connect6", Side::Client, BPF_CGROUP_INET6_CONNECT).for_dns(),
    hook("connect4", Side::Client, BPF_CGROUP_INET4_CONNECT),
    hook("connect6", Side::Client, BPF_CGROUP_INET6_CONNECT),
];
