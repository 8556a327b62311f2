//! One daemon keeps a node: a second one is refused, and undoes nothing.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::os::unix::net::UnixListener;

use nix::sys::signal::Signal;
use redirect_tests::{
    api_server::ApiServer,
    bpffs,
    daemon::{Daemon, free_port, until_out},
    kubernetes::object,
    loader::finish,
    protocol::{Dial, Family::V4},
    scene::{Scene, To},
};
use rstest::rstest;
use serde_json::json;

/// The second one would let the pod go.
const OTHERWISE: [&str; 2] = ["--exclude-namespaces", "shop"];

fn is_refused(command: &mut std::process::Command, words: &str) {
    let output = finish(command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains(words), "{said}");
}

#[rstest]
fn second_daemon_is_refused_until_the_first_has_ended(
    #[values(true, false)] same_socket: bool,
    #[values(Signal::SIGTERM, Signal::SIGKILL)] signal: Signal,
) {
    bpffs::private(|| {
        let mut scene = Scene::new();
        let server = ApiServer::start();
        server.apply(&object(&scene.pod, &[]));
        let mut daemon = Daemon::start(&server, &[]);
        until_out(&daemon, &mut scene, 80, "15001");
        let service = scene.address(V4, To::Service(80));
        scene.app.traffic_start(Dial::new(V4, service));

        let socket = if same_socket {
            daemon.socket().to_owned()
        } else {
            Daemon::free_socket()
        };
        for _ in 0..3 {
            let mut second = Daemon::command(&socket, free_port(), &server);
            is_refused(second.args(OTHERWISE), "another daemon keeps this node");
        }
        assert_eq!(socket.exists(), same_socket);
        let status = json!({"version": 1, "op": "status"});
        assert_eq!(daemon.ask(&status), json!({"result": "ok"}));
        let traffic = scene.app.traffic_stop();
        let [(who, _)] = &traffic.outcomes[..] else {
            panic!("{traffic:?}");
        };
        assert_eq!(who, "15001");

        daemon.end(signal);
        let second = Daemon::start_at(&socket, &server, &OTHERWISE);
        until_out(&second, &mut scene, 80, "service");
    });
}

#[rstest]
fn socket_of_somebody_else_is_not_taken() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let socket = Daemon::free_socket();
        let listener = UnixListener::bind(&socket).unwrap();
        let words = "another daemon answers there";
        is_refused(&mut Daemon::command(&socket, free_port(), &server), words);
        drop(listener);
        // Nobody answers any more.
        let daemon = Daemon::start_at(&socket, &server, &[]);
        daemon.until_ready();
    });
}
