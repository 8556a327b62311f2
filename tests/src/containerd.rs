//! A container runtime of a test's own, driven over its socket as a kubelet does it.

mod cri;
mod image;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::{
    namespace::{Namespace, succeed},
    patience::patience,
};
use cri::Cri;

/// The image of sandboxes and containers: one program that waits.
const IMAGE: &str = "redirect.test/pause:1";
/// Where Debian's containernetworking-plugins are.
const PLUGINS: &str = "/usr/lib/cni";
/// Programs of the host that containers use.
const HOST_DIRECTORIES: [&str; 4] = ["/usr", "/lib", "/lib64", "/bin"];
/// How long anything may take; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running containerd.
pub struct Containerd {
    child: Child,
    runtime: Runtime,
    cri: Cri,
    /// Network configurations.
    pub conf_dir: PathBuf,
    /// Plugins.
    pub bin_dir: PathBuf,
    // Last: its files are used until then.
    directory: TempDir,
}

/// A pod to be made.
#[derive(Clone, Debug)]
pub struct PodRequest {
    /// In the namespace `shop`.
    pub name: String,
    /// As Kubernetes tells pods of one name apart.
    pub uid: String,
    /// Below the cgroup2 mount.
    pub cgroup_parent: String,
    /// Kubernetes annotations.
    pub annotations: HashMap<String, String>,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    config: cri::PodSandboxConfig,
}

impl Containerd {
    /// What is missing on this machine, in words.
    pub fn missing() -> Option<String> {
        let programs = ["containerd", "ctr", "runc"].map(|name| format!("command -v {name}"));
        let plugins =
            ["ptp", "host-local", "loopback"].map(|name| format!("test -x {PLUGINS}/{name}"));
        programs.iter().chain(&plugins).find_map(|probe| {
            let found = Command::new("sh").args(["-c", probe]).output().unwrap();
            (!found.status.success()).then(|| format!("`{probe}` fails"))
        })
    }

    /// Starts one in a network namespace: that is where the other ends of its pods' links are.
    pub fn start(netns: &Namespace, subnet: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        let (conf_dir, bin_dir) = (path("net.d"), path("bin"));
        fs::create_dir(&conf_dir).unwrap();
        fs::create_dir(&bin_dir).unwrap();
        for plugin in ["ptp", "host-local", "loopback"] {
            std::os::unix::fs::symlink(Path::new(PLUGINS).join(plugin), bin_dir.join(plugin))
                .unwrap();
        }
        let network = serde_json::json!({
            "cniVersion": "0.4.0", "name": "pods",
            "plugins": [{ "type": "ptp", "ipam": {
                "type": "host-local", "dataDir": path("ipam"),
                "ranges": [[{ "subnet": subnet }]], "routes": [{ "dst": "0.0.0.0/0" }],
            }}],
        });
        fs::write(conf_dir.join("10-pods.conflist"), network.to_string()).unwrap();
        let socket = path("containerd.sock");
        fs::write(path("config.toml"), config(directory.path())).unwrap();
        let log = fs::File::create(path("log")).unwrap();
        let child = netns
            .command("containerd")
            .arg("--config")
            .arg(path("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let mut containerd = Self {
            child,
            cri: runtime.block_on(async { Cri::new(&socket) }),
            runtime,
            conf_dir,
            bin_dir,
            directory,
        };
        containerd.wait_until("containerd answers", |containerd| {
            containerd.status().is_some()
        });
        containerd.import_image();
        containerd.wait_for_network();
        containerd
    }

    /// Waits until it has read the network configuration.
    pub fn wait_for_network(&mut self) {
        self.wait_until("the network is ready", |containerd| {
            let conditions = containerd.status().unwrap_or_default();
            conditions
                .iter()
                .any(|(kind, ready)| kind == "NetworkReady" && *ready)
        });
    }

    /// Waits until it has read `text` in its network configuration.
    pub fn wait_for_plugin(&mut self, text: &str) {
        self.wait_until(text, |containerd| {
            let status = containerd.runtime.block_on(containerd.cri.config());
            status.is_ok_and(|config| config.contains(text))
        });
    }

    fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + patience(PATIENCE);
        while !done(self) {
            assert!(
                Instant::now() < deadline && self.child.try_wait().unwrap().is_none(),
                "{what}: not so:\n{}",
                fs::read_to_string(self.directory.path().join("log")).unwrap()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn status(&mut self) -> Option<Vec<(String, bool)>> {
        self.runtime.block_on(self.cri.status()).ok()
    }

    fn import_image(&self) {
        let image = image::pause(&self.directory.path().join("image"), IMAGE);
        let socket = self.directory.path().join("containerd.sock");
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(socket);
        succeed(
            ctr.args(["--namespace", "k8s.io", "images", "import"])
                .arg(image),
        );
    }

    /// Makes a pod, as far as its sandbox; the error is what a kubelet would put into the pod's events.
    pub fn run(&mut self, pod: &PodRequest) -> Result<Sandbox, String> {
        let config = cri::PodSandboxConfig::new(pod, self.directory.path());
        let id = self
            .runtime
            .block_on(self.cri.run_sandbox(config.clone()))?;
        Ok(Sandbox { id, config })
    }

    /// Runs a shell's script as the pod's container to its end. What it wrote is returned.
    pub fn script(&mut self, sandbox: &Sandbox, name: &str, script: &str) -> String {
        let log = format!("{name}.log");
        let config = cri::ContainerConfig::new(
            name,
            IMAGE,
            &["/bin/bash", "-c", script],
            &HOST_DIRECTORIES,
            &log,
        );
        let started = self.runtime.block_on(self.cri.start_container(
            &sandbox.id,
            config,
            sandbox.config.clone(),
        ));
        let id = started.unwrap();
        self.wait_until("the container ends", |containerd| {
            containerd
                .runtime
                .block_on(containerd.cri.has_exited(&id))
                .unwrap()
        });
        fs::read_to_string(Path::new(&sandbox.config.log_directory).join(log)).unwrap()
    }

    /// Ends a pod.
    pub fn remove(&mut self, sandbox: Sandbox) -> Result<(), String> {
        self.runtime.block_on(self.cri.remove_sandbox(&sandbox.id))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Pods that a failed test has left.
        let _already_gone = self.runtime.block_on(self.cri.remove_all());
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _already_gone = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + patience(PATIENCE);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// What runc leaves of the pods' cgroup in the hierarchies of version 1; removed with this value, which has to come after the pods.
pub struct V1Cgroups(String);

impl V1Cgroups {
    /// Of the cgroup of that name.
    pub fn of(name: &str) -> Self {
        Self(name.to_owned())
    }
}

impl Drop for V1Cgroups {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mount in mounts.lines().filter(|line| line.contains(" - cgroup ")) {
            let point = mount.split(' ').nth(4).unwrap_or_default();
            let mut find = Command::new("find");
            find.arg(Path::new(point).join(&self.0));
            // Most hierarchies have none.
            let _absent = find.args(["-depth", "-type", "d", "-delete"]).output();
        }
    }
}

fn config(directory: &Path) -> String {
    let path = |name: &str| directory.join(name).display().to_string();
    format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = {IMAGE:?}\ndisable_tcp_service = true\nrestrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {:?}\nconf_dir = {:?}\n",
        path("root"),
        path("state"),
        path("containerd.sock"),
        path("bin"),
        path("net.d"),
    )
}
