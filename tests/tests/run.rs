//! `redirect run`: a command's outbound TCP is captured, and nothing else and no longer.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::BTreeSet,
    fmt::Display,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use redirect_tests::{
    actor::{Actor, executable},
    bpffs,
    cgroup::mount_point,
    faults::{self, DIRECT, ends, sample},
    loader::{self, finish, redirect_inside},
    namespace::errors,
    options::Options,
    patience::patience,
    pod::Pod,
    protocol::{Dial, Family, Identity, Start},
    scene::{Lands, Scene, To, inward},
    tracer::{self, Fault},
    traces::Traces,
};
use rstest::rstest;

use Family::{Mapped, V4, V6};

/// `redirect run` in the scene's namespace, before `--`.
fn run(scene: &Scene) -> Command {
    let mut command = redirect_inside(&scene.pod.netns);
    command.args(["run", "-u", "1337", "-g", "1337", "--ipv6", "on"]);
    command
}

fn run_shell(scene: &Scene, script: &str) -> Command {
    let mut command = run(scene);
    command.args(["--", "sh", "-c", script]);
    command
}

fn run_actor(scene: &Scene) -> Actor {
    let mut command = run(scene);
    command.arg("--").arg(executable("actor"));
    let start = Start {
        cgroup: None,
        netns: scene.pod.netns.path(),
        net_admin: false,
        identity: Identity::APP,
    };
    Actor::start_by(&mut command, start)
}

/// The cgroup made by a `redirect run` with that process id.
fn cgroup_of(pid: impl Display) -> PathBuf {
    mount_point().join(format!("redirect-run-{pid}"))
}

/// In which nothing of a run may be left.
fn assert_nothing_left(pid: u32) {
    assert_eq!(bpffs::pins(), BTreeSet::new());
    assert!(!cgroup_of(pid).exists());
}

#[rstest]
fn outbound_tcp_of_the_command_lands_at_the_proxy() {
    bpffs::private(|| {
        let mut scene = Scene::new();
        let mut command = run_actor(&scene);
        let pid = command.pid();
        assert!(cgroup_of(pid).is_dir());
        for family in [V4, V6, Mapped] {
            for to in [To::Service(80), To::Elsewhere(443)] {
                let to = scene.address(family, to);
                // The same program beside it, at the same time, without `run`.
                assert_eq!(scene.app.dial(&Dial::new(family, to)).outcome(), "service");
                let dialed = command.dial(&Dial::new(family, to));
                assert_eq!(dialed.outcome(), "15001");
                assert_eq!(
                    dialed.peer.map(|peer| peer.ip().to_canonical()),
                    Some(to.ip())
                );
                let greeting = dialed.greeting.unwrap();
                let original = if to.is_ipv4() {
                    greeting.original
                } else {
                    greeting.original6
                };
                assert_eq!(original.address, Some(to));
            }
        }
        // The command is no pod: what comes in is not its own.
        scene.attempt(V4, &inward(8080, Lands::Direct)).unwrap();
        assert!(command.end().success());
        assert_nothing_left(pid);
    });
}

#[rstest]
#[case::success("exit 0", 0)]
#[case::failure("exit 7", 7)]
#[case::killed("kill -KILL $$", 128 + 9)]
fn exit_status_of_the_command_is_passed_on(#[case] script: &str, #[case] code: i32) {
    bpffs::private(|| {
        let scene = Scene::new();
        let output = finish(&mut run_shell(&scene, script));
        assert_eq!(output.status.code(), Some(code), "{}", errors(&output));
        assert_eq!(errors(&output), "");
        assert_eq!(bpffs::pins(), BTreeSet::new());
    });
}

#[rstest]
#[case::not_found("no-such-command", 127, "No such file")]
#[case::no_program("/etc/passwd", 126, "Permission denied")]
fn command_that_cannot_be_run_is_named(#[case] name: &str, #[case] code: i32, #[case] why: &str) {
    bpffs::private(|| {
        let scene = Scene::new();
        let output = finish(run(&scene).args(["--", name]));
        assert_eq!(output.status.code(), Some(code));
        let text = errors(&output);
        assert!(text.contains(name) && text.contains(why), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(bpffs::pins(), BTreeSet::new());
    });
}

/// Runs a script that says when it is ready.
fn ready(scene: &Scene, script: &str) -> Child {
    let mut child = run_shell(scene, script)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    child
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

/// Waits for the end; the script of these tests ends by itself within 20 s.
fn ended(mut child: Child) -> Option<i32> {
    child.wait().unwrap().code()
}

#[rstest]
#[case::caught(
    "trap 'exit 9' TERM; echo ready; for i in $(seq 400); do sleep 0.05; done",
    9
)]
#[case::not_caught("echo ready; exec sleep 20", 128 + 15)]
fn termination_is_passed_on_to_the_command(#[case] script: &str, #[case] code: i32) {
    bpffs::private(|| {
        let scene = Scene::new();
        let child = ready(&scene, script);
        let pid = child.id();
        signal(&child, Signal::SIGTERM);
        assert_eq!(ended(child), Some(code));
        assert_nothing_left(pid);
    });
}

#[rstest]
fn interrupt_is_left_to_the_command() {
    bpffs::private(|| {
        let scene = Scene::new();
        // The terminal would have sent it to both.
        let child = ready(&scene, "echo ready; sleep 0.3; exit 5");
        let pid = child.id();
        signal(&child, Signal::SIGINT);
        assert_eq!(ended(child), Some(5));
        assert_nothing_left(pid);
    });
}

#[rstest]
fn killed_run_is_collected_once_its_command_has_ended() {
    bpffs::private(|| {
        let (scene, other) = (Scene::new(), Pod::new());
        let mut command = run_actor(&scene);
        let (pid, to) = (command.pid(), scene.address(V4, To::Service(80)));
        assert_eq!(command.dial(&Dial::new(V4, to)).outcome(), "15001");
        let run = Pid::from_raw(i32::try_from(pid).unwrap());
        kill(run, Signal::SIGKILL).unwrap();
        wait_until(|| is_dead(pid));
        // Any other call of the loader leaves a command alone that still runs.
        loader::attach(&other, &Options::ISTIO);
        assert_eq!(command.dial(&Dial::new(V4, to)).outcome(), "15001");
        drop(command);
        wait_until(|| {
            // Another test's run may have removed it.
            let processes = fs::read_to_string(cgroup_of(pid).join("cgroup.procs"));
            processes.unwrap_or_default().is_empty()
        });
        let detached = loader::detach(other.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        assert_nothing_left(pid);
    });
}

#[rstest]
fn run_that_is_killed_at_a_call_is_collected_by_the_next() {
    bpffs::private(|| {
        let (mut scene, other) = (faults::scene(), Scene::new());
        // The programs stay loaded.
        loader::attach(&other.pod, &Options::ISTIO);
        let rest = Traces::read([&scene, &other]);
        let command = run_shell(&scene, "true");
        let calls = tracer::run(&command, None).calls;
        let (points, mut killed) = (sample(&calls, 32), 0);
        for &after in &points {
            let traced = tracer::run(&command, Some(Fault::Kill { after }));
            let case = format!("killed after {after}, {}: {traced:?}", calls[after - 1]);
            // How often it looks for messages differs: a run may end with fewer calls.
            let code = (!traced.struck).then_some(0);
            assert_eq!(traced.code, code, "{case}");
            killed += usize::from(traced.struck);
            // Nobody else is captured.
            assert_eq!(ends(&mut scene, None).unwrap(), DIRECT, "{case}");
            let processes = cgroup_of(traced.process).join("cgroup.procs");
            wait_until(|| {
                fs::read_to_string(&processes)
                    .unwrap_or_default()
                    .is_empty()
            });
            let next = finish(&mut run_shell(&scene, "true"));
            assert!(next.status.success(), "{case}: {}", errors(&next));
            assert_eq!(errors(&next), "", "{case}");
            let left = Traces::read([&scene, &other]).differences(&rest);
            assert_eq!(left, Vec::<String>::new(), "{case}");
            assert!(!cgroup_of(traced.process).exists(), "{case}");
        }
        assert!(killed * 2 > points.len(), "only {killed} were killed");
        loader::detach(other.pod.cgroup.path());
    });
}

/// Process ids are used again, in a container that is restarted always the same one.
#[rstest]
#[case::killed_at_once("", 0, "")]
#[case::killed_while_it_captured(
    "$PROGRAM attach --cgroup \"$1\" --netns $NETNS -p 16001 >/dev/null;",
    0,
    ""
)]
#[case::outlived_by_its_command(
    "sleep 60 2>&- & echo $! > \"$1/cgroup.procs\";",
    1,
    "making cgroup"
)]
fn cgroup_of_a_former_run_with_the_same_process_id(
    #[case] former: &str,
    #[case] code: i32,
    #[case] says: &str,
) {
    bpffs::private(|| {
        let scene = Scene::new();
        let run = run_shell(&scene, "true");
        let script = format!("set -- \"$0$$\" \"$@\"; mkdir \"$1\"; {former} shift; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(cgroup_of(""));
        command.arg(run.get_program()).args(run.get_args());
        command.env("PROGRAM", loader::redirect().get_program());
        command.env("NETNS", scene.pod.netns.path());
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let cgroup = cgroup_of(child.id());
        let output = child.wait_with_output().unwrap();
        let living = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        for pid in living.lines() {
            kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
        }
        let said = errors(&output);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(
            said.contains(says) && (code != 0) == said.contains(cgroup.to_str().unwrap()),
            "{said}"
        );
        assert_eq!(living.is_empty(), code == 0);
        wait_until(|| !cgroup.exists() || fs::remove_dir(&cgroup).is_ok());
        assert_eq!(bpffs::pins(), BTreeSet::new());
    });
}

/// True for a process that has ended, also if it was not waited for yet.
fn is_dead(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| stat.contains(") Z "))
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + patience(Duration::from_secs(10));
    while !done() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    }
}
