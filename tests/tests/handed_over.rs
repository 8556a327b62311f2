//! What the container runtime hands over of a pod, through the plugin to the daemon, while the Kubernetes API is silent.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use redirect_tests::{
    actor::Actor,
    api_server::{ApiServer, Manner},
    bpffs,
    cni::{Call, Called},
    daemon::Daemon,
    kubernetes::{STATUS, object},
    loader,
    pod::Pod,
    protocol::{Dial, Family, Identity, Listen},
};
use rstest::rstest;
use serde_json::{Value, json};

use Family::V4;

const INJECTED: &str = r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"],"volumes":null,"imagePullSecrets":null,"revision":"default"}"#;
const EXCLUDE_OUT: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const CONFIG_SOURCE: (&str, &str) = ("kubernetes.io/config.source", "api");
/// The CNI specification's code.
const TRY_AGAIN: u64 = 11;

/// A pod whose sandbox has just been made, and a service outside.
struct Sandbox {
    pod: Pod,
    object: Value,
    _outside: Actor,
}

impl Sandbox {
    fn new() -> Self {
        let pod = Pod::new();
        let mut outside = Actor::start(&pod.peer.path(), None, Identity::ROOT);
        for port in [80, 443] {
            outside.listen(Listen::new("service", (pod.peer4, port).into()));
        }
        let object = object(&pod, &[(STATUS, INJECTED)]);
        Self {
            pod,
            object,
            _outside: outside,
        }
    }

    /// Calls the plugin as containerd does.
    fn call(&self, command: &str, daemon: &Daemon, annotations: &[(&str, &str)]) -> Called {
        let metadata = &self.object["metadata"];
        let text = |name: &str| metadata[name].as_str().unwrap().to_owned();
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID=c-1;K8S_POD_UID={}",
            text("namespace"),
            text("name"),
            text("uid")
        );
        let call = Call::new(command, "1.0.0", &self.pod.netns.path(), daemon.socket())
            .variable("CNI_ARGS", &arguments)
            .field("timeout", json!(20));
        let all: serde_json::Map<_, _> = annotations
            .iter()
            .map(|(name, text)| ((*name).to_owned(), json!(text)))
            .collect();
        let call = if all.is_empty() {
            call
        } else {
            let runtime = json!({"io.kubernetes.cri.pod-annotations": all});
            call.field("runtimeConfig", runtime)
        };
        // Again, as a runtime would: the first pod of all waits for the programs, on a busy machine for long.
        daemon.until(command, || {
            let called = call.run();
            (!called.stdout.contains("the daemon is busy")).then_some(called)
        })
    }

    fn start(&self, identity: Identity) -> Actor {
        let cgroup = self.pod.cgroup.child("container");
        Actor::start(&self.pod.netns.path(), Some(cgroup), identity)
    }

    fn dial(&self, actor: &mut Actor, port: u16) -> String {
        let to = (self.pod.peer4, port).into();
        actor.dial(&Dial::new(V4, to)).outcome().to_owned()
    }
}

/// A daemon that is ready, and an API that has ceased to answer since.
fn while_the_api_hangs(work: impl FnOnce(&ApiServer, &Daemon) + Send) {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        daemon.until_ready();
        server.behave(Manner::Hang);
        work(&server, &daemon);
    });
}

#[rstest]
fn pod_is_captured_before_its_first_process_while_the_api_hangs() {
    while_the_api_hangs(|_, daemon| {
        let (pod, uncaptured) = (Sandbox::new(), Sandbox::new());
        let annotations = [CONFIG_SOURCE, (STATUS, INJECTED), (EXCLUDE_OUT, "443")];
        for command in ["ADD", "CHECK"] {
            let called = pod.call(command, daemon, &annotations);
            assert!(called.ok, "{command}: {called:?}");
        }
        // The very first connection of the first process is captured: there is no proxy yet.
        let mut app = pod.start(Identity::APP);
        assert_eq!(pod.dial(&mut app, 80), "ECONNREFUSED");
        assert_eq!(pod.dial(&mut app, 443), "service");
        let mut proxy = pod.start(Identity::PROXY);
        proxy.listen(Listen::new("proxy", ([0, 0, 0, 0], 15001).into()));
        assert_eq!(pod.dial(&mut app, 80), "proxy");
        assert_eq!(pod.dial(&mut proxy, 80), "service");
        // Nothing else has captured it.
        let mut other = uncaptured.start(Identity::APP);
        assert_eq!(uncaptured.dial(&mut other, 80), "service");
        let del = pod.call("DEL", daemon, &annotations);
        assert!(del.ok, "{del:?}");
        assert_eq!(pod.dial(&mut app, 80), "service");
    });
}

#[rstest]
fn what_the_api_says_later_counts() {
    while_the_api_hangs(|server, daemon| {
        let mut pod = Sandbox::new();
        pod.object["spec"]["containers"][1]["securityContext"]["runAsUser"] = json!(2000);
        pod.object["spec"]["containers"][1]["securityContext"]["runAsGroup"] = json!(2000);
        server.apply(&pod.object);
        let called = pod.call("ADD", daemon, &[CONFIG_SOURCE, (STATUS, INJECTED)]);
        assert!(called.ok, "{called:?}");
        let (mut by_default, mut really) = (
            pod.start(Identity::PROXY),
            pod.start(Identity::new(2000, 2000)),
        );
        assert_eq!(pod.dial(&mut by_default, 80), "service");
        assert_eq!(pod.dial(&mut really, 80), "ECONNREFUSED");
        server.behave(Manner::Well);
        daemon.until("the proxy's user is known", || {
            (pod.dial(&mut really, 80) == "service").then_some(())
        });
        assert_eq!(pod.dial(&mut by_default, 80), "ECONNREFUSED");
        // A pod that is none of the mesh's after all is let go.
        pod.object["metadata"]["annotations"] = json!({});
        server.apply(&pod.object);
        daemon.until("it is let go", || {
            (pod.dial(&mut by_default, 80) == "service").then_some(())
        });
    });
}

#[rstest]
fn what_the_api_has_told_before_counts_more() {
    bpffs::private(|| {
        let server = ApiServer::start();
        let daemon = Daemon::start(&server, &[]);
        let mut pod = Sandbox::new();
        pod.object["metadata"]["annotations"][EXCLUDE_OUT] = json!("443");
        server.apply(&pod.object);
        daemon.until_metric("redirect_pods{state=\"waiting\"}", 1.0);
        server.behave(Manner::Hang);
        let called = pod.call("ADD", &daemon, &[CONFIG_SOURCE, (STATUS, INJECTED)]);
        assert!(called.ok, "{called:?}");
        let mut app = pod.start(Identity::APP);
        assert_eq!(pod.dial(&mut app, 80), "ECONNREFUSED");
        assert_eq!(pod.dial(&mut app, 443), "service");
    });
}

#[rstest]
fn pod_that_was_not_injected_starts_uncaptured_while_the_api_hangs() {
    while_the_api_hangs(|_, daemon| {
        let pod = Sandbox::new();
        let called = pod.call("ADD", daemon, &[CONFIG_SOURCE]);
        assert!(called.ok, "{called:?}");
        assert_eq!(pod.dial(&mut pod.start(Identity::APP), 80), "service");
        assert!(bpffs::pins().is_empty());
    });
}

#[rstest]
#[case::nothing(&[], "no annotations")]
#[case::unknown_status(&[CONFIG_SOURCE, (STATUS, "{}")], "does not name container istio-proxy")]
#[case::gateway(
    &[CONFIG_SOURCE, (STATUS, INJECTED), ("inject.istio.io/templates", "gateway")],
    "inject.istio.io/templates"
)]
fn pod_does_not_start_if_that_is_not_enough(
    #[case] annotations: &[(&str, &str)],
    #[case] missing: &str,
) {
    while_the_api_hangs(|server, daemon| {
        let pod = Sandbox::new();
        let (code, message) = pod.call("ADD", daemon, annotations).error();
        assert_eq!(code, TRY_AGAIN, "{message}");
        for words in ["the Kubernetes API", missing] {
            assert!(message.contains(words), "{message}");
        }
        assert!(bpffs::pins().is_empty());
        // With the API it does.
        server.behave(Manner::Well);
        server.apply(&pod.object);
        let called = pod.call("ADD", daemon, annotations);
        assert!(called.ok, "{called:?}");
        assert_eq!(
            loader::status_of(&pod.pod)["pod"]["uid"],
            pod.object["metadata"]["uid"]
        );
    });
}

#[rstest]
fn annotation_that_cannot_be_read_is_refused_for_good() {
    while_the_api_hangs(|_, daemon| {
        let pod = Sandbox::new();
        let annotations = [
            CONFIG_SOURCE,
            (STATUS, INJECTED),
            (EXCLUDE_OUT, "http-and-more"),
        ];
        let (code, message) = pod.call("ADD", daemon, &annotations).error();
        assert_ne!(code, TRY_AGAIN, "{message}");
        assert!(message.contains(EXCLUDE_OUT), "{message}");
        assert!(bpffs::pins().is_empty());
    });
}
