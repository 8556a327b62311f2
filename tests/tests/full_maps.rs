//! A map without room: attaching one more pod fails, says which map is full and changes nothing; pods that are attached stay so.
//! And none has more than its part of the room.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{net::Ipv4Addr, thread, time::Duration};

use redirect_common::{
    pod::PodConfig,
    record::Record,
    route::{RouteInfo, RouteKey},
    virtual_machine::{Interface, InterfaceKey},
};
use redirect_tests::{
    backend::Backend::Redirect,
    bpffs::{self, State},
    faults::{
        self, DIRECT, INTERFACE, OTHER, OTHER_OPTIONS, THIRD, THIRD_OPTIONS, attach, detach, ends,
        run,
    },
    fill::{self, Empty},
    loader::finish,
    machine::{Link, Machine},
    maps::{destinations_of, exhaust_ports, flows_of, push_out_flows},
    namespace::{errors, succeed},
    options::Options,
    protocol::{Dial, Family},
    scene::{Scene, To},
    tracer,
    traces::Traces,
};
use rstest::rstest;

use Family::{V4, V6};

/// With something for every map.
const OPTIONS: Options = Options {
    virtual_interfaces: INTERFACE,
    ..OTHER_OPTIONS
};

#[rstest]
#[case::pods("PODS", || fill::hash::<8, { size_of::<PodConfig>() }>("PODS"))]
#[case::lists("LISTS", fill::lists)]
#[case::routes("ROUTES", || fill::trie::<{ size_of::<RouteKey>() }, { size_of::<RouteInfo>() }>("ROUTES"))]
#[case::counts("COUNTS", fill::counts)]
#[case::listeners("LISTENERS", fill::listeners)]
#[case::interfaces("INTERFACES", || fill::hash::<{ size_of::<InterfaceKey>() }, { size_of::<Interface>() }>("INTERFACES"))]
fn no_room_for_one_more_pod(#[case] map: &str, #[case] fill: fn() -> Empty) {
    one_pod_too_many(map, |scene| {
        let empty = fill();
        let output = finish(&mut attach(scene, &OPTIONS));
        (empty, output.status.code(), errors(&output))
    });
}

/// Records of nobody are collected before anything is written: the map is filled between the two.
#[rstest]
fn no_room_for_the_record_of_one_more_pod() {
    one_pod_too_many("RECORDS", |scene| {
        let command = attach(scene, &OPTIONS);
        let calls = tracer::run(&command, None).calls;
        run(&mut detach(scene));
        let first_write = calls.iter().position(|call| call == "bpf MAP_UPDATE_ELEM");
        let mut empty = None;
        let traced = tracer::run_held(&command, first_write.unwrap() + 1, || {
            empty = Some(fill::hash::<8, { size_of::<Record>() }>("RECORDS"));
        });
        (empty.unwrap(), traced.code, traced.errors)
    });
}

/// `fills` the map and attaches; the code and what was said are those of the attachment.
fn one_pod_too_many(map: &str, fills: impl FnOnce(&Scene) -> (Empty, Option<i32>, String) + Send) {
    bpffs::private(|| {
        let (mut scene, mut other) = (faults::scene(), faults::scene());
        let _machine = Machine::new(&scene.pod, INTERFACE, 1, Link::Plain);
        run(&mut attach(&other, &THIRD_OPTIONS));
        let before = Traces::read([&scene, &other]);

        let (empty, code, said) = fills(&scene);
        let is_told =
            said.starts_with("redirect: ") && said.contains(&format!("map {map} is full"));
        assert!(
            code == Some(1) && is_told && said.trim_end().lines().count() == 1,
            "{code:?} {said}"
        );
        assert_eq!(ends(&mut scene, None).unwrap(), DIRECT);
        assert_eq!(ends(&mut other, None).unwrap(), THIRD);
        empty();
        let now = Traces::read([&scene, &other]);
        assert_eq!(now.differences(&before), Vec::<String>::new());

        // Negative control: with room, it is attached.
        run(&mut attach(&scene, &OPTIONS));
        assert_eq!(ends(&mut scene, None).unwrap(), OTHER);
        run(&mut detach(&scene));
        run(&mut detach(&other));
    });
}

/// What a pod with CAP_NET_ADMIN may do, again and again.
#[rstest]
#[case::routes(
    OTHER_OPTIONS,
    |round, n| format!("route add blackhole {}", Ipv4Addr::from_bits((11 + round) << 24 | n)),
    1 << 14,
    "route flush type blackhole",
    "more routes or addresses than are kept",
    "ROUTES",
    1 << 14
)]
#[case::interfaces(
    Options { virtual_interfaces: "full+", ..OTHER_OPTIONS },
    |round, n| format!("link add full{round}x{n} group 77 type bridge"),
    300,
    "link del group 77",
    "machines behind 45 more are not captured",
    "INTERFACES",
    256
)]
fn no_pod_takes_the_room_of_others(
    #[case] options: Options,
    #[case] command: fn(u32, u32) -> String,
    #[case] count: u32,
    #[case] clear: &str,
    #[case] told: &str,
    #[case] map: &str,
    #[case] most: usize,
) {
    bpffs::private(|| {
        let (mut scene, mut other) = (faults::scene(), faults::scene());
        run(&mut attach(&other, &THIRD_OPTIONS));
        // One that stays.
        scene.pod.netns.ip("link add full type bridge");
        let entries = || State::read().entries(map);
        let before = entries();
        let mut taken = 0;
        for round in 0..2 {
            let commands: Vec<_> = (0..count).map(|n| command(round, n)).collect();
            scene.pod.netns.ip(&commands.join("\n"));
            let output = finish(&mut attach(&scene, &options));
            let said = errors(&output);
            assert!(output.status.success() && said.contains(told), "{said}");
            assert_eq!(said.trim_end().lines().count(), 1, "{said}");
            taken = entries() - before;
            assert!((most / 2..=most).contains(&taken), "{taken}");
            assert_eq!(ends(&mut scene, None).unwrap(), OTHER);
            scene.pod.netns.ip(clear);
        }
        // Negative control: with fewer, nothing is said.
        run(&mut attach(&scene, &options));
        assert!(entries() - before < taken);
        assert_eq!(ends(&mut scene, None).unwrap(), OTHER);
        assert_eq!(ends(&mut other, None).unwrap(), THIRD);
        run(&mut detach(&scene));
        assert_eq!(entries(), before);
        run(&mut detach(&other));
    });
}

/// The kernel is asked about one address of each network. If that one has a route of its own that is left out, the answer is not
/// the network's.
#[rstest]
fn what_is_left_out_speaks_for_no_network() {
    /// The one that is asked about for the default route.
    const ASKED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
    bpffs::private(|| {
        let mut scene = Scene::new();
        let own = Dial::new(V4, (ASKED, 80).into());
        let outside = Dial::new(V4, scene.address(V4, To::Service(80)));
        let wider = (0..1 << 13).map(|n| {
            format!(
                "route add blackhole {}/31",
                Ipv4Addr::from_bits(0x0b00_0000 | n << 1)
            )
        });
        let wider = wider.collect::<Vec<_>>().join("\n");
        scene
            .pod
            .netns
            .ip(&format!("route add local {ASKED}/32 dev lo"));
        for (routes, who) in [(&*wider, "15001"), ("route flush type blackhole", "app")] {
            scene.pod.netns.ip(routes);
            scene.attach(Redirect, &Options::ISTIO);
            assert_eq!(scene.app.dial(&outside).outcome(), "15001");
            assert_eq!(scene.app.dial(&own).outcome(), who);
        }
        scene.detach();
    });
}

/// What happens to a connection whose SYN is on its way while others fill `FLOWS`.
#[rstest]
#[case::few_destinations(false, true, "15001")]
#[case::more_destinations_than_ports(true, true, "ECONNREFUSED")]
#[case::room_for_all(true, false, "15001")]
fn connection_on_its_way_when_others_fill_the_flows(
    #[values(V4, V6)] family: Family,
    #[case] exhausted: bool,
    #[case] filled: bool,
    #[case] outcome: &str,
) {
    bpffs::private(|| {
        let mut scene = Scene::new();
        scene.attach(Redirect, &Options::ISTIO);
        if exhausted {
            exhaust_ports(&scene.pod);
        }
        let to = scene.address(family, To::Service(80));
        let Scene { app, pod, .. } = &mut scene;
        let dial = Dial::new(family, to).timeout_ms(20_000);
        // The SYN is lost, and sent again a second later.
        succeed(pod.netns.command("tc").args(LOSE_ALL));
        let dialed = thread::scope(|scope| {
            let dialed = scope.spawn(|| app.dial(&dial));
            let known = if exhausted { flows_of } else { destinations_of };
            while known(pod) == 0 && !dialed.is_finished() {
                thread::sleep(Duration::from_millis(1));
            }
            if filled {
                push_out_flows(pod);
            }
            succeed(pod.netns.command("tc").args(LOSE_NOTHING));
            dialed.join().unwrap()
        });
        assert_eq!(dialed.outcome(), outcome, "{dialed:?}");
        // What comes later is captured in any case.
        assert_eq!(app.dial(&dial).outcome(), "15001");
        scene.detach();
    });
}

const LOSE_ALL: [&str; 6] = ["qdisc", "add", "dev", "lo", "root", "blackhole"];
const LOSE_NOTHING: [&str; 5] = ["qdisc", "del", "dev", "lo", "root"];
