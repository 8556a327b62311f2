//! Both ends of a connection stop sending at the same time.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    maps::flows_of,
    options::Options,
    patience::patience,
    pod::Pod,
    protocol::{Dial, Family, Step, canonical},
    scene::{APP, SERVICE, Scene, To, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Family::{Mapped, V4, V6};

/// No acknowledgement takes longer.
const PATIENCE: Duration = Duration::from_secs(3);

fn state(actor: &mut Actor) -> String {
    actor.step("connection", Step::State).unwrap()
}

fn closes(actor: &mut Actor) {
    let deadline = Instant::now() + patience(PATIENCE);
    while state(actor) != "CLOSE" {
        assert!(Instant::now() < deadline, "{}", state(actor));
        thread::sleep(Duration::from_millis(1));
    }
}

#[rstest]
fn simultaneous_close_loses_nothing(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] inward: bool,
) {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let (to, port, real) = if inward {
        (To::Own(8080), 15006, APP)
    } else {
        (To::Service(80), 15001, SERVICE)
    };
    let to = scene.address(family, to);
    let dial = Dial::new(family, to);
    let at = wildcards(port)[usize::from(!family.is_ipv4())];
    let deferred = false;
    scene
        .proxy
        .step("listener", Step::Listen { at, deferred })
        .unwrap();
    let accept = |expected| Step::Accept {
        listener: "listener".to_owned(),
        expected,
    };
    let client = if inward {
        &mut scene.outside
    } else {
        &mut scene.app
    };
    assert_eq!(client.dial(&dial).outcome(), real);
    let nobody = scene.proxy.step("connection", accept(false));
    assert_eq!(nobody, Err("EAGAIN".to_owned()));

    scene.attach(backend, &Options::ISTIO);
    let client = if inward {
        &mut scene.outside
    } else {
        &mut scene.app
    };
    let server = &mut scene.proxy;
    let quiet = Dial {
        greeting: false,
        ..dial.keep("connection")
    };
    assert_eq!(client.dial(&quiet).error, None);
    server.step("connection", accept(true)).unwrap();
    let names = |actor: &mut Actor| {
        let seen = actor.look("connection");
        (seen.local, seen.peer, seen.original, seen.original6)
    };
    let before = [names(client), names(server)];
    assert_eq!(before[0].1.map(canonical), Some(to));
    // Nobody reads: each end's FIN has to wait behind its data.
    let sent = [&mut *client, &mut *server].map(|end| end.step("connection", Step::Fill));
    for end in [&mut *client, &mut *server] {
        end.step("connection", Step::Shut).unwrap();
    }
    for end in [&mut *client, &mut *server] {
        assert_eq!(state(end), "FIN_WAIT1");
    }
    assert_eq!([names(client), names(server)], before);
    assert_eq!(client.step("connection", Step::Drain), sent[1]);
    // The server's FIN is here, and the client's own has not been acknowledged.
    assert_eq!(state(client), "CLOSING");
    assert_eq!(names(client), before[0]);
    assert_eq!(server.step("connection", Step::Drain), sent[0]);
    closes(client);
    closes(server);
    if backend == Redirect {
        assert_eq!(flows_of(&scene.pod), 0);
    }
}
