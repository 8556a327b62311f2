//! The pod and its peer: two network namespaces joined by a veth pair, and a cgroup for the pod's processes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use super::teardown::Teardown;
use super::{OWN_SERVICE_IP, PEER_IP, POD_IP, SERVICE_IP};

pub struct Pod {
    names: Teardown,
}

impl Pod {
    /// Makes everything; what a failure leaves half made is the armed teardown's to remove.
    pub fn create(names: &Teardown) -> Result<Self> {
        let pod = Self {
            names: names.clone(),
        };
        let (inside, outside) = (&pod.names.pod_namespace, &pod.names.peer_namespace);
        ip(&["netns", "add", inside])?;
        ip(&["netns", "add", outside])?;
        // Born inside their namespaces, both ends can be called eth0 and the host never sees either.
        ip(&[
            "link", "add", "eth0", "netns", inside, "type", "veth", "peer", "name", "eth0",
            "netns", outside,
        ])?;
        for (namespace, address) in [(inside, POD_IP), (outside, PEER_IP)] {
            ip(&[
                "-n",
                namespace,
                "address",
                "add",
                &format!("{address}/24"),
                "dev",
                "eth0",
            ])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
        }
        ip(&[
            "-n",
            inside,
            "route",
            "add",
            "default",
            "via",
            &PEER_IP.to_string(),
        ])?;
        for service in [SERVICE_IP, OWN_SERVICE_IP] {
            ip(&[
                "-n",
                outside,
                "address",
                "add",
                &format!("{service}/32"),
                "dev",
                "lo",
            ])?;
        }
        fs::create_dir(pod.cgroup())
            .with_context(|| format!("cannot make cgroup {}", pod.cgroup().display()))?;
        Ok(pod)
    }

    pub fn namespace(&self) -> &str {
        &self.names.pod_namespace
    }

    pub fn namespace_path(&self) -> PathBuf {
        namespace_path(&self.names.pod_namespace)
    }

    pub fn cgroup(&self) -> &Path {
        &self.names.cgroup
    }

    /// A command that runs in the pod's namespace and cgroup as `id`, with no capability and no other group.
    ///
    /// A chain of execs, so the process started is the program itself and can be waited for and ended.
    pub fn command(&self, id: u32, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace_path().display()));
        command
            .args([
                "--",
                "sh",
                "-c",
                r#"echo $$ >"$0/cgroup.procs" && exec "$@""#,
            ])
            .arg(self.cgroup());
        command
            .arg("setpriv")
            .arg(format!("--reuid={id}"))
            .arg(format!("--regid={id}"));
        command
            .args(["--clear-groups", "--inh-caps=-all", "--no-new-privs", "--"])
            .arg(program);
        command
    }

    /// Runs `work` in the peer's namespace. Sockets made there stay there.
    pub fn in_peer<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_namespace(&self.names.peer_namespace, work)
    }

    /// Waits until something in the pod listens on each port.
    ///
    /// Asked of the kernel, not by connecting: a connection would show up in the proxy's access log.
    pub fn wait_for_listeners(&self, ports: &[u16]) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let tables = in_namespace(self.namespace(), || {
                ["tcp", "tcp6"].map(|table| {
                    fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default()
                })
            })?;
            let missing: Vec<_> = ports
                .iter()
                .filter(|port| !tables.iter().any(|t| has_listener(t, **port)))
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("nothing listens on port {missing:?} in the pod");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether `/proc/net/tcp` text has a socket in state LISTEN (0A) on this port: proc_net_tcp.rst.
fn has_listener(table: &str, port: u16) -> bool {
    let ending = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        local.is_some_and(|local| local.ends_with(&ending)) && state == Some("0A")
    })
}

/// On a thread of its own: a thread that has changed namespace is not fit for other work.
fn in_namespace<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file =
        File::open(namespace_path(name)).with_context(|| format!("no network namespace {name}"))?;
    thread::scope(|scope| {
        let inside = scope.spawn(|| -> Result<T> {
            setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
            Ok(work())
        });
        inside
            .join()
            .map_err(|_| anyhow!("a thread in namespace {name} panicked"))?
    })
}

pub fn namespace_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("cannot run `ip`")?;
    if !output.status.success() {
        bail!(
            "`ip {}` failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::has_listener;

    #[test]
    fn listener_is_told_from_a_connection() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 00000000:3A99 00000000:0000 0A 00000000:00000000\n\
                     1: 0100007F:3A9E 0100007F:D431 01 00000000:00000000\n";
        assert!(has_listener(table, 15001));
        assert!(!has_listener(table, 15006));
    }
}
