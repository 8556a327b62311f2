//! Network namespaces with a name under `/run/netns`.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

use crate::{patience::patience, pod::Regrets};

/// A network namespace that is removed with this value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// A process that keeps the owning user namespace, where that is not ours.
    keeper: Option<Child>,
}

impl Namespace {
    /// Adds a namespace and brings its `lo` up.
    pub fn new(name: &str) -> Self {
        succeed(Command::new("ip").args(["netns", "add", name]));
        let namespace = Self {
            name: name.to_owned(),
            keeper: None,
        };
        namespace.ip("link set lo up");
        namespace
    }

    /// Adds a namespace owned by a new user namespace, whose ids 0 to 65535 are ours from `offset` on: a pod with `hostUsers: false`.
    pub fn in_user_namespace(name: &str, offset: u32) -> Self {
        let keeper = Command::new("unshare")
            .args(["--user", "--net", "sleep", "300"])
            .spawn()
            .unwrap();
        let process = Path::new("/proc").join(keeper.id().to_string());
        // The last that unshare(2) changes.
        let ours = std::fs::read_link("/proc/self/ns/user").unwrap();
        let deadline = Instant::now() + patience(Duration::from_secs(5));
        while std::fs::read_link(process.join("ns/user")).map_or(true, |user| user == ours) {
            assert!(Instant::now() < deadline, "unshare does not unshare");
            thread::sleep(Duration::from_millis(1));
        }
        for map in ["uid_map", "gid_map"] {
            std::fs::write(process.join(map), format!("0 {offset} 65536")).unwrap();
        }
        succeed(Command::new("ip").args(["netns", "attach", name, &keeper.id().to_string()]));
        let namespace = Self {
            name: name.to_owned(),
            keeper: Some(keeper),
        };
        namespace.ip("link set lo up");
        namespace
    }

    /// A command that will run in this namespace, and as its owner's superuser.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display()));
        if let Some(keeper) = &self.keeper {
            command.arg(format!("--user=/proc/{}/ns/user", keeper.id()));
        }
        command.args(["--", program]);
        command
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` commands in it, one a line.
    pub fn ip(&self, commands: &str) {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(commands.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "ip -n {}: {commands}\n{}",
            self.name,
            errors(&output)
        );
    }

    /// Runs one `ip` command in it; false where it fails.
    pub fn try_ip(&self, command: &str) -> bool {
        let output = Command::new("ip")
            .args(["-n", &self.name])
            .args(command.split(' '))
            .output()
            .unwrap();
        output.status.success()
    }

    /// Sets kernel parameters under `/proc/sys/net`: path and value.
    pub fn sysctl(&self, parameters: &[(&str, &str)]) {
        self.enter(|| {
            for (path, value) in parameters {
                std::fs::write(Path::new("/proc/sys/net").join(path), value).unwrap();
            }
        });
    }

    /// Runs `work` on a thread of its own inside the namespace: threads of the test harness stay where they are.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        enter(&self.path(), work)
    }
}

/// Runs `work` on a thread of its own inside the network namespace that a file stands for.
pub fn enter<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(netns).unwrap();
    thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let mut regrets = Regrets::new(&self.name);
        if let Some(keeper) = &mut self.keeper {
            let _already_gone = keeper.kill();
            let _reaped = keeper.wait();
        }
        match Command::new("ip")
            .args(["netns", "del", &self.name])
            .output()
        {
            Ok(output) if output.status.success() => (),
            Ok(output) => regrets.add(errors(&output)),
            Err(error) => regrets.add(error),
        }
    }
}

/// Runs a command that has to succeed.
pub fn succeed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command wrote to stderr.
pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
