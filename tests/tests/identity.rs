//! Whose connection it is: the effective ids of whoever created the socket, as iptables' owner match has it (semantics.md 0.2).
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    options::Options,
    pod::{Pod, Shape},
    protocol::{Dial, Family, Identity},
    scene::{Lands, Scene, To, out},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

#[rstest]
#[case::real_app_effective_proxy(Identity::new(1000, 1000).effective_user(1337), Direct, Inbound)]
#[case::real_proxy_effective_app(Identity::new(1337, 1000).effective_user(1000), Outbound, Direct)]
#[case::real_app_group_effective_proxy_group(Identity::new(1000, 1000).effective_group(1337), Direct, Direct)]
#[case::real_proxy_group_effective_app_group(Identity::new(1000, 1337).effective_group(1000), Outbound, Direct)]
#[case::supplementary_proxy_group(Identity::new(1000, 1000).supplementary(1337), Outbound, Direct)]
#[case::root_in_the_proxys_group(Identity::new(0, 1337), Direct, Direct)]
fn effective_ids_decide(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[case] identity: Identity,
    #[case] outside: Lands,
    #[case] own: Lands,
) {
    let attempts = [
        out(identity.clone(), To::Service(80), outside),
        out(identity, To::Own(8080), own),
    ];
    Scene::run(backend, family, Options::ISTIO, &attempts);
}

/// Creates a socket as one identity and connects it as another.
fn create_then_connect(
    backend: Backend,
    family: Family,
    [start, creator, connector]: [Identity; 3],
    created_before_attach: bool,
) -> String {
    let mut scene = Scene::new();
    let to = scene.address(family, To::Service(80));
    if !created_before_attach {
        scene.attach(backend, &Options::ISTIO);
    }
    let actor = scene.actor(&start);
    actor.assume(&creator);
    actor.create("early", family);
    actor.assume(&connector);
    if created_before_attach {
        scene.attach(backend, &Options::ISTIO);
    }
    let dialed = scene.actor(&start).connect("early", &Dial::new(family, to));
    dialed.outcome().to_owned()
}

const ROOT: Identity = Identity::ROOT;
/// The superuser, acting as the proxy for the time being.
const ROOT_AS_PROXY: Identity = Identity::new(0, 0).effective_user(1337);

#[rstest]
#[case::root_then_proxy_is_captured([ROOT, ROOT, Identity::PROXY], "15001")]
#[case::root_then_app_is_captured([ROOT, ROOT, Identity::APP], "15001")]
#[case::proxy_then_root_is_exempt([ROOT, ROOT_AS_PROXY, ROOT], "service")]
fn creator_decides_not_the_caller(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[case] identities: [Identity; 3],
    #[case] who: &str,
) {
    assert_eq!(create_then_connect(backend, family, identities, false), who);
}

#[rstest]
#[case::app([ROOT, Identity::APP, Identity::APP], "15001")]
#[case::proxy([ROOT, Identity::PROXY, Identity::PROXY], "service")]
#[case::root_then_proxy([ROOT, ROOT, Identity::PROXY], "15001")]
fn socket_created_before_attach_has_an_owner_too(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
    #[case] identities: [Identity; 3],
    #[case] who: &str,
) {
    assert_eq!(create_then_connect(backend, family, identities, true), who);
}

#[rstest]
fn ids_are_read_in_the_pods_user_namespace(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let pod = Pod::shaped(Shape {
        id_offset: 100_000,
        ..Pod::shape()
    });
    let mut scene = Scene::with(pod, &Options::ISTIO);
    scene.attach(
        backend,
        &Options {
            owner_groups_exclude: "2000",
            ..Options::ISTIO
        },
    );
    scene.all(
        "attached",
        family,
        &[
            out(Identity::APP, To::Service(80), Outbound),
            out(Identity::PROXY, To::Service(80), Direct),
            out(Identity::PROXY, To::Own(8080), Inbound),
            out(Identity::new(1000, 1337), To::Service(80), Direct),
            out(Identity::new(1000, 2000), To::Service(80), Direct),
            out(Identity::ROOT, To::Service(80), Outbound),
        ],
    );
    // The node's own 1337 is a stranger in there.
    let cgroup = Some(scene.pod.cgroup.child("stranger"));
    let mut stranger = Actor::start(&scene.pod.netns.path(), cgroup, Identity::PROXY);
    let to = scene.address(family, To::Service(80));
    assert_eq!(stranger.dial(&Dial::new(family, to)).outcome(), "15001");
}
