//! A container runtime of a test's own, driven over its socket as a kubelet does it.

mod cri;
mod image;
pub mod node;
mod runc;

use std::{
    collections::HashMap,
    fs,
    net::IpAddr,
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
pub use cri::{ContainerConfig, Mount, Security};

/// The image of sandboxes, and of containers that use the host's programs: one program that waits.
pub const PAUSE: &str = "redirect.test/pause:1";
/// Where Debian's containernetworking-plugins are.
const PLUGINS: &str = "/usr/lib/cni";
/// Programs of the host that containers use.
const HOST_DIRECTORIES: [&str; 4] = ["/usr", "/lib", "/lib64", "/bin"];
/// The exit code of a process that SIGKILL has ended: 128 + 9.
const SIGKILLED: i32 = 137;
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
    /// Kubernetes namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// As Kubernetes tells pods of one name apart.
    pub uid: String,
    /// Below the cgroup2 mount.
    pub cgroup_parent: String,
    /// Kubernetes annotations.
    pub annotations: HashMap<String, String>,
    /// What concerns the sandbox: namespaces and profiles.
    pub security: Security,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    config: cri::PodSandboxConfig,
}

/// A container that has been started.
#[derive(Debug)]
pub struct Container {
    id: String,
    log: PathBuf,
}

impl Container {
    /// What it has written so far, as the runtime logs it: time, stream, a tag, and the line.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
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
        let pause = image::pause(&containerd.directory.path().join("image"), PAUSE);
        containerd.import(&pause);
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

    /// Waits for something to come true, and shows its log if it does not.
    pub fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
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

    /// Takes in the images of an archive.
    pub fn import(&self, archive: &Path) {
        let socket = self.directory.path().join("containerd.sock");
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(socket);
        succeed(
            ctr.args(["--namespace", "k8s.io", "images", "import"])
                .arg(archive),
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

    /// Starts a container of a pod.
    pub fn start_container(&mut self, sandbox: &Sandbox, config: ContainerConfig) -> Container {
        let log = Path::new(&sandbox.config.log_directory).join(&config.log_path);
        let start = self
            .cri
            .start_container(&sandbox.id, config, sandbox.config.clone());
        let id = self.runtime.block_on(start).unwrap();
        Container { id, log }
    }

    /// A container that has the host's programs, to be given a command.
    pub fn of_host(name: &str, attempt: u32, security: &Security) -> ContainerConfig {
        let mut config = ContainerConfig::new(name, attempt, PAUSE, security);
        let mounts = HOST_DIRECTORIES.map(|path| Mount::of_host(Path::new(path), true));
        config.mounts.extend(mounts);
        config
    }

    /// Runs a shell's script as the pod's container to its end. What it wrote is returned.
    pub fn script(&mut self, sandbox: &Sandbox, name: &str, script: &str) -> String {
        let mut config = Self::of_host(name, 0, &Security::default());
        config.command = ["/bin/bash", "-c", script].map(str::to_owned).to_vec();
        let container = self.start_container(sandbox, config);
        self.wait_for_end(&container);
        container.log()
    }

    /// Waits until a container has ended. Its exit code is returned.
    pub fn wait_for_end(&mut self, container: &Container) -> i32 {
        self.wait_until("the container ends", |containerd| {
            containerd.exit(container).is_some()
        });
        self.exit(container).unwrap()
    }

    /// The exit code of a container; None while it runs.
    pub fn exit(&mut self, container: &Container) -> Option<i32> {
        self.runtime.block_on(self.cri.exit(&container.id)).unwrap()
    }

    /// The process that a container has begun with.
    pub fn pid(&mut self, container: &Container) -> u32 {
        self.runtime.block_on(self.cri.pid(&container.id)).unwrap()
    }

    /// Asks a container to end, and kills it after so many seconds. Its exit code is returned.
    pub fn stop(&mut self, container: &Container, seconds: i64) -> i32 {
        let stop = self.cri.stop_container(&container.id, seconds);
        self.runtime.block_on(stop).unwrap();
        self.wait_for_end(container)
    }

    /// Ends a container without a chance to tidy up.
    pub fn kill(&mut self, container: &Container) {
        assert_eq!(self.stop(container, 0), SIGKILLED);
    }

    /// The address that CNI plugins have given to a pod.
    pub fn address(&mut self, sandbox: &Sandbox) -> IpAddr {
        let address = self.runtime.block_on(self.cri.address(&sandbox.id));
        address.unwrap().parse().unwrap()
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
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let mut config = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\n[grpc]\naddress = {:?}\n\
         [{cri}]\nsandbox_image = {PAUSE:?}\ndisable_tcp_service = true\nrestrict_oom_score_adj = true\n\
         [{cri}.cni]\nbin_dir = {:?}\nconf_dir = {:?}\n",
        path("root"),
        path("state"),
        path("containerd.sock"),
        path("bin"),
        path("net.d"),
    );
    if let Some(runc) = runc::without_cpu(directory) {
        let runtime = format!("{cri}.containerd.runtimes.runc");
        config += &format!(
            "[{runtime}]\nruntime_type = \"io.containerd.runc.v2\"\n[{runtime}.options]\nBinaryName = {runc:?}\n"
        );
    }
    config
}
