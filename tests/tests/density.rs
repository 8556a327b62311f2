//! A full node: as many pods as one can have, attached by `redirect daemon`.
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
    daemon::{Daemon, inward, out, until_out},
    kubernetes::object,
    light::LightPod,
    scene::Scene,
};
use rstest::rstest;
use serde_json::Value;

/// Pods of a node with a raised limit; kubelet's own is 110.
const PODS: u16 = 250;
/// How many of them have a cast, spread among the others.
const SAMPLES: u16 = 5;
/// Longer, and it hangs: no measure of speed.
const PATIENCE: Duration = Duration::from_secs(300);

fn attaches(daemon: &Daemon, outcome: &str) -> u32 {
    let name = format!("redirect_attaches_total{{outcome=\"{outcome}\"}}");
    // Not there before the first one.
    daemon.metric(&name).unwrap_or(0.0) as u32
}

#[rstest]
fn node_with_250_pods_is_captured_and_left_alone_then() {
    bpffs::private(|| {
        let above = Cgroup::new(&format!("rd-{}-density", std::process::id()));
        let (mut samples, mut light, mut objects) = (Vec::new(), Vec::new(), Vec::<Value>::new());
        for number in 0..PODS {
            if number % (PODS / SAMPLES) == PODS / SAMPLES / 2 {
                let mut scene = Scene::new();
                assert_eq!(out(&mut scene, 80), "service");
                assert_eq!(inward(&mut scene, 8080), "app");
                objects.push(object(&scene.pod, &[]));
                samples.push(scene);
            } else {
                let pod = LightPod::new(&above, number);
                objects.push(pod.object());
                light.push(pod);
            }
        }
        assert_eq!(samples.len(), usize::from(SAMPLES));
        let mut stranger = Scene::new();

        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        let empty = daemon.usage();
        let begun = Instant::now();
        for object in &objects {
            server.apply(object);
        }
        daemon.until_within(PATIENCE, "all are attached", || {
            (daemon.metric("redirect_pods{state=\"captured\"}")? == f64::from(PODS)).then_some(())
        });
        let took = begun.elapsed();
        let full = daemon.usage();
        eprintln!(
            "{PODS} pods attached in {took:.1?}, {:.1?} of CPU each; the daemon's memory: {} kB before, {} kB after",
            (full.cpu - empty.cpu) / u32::from(PODS),
            empty.resident_kb,
            full.resident_kb,
        );

        for scene in &mut samples {
            until_out(&daemon, scene, 80, "15001");
            assert_eq!(inward(scene, 8080), "15006");
        }
        assert_eq!(out(&mut stranger, 80), "service");
        assert_eq!(inward(&mut stranger, 8080), "app");

        let (state, programs) = (State::read(), Objects::pinned());
        let looked = attaches(&daemon, "unchanged");
        let before = daemon.usage();
        let all = looked + u32::from(PODS);
        daemon.until_within(PATIENCE, "all have been looked at again", || {
            // To ask is work for it too.
            thread::sleep(Duration::from_secs(3));
            (attaches(&daemon, "unchanged") >= all).then_some(())
        });
        let looks = attaches(&daemon, "unchanged") - looked;
        let after = daemon.usage();
        eprintln!(
            "{looks} looks, {:.1?} of CPU each; memory {} kB",
            (after.cpu - before.cpu) / looks,
            after.resident_kb
        );
        assert_eq!(attaches(&daemon, "attached"), u32::from(PODS));
        assert_eq!(attaches(&daemon, "changed"), 0);
        let differences = State::read().differences(&state);
        assert!(differences.is_empty(), "{differences:#?}");
        assert_eq!(Objects::pinned(), programs);
        for trouble in ["attach", "detach", "observe"] {
            let name = format!("redirect_errors_total{{reason=\"{trouble}\"}}");
            assert_eq!(daemon.metric(&name), Some(0.0), "{trouble}");
        }
        // While it looks at a pod it has the maps open.
        daemon.until("it has as many descriptors as at first", || {
            (daemon.usage().descriptors.len() <= empty.descriptors.len() + 4).then_some(())
        });
    });
}
