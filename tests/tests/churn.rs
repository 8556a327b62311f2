//! Pods come and go by the hundred under one daemon, and leave nothing.
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
    api_server::ApiServer,
    bpffs::{self, Objects, State},
    cgroup::Cgroup,
    daemon::{Daemon, Usage, inward, out, until_out},
    kubernetes::object,
    light::LightPod,
    patience::amount,
    protocol::{Burst, Dial, Family},
    scene::{Scene, To, loopback},
};
use rstest::rstest;
use serde_json::{Value, json};

/// How many pods come and go at the same time.
const WAVE: u32 = 50;
/// How often.
const WAVES: u32 = 20;
const WAVES_WHEN_SLOW: u32 = 4;
/// What allocators keep may grow by that much, whatever the number of pods: more where more is on its way at once.
const GROWTH_KB: u32 = 16 * 1024;
const GROWTH_KB_WHEN_SLOW: u32 = 32 * 1024;
/// Connections that the daemon may have open to somebody who asks, or to the API, when it is looked at.
const CALLS: usize = 3;
/// Longer, and it hangs: no measure of speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// How pods end.
#[derive(Clone, Copy, Debug)]
enum End {
    /// As a kubelet does it: processes end, then all that was theirs goes.
    Orderly,
    /// Cgroup and namespace are gone before the daemon hears of it.
    Unheard,
}

/// One pod that connects and asks for names, among others that do not.
struct Wave {
    busy: Scene,
    light: Vec<LightPod>,
    objects: Vec<Value>,
}

impl Wave {
    fn new(above: &Cgroup, first: u32) -> Self {
        let busy = Scene::new();
        let light: Vec<LightPod> = thread::scope(|scope| {
            let make = |number: u32| {
                let number = u16::try_from(first + number).unwrap();
                scope.spawn(move || LightPod::new(above, number))
            };
            let made: Vec<_> = (1..WAVE).map(make).collect();
            made.into_iter().map(|pod| pod.join().unwrap()).collect()
        });
        let mut captured = object(&busy.pod, &[]);
        captured["spec"]["containers"][1]["env"] =
            json!([{"name": "ISTIO_META_DNS_CAPTURE", "value": "true"}]);
        let objects = [captured]
            .into_iter()
            .chain(light.iter().map(LightPod::object))
            .collect();
        Self {
            busy,
            light,
            objects,
        }
    }

    /// Makes connections, which leave their traces in the maps.
    fn connect(&mut self, daemon: &Daemon) {
        until_out(daemon, &mut self.busy, 80, "15001");
        assert_eq!(inward(&mut self.busy, 8080), "15006");
        let server = self.busy.address(Family::V4, To::Service(53));
        let agent = loopback(server, 15053);
        self.busy.proxy.reverse("agent", agent, 1);
        let replies = self.busy.app.burst(&Burst::new(Family::V4, vec![server]));
        assert_eq!(replies.unwrap()[0].from, server);
        let traces = bpffs::traces();
        assert!(traces["DESTINATIONS"] > 1, "{traces:?}");
        assert!(traces["DNS_SLOTS"] > 0, "{traces:?}");
    }

    fn end(self, how: End, server: &ApiServer) {
        match how {
            End::Orderly => {
                for object in &self.objects {
                    server.delete(object);
                }
                drop((self.busy, self.light));
            }
            End::Unheard => {
                drop((self.busy, self.light));
                for object in &self.objects {
                    server.delete(object);
                }
            }
        }
    }
}

/// Waits until the daemon has captured so many pods, and knows of no other.
fn until_attached(daemon: &Daemon, count: u32) {
    let count = f64::from(count);
    daemon.until_within(PATIENCE, &format!("{count} pods are attached"), || {
        let known = daemon.metric("redirect_pods{state=\"captured\"}")?;
        let noted = daemon.metric("redirect_map_entries{map=\"RECORDS\"}")?;
        (known == count && noted == count).then_some(())
    });
}

/// What must not grow, when only one pod is left.
struct Rest {
    state: State,
    traces: std::collections::BTreeMap<&'static str, usize>,
    objects: Objects,
    daemon: Usage,
}

impl Rest {
    fn of(daemon: &Daemon) -> Self {
        Self {
            state: State::read(),
            traces: bpffs::traces(),
            objects: Objects::loaded(),
            daemon: daemon.usage(),
        }
    }
}

#[rstest]
fn pods_that_come_and_go_leave_nothing() {
    bpffs::private(|| {
        let above = Cgroup::new(&format!("rd-{}-churn", std::process::id()));
        let mut stays = Scene::new();
        assert_eq!(out(&mut stays, 80), "service");
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let stays_object = object(&stays.pod, &[]);
        server.apply(&stays_object);
        until_out(&daemon, &mut stays, 80, "15001");
        let mut ever = Objects::loaded();
        let mut wave = |first: u32, how: End| {
            let mut wave = Wave::new(&above, first);
            assert_eq!(out(&mut wave.busy, 80), "service");
            for object in &wave.objects {
                server.apply(object);
            }
            until_attached(&daemon, 1 + WAVE);
            wave.connect(&daemon);
            let loaded = Objects::loaded();
            // Each pod has links and an entry of its own: they are seen if they stay.
            let [links, programs, _] = loaded.without(&ever).counts();
            assert!(links >= 9 * WAVE as usize && programs >= WAVE as usize);
            ever = std::mem::take(&mut ever).with(loaded);
            wave.end(how, &server);
            until_attached(&daemon, 1);
        };
        // What is loaded and allocated once is there after the first pods.
        wave(0, End::Orderly);
        let before = Rest::of(&daemon);
        let traffic = Dial::new(Family::V4, stays.address(Family::V4, To::Service(80)));
        stays.app.traffic_start(traffic);
        let begun = Instant::now();
        let pods = amount(WAVES, WAVES_WHEN_SLOW) * WAVE;
        for (first, how) in (WAVE..WAVE + pods)
            .step_by(WAVE as usize)
            .zip([End::Unheard, End::Orderly].into_iter().cycle())
        {
            wave(first, how);
        }
        let took = begun.elapsed();
        let traffic = stays.app.traffic_stop();
        let [(who, _)] = &traffic.outcomes[..] else {
            panic!("{traffic:?}");
        };
        assert_eq!(who, "15001");

        // The kernel frees a program after a grace period, and the daemon may be looking at a pod.
        let most = before.daemon.descriptors.len() + CALLS;
        let after = daemon.until_within(PATIENCE, "only one pod's programs are loaded", || {
            let rest = Rest::of(&daemon);
            let is_at_rest = rest.daemon.descriptors.len() <= most;
            (rest.objects == before.objects && is_at_rest).then_some(rest)
        });
        eprintln!(
            "{pods} pods came and went in {took:.1?}; the daemon's memory: {} kB before, {} kB after; its descriptors: {} and {}",
            before.daemon.resident_kb,
            after.daemon.resident_kb,
            before.daemon.descriptors.len(),
            after.daemon.descriptors.len(),
        );
        let differences = after.state.differences(&before.state);
        assert!(differences.is_empty(), "{differences:#?}");
        assert_eq!(after.traces, before.traces);
        let most_kb = before.daemon.resident_kb + u64::from(amount(GROWTH_KB, GROWTH_KB_WHEN_SLOW));
        assert!(after.daemon.resident_kb < most_kb);

        server.delete(&stays_object);
        drop(stays);
        daemon.until("the last one is detached", || {
            bpffs::pins().is_empty().then_some(())
        });
        let alive = ever.wait_until_freed();
        assert!(alive.is_empty(), "{alive:?}");
    });
}
