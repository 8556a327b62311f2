//! Running the `redirect` program.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    actor::executable,
    namespace::{Namespace, errors, succeed},
    options::Options,
    patience::{amount, patience},
    pod::Pod,
};

/// No call of the program takes longer, in seconds.
const PATIENCE: u32 = 30;
/// Several verifiers share what an emulator leaves of a processor.
const PATIENCE_WHEN_SLOW: u32 = 120;

/// A call of `redirect` in the making.
pub fn redirect() -> Command {
    clean(Command::new(program()))
}

/// A call of the same program with another layout of the maps that an upgrade fills anew. It is built by
/// `cargo build --features redirect-user/other-layout --bin redirect-other-layout`.
pub fn redirect_of_other_layout() -> Command {
    clean(Command::new(executable("redirect-other-layout")))
}

/// A call of `redirect` by somebody in a network namespace.
pub fn redirect_inside(netns: &Namespace) -> Command {
    let mut command = clean(netns.command("env"));
    command.arg(program());
    command
}

/// A copy of the program whose embedded eBPF object has another hash, as that of another release: a padding byte of
/// its ELF header, which means nothing, is changed.
#[derive(Debug)]
pub struct OtherBuild {
    path: PathBuf,
}

static COPIES: AtomicU32 = AtomicU32::new(0);

impl OtherBuild {
    /// Makes the copy; it goes with this value.
    pub fn new() -> Self {
        // elf(5): magic, 64 bits, little-endian, version 1.
        const ELF: &[u8] = b"\x7fELF\x02\x01\x01";
        const PADDING: usize = 15;
        const MACHINE: usize = 18;
        const EM_BPF: [u8; 2] = 247u16.to_le_bytes();
        let mut bytes = fs::read(program()).unwrap();
        let objects: Vec<usize> = (0..bytes.len() - MACHINE - EM_BPF.len())
            .filter(|&at| bytes[at] == ELF[0] && bytes[at..].starts_with(ELF))
            .filter(|&at| bytes[at + MACHINE..].starts_with(&EM_BPF))
            .collect();
        let [object] = objects[..] else {
            panic!("eBPF objects in the program: {objects:?}");
        };
        bytes[object + PADDING] ^= 1;
        // The build script has worked the hash out: it is there as text or, if the compiler has read that, as a number.
        let status = status();
        let text = status["build"].as_str().unwrap().as_bytes();
        let number = u64::from_str_radix(status["build"].as_str().unwrap(), 16).unwrap();
        let mut another = text.to_owned();
        another[0] = if text[0] == b'1' { b'2' } else { b'1' };
        let uses = replace(&mut bytes, text, &another)
            + replace(
                &mut bytes,
                &number.to_le_bytes(),
                &(number ^ 1).to_le_bytes(),
            );
        assert!(uses > 0, "the program does not have its own hash");
        let serial = COPIES.fetch_add(1, Ordering::Relaxed);
        let name = format!("redirect-other-build-{}-{serial}", process::id());
        let (path, patched) = (
            env::temp_dir().join(&name),
            env::temp_dir().join(name + "-patched"),
        );
        fs::write(&patched, bytes).unwrap();
        // By another process: a file that a fork of this one holds open for writing cannot be executed.
        let mut install = Command::new("install");
        succeed(install.args(["-m", "700"]).args([&patched, &path]));
        fs::remove_file(patched).unwrap();
        Self { path }
    }

    /// A call of it.
    pub fn redirect(&self) -> Command {
        clean(Command::new(&self.path))
    }
}

impl Default for OtherBuild {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for OtherBuild {
    fn drop(&mut self) {
        let _left_in_tmp = fs::remove_file(&self.path);
    }
}

/// Replaces every occurrence by something as long, and counts them.
fn replace(bytes: &mut [u8], old: &[u8], new: &[u8]) -> usize {
    let mut count = 0;
    for at in 0..=bytes.len() - old.len() {
        if bytes[at] == old[0] && bytes[at..].starts_with(old) {
            bytes[at..at + old.len()].copy_from_slice(new);
            count += 1;
        }
    }
    count
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
    let limit = amount(PATIENCE, PATIENCE_WHEN_SLOW);
    let deadline = Instant::now() + patience(Duration::from_secs(limit.into()));
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
    attach_by(redirect(), pod)
}

/// The same by any call of `redirect`.
pub fn attach_by(mut command: Command, pod: &Pod) -> Command {
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
    status_by(redirect())
}

/// The same by any call of `redirect`.
pub fn status_by(mut command: Command) -> serde_json::Value {
    let output = finish(command.args(["status", "-o", "json"]));
    assert!(output.status.success(), "status: {}", errors(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What `redirect status` says about an attached pod.
pub fn status_of(pod: &Pod) -> serde_json::Value {
    let status = status();
    let path = pod.cgroup.path().to_str().unwrap();
    let mut pods = status["pods"].as_array().unwrap().iter();
    let found = pods.find(|pod| pod["cgroup"] == path);
    found
        .unwrap_or_else(|| panic!("{path} is not in {status}"))
        .clone()
}

/// Whether the status mentions the pod's cgroup anywhere.
pub fn status_mentions(pod: &Pod) -> bool {
    status()
        .to_string()
        .contains(&format!("{}\"", pod.cgroup.path().display()))
}
