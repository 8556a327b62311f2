//! What the loader reads from a pod before it attaches.
//!
//! Everything here only looks: no socket is kept open in the pod's namespace and nothing of the pod is changed.
//! All calls are synchronous; those that need the pod's network namespace run on a thread of their own
//! ([`netns::NetworkNamespace::run_inside`]).

pub(crate) mod ancestors;
pub mod cgroup;
pub mod containers;
pub mod identity;
pub mod interfaces;
pub mod listeners;
pub mod mounts;
pub mod netns;
pub mod node_pods;
pub mod pod_cgroup;
pub mod routes;

pub(crate) mod netlink;
pub(crate) mod proc;
#[cfg(test)]
pub(crate) mod testing;
