//! Running the `redirect` program.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    actor::executable,
    namespace::{Namespace, errors},
    options::Options,
    pod::Pod,
};

/// No call of the program takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A call of `redirect` in the making.
pub fn redirect() -> Command {
    clean(Command::new(program()))
}

/// A call of `redirect` by somebody in a network namespace.
pub fn redirect_inside(netns: &Namespace) -> Command {
    let mut command = clean(netns.command("env"));
    command.arg(program());
    command
}

fn program() -> PathBuf {
    env::var_os("REDIRECT_BIN").map_or_else(|| executable("redirect"), PathBuf::from)
}

fn clean(mut command: Command) -> Command {
    // Istio's variables in the surrounding environment must not reach the program under test.
    command.env_clear();
    for kept in ["PATH", "HOME", "RUST_BACKTRACE", "RUST_LOG"] {
        if let Some(value) = env::var_os(kept) {
            command.env(kept, value);
        }
    }
    command
}

/// Runs to its end, which must come in time.
pub fn finish(command: &mut Command) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let deadline = Instant::now() + PATIENCE;
    // What the program writes fits a pipe's buffer, so waiting before reading cannot block it.
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!(
                "{command:?} hangs: {}",
                errors(&child.wait_with_output().unwrap())
            );
        }
        thread::sleep(Duration::from_millis(1));
    }
    child.wait_with_output().unwrap()
}

/// Runs `redirect` with any arguments.
pub fn run<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Output {
    finish(redirect().args(arguments))
}

/// `redirect attach` for a pod, not run yet.
pub fn attach_command(pod: &Pod) -> Command {
    let mut command = redirect();
    command.arg("attach");
    command.arg("--cgroup").arg(pod.cgroup.path());
    command.arg("--netns").arg(pod.netns.path());
    command
}

/// Attaches, or changes the options of a pod that is attached.
pub fn attach(pod: &Pod, options: &Options) -> Output {
    let mut command = attach_command(pod);
    command
        .args(options.arguments())
        .envs(options.environment());
    let output = finish(&mut command);
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    output
}

/// Detaches the pod with this cgroup.
pub fn detach(cgroup: &Path) -> Output {
    finish(redirect().arg("detach").arg("--cgroup").arg(cgroup))
}

/// `redirect status -o json`.
pub fn status() -> serde_json::Value {
    let output = run(["status", "-o", "json"]);
    assert!(output.status.success(), "status: {}", errors(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Whether the status mentions the pod's cgroup anywhere.
pub fn status_mentions(pod: &Pod) -> bool {
    status()
        .to_string()
        .contains(&format!("{}\"", pod.cgroup.path().display()))
}
