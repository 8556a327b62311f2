//! The cgroup hooks.

use aya_obj::generated::bpf_attach_type;

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
    /// Name of the program in the object.
    pub program: &'static str,
    /// Where it is attached.
    pub side: Side,
    /// When it is attached. Once there it stays until the pod is detached.
    pub need: Need,
    /// The kernel's name of the hook.
    pub attach_type: bpf_attach_type,
}

/// The cgroup hooks, in the order in which they are attached: `connect` comes last, when all that
/// it relies on is there.
pub const HOOKS: &[Hook] = &[
    hook(
        "sockops",
        "redirect_sockops",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    ),
    hook(
        "getsockopt",
        "redirect_getsockopt",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_GETSOCKOPT,
    ),
    hook(
        "getsockname4",
        "redirect_getsockname4",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_INET4_GETSOCKNAME,
    ),
    hook(
        "getsockname6",
        "redirect_getsockname6",
        Side::Proxy,
        bpf_attach_type::BPF_CGROUP_INET6_GETSOCKNAME,
    ),
    hook(
        "getpeername4",
        "redirect_getpeername4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    ),
    hook(
        "getpeername6",
        "redirect_getpeername6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    ),
    dns_hook(
        "recvmsg4",
        "redirect_recvmsg4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
    ),
    dns_hook(
        "recvmsg6",
        "redirect_recvmsg6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
    ),
    dns_hook(
        "answer4",
        "redirect_answer4",
        Side::ProxyElsewhere,
        bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    ),
    dns_hook(
        "answer6",
        "redirect_answer6",
        Side::ProxyElsewhere,
        bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    ),
    dns_hook(
        "sendmsg4",
        "redirect_sendmsg4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
    ),
    dns_hook(
        "sendmsg6",
        "redirect_sendmsg6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
    ),
    dns_hook(
        "dns_connect4",
        "redirect_dns_connect4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    ),
    dns_hook(
        "dns_connect6",
        "redirect_dns_connect6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    ),
    hook(
        "connect4",
        "redirect_connect4",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
    ),
    hook(
        "connect6",
        "redirect_connect6",
        Side::Client,
        bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
    ),
];

const fn hook(
    name: &'static str,
    program: &'static str,
    side: Side,
    attach_type: bpf_attach_type,
) -> Hook {
    Hook {
        name,
        program,
        side,
        need: Need::Always,
        attach_type,
    }
}

const fn dns_hook(
    name: &'static str,
    program: &'static str,
    side: Side,
    attach_type: bpf_attach_type,
) -> Hook {
    Hook {
        need: Need::Dns,
        ..hook(name, program, side, attach_type)
    }
}
