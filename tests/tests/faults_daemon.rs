//! The node's daemon is killed after, or refused, calls to the kernel that change something, while a pod comes, changes and goes.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use redirect_tests::{
    bpffs,
    daemon_faults::{
        Vanishes::{self, Both, Cgroup, Namespace},
        Work, endure, vanish,
    },
    faults::{
        DIRECT, ISTIO,
        Suffers::{self, Kill, Refusal},
        THIRD,
    },
    loader,
    options::Options,
    pod::Pod,
};
use rstest::rstest;

const PLAIN: &[(&str, &str)] = &[];
const CHANGED: &[(&str, &str)] = &[("traffic.sidecar.istio.io/excludeOutboundPorts", "443")];

#[rstest]
#[case::pod_that_appears(Work { before: None, after: Some(PLAIN), old: DIRECT, new: ISTIO })]
#[case::annotation_that_changes(Work { before: Some(PLAIN), after: Some(CHANGED), old: ISTIO, new: THIRD })]
#[case::pod_that_leaves_the_mesh(Work { before: Some(CHANGED), after: None, old: THIRD, new: DIRECT })]
fn daemon_gets_there(#[values(Kill, Refusal)] suffers: Suffers, #[case] work: Work) {
    beside_another(|| endure(work, suffers));
}

#[rstest]
fn pod_that_vanishes_while_it_is_attached_is_forgotten(
    #[values(Cgroup, Namespace, Both)] vanishes: Vanishes,
) {
    beside_another(|| vanish(vanishes));
}

/// Another pod is attached by hand, and none of the daemon's: the programs stay loaded.
fn beside_another(work: impl FnOnce() + Send) {
    bpffs::private(|| {
        let other = Pod::new();
        loader::attach(&other, &Options::ISTIO);
        work();
        loader::detach(other.cgroup.path());
    });
}
