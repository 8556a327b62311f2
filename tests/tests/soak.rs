//! The short version of `cargo xtask soak`, and what shows that it notices.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    net::{Ipv4Addr, TcpStream},
    ops::ControlFlow,
    sync::{PoisonError, RwLock},
    time::Duration,
};

use redirect_tests::{
    actor::Actor,
    bpffs, loader,
    options::Options,
    patience::{amount, patience},
    protocol::{Dial, Family, Identity},
    scene::To,
    soak::{Plan, cast::Cast, policy::APP_PORTS, report::Report, run},
};
use rstest::rstest;

/// The same schedule each time.
const SEED: u64 = 1;
/// The kernel's memory is the machine's: what others hold must not count as growth.
static ALONE: RwLock<()> = RwLock::new(());

#[test]
fn all_connections_end_where_they_should_while_everything_changes() {
    let _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
    let plan = Plan {
        held: 1_000,
        round_ms: 3_000,
        ..Plan::new(SEED, Duration::from_secs(amount(35, 70).into()))
    };
    let report = run(&plan, &mut |_| ControlFlow::Continue(()));
    println!("{report}");
    assert!(report.is_clean(), "{report}");
    // Where hardly anything happens, all is well.
    for (who, least) in [
        ("15001", amount(300, 30)),
        ("15006", amount(300, 30)),
        ("app", amount(1_000, 200)),
        ("service", amount(300, 30)),
    ] {
        let met = report.outcomes.get(who).copied();
        assert!(
            met >= Some(least.into()),
            "{who} answered {met:?} times: {report}"
        );
    }
    for manner in ["short", "long", "half-closed", "reset", "aborted", "held"] {
        let made = report.manners.get(manner).copied();
        assert!(
            made >= Some(amount(100, 20).into()),
            "{manner}: {made:?}: {report}"
        );
    }
    assert!(report.asked > amount(1_000, 200).into(), "{report}");
    assert!(report.counted > amount(4, 2).into(), "{report}");
    // Nobody listens there, and nothing captures it.
    assert!(report.outcomes.contains_key("ECONNREFUSED"), "{report}");
    assert!(report.exact_outbound >= amount(1, 0).into(), "{report}");
    assert!(report.storages > 0, "{report}");
    let events: u64 = report.events.values().sum();
    assert!(events > amount(10, 5).into(), "{report}");
    for kind in ["attach", "upgrade", "detach", "proxy restarted"] {
        let happened = report.events.get(kind).copied().unwrap_or_default();
        assert!(happened >= amount(1, 0).into(), "{kind}: {report}");
    }
}

/// A pod that nothing should happen to, until something is noticed, and for a few rounds at most.
fn noticed(distortion: fn(Options) -> Options, meddle: fn(&mut Cast)) -> Report {
    let _beside = ALONE.read().unwrap_or_else(PoisonError::into_inner);
    let plan = Plan {
        held: 100,
        pods: 1,
        round_ms: 1_500,
        calm: true,
        distortion,
        meddle,
        ..Plan::new(SEED, patience(Duration::from_secs(30)))
    };
    run(&plan, &mut |report| {
        if report.is_clean() && report.rounds < 5 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    })
}

/// Whether one of these was said.
fn is_noticed(report: &Report, signs: &[&str]) -> bool {
    let mut violations = report.violations.iter();
    violations.any(|violation| signs.iter().any(|sign| violation.contains(sign)))
}

/// Negative controls: something happens that the check is not told of.
#[rstest]
#[case::detached(
    |options| options,
    |cast: &mut Cast| drop(loader::detach(cast.pod.cgroup.path())),
    // New connections and those that are there: on a slow machine the latter may be all that is told.
    &["who answered is \"service\", expected \"15001\"", "afterwards: changed"],
)]
#[case::policy(
    |options| Options { exclude_outbound: "80", ..options },
    |_: &mut Cast| (),
    &["who answered is \"service\", expected \"15001\""],
)]
#[case::proxy_killed(
    |options| options,
    |cast: &mut Cast| {
        cast.proxies.clear();
        cast.start_proxy();
    },
    &["Proxy("],
)]
#[case::not_counted(|options| options, stranger, &["counts"])]
#[case::leak(|options| options, leak, &["not freed by the kernel"])]
#[case::pin(|options| options, pin, &["and now Counts"])]
#[case::storage(|options| options, hold, &["sockets with a storage"])]
fn what_should_not_be_is_noticed(
    #[case] distortion: fn(Options) -> Options,
    #[case] meddle: fn(&mut Cast),
    #[case] signs: &[&str],
) {
    let report = noticed(distortion, meddle);
    assert!(is_noticed(&report, signs), "{report}");
    // The way to have it again is part of what is shown.
    assert!(
        report.to_string().contains("cargo xtask soak --seed 1 "),
        "{report}"
    );
}

/// A connection that nobody tells the check of.
fn stranger(cast: &mut Cast) {
    let cgroup = Some(cast.pod.cgroup.child("stranger"));
    let mut stranger = Actor::start(&cast.pod.netns.path(), cgroup, Identity::APP);
    let to = To::Service(80).address(&cast.pod, Family::V4);
    stranger.dial(&Dial::new(Family::V4, to));
}

/// Holds a map until this process ends.
fn leak(_: &mut Cast) {
    std::mem::forget(bpffs::map("PODS"));
}

/// Pins something of its own where the loader has its pins.
fn pin(_: &mut Cast) {
    let map = bpffs::map("PODS").unwrap();
    // Once is enough, and then it is there.
    drop(map.pin(bpffs::map_pin("PODS").unwrap().with_file_name("STRANGE")));
}

/// Holds a connection of the application until this process ends.
fn hold(cast: &mut Cast) {
    let to = (Ipv4Addr::LOCALHOST, APP_PORTS[0]);
    let connect = || TcpStream::connect(to).unwrap();
    std::mem::forget(cast.pod.netns.enter(connect));
}
