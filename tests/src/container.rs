//! A program in a container of a pod: in a cgroup below the pod's, in the pod's network namespace.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    process::{self, Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    cgroup::mount_point,
    loader::{finish, redirect},
    pod::{Pod, Regrets},
};

/// What a container has of its own, beside its cgroup.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Isolation {
    /// Nothing.
    None,
    /// Process ids, mounts, and a cgroup namespace with a cgroup2 mount of its own; the host's tree is mounted too, read-only.
    Namespaces,
    /// The same, without the host's tree.
    HiddenTree,
    /// The same, with the host's tree and without its BPF file system.
    HiddenPins,
    /// Only a user namespace, in which it is root: `hostUsers: false`.
    Users,
}

/// A call of istio-iptables in the making.
#[derive(Debug)]
pub struct Container<'a> {
    pod: &'a Pod,
    /// Its cgroup.
    pub cgroup: PathBuf,
    isolation: Isolation,
    by_name: bool,
    privileges: Vec<String>,
    environment: Vec<(String, String)>,
}

impl<'a> Container<'a> {
    /// A new cgroup below the pod's.
    pub fn new(pod: &'a Pod, name: &str) -> Self {
        Self {
            pod,
            cgroup: pod.cgroup.child(name),
            isolation: Isolation::None,
            by_name: false,
            privileges: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// In a cgroup that is no container's.
    pub fn in_cgroup(mut self, cgroup: PathBuf) -> Self {
        self.cgroup = cgroup;
        self
    }

    /// With namespaces of its own.
    pub const fn isolated(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Through a link of the name istio-iptables, not as a subcommand.
    pub const fn by_name(mut self, by_name: bool) -> Self {
        self.by_name = by_name;
        self
    }

    /// As root with these capabilities only (`+net_admin,+bpf`).
    pub fn capabilities(mut self, added: &str) -> Self {
        let set = format!("-all,{added}");
        self.privileges = ["--bounding-set", &set, "--inh-caps=-all", "--no-new-privs"]
            .map(str::to_owned)
            .to_vec();
        self
    }

    /// As that user and group, without any capability.
    pub fn user(mut self, id: u32) -> Self {
        let id = id.to_string();
        self.privileges = [
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
        ]
        .map(str::to_owned)
        .to_vec();
        self
    }

    /// With a variable set.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs istio-iptables to its end.
    pub fn istio_iptables(&self, arguments: &[&str]) -> Output {
        let link = self.by_name.then(|| Link::to(redirect().get_program()));
        finish(&mut self.command(link.as_ref(), arguments))
    }

    /// A call of istio-iptables in the making.
    pub fn call(&self, arguments: &[&str]) -> Command {
        self.command(None, arguments)
    }

    /// A call of istio-iptables by that link, or as a subcommand.
    fn command(&self, link: Option<&Link>, arguments: &[&str]) -> Command {
        let redirect = redirect();
        let mut line: Vec<String> = Vec::new();
        let mut words = |words: &[&str]| line.extend(words.iter().map(|&word| word.to_owned()));
        words(&[
            "nsenter",
            &format!("--net={}", self.pod.netns.path().display()),
            "--",
        ]);
        let tree = mount_point().display().to_string();
        let hide = match self.isolation {
            Isolation::None => None,
            Isolation::Namespaces => Some(format!("mount -o remount,bind,ro {tree}")),
            Isolation::HiddenTree => Some(format!("umount {tree}")),
            Isolation::HiddenPins => Some("mount -t tmpfs none /sys/fs/bpf".to_owned()),
            Isolation::Users => {
                words(&["unshare", "--user", "--map-root-user"]);
                None
            }
        };
        if let Some(hide) = hide {
            words(&[
                "unshare",
                "--cgroup",
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
            ]);
            let script = format!("{hide} && mount -t cgroup2 own /mnt && exec \"$@\"");
            words(&["sh", "-c", &script, "sh"]);
        }
        if !self.privileges.is_empty() {
            let privileges: Vec<_> = self.privileges.iter().map(String::as_str).collect();
            words(&["setpriv"]);
            words(&privileges);
        }
        match link {
            Some(link) => words(&[&link.program().display().to_string()]),
            None => words(&[&redirect.get_program().to_string_lossy(), "istio-iptables"]),
        }
        words(arguments);
        // A child is born into its parent's cgroup: the shell moves itself, then becomes the program.
        let mut command = Command::new("sh");
        command.args(["-c", "echo 0 >\"$0\" && exec \"$@\""]);
        command.arg(self.cgroup.join("cgroup.procs")).args(line);
        command.env_clear();
        for (name, value) in redirect.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Ends it, as the container runtime does once its program has ended.
    pub fn remove(self) {
        fs::remove_dir(&self.cgroup).unwrap();
    }
}

/// A link of the name istio-iptables, in a directory that is removed with this value.
struct Link(PathBuf);

impl Link {
    fn to(program: &OsStr) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let link = Self(env::temp_dir().join(format!("rd-{}-link-{serial}", process::id())));
        fs::create_dir(&link.0).unwrap();
        symlink(program, link.program()).unwrap();
        link
    }

    fn program(&self) -> PathBuf {
        self.0.join("istio-iptables")
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            Regrets::new(&self.0.display().to_string()).add(error);
        }
    }
}
