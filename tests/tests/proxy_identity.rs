//! `--proxy-identity`: who is the proxy, by its user or by its container.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{fs, net::SocketAddr, path::Path, process::Command};

use nix::sys::signal::Signal;
use redirect_tests::{
    actor::Actor,
    api_server::{ApiServer, Manner},
    bpffs,
    daemon::{Daemon, inward},
    follower::Follower,
    kubernetes::{Container, Layout, NODE, Runtime, View, laid_out, object, on_node_in_container},
    loader::{self, finish, redirect},
    namespace::errors,
    options::{DNS_PROXY_PORT, Options},
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen, Transport, canonical},
    scene::{SERVICE, Scene, To, loopback, wildcards},
};
use rstest::rstest;
use serde_json::{Value, json};

use Family::{Mapped, V4, V6};
use Runtime::{ContainerdCgroupfs, ContainerdSystemd, CrioSystemd};

const BY_CONTAINER: [&str; 2] = ["--proxy-identity", "container"];
const UNKNOWN: &str = "redirect_proxies_unknown";
const PROXY: &str = "istio-proxy";

/// A pod with two containers, and a node that keeps it.
struct Mesh {
    daemon: Daemon,
    /// As 1337 in the application's container.
    app: Actor,
    /// As root in the proxy's container, with the proxy's listeners.
    proxy: Actor,
    container: Container,
    object: Value,
    server: ApiServer,
    scene: Scene,
}

impl Mesh {
    /// The API has not told yet which containers run.
    fn start(pod: Pod, runtime: Runtime, arguments: &[&str], annotations: &[(&str, &str)]) -> Self {
        Self::start_by(redirect(), pod, runtime, arguments, annotations)
    }

    fn start_by(
        redirect: Command,
        pod: Pod,
        runtime: Runtime,
        arguments: &[&str],
        annotations: &[(&str, &str)],
    ) -> Self {
        let scene = Scene::without_proxy(pod, &Options::ISTIO);
        let container = Container::new(&scene.pod, runtime, 1);
        let neighbour = Container::new(&scene.pod, runtime, 2);
        let mut object = object(&scene.pod, annotations);
        object["spec"]["containers"][1]["env"] = json!([
            {"name": "ISTIO_DUAL_STACK", "value": "true"},
            {"name": "ISTIO_META_DNS_CAPTURE", "value": "true"},
        ]);
        object["status"]["containerStatuses"] = json!([neighbour.running("app")]);
        let server = ApiServer::start();
        server.apply(&object);
        let socket = Daemon::free_socket();
        let daemon = Daemon::start_by(redirect, &socket, &server, arguments);
        let netns = scene.pod.netns.path();
        let mut proxy = Actor::start(&netns, Some(container.cgroup.clone()), Identity::ROOT);
        serve(&mut proxy);
        let app = Actor::start(&netns, Some(neighbour.cgroup), Identity::PROXY);
        let mut mesh = Self {
            daemon,
            app,
            proxy,
            container,
            object,
            server,
            scene,
        };
        mesh.until(To::Service(80), "15001", |mesh| &mut mesh.scene.app);
        mesh
    }

    /// Tells the API of a container's state.
    fn tell(&mut self, list: &str, status: Value) {
        let statuses = &mut self.object["status"][list];
        let others = statuses.as_array().into_iter().flatten();
        let others = others.filter(|other| other["name"] != PROXY).cloned();
        *statuses = others.chain([status]).collect();
        self.server.apply(&self.object);
    }

    fn tell_running(&mut self) {
        let status = self.container.running(PROXY);
        self.tell("containerStatuses", status);
    }

    /// Waits until the call of somebody is answered by that one.
    fn until(&mut self, to: To, who: &str, caller: fn(&mut Self) -> &mut Actor) {
        let to = self.scene.address(V4, to);
        let mut last = String::new();
        for _ in 0..2000 {
            last = caller(self).dial(&Dial::new(V4, to)).outcome().to_owned();
            if last == who {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!(
            "answered by {last}, not {who}\n{}",
            self.daemon.log().join("\n")
        );
    }

    fn until_known(&mut self) {
        self.until(To::Service(80), SERVICE, |mesh| &mut mesh.proxy);
    }

    fn as_app(&mut self, family: Family, to: To) -> String {
        let to = self.scene.address(family, to);
        outcome(&mut self.app, &Dial::new(family, to))
    }

    fn as_proxy(&mut self, family: Family, to: To) -> String {
        let to = self.scene.address(family, to);
        outcome(&mut self.proxy, &Dial::new(family, to))
    }

    /// Who answers a process that somebody starts in that cgroup.
    fn from(&self, cgroup: &Path) -> String {
        let netns = self.scene.pod.netns.path();
        let mut actor = Actor::start(&netns, Some(cgroup.to_owned()), Identity::ROOT);
        let to = self.scene.address(V4, To::Service(80));
        outcome(&mut actor, &Dial::new(V4, to))
    }

    fn identity(&self) -> Value {
        loader::status_of(&self.scene.pod)["proxy"].clone()
    }
}

fn outcome(actor: &mut Actor, dial: &Dial) -> String {
    actor.dial(dial).outcome().to_owned()
}

/// Opens the proxy's listeners and its DNS agent.
fn serve(proxy: &mut Actor) {
    for port in [15001, 15006] {
        for address in wildcards(port) {
            proxy.listen(Listen::new(&port.to_string(), address));
        }
    }
    let agent = SocketAddr::from(([127, 0, 0, 1], DNS_PROXY_PORT));
    proxy.listen(Listen::new("agent", agent).udp());
}

#[rstest]
fn container_tells_the_proxy_and_the_user_does_not(
    #[values(ContainerdCgroupfs, ContainerdSystemd, CrioSystemd)] runtime: Runtime,
    #[values("containerStatuses", "initContainerStatuses")] list: &str,
) {
    bpffs::private(|| {
        let pod = match runtime {
            ContainerdCgroupfs => laid_out(Pod::new(), Layout::CgroupfsBurstable),
            ContainerdSystemd | CrioSystemd => laid_out(Pod::new(), Layout::SystemdBurstable),
        };
        let mut mesh = Mesh::start(pod, runtime, &BY_CONTAINER, &[]);
        // Nobody is the proxy yet, the application least of all.
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");
        assert_eq!(mesh.as_app(V4, To::Service(80)), "15001");
        assert_eq!(
            mesh.identity(),
            json!({"by": "container", "container": null})
        );
        assert_eq!(mesh.daemon.metric(UNKNOWN), Some(1.0));

        let status = mesh.container.running(PROXY);
        mesh.tell(list, status);
        mesh.until_known();
        let identity = mesh.identity();
        assert_eq!(identity["container"]["id"], mesh.container.id);
        assert_eq!(
            identity["container"]["cgroup"],
            json!(mesh.container.cgroup)
        );
        assert_eq!(mesh.daemon.metric(UNKNOWN), Some(0.0));
        for family in [V4, V6, Mapped] {
            // All that the proxy does is as with its user.
            for (to, who) in [
                (To::Service(80), SERVICE),
                (To::Own(8080), "15006"),
                (To::Own(15008), "app"),
                (To::Localhost(8080), "app"),
            ] {
                assert_eq!(mesh.as_proxy(family, to), who, "{family:?} {to:?}");
            }
            // And all that the application does as with any other user.
            for (to, who) in [
                (To::Service(80), "15001"),
                (To::Own(8080), "app"),
                (To::Localhost(8080), "app"),
            ] {
                assert_eq!(mesh.as_app(family, to), who, "{family:?} {to:?}");
            }
        }
        // Istio's test of the capture, which it makes as the proxy's user and in another container.
        for (family, address) in [(V4, "127.0.0.6"), (V6, "::6")] {
            let to = SocketAddr::new(address.parse().unwrap(), 15002);
            let test = Dial::new(family, to).bind(loopback(to, 0));
            let dialed = mesh.app.dial(&test);
            assert_eq!(dialed.outcome(), "15006", "{address}");
            let greeting = dialed.greeting.unwrap();
            let asked = if to.is_ipv4() {
                greeting.original
            } else {
                greeting.original6
            };
            assert_eq!(asked.address, Some(to));
        }
        let neighbour = Dial::new(V4, ([127, 0, 0, 5], 15002).into());
        assert_eq!(outcome(&mut mesh.app, &neighbour), "ECONNREFUSED");
        let to = mesh.scene.address(V4, To::Own(8080));
        let from = Dial::new(V4, to).bind(([127, 0, 0, 6], 0).into());
        assert_eq!(outcome(&mut mesh.proxy, &from), "app");
        assert_eq!(inward(&mut mesh.scene, 8080), "15006");
        assert_eq!(inward(&mut mesh.scene, 15020), "app");
    });
}

#[rstest]
fn container_tells_the_proxy_on_a_node_that_is_a_container_itself() {
    bpffs::private(|| {
        let pod = laid_out(Pod::new(), Layout::Nested);
        let redirect = on_node_in_container(pod.above.path(), View::Node, &redirect());
        let mut mesh = Mesh::start_by(redirect, pod, ContainerdSystemd, &BY_CONTAINER, &[]);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");
        mesh.tell_running();
        mesh.until_known();
        assert_eq!(mesh.as_app(V4, To::Service(80)), "15001");
    });
}

#[rstest]
fn daemon_that_sees_no_cgroup_but_its_own_says_what_to_mount() {
    let pod = laid_out(Pod::new(), Layout::Nested);
    let server = ApiServer::start();
    let call = Daemon::command(&Daemon::free_socket(), 0, &server);
    let mut call = on_node_in_container(pod.above.path(), View::Own, &call);
    let output = finish(call.env("NODE_NAME", NODE));
    assert_eq!(output.status.code(), Some(1));
    let error = errors(&output);
    assert!(error.contains("own cgroup: mount the host's"), "{error}");
}

#[rstest]
fn user_tells_the_proxy_unless_told_otherwise(
    #[values(&[][..], &["--proxy-identity", "uid"][..])] arguments: &[&str],
) {
    bpffs::private(|| {
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, arguments, &[]);
        mesh.tell_running();
        mesh.daemon
            .until_metric("redirect_pods{state=\"captured\"}", 1.0);
        // The application escapes, and what runs as another user in the proxy's container is captured.
        assert_eq!(mesh.as_app(V4, To::Service(80)), SERVICE);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");
        assert_eq!(mesh.identity(), json!({"by": "uid"}));
        assert_eq!(mesh.daemon.metric(UNKNOWN), Some(0.0));
    });
}

#[rstest]
fn restarted_container_is_followed() {
    bpffs::private(|| {
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, &BY_CONTAINER, &[]);
        mesh.tell_running();
        mesh.until_known();
        let first = mesh.container.cgroup.clone();
        // It ends: nobody is the proxy, not even who is left in its cgroup.
        let ended = mesh.container.ended(PROXY);
        mesh.tell("containerStatuses", ended);
        mesh.daemon.until_metric(UNKNOWN, 1.0);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");

        mesh.container = Container::new(&mesh.scene.pod, ContainerdSystemd, 3);
        let (netns, cgroup) = (mesh.scene.pod.netns.path(), &mesh.container.cgroup);
        // The former one goes, and its listeners with it.
        mesh.proxy = Actor::start(&netns, Some(cgroup.clone()), Identity::ROOT);
        serve(&mut mesh.proxy);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");
        mesh.tell_running();
        mesh.until_known();
        assert_eq!(mesh.from(&first), "15001");
        assert_eq!(mesh.as_app(V4, To::Service(80)), "15001");
    });
}

#[rstest]
fn daemon_that_comes_back_knows_the_proxy_without_the_api() {
    bpffs::private(|| {
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, &BY_CONTAINER, &[]);
        mesh.tell_running();
        mesh.until_known();
        let identity = mesh.identity();
        let socket = mesh.daemon.socket().to_owned();
        assert!(mesh.daemon.end(Signal::SIGTERM).success());
        mesh.server.behave(Manner::Hang);
        mesh.daemon = Daemon::start_at(&socket, &mesh.server, &BY_CONTAINER);
        mesh.daemon
            .until_metric("redirect_pods{state=\"captured\"}", 1.0);
        assert_eq!(mesh.identity(), identity);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), SERVICE);
        assert_eq!(mesh.as_app(V4, To::Service(80)), "15001");
        // One that knows proxies by their users follows as soon as the API has told it of the pod.
        assert!(mesh.daemon.end(Signal::SIGTERM).success());
        mesh.server.behave(Manner::Well);
        mesh.daemon = Daemon::start_at(&socket, &mesh.server, &[]);
        mesh.until(To::Service(80), SERVICE, |mesh| &mut mesh.app);
        assert_eq!(mesh.as_proxy(V4, To::Service(80)), "15001");
    });
}

#[rstest]
fn container_of_the_creator_decides_at_any_depth() {
    bpffs::private(|| {
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, &BY_CONTAINER, &[]);
        mesh.tell_running();
        mesh.until_known();
        let pod = mesh.scene.pod.cgroup.path().to_owned();
        let inside = mesh.container.cgroup.join("a/b/c");
        // A container's name below another container makes no proxy.
        let name = mesh.container.cgroup.file_name().unwrap();
        let forged = pod.join("app").join(name);
        for directory in [&inside, &forged] {
            fs::create_dir_all(directory).unwrap();
        }
        assert_eq!(mesh.from(&inside), SERVICE);
        assert_eq!(mesh.from(&forged), "15001");
        assert_eq!(mesh.from(&pod.join("app")), "15001");

        let netns = mesh.scene.pod.netns.path();
        let to = mesh.scene.address(V4, To::Service(80));
        for (from, into, who) in [
            (&mesh.container.cgroup, &pod.join("app"), SERVICE),
            (&pod.join("app"), &mesh.container.cgroup, "15001"),
        ] {
            let mut actor = Actor::start(&netns, Some(from.clone()), Identity::ROOT);
            actor.create("early", V4);
            fs::write(into.join("cgroup.procs"), actor.pid().to_string()).unwrap();
            let dialed = actor.connect("early", &Dial::new(V4, to));
            assert_eq!(dialed.outcome(), who, "{from:?}");
        }
    });
}

#[rstest]
fn dns_queries_of_the_proxys_container_pass() {
    bpffs::private(|| {
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, &BY_CONTAINER, &[]);
        for address in wildcards(53) {
            mesh.scene
                .outside
                .listen(Listen::new(SERVICE, address).udp());
        }
        mesh.tell_running();
        mesh.until_known();
        let mut query = Dial::new(V4, mesh.scene.address(V4, To::Service(53)));
        for transport in [Transport::Udp, Transport::ConnectedUdp] {
            query.transport = transport;
            assert_eq!(outcome(&mut mesh.proxy, &query), SERVICE, "{transport:?}");
            assert_eq!(outcome(&mut mesh.app, &query), "agent", "{transport:?}");
        }
    });
}

#[rstest]
#[case::redirect("REDIRECT", false)]
#[case::tproxy("TPROXY", true)]
fn proxys_call_to_its_own_pod_is_captured_as_the_mode_has_it(
    #[case] mode: &str,
    #[case] in_place: bool,
) {
    bpffs::private(|| {
        let annotations = [("sidecar.istio.io/interceptionMode", mode)];
        let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, &BY_CONTAINER, &annotations);
        mesh.tell_running();
        mesh.until_known();
        let own = mesh.scene.address(V4, To::Own(8080));
        let dialed = mesh.proxy.dial(&Dial::new(V4, own));
        assert_eq!(dialed.outcome(), "15006");
        let seen = canonical(dialed.greeting.unwrap().local);
        let wanted = if in_place { own } else { loopback(own, 15006) };
        assert_eq!(seen, wanted);
        assert_eq!(mesh.as_app(V4, To::Own(8080)), "app");
    });
}

#[rstest]
fn decisions_tell_which_rule_is_in_force() {
    bpffs::private(|| {
        for (arguments, of_app, of_proxy) in [
            (&BY_CONTAINER[..], json!(false), json!(true)),
            (&[][..], Value::Null, Value::Null),
        ] {
            let mut mesh = Mesh::start(Pod::new(), ContainerdSystemd, arguments, &[]);
            mesh.tell_running();
            if arguments.is_empty() {
                mesh.until(To::Service(80), SERVICE, |mesh| &mut mesh.app);
            } else {
                mesh.until_known();
            }
            let cgroup = mesh.scene.pod.cgroup.path().to_str().unwrap().to_owned();
            let follower = Follower::start(["--decisions", "--cgroup", &cgroup]);
            let to = Dial::new(V4, mesh.scene.address(V4, To::Service(8000)));
            for (actor, uid, wanted) in [
                (&mut mesh.app, 1337, &of_app),
                (&mut mesh.proxy, 0, &of_proxy),
            ] {
                let events = follower.until(
                    || drop(actor.dial(&to)),
                    |event| event["uid"] == uid && event["rule"].is_string(),
                );
                let event = &events[events.len() - 1];
                assert_eq!(event["in_proxy_container"], *wanted, "{event}");
            }
        }
    });
}
