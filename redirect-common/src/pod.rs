//! A pod's settings: one map value, replaced whole, so that a reader sees the old or the new one.

use bytemuck::{Pod, Zeroable};

use crate::address::Address;
use crate::lists::List;

/// How many proxy UIDs, and how many GIDs, a pod may have.
pub const MAX_PROXY_IDS: usize = 16;
/// How many owner groups a pod may have: Istio's own limit.
pub const MAX_OWNER_GROUPS: usize = 64;
/// How many interfaces of a pod may be excluded.
pub const MAX_EXCLUDED_INTERFACES: usize = 16;

/// IPv6 is captured. IPv4 always is.
pub const FLAG_IPV6: u32 = 1 << 0;
/// `-i '*'`.
pub const FLAG_OUTBOUND_ALL: u32 = 1 << 1;
/// `-b '*'`.
pub const FLAG_INBOUND_ALL: u32 = 1 << 2;
/// `-i` names a loopback CIDR: Istio then leaves out the rules that pass pod-local traffic.
pub const FLAG_LOOPBACK_INCLUDED: u32 = 1 << 3;
/// [`PodConfig::groups`] are those captured; without it, those not captured.
pub const FLAG_GROUPS_INCLUDE: u32 = 1 << 4;
/// `-m TPROXY`: inbound connections keep their local address.
pub const FLAG_TPROXY: u32 = 1 << 5;
/// `--redirect-dns`.
pub const FLAG_DNS: u32 = 1 << 6;
/// `--capture-all-dns`: queries to any server; without it, to those in [`List::DnsServers`].
pub const FLAG_DNS_ALL: u32 = 1 << 7;

/// Virtual machines live behind interfaces of the pod (`-k`).
pub const FLAG_MACHINES: u32 = 1 << 8;

/// The proxy is known by its container's cgroup, [`PodConfig::proxy_cgroup`], and not by its ids.
pub const FLAG_PROXY_CONTAINER: u32 = 1 << 9;

/// A range of kernel user or group ids, both ends included.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct IdRange {
    /// Lowest id.
    pub first: u32,
    /// Highest id.
    pub last: u32,
}

impl IdRange {
    /// True if the id lies in the range.
    ///
    /// In one comparison, and not of the id itself: the verifier would learn a little about the id
    /// each time, and follow every combination of what it may have learnt.
    #[inline(always)]
    pub const fn contains(&self, id: u32) -> bool {
        id.wrapping_sub(self.first) <= self.last.wrapping_sub(self.first)
    }
}

/// Value of `PODS`, keyed by network namespace cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PodConfig {
    /// Puts everything else in another place.
    #[cfg(feature = "other-layout")]
    pub _moved: [u64; 3],
    /// Which lists in `LISTS` are this pod's; pods with equal lists share them.
    pub policy: u64,
    /// `FLAG_` bits.
    pub flags: u32,
    /// [`List::bit`] of every list that is not empty.
    pub lists: u32,
    /// `-p`, host order.
    pub outbound_port: u16,
    /// `-z`, host order.
    pub inbound_port: u16,
    /// `-e`, host order.
    pub tunnel_port: u16,
    /// How many cgroups `proxy_cgroup` has above it, the root among them.
    pub proxy_cgroup_level: u16,
    /// Loopback CIDR: IPv4 network in network order.
    pub loopback_be: u32,
    /// Loopback CIDR: mask in network order.
    pub loopback_mask_be: u32,
    /// Used entries of `proxy_uids`.
    pub proxy_uid_count: u32,
    /// Used entries of `proxy_gids`.
    pub proxy_gid_count: u32,
    /// Used entries of `groups`.
    pub group_count: u32,
    /// `-t`, if [`FLAG_TPROXY`] is set: the pod's own connections with this mark are not captured in place.
    pub tproxy_mark: u32,
    /// `-u`, in the order given: it matters.
    pub proxy_uids: [IdRange; MAX_PROXY_IDS],
    /// `-g`, in the order given: it matters.
    pub proxy_gids: [IdRange; MAX_PROXY_IDS],
    /// Owner groups.
    pub groups: [IdRange; MAX_OWNER_GROUPS],
    /// Indexes of the interfaces that `-c` named at attach.
    pub excluded_interfaces: [u32; MAX_EXCLUDED_INTERFACES],
    /// Used entries of `excluded_interfaces`.
    pub excluded_interface_count: u32,
    /// [`Address::bucket`]s, as bits, in which none of the pod's own addresses is, apart from
    /// loopback ones: most of them. None is set if that is not known.
    pub foreign_buckets: u32,
    /// Id of the cgroup of the proxy's container, if [`FLAG_PROXY_CONTAINER`] is set; 0, which no cgroup
    /// has, while it is not known: nobody is the proxy then.
    pub proxy_cgroup: u64,
    /// [`port_bucket`]s, as bits, in which no port of any of the policy's port lists is. None is set
    /// if that is not known.
    pub unlisted_port_buckets: u64,
}

/// One of 64 buckets, of which neighbouring ports have different ones.
#[inline(always)]
pub const fn port_bucket(port: u16) -> u32 {
    port as u32 % 64
}

#[cfg(not(feature = "other-layout"))]
crate::assert_size!(PodConfig, 904);

impl PodConfig {
    /// Tests a `FLAG_`.
    #[inline(always)]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// True if the list has entries.
    #[inline(always)]
    pub const fn lists_any(&self, list: List) -> bool {
        self.lists & list.bit() != 0
    }

    /// True if the address is certainly none of the pod's own. False says nothing: `ROUTES` knows.
    #[inline(always)]
    pub const fn is_foreign(&self, address: &Address) -> bool {
        !address.is_loopback() && self.foreign_buckets & 1 << address.bucket() != 0
    }

    /// True if certainly no port list of the policy has the port. False says nothing: `LISTS` knows.
    #[inline(always)]
    pub const fn lists_no_port(&self, port: u16) -> bool {
        self.unlisted_port_buckets & 1 << port_bucket(port) != 0
    }

    /// True if `-c` names the interface with this index.
    #[inline(always)]
    pub fn excludes_interface(&self, index: u32) -> bool {
        let interfaces = self.excluded_interfaces.iter().enumerate();
        for (position, excluded) in interfaces {
            if position as u32 >= self.excluded_interface_count {
                break;
            }
            if *excluded == index {
                return true;
            }
        }
        false
    }

    /// `L` of the rules: the loopback CIDR for IPv4, `::1` for IPv6.
    #[inline(always)]
    pub fn in_loopback_cidr(&self, address: &Address) -> bool {
        if address.is_v4() {
            address.v4_be() & self.loopback_mask_be == self.loopback_be
        } else {
            *address == address.loopback_of_family()
        }
    }
}
