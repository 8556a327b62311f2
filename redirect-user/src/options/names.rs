//! User, group and service names, behind a trait so that tests bring their own.

use nix::unistd::{Group, User};

/// Where names are looked up.
pub trait Names {
    /// Uid of a user.
    fn user(&self, name: &str) -> Option<u32>;
    /// Gid of a group.
    fn group(&self, name: &str) -> Option<u32>;
    /// Port of a TCP service, host order.
    fn tcp_service(&self, name: &str) -> Option<u16>;
}

/// The databases of the mount namespace the loader runs in: passwd, group and `/etc/services`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNames;

impl Names for SystemNames {
    fn user(&self, name: &str) -> Option<u32> {
        Some(User::from_name(name).ok()??.uid.as_raw())
    }

    fn group(&self, name: &str) -> Option<u32> {
        Some(Group::from_name(name).ok()??.gid.as_raw())
    }

    fn tcp_service(&self, name: &str) -> Option<u16> {
        tcp_service_in(&std::fs::read_to_string("/etc/services").ok()?, name)
    }
}

/// Finds a TCP service, by name or alias, in text of the form of `/etc/services`.
///
/// UDP-only services are not found: iptables looks names up for the rule's protocol, and each port option has a TCP rule.
pub fn tcp_service_in(services: &str, name: &str) -> Option<u16> {
    services.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let (first, port) = (words.next()?, words.next()?);
        let port = port.strip_suffix("/tcp")?;
        let named = first == name || words.any(|alias| alias == name);
        if named { port.parse().ok() } else { None }
    })
}
