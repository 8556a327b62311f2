//! The capture under test, and the reference that vouches for the expectations.

use crate::{
    iptables::{self, Variant},
    loader,
    namespace::errors,
    options::Options,
    pod::{Pod, Regrets},
};

/// Who captures.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Backend {
    /// This project's eBPF data plane.
    Redirect,
    /// Istio's rules in the kernel's own iptables.
    Iptables,
}

impl Backend {
    /// Captures the pod's traffic, until the returned value is dropped; the pod is remembered by reference.
    pub fn attach(self, pod: &Pod, options: &Options) {
        match self {
            Self::Redirect => drop(loader::attach(pod, options)),
            Self::Iptables => iptables::apply(pod, options, Variant::from_environment()),
        }
    }

    /// Ends the capture.
    pub fn detach(self, pod: &Pod) {
        match self {
            Self::Redirect => {
                let output = loader::detach(pod.cgroup.path());
                if !output.status.success() {
                    Regrets::new("the attachment").add(errors(&output));
                }
            }
            Self::Iptables => iptables::flush(pod, Variant::from_environment()),
        }
    }
}
