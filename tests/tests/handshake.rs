//! Handshakes that end badly, or are asked for again before they end.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::net::SocketAddr;

use redirect_tests::{
    actor::Actor,
    backend::Backend,
    maps::{exhaust_ports, flows_of},
    options::Options,
    pod::Pod,
    protocol::{Dial, Dialed, Family, Identity, Listen, Step, Way, canonical},
    scene::{Attempt, Lands, SERVICE, Scene, To, inward, out, wildcards},
};
use rstest::rstest;

use Backend::{Iptables, Redirect};
use Direction::{In, Out};
use Family::{Mapped, V4, V6};
use Lands::{Direct, Inbound, Outbound};

const APP: Identity = Identity::APP;

/// Where a connection comes from that the proxy is to get.
#[derive(Clone, Copy, Debug)]
enum Direction {
    Out,
    In,
}

impl Direction {
    /// The connection, and the proxy's port.
    const fn attempt(self) -> (Attempt, u16) {
        match self {
            Out => (out(APP, To::Service(80), Outbound), 15001),
            In => (inward(8080, Inbound), 15006),
        }
    }

    fn dialer(self, scene: &mut Scene) -> &mut Actor {
        match self {
            Out => &mut scene.app,
            In => &mut scene.outside,
        }
    }
}

/// A captured pod in which nobody listens for the proxy yet.
fn without_proxy(backend: Backend) -> Scene {
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(backend, &Options::ISTIO);
    scene
}

fn listen(scene: &mut Scene, family: Family, port: u16, deferred: bool) {
    let at = wildcards(port)[usize::from(!family.is_ipv4())];
    let step = Step::Listen { at, deferred };
    scene.proxy.step("listener", step).unwrap();
}

fn accept(scene: &mut Scene, name: &str, expected: bool) -> Result<(), String> {
    let listener = "listener".to_owned();
    let step = Step::Accept { listener, expected };
    scene.proxy.step(name, step).map(drop)
}

/// A connection about which nobody says a word, and which is reset when it is closed.
fn quiet(family: Family, to: SocketAddr, name: &str) -> Dial {
    Dial {
        greeting: false,
        reset: true,
        ..Dial::new(family, to).keep(name)
    }
}

/// What `SO_ORIGINAL_DST` answered in the family asked.
fn told(dialed: &Dialed) -> Option<SocketAddr> {
    let both = [&dialed.original, &dialed.original6].map(|probe| probe.as_ref()?.address);
    both.into_iter().flatten().next()
}

/// What a socket gets that connects twice to where nobody listens.
const fn refusals(way: Way) -> [&'static str; 2] {
    match way {
        // SO_ERROR has told the first refusal; the kernel ends that attempt by the next call.
        Way::Nonblocking => ["ECONNREFUSED", "ECONNABORTED"],
        _ => ["ECONNREFUSED"; 2],
    }
}

#[rstest]
fn connection_reset_during_the_handshake_is_never_accepted(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Out, In)] direction: Direction,
) {
    let mut scene = without_proxy(backend);
    let (attempt, port) = direction.attempt();
    let to = scene.address(family, attempt.to);
    // The proxy's side stays in SYN_RECV until data comes.
    listen(&mut scene, family, port, true);
    for name in ["gone", "stays"] {
        let dialed = direction.dialer(&mut scene).dial(&quiet(family, to, name));
        assert_eq!(dialed.error, None);
        let waiting = Err("EAGAIN".to_owned());
        assert_eq!(accept(&mut scene, "early", false), waiting);
        if name == "gone" {
            direction.dialer(&mut scene).hang(name);
            assert_eq!(accept(&mut scene, "gone", false), waiting);
        }
    }
    // The one that was not reset is there as soon as it says something.
    direction
        .dialer(&mut scene)
        .step("stays", Step::Fill)
        .unwrap();
    accept(&mut scene, "stays", true).unwrap();
    let server = scene.proxy.look("stays");
    assert_eq!(told(&server), Some(to), "{server:?}");
    assert_eq!(server.local.map(|local| local.port()), Some(port));
    let client = direction.dialer(&mut scene).look("stays");
    assert_eq!(client.peer.map(canonical), Some(to));
    assert_eq!(server.peer, client.local.map(canonical));
}

#[rstest]
fn connection_reset_during_the_handshake_leaves_no_flow(#[values(V4, V6, Mapped)] family: Family) {
    let mut scene = without_proxy(Redirect);
    exhaust_ports(&scene.pod);
    let to = scene.address(family, To::Service(80));
    listen(&mut scene, family, 15001, true);
    assert_eq!(scene.app.dial(&quiet(family, to, "gone")).error, None);
    assert_eq!(flows_of(&scene.pod), 1);
    scene.app.hang("gone");
    assert_eq!(flows_of(&scene.pod), 0);
    assert_eq!(accept(&mut scene, "gone", false), Err("EAGAIN".to_owned()));
}

/// TPROXY shows the port called and REDIRECT the proxy's: which of them holds is asked once, when the connection is there.
#[rstest]
fn change_of_mode_during_the_handshake_changes_what_is_shown_only(
    #[values(V4, V6, Mapped)] family: Family,
    #[values(false, true)] to_tproxy: bool,
    #[values(false, true)] changed: bool,
) {
    let [before, after] = [!to_tproxy, to_tproxy].map(|tproxy| Options {
        tproxy,
        ..Options::ISTIO
    });
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    scene.attach(Redirect, &before);
    listen(&mut scene, family, 15006, true);
    let to = scene.address(family, To::Own(8080));
    let dialed = scene.outside.dial(&quiet(family, to, "under way"));
    assert_eq!(dialed.error, None);
    if changed {
        scene.attach(Redirect, &after);
    }
    scene.outside.step("under way", Step::Fill).unwrap();
    accept(&mut scene, "under way", true).unwrap();
    let server = scene.proxy.look("under way");
    assert_eq!(told(&server), Some(to), "{server:?}");
    let tproxy = to_tproxy == changed;
    let port = if tproxy { 8080 } else { 15006 };
    assert_eq!(server.local.map(|local| local.port()), Some(port));
    let client = scene.outside.look("under way");
    assert_eq!(client.peer.map(canonical), Some(to));
    assert_eq!(server.peer.map(canonical), client.local.map(canonical));
}

#[rstest]
fn connection_that_nobody_has_accepted_is_reset_with_its_listener(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Out, In)] direction: Direction,
) {
    let mut scene = without_proxy(backend);
    let (attempt, port) = direction.attempt();
    let to = scene.address(family, attempt.to);
    listen(&mut scene, family, port, false);
    let dialer = direction.dialer(&mut scene);
    assert_eq!(dialer.dial(&quiet(family, to, "waits")).error, None);
    scene.proxy.hang("listener");
    let dialer = direction.dialer(&mut scene);
    let reset = dialer.ask("waits", "anybody there?");
    assert_eq!(reset, Err("ECONNRESET".to_owned()));
    // Reset for good, but not for those that come when somebody listens again.
    scene.open_proxy();
    scene.attempt(family, &attempt).unwrap();
}

/// Who captures, and whether no steered port is left for a destination.
#[rstest]
fn refused_socket_connects_to_somebody_else(
    #[values((Redirect, false), (Redirect, true), (Iptables, false))] capture: (Backend, bool),
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Way::Blocking, Way::Nonblocking)] way: Way,
    #[values(
        (To::Service(80), To::Elsewhere(443), Outbound),
        (To::Service(80), To::Own(8080), Direct),
        (To::Own(81), To::Service(80), Outbound),
        (To::Own(61_000), To::Service(80), Outbound),
    )]
    (first, second, lands): (To, To, Lands),
) {
    let (backend, exhausted) = capture;
    let mut scene = without_proxy(backend);
    if exhausted {
        exhaust_ports(&scene.pod);
    }
    scene.app.create("again", family);
    let dial = |scene: &Scene, to| Dial::new(family, scene.address(family, to)).way(way);
    let refused = dial(&scene, first);
    for outcome in refusals(way) {
        assert_eq!(scene.app.connect("again", &refused).outcome(), outcome);
    }
    scene.open_proxy();
    let dial = dial(&scene, second);
    let dialed = scene.app.connect("again", &dial);
    let attempt = out(APP, second, lands);
    scene.judge(&dialed, dial.to, &attempt).unwrap();
    if backend == Redirect {
        assert_eq!(flows_of(&scene.pod), 0);
    }
}

#[rstest]
fn socket_refused_from_outside_connects_when_the_proxy_listens(
    #[values(Redirect, Iptables)] backend: Backend,
    #[values(V4, V6, Mapped)] family: Family,
    #[values(Way::Blocking, Way::Nonblocking)] way: Way,
) {
    let mut scene = without_proxy(backend);
    scene.outside.create("again", family);
    let to = scene.address(family, To::Own(8080));
    let dial = Dial::new(family, to).way(way);
    for outcome in refusals(way) {
        assert_eq!(scene.outside.connect("again", &dial).outcome(), outcome);
    }
    scene.open_proxy();
    let dialed = scene.outside.connect("again", &dial);
    scene.judge(&dialed, to, &inward(8080, Inbound)).unwrap();
}

#[rstest]
fn connect_called_again_on_the_way_changes_nothing(
    #[values((Redirect, false), (Redirect, true), (Iptables, false))] capture: (Backend, bool),
    #[values(V4, V6, Mapped)] family: Family,
) {
    let (backend, exhausted) = capture;
    let mut scene = Scene::without_proxy(Pod::new(), &Options::ISTIO);
    let [to, other] =
        [To::Service(80), To::Elsewhere(443)].map(|place| scene.address(family, place));
    let dial = Dial::new(family, to).timeout_ms(20_000);
    let begin =
        |scene: &mut Scene, name: &str, to| scene.app.step(name, Step::Begin { family, to });
    let failed = |errno: &str| Err::<String, _>(errno.to_owned());
    scene.app.create("uncaptured", family);
    assert_eq!(begin(&mut scene, "uncaptured", to), failed("EINPROGRESS"));
    let dialed = scene.app.connect("uncaptured", &dial);
    assert_eq!(dialed.outcome(), SERVICE);
    assert_eq!(begin(&mut scene, "uncaptured", other), failed("EISCONN"));

    scene.attach(backend, &Options::ISTIO);
    if exhausted {
        exhaust_ports(&scene.pod);
    }
    let at = wildcards(15001)[usize::from(!family.is_ipv4())];
    scene.proxy.listen(Listen::new("15001", at).slow(1, 1500));
    // The queue is full: the next handshake takes until the kernel sends its SYN again.
    for name in ["first", "second"] {
        assert_eq!(scene.app.dial(&quiet(family, to, name)).error, None);
    }
    scene.app.create("late", family);
    assert_eq!(begin(&mut scene, "late", to), failed("EINPROGRESS"));
    assert_eq!(begin(&mut scene, "late", to), failed("EALREADY"));
    assert_eq!(begin(&mut scene, "late", other), failed("EALREADY"));
    // A blocking call waits for the handshake that is under way.
    let dialed = scene.app.connect("late", &Dial { to: other, ..dial });
    let attempt = out(APP, To::Service(80), Outbound);
    scene.judge(&dialed, to, &attempt).unwrap();
    for again in [to, other] {
        assert_eq!(begin(&mut scene, "late", again), failed("EISCONN"));
    }
    assert_eq!(scene.app.look("late").peer.map(canonical), Some(to));
}
