//! Kernel-level tests of the data plane: real pods (network namespace, cgroup), real sockets, real identities.
//!
//! A test builds a [`scene::Scene`], attaches a [`backend::Backend`] and dials. It always asks who answered, and compares what
//! both ends of the connection see. The same expectations run against Istio's own iptables rules, so that the kernel itself vouches for them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`namespace`], [`cgroup`], [`pod`] | a pod and its peer, removed again whatever happens |
//! | [`container`] | the `istio-iptables` program in a container of a pod |
//! | [`protocol`], [`actor`] | a process with a chosen identity that dials and listens on request |
//! | [`dial`], [`by_hand`], [`datagram`], [`burst`], [`server`], [`sockopt`] | the code that runs inside such a process |
//! | [`options`], [`loader`], [`iptables`], [`backend`] | the capture under test and the reference it is compared with |
//! | [`cni`] | a container runtime's end of the CNI plugin, and a stand-in for the daemon |
//! | [`containerd`] | a real container runtime, driven as a kubelet does it |
//! | [`manifests`], [`helm`], [`kubectl`] | `deploy/`, and the real ones, for the chart and the manifests |
//! | [`target`], [`http`] | what the set-up left, and one request |
//! | [`kubelet`], [`sidecar`], [`mounts`] | the DaemonSet's pod as a kubelet runs it, and pods with a real Envoy |
//! | [`envoy`], [`skip`] | a real Envoy in the pod, and what is said where there is none |
//! | [`follower`] | `redirect log` beside a test |
//! | [`bpffs`] | a BPF file system of a test's own, and what the loader keeps in it |
//! | [`tracer`] | following a program call by call, and killing it after any of them, refusing it, or holding the program there |
//! | [`faults`], [`daemon_faults`] | what a loader leaves that was killed or refused a call, and how the daemon goes on |
//! | [`fill`] | maps without room for more |
//! | [`traces`], [`surroundings`] | all that the loader may change, and what of it is a pod's network namespace |
//! | [`api_server`], [`daemon`], [`kubernetes`] | a node: the Kubernetes API played, `redirect daemon`, pods as the API tells them |
//! | [`light`] | pods by the hundred |
//! | [`foreign`] | somebody else's eBPF program on the same hook |
//! | [`machine`] | a virtual machine behind an interface of a pod |
//! | [`scene`] | a pod with a proxy, an application and a service |
//! | [`judge`] | the check of one connection |
//! | [`play`] | very many connections of one process |
//! | [`soak`] | hours of it: pods under load while capture is begun, changed and ended, and what must hold all the time |
//! | [`conformance`] | random options and connections, in two pods alike: one captured by redirect, one by iptables |
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, so that the backtrace points at the line"
)]

pub mod actor;
pub mod api_server;
pub mod backend;
pub mod bpffs;
pub mod burst;
pub mod by_hand;
pub mod cgroup;
pub mod cni;
pub mod conformance;
pub mod container;
pub mod containerd;
pub mod daemon;
pub mod daemon_faults;
pub mod datagram;
pub mod dial;
mod differences;
pub mod envoy;
pub mod faults;
pub mod fill;
pub mod follower;
pub mod foreign;
pub mod helm;
pub mod http;
pub mod iptables;
pub mod judge;
pub mod kubectl;
pub mod kubelet;
pub mod kubernetes;
pub mod light;
pub mod loader;
pub mod machine;
pub mod manifests;
mod map_ids;
pub mod maps;
pub mod mounts;
pub mod namespace;
pub mod options;
pub mod parcel;
pub mod patience;
pub mod pin;
pub mod play;
pub mod pod;
pub mod protocol;
pub mod raw;
pub mod scene;
pub mod server;
pub mod sidecar;
pub mod skip;
pub mod soak;
pub mod sockopt;
pub mod surroundings;
pub mod target;
pub mod tracer;
pub mod traces;
