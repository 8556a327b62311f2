//! An unmodified Envoy, configured as a sidecar, behind the capture.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use redirect_tests::{
    backend::Backend,
    envoy::{self, Envoy, SELF_PORT},
    options::Options,
    pod::Pod,
    protocol::{Dial, Dialed, Family, canonical},
    scene::{Scene, To},
    skip,
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};

const TPROXY: Options = Options {
    tproxy: true,
    ..Options::ISTIO
};

/// Envoy in a captured pod, or `None` with the record of a skip.
fn sidecar(backend: Backend) -> Result<(Envoy, Scene), String> {
    let program = envoy::find()?;
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.pod.netns.ip("addr replace ::6/128 dev lo nodad");
    control(&mut scene);
    scene.attach(backend, &Options::ISTIO);
    let envoy = Envoy::start(&program, &scene.pod, &mut scene.app);
    Ok((envoy, scene))
}

/// The same for TPROXY.
fn transparent_sidecar(backend: Backend) -> Result<(Envoy, Scene), String> {
    let program = envoy::find()?;
    let mut scene = Scene::without_proxy(Pod::new(), &TPROXY);
    scene.attach(backend, &TPROXY);
    let envoy = Envoy::start_transparent(&program, &scene.pod, &mut scene.app);
    Ok((envoy, scene))
}

/// Uncaptured, the client itself is what the server sees, and nobody serves [`SELF_PORT`].
fn control(scene: &mut Scene) {
    for family in [V4, V6] {
        let [service, own, nobody] = [To::Service(80), To::Own(8080), To::Service(SELF_PORT)]
            .map(|to| Dial::new(family, scene.address(family, to)));
        for dialed in [scene.app.dial(&service), scene.outside.dial(&own)] {
            assert_eq!(dialed.greeting.map(|seen| seen.peer), dialed.local);
        }
        assert_eq!(scene.app.dial(&nobody).outcome(), "ECONNREFUSED");
    }
}

/// What Envoy and the server say about one connection.
struct Story {
    dialed: Dialed,
    /// Listener, downstream_local, downstream_remote, upstream_host, upstream_local.
    log: Vec<String>,
}

fn tell(envoy: &Envoy, scene: &mut Scene, inward: bool, dial: &Dial) -> Story {
    let dialed = if inward {
        scene.outside.dial(dial)
    } else {
        scene.app.dial(dial)
    };
    assert!(dialed.greeting.is_some(), "{dialed:?}");
    let log = envoy.access_log(&canonical(dialed.local.unwrap()).to_string());
    Story { dialed, log }
}

#[rstest]
fn outbound_request_reaches_its_destination_through_envoy(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
) {
    let (envoy, mut scene) = match sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    for port in [80, 443, 15008] {
        let to = scene.address(family, To::Service(port));
        let Story { dialed, log } = tell(&envoy, &mut scene, false, &Dial::new(family, to));
        let (local, greeting) = (
            canonical(dialed.local.unwrap()),
            dialed.greeting.as_ref().unwrap(),
        );
        assert_eq!(greeting.who, "service");
        assert_eq!(dialed.peer.map(canonical), Some(to));
        assert_eq!(local.ip(), scene.pod.own(family));
        // Envoy made a connection of its own.
        assert_eq!(greeting.peer.ip(), scene.pod.own(family));
        assert_ne!(greeting.peer, local);
        assert_eq!(
            log[..4],
            [
                "outbound".to_owned(),
                to.to_string(),
                local.to_string(),
                to.to_string()
            ]
        );
        assert_eq!(log[4], greeting.peer.to_string());
    }
}

#[rstest]
fn inbound_request_reaches_the_application_through_envoy(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (envoy, mut scene) = match sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    for port in [80, 8080] {
        let to = scene.address(family, To::Own(port));
        let Story { dialed, log } = tell(&envoy, &mut scene, true, &Dial::new(family, to));
        let (local, greeting) = (dialed.local.unwrap(), dialed.greeting.as_ref().unwrap());
        assert_eq!(greeting.who, "app");
        assert_eq!(dialed.peer, Some(to));
        assert_eq!(greeting.local, to);
        let passthrough = if family == V4 { "127.0.0.6" } else { "::6" };
        assert_eq!(greeting.peer.ip().to_string(), passthrough);
        assert_eq!(
            log[..4],
            [
                "inbound".to_owned(),
                to.to_string(),
                local.to_string(),
                to.to_string()
            ]
        );
        assert_eq!(log[4], greeting.peer.to_string());
    }
}

#[rstest]
fn request_to_oneself_passes_both_listeners(#[values(Redirect, Iptables)] backend: Backend) {
    let (envoy, mut scene) = match sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    let to = scene.address(V4, To::Service(SELF_PORT));
    let Story { dialed, log } = tell(&envoy, &mut scene, false, &Dial::new(V4, to));
    let greeting = dialed.greeting.unwrap();
    assert_eq!(greeting.who, "app");
    assert_eq!(greeting.peer.ip().to_string(), "127.0.0.6");
    let own = scene.address(V4, To::Own(8080)).to_string();
    assert_eq!(
        log[..4],
        [
            "outbound".to_owned(),
            to.to_string(),
            dialed.local.unwrap().to_string(),
            own.clone()
        ]
    );
    // The second half of the way: Envoy's outbound side calls its own inbound listener.
    let inbound = envoy.access_log(&log[4]);
    assert_eq!(inbound[..2], ["inbound".to_owned(), own]);
    assert_eq!(inbound[4], greeting.peer.to_string());
}

/// Sends a lot over one connection out of the pod and one into it.
fn talk_long(scene: &mut Scene, family: Family) {
    let (service, own) = (
        scene.address(family, To::Service(80)),
        scene.address(family, To::Own(8080)),
    );
    let out = Dial::new(family, service).keep("out");
    assert_eq!(scene.app.dial(&out).outcome(), "service");
    let inward = Dial::new(family, own).keep("in");
    assert_eq!(scene.outside.dial(&inward).outcome(), "app");
    let long = "x".repeat(100_000);
    for _ in 0..20 {
        assert_eq!(scene.app.ask("out", &long).as_deref(), Ok(&*long));
        assert_eq!(scene.outside.ask("in", &long).as_deref(), Ok(&*long));
    }
}

#[rstest]
fn connections_flow_through_envoy_for_as_long_as_they_like(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let (_envoy, mut scene) = match sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    talk_long(&mut scene, V4);
}

#[rstest]
fn transparent_envoy_shows_the_application_its_client(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (envoy, mut scene) = match transparent_sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    for port in [80, 8080] {
        let to = scene.address(family, To::Own(port));
        let Story { dialed, log } = tell(&envoy, &mut scene, true, &Dial::new(family, to));
        let (local, greeting) = (dialed.local.unwrap(), dialed.greeting.as_ref().unwrap());
        assert_eq!(greeting.who, "app");
        assert_eq!(dialed.peer, Some(to));
        assert_eq!(greeting.local, to);
        // The client's address, on a connection of Envoy's own.
        assert_eq!(greeting.peer.ip(), local.ip());
        assert_ne!(greeting.peer, local);
        assert_eq!(
            log[..4],
            [
                "inbound".to_owned(),
                to.to_string(),
                local.to_string(),
                to.to_string()
            ]
        );
        assert_eq!(log[4], greeting.peer.to_string());
    }
}

#[rstest]
fn transparent_envoy_passes_both_its_listeners_to_reach_its_own_pod(
    #[values(Redirect, Iptables)] backend: Backend,
) {
    let (envoy, mut scene) = match transparent_sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    let to = scene.address(V4, To::Service(SELF_PORT));
    let Story { dialed, log } = tell(&envoy, &mut scene, false, &Dial::new(V4, to));
    let greeting = dialed.greeting.unwrap();
    assert_eq!(greeting.who, "app");
    assert_eq!(greeting.peer.ip(), scene.pod.ipv4);
    let own = scene.address(V4, To::Own(8080)).to_string();
    assert_eq!(log[3], own);
    let inbound = envoy.access_log(&log[4]);
    assert_eq!(inbound[..2], ["inbound".to_owned(), own]);
    assert_eq!(inbound[4], greeting.peer.to_string());
}

#[rstest]
fn connections_flow_through_a_transparent_envoy(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6)] family: Family,
) {
    let (_envoy, mut scene) = match transparent_sidecar(backend) {
        Ok(sidecar) => sidecar,
        Err(probe) => skip!("{probe}"),
    };
    talk_long(&mut scene, family);
}
