//! What the loader remembers of the proxies' listeners.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use redirect_tests::{
    backend::Backend::Redirect,
    bpffs, loader,
    options::Options,
    protocol::Listen,
    scene::{Scene, wildcards},
};
use rstest::rstest;

/// Ports with a remembered listener in the namespace with that cookie.
fn ports(cookie: u64) -> Vec<u16> {
    let mut ports: Vec<u16> = bpffs::listeners()
        .unwrap()
        .iter()
        .filter(|key| key.netns_cookie == cookie)
        .map(|key| key.port)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn cookie(scene: &Scene) -> u64 {
    let status = loader::status_of(&scene.pod);
    status["netns_cookie"].as_u64().unwrap()
}

#[rstest]
fn detach_forgets_listeners_of_former_ports_too() {
    const MOVED: Options = Options {
        proxy_port: "16001",
        ..Options::ISTIO
    };
    bpffs::private(|| {
        let (mut first, mut second) = (Scene::new(), Scene::new());
        for at in wildcards(16001) {
            first.proxy.listen(Listen::new("16001", at));
        }
        // The second keeps the maps in place.
        second.attach(Redirect, &Options::ISTIO);
        first.attach(Redirect, &Options::ISTIO);
        let cookies = [cookie(&first), cookie(&second)];
        assert_eq!(ports(cookies[0]), [15001, 15006]);
        first.attach(Redirect, &MOVED);
        assert_eq!(ports(cookies[0]), [15001, 15006, 16001]);
        first.detach();
        assert_eq!(ports(cookies[0]), [0; 0]);
        assert_eq!(ports(cookies[1]), [15001, 15006]);
    });
}
