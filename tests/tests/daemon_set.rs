//! The DaemonSet's pod as a kubelet runs it: the image, the manifests' capabilities, profiles and mounts, a container runtime, and
//! pods whose proxy is a real Envoy.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    net::IpAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use k8s_openapi::api::apps::v1::DaemonSet;
use redirect_tests::{
    api_server::ApiServer,
    bpffs,
    cgroup::mount_point,
    cni::NAME,
    containerd::{
        Container, Containerd, PodRequest, Sandbox,
        node::{DIAL, Node, greeting, object},
    },
    envoy, kubectl,
    kubelet::DaemonPod,
    manifests, mounts,
    patience::patience,
    pod::SERVICE4,
    protocol::Greeting,
    scene::SERVICE,
    sidecar::Sidecar,
    skip,
    target::in_target,
};

/// Not root.
const SOMEBODY: u32 = 1000;
/// `terminationGracePeriodSeconds`
const GRACE: i64 = 30;
/// How long the daemon may take to find a pod; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is neither in this workspace nor on every machine.
struct Programs {
    image: PathBuf,
    envoy: PathBuf,
    kubectl: PathBuf,
}

impl Programs {
    fn find() -> Result<Self, String> {
        if let Some(missing) = Containerd::missing() {
            return Err(missing);
        }
        Ok(Self {
            image: in_target("image/redirect.tar").ok_or(
                "no image/redirect.tar in the target directory: `cargo xtask image` makes it",
            )?,
            envoy: envoy::find()?,
            kubectl: kubectl::find()?,
        })
    }
}

/// Cgroups as a node has them.
#[derive(Clone, Copy)]
enum Cgroups {
    AsFound,
    Version2,
}

#[test]
fn daemon_set_captures_pods_from_their_first_connection_and_takes_itself_off() {
    on_node(1, Cgroups::AsFound);
}

/// There, a container has a cgroup namespace of its own.
#[test]
fn daemon_set_does_so_where_there_is_only_cgroup2() {
    on_node(2, Cgroups::Version2);
}

fn on_node(number: u8, cgroups: Cgroups) {
    let programs = match Programs::find() {
        Ok(programs) => programs,
        Err(missing) => skip!("{missing}"),
    };
    bpffs::private(|| {
        mounts::own_run_directory();
        if let Cgroups::Version2 = cgroups {
            mounts::only_cgroup2();
        }
        life(Cluster::new(number, programs));
    });
}

/// One node, and the API that knows its pods.
struct Cluster {
    node: Node,
    server: ApiServer,
    programs: Programs,
    /// Tells its pods from those of other nodes on this machine.
    number: u8,
}

/// The DaemonSet's pod on that node.
struct Running {
    pod: DaemonPod,
    sandbox: Sandbox,
    containers: BTreeMap<String, Container>,
}

/// A pod with an Envoy.
struct Shop {
    sandbox: Sandbox,
    envoy: Sidecar,
    address: IpAddr,
    dials: u32,
}

fn life(mut cluster: Cluster) {
    cluster.give_cni_files_to_somebody();
    let found = cluster.cni_files();

    let mut early = cluster.shop("early", true).unwrap();
    cluster.assert_direct(&mut early, "without the plugin");

    let mut redirect = cluster.deploy("base", "redirect-a");
    cluster.wait_for_daemon(&redirect);
    cluster.node.containerd.wait_for_plugin(NAME);
    cluster.assert_confined(&redirect);
    assert_ne!(cluster.cni_files(), found);
    // Its Envoy listens already.
    cluster.wait_until_captured(&mut early);
    cluster.node.containerd.remove(early.sandbox).unwrap();

    let mut cart = cluster.shop("cart", true).unwrap();
    cluster.assert_captured(&mut cart);
    let mut outside = cluster.shop("outside", false).unwrap();
    cluster.assert_direct(&mut outside, "not of the mesh");
    cluster.node.containerd.remove(outside.sandbox).unwrap();

    cluster.node.containerd.kill(&redirect.containers["daemon"]);
    cluster.assert_captured(&mut cart);
    let error = cluster.shop("stuck", true).err().unwrap();
    assert!(
        error.contains(NAME) && error.contains("does not run"),
        "{error}"
    );
    cluster.start(&mut redirect, "daemon", 1);
    cluster.wait_for_daemon(&redirect);
    let mut late = cluster.shop("late", true).unwrap();
    cluster.assert_captured(&mut late);
    cluster.node.containerd.remove(late.sandbox).unwrap();

    cluster.retire(redirect);
    let removal = cluster.deploy("remove-cni", "redirect-b");
    assert_eq!(cluster.cni_files(), found, "byte for byte as found");
    cluster.wait_for_daemon(&removal);
    cluster.retire(removal);
    cluster.node.containerd.wait_for_network();
    let mut after = cluster.shop("after", true).unwrap();
    cluster.assert_direct(&mut after, "after removal");
    cluster.assert_captured(&mut cart);
}

impl Cluster {
    fn new(number: u8, programs: Programs) -> Self {
        let node = Node::new(100 + number);
        node.containerd.import(&programs.image);
        Self {
            node,
            server: ApiServer::start(),
            programs,
            number,
        }
    }

    /// Runs the pod of a DaemonSet of `deploy/kustomize`, as far as all of its containers are started.
    fn deploy(&mut self, directory: &str, name: &str) -> Running {
        let objects = kubectl::kustomize(&self.programs.kubectl, directory);
        let daemon_set = manifests::of_kind(&objects, "DaemonSet").clone();
        let daemon_set: DaemonSet = serde_json::from_value(daemon_set).unwrap();
        let containerd = &self.node.containerd;
        let name = format!("{name}-{}", self.number);
        let pod = DaemonPod::new(&daemon_set, &name)
            .volume("cni-conf", &containerd.conf_dir)
            .volume("cni-bin", &containerd.bin_dir);
        // The daemon is in the node's network namespace, and calls the API there.
        let pod = self.node.world.enter(|| pod.calling(&self.server));
        let request = pod.request(&self.node);
        let sandbox = self.node.containerd.run(&request).unwrap();
        let [first, rest] = pod
            .names()
            .map(|names| names.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let mut running = Running {
            pod,
            sandbox,
            containers: BTreeMap::new(),
        };
        for name in first {
            self.start(&mut running, &name, 0);
            let container = &running.containers[&name];
            let code = self.node.containerd.wait_for_end(container);
            assert_eq!(code, 0, "{name}: {}", container.log());
        }
        for name in rest {
            self.start(&mut running, &name, 0);
        }
        running
    }

    /// Ends a pod of the DaemonSet as a kubelet does: all containers end by themselves when they are asked to.
    fn retire(&mut self, redirect: Running) {
        for (name, container) in &redirect.containers {
            let code = self.node.containerd.stop(container, GRACE);
            assert_eq!(code, 0, "{name}: {}", container.log());
        }
        self.node.containerd.remove(redirect.sandbox).unwrap();
    }

    /// Starts one of its containers, as often restarted.
    fn start(&mut self, redirect: &mut Running, name: &str, attempt: u32) {
        let config = redirect.pod.config(name, attempt);
        let container = self
            .node
            .containerd
            .start_container(&redirect.sandbox, config);
        redirect.containers.insert(name.to_owned(), container);
    }

    fn wait_for_daemon(&mut self, redirect: &Running) {
        let (daemon, world) = (&redirect.containers["daemon"], &self.node.world);
        self.node
            .containerd
            .wait_until("the daemon is ready", |containerd| {
                let ended = containerd.exit(daemon);
                assert!(ended.is_none(), "{ended:?}: {}", daemon.log());
                world.enter(|| redirect.pod.is_ready("daemon"))
            });
    }

    /// The manifest's restrictions are in force, so that what works works with them.
    fn assert_confined(&mut self, redirect: &Running) {
        let ours = fs::read_link("/proc/self/ns/cgroup").unwrap();
        for (name, container) in &redirect.containers {
            let pid = self.node.containerd.pid(container);
            let theirs = fs::read_link(format!("/proc/{pid}/ns/cgroup")).unwrap();
            let is_alone = mount_point() == Path::new("/sys/fs/cgroup");
            assert_eq!(theirs != ours, is_alone, "{name}: a cgroup namespace");
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_else(|| panic!("no {name} in {status}"))
                    .trim()
                    .to_owned()
            };
            assert_eq!(field("Seccomp:"), "2", "{name}: a filter");
            assert_eq!(field("NoNewPrivs:"), "1", "{name}");
            let capabilities = u64::from_str_radix(&field("CapEff:"), 16).unwrap();
            let added = redirect.pod.container(name).security_context.as_ref();
            let added = added.and_then(|context| context.capabilities.as_ref()?.add.as_ref());
            assert_eq!(
                capabilities.count_ones() as usize,
                added.unwrap().len(),
                "{name}: {capabilities:x}"
            );
        }
    }

    /// As a node may have it whose network is another project's.
    fn give_cni_files_to_somebody(&self) {
        let containerd = &self.node.containerd;
        for directory in [&containerd.conf_dir, &containerd.bin_dir] {
            chown(directory, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        }
        for entry in fs::read_dir(&containerd.conf_dir).unwrap() {
            let path = entry.unwrap().path();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            chown(&path, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
        }
    }

    /// All that a container runtime reads: file names with owner, mode and contents.
    fn cni_files(&self) -> BTreeMap<PathBuf, (u32, u32, Vec<u8>)> {
        let containerd = &self.node.containerd;
        let mut files = BTreeMap::new();
        for directory in [&containerd.conf_dir, &containerd.bin_dir] {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let (metadata, content) = (fs::metadata(&path).unwrap(), fs::read(&path).unwrap());
                files.insert(path, (metadata.uid(), metadata.mode(), content));
            }
        }
        files
    }

    /// Runs a pod with an Envoy, of the mesh or not; the error is that of its sandbox.
    fn shop(&mut self, name: &str, is_in_mesh: bool) -> Result<Shop, String> {
        let pod = self.node.pod(&format!("{name}-{}", self.number));
        let pod = PodRequest {
            annotations: if is_in_mesh {
                pod.annotations.clone()
            } else {
                Default::default()
            },
            ..pod
        };
        self.server.apply(&object(&pod));
        let containerd = &mut self.node.containerd;
        let sandbox = containerd.run(&pod)?;
        let envoy = Sidecar::start(containerd, &self.programs.envoy, &sandbox);
        Ok(Shop {
            address: containerd.address(&sandbox),
            sandbox,
            envoy,
            dials: 0,
        })
    }

    /// What the service says of a connection that is the first thing a container does.
    fn dial(&mut self, shop: &mut Shop) -> Greeting {
        shop.dials += 1;
        let app = format!("app-{}", shop.dials);
        let greeting = greeting(&self.node.containerd.script(&shop.sandbox, &app, DIAL));
        assert_eq!(greeting.who, SERVICE);
        assert_eq!(greeting.peer.ip(), shop.address);
        greeting
    }

    /// The daemon captures pods that run already when it gets to them.
    fn wait_until_captured(&mut self, shop: &mut Shop) {
        let deadline = Instant::now() + patience(PATIENCE);
        loop {
            let peer = self.dial(shop).peer.to_string();
            // Envoy notes a connection soon after its end.
            thread::sleep(Duration::from_millis(200));
            if shop.envoy.log.lines().iter().any(|words| words[4] == peer) {
                return;
            }
            assert!(Instant::now() < deadline, "it stays uncaptured");
        }
    }

    fn assert_captured(&mut self, shop: &mut Shop) {
        let peer = self.dial(shop).peer.to_string();
        let line = shop
            .envoy
            .log
            .wait_for(&format!("upstream from {peer}"), |words| words[4] == peer);
        let service = format!("{SERVICE4}:80");
        assert_eq!(
            [&line[0], &line[1], &line[3]],
            ["outbound", &service, &service]
        );
        let app = line[2].parse::<std::net::SocketAddr>().unwrap();
        assert_eq!(app.ip(), shop.address);
        assert_ne!(app.to_string(), peer, "two connections");
    }

    /// Envoy has no part in it, though it serves.
    fn assert_direct(&mut self, shop: &mut Shop, why: &str) {
        self.dial(shop);
        assert_eq!(shop.envoy.log.lines(), [[""; 0]; 0], "{why}");
    }
}
