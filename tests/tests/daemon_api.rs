//! The daemon and a Kubernetes API that is away, forgets, hangs or talks nonsense.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::{thread, time::Duration};

use redirect_tests::{
    api_server::{ApiServer, Manner},
    bpffs,
    daemon::{Daemon, out, until_out},
    kubernetes::object,
    loader,
    scene::Scene,
};
use rstest::rstest;

const EXCLUDE_OUT: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";

#[rstest]
fn daemon_starts_without_the_api_and_keeps_what_is_captured() {
    bpffs::private(|| {
        let mut server = ApiServer::away();
        let mut scene = Scene::new();
        server.apply(&object(&scene.pod, &[(EXCLUDE_OUT, "443")]));
        let mut daemon = Daemon::start(&server, &[]);
        daemon.until("it has tried", || {
            (daemon.metric("redirect_errors_total{reason=\"watch\"}")? >= 2.0).then_some(())
        });
        assert_eq!(daemon.get("/readyz").unwrap().0, 503);
        assert_eq!(out(&mut scene, 80), "service");
        server.come();
        until_out(&daemon, &mut scene, 80, "15001");
        assert_eq!(daemon.get("/readyz").unwrap().0, 200);
        // Away again, also for the next daemon, whose resync must not take an unknown pod for one that has gone.
        server.go();
        daemon.kill();
        daemon = Daemon::start(&server, &[]);
        daemon.until_metric("redirect_pods{state=\"captured\"}", 1.0);
        thread::sleep(Duration::from_millis(2500));
        assert_eq!(daemon.get("/readyz").unwrap().0, 503);
        assert_eq!(out(&mut scene, 80), "15001");
        assert_eq!(out(&mut scene, 443), "service");
    });
}

#[rstest]
#[case::hangs(Manner::Hang)]
#[case::talks_nonsense(Manner::Nonsense)]
#[case::fails(Manner::Fail)]
#[case::answers_gone(Manner::Gone)]
fn changes_are_followed_after_the_api_misbehaved(#[case] manner: Manner) {
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut scene = Scene::new();
        server.apply(&object(&scene.pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 443, "15001");
        let before = server.asked();
        server.behave(manner);
        daemon.until("it asks again", || {
            let now = server.asked();
            (now.lists + now.watches > before.lists + before.watches + 1).then_some(())
        });
        assert_eq!(out(&mut scene, 443), "15001");
        server.behave(Manner::Well);
        server.apply(&object(&scene.pod, &[(EXCLUDE_OUT, "443")]));
        until_out(&daemon, &mut scene, 443, "service");
        assert_eq!(out(&mut scene, 80), "15001");
    });
}

#[rstest]
fn watch_goes_on_from_bookmarks_and_lists_again_only_when_history_is_gone() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let mut scene = Scene::new();
        server.apply(&object(&scene.pod, &[]));
        let daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 443, "15001");
        let first = server.asked();
        server.bookmark();
        thread::sleep(Duration::from_millis(300));
        server.disconnect();
        server.apply(&object(&scene.pod, &[(EXCLUDE_OUT, "443")]));
        until_out(&daemon, &mut scene, 443, "service");
        let resumed = server.asked();
        assert_eq!(resumed.lists, first.lists);
        assert!(resumed.watches > first.watches);
        // A pod goes while nobody watches and nothing tells of it: the new list shows that.
        let other = Scene::new();
        let gone = object(&other.pod, &[]);
        server.apply(&gone);
        daemon.until_metric("redirect_pods{state=\"captured\"}", 2.0);
        server.delete(&gone);
        server.compact();
        drop(other);
        daemon.until("it lists again", || {
            (server.asked().lists > resumed.lists).then_some(())
        });
        daemon.until_metric("redirect_pods{state=\"captured\"}", 1.0);
        daemon.until("one pod is left", || {
            (loader::status()["pods"].as_array()?.len() == 1).then_some(())
        });
        assert_eq!(out(&mut scene, 80), "15001");
    });
}
