//! `redirect daemon` beside a test.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{self, Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    api_server::ApiServer,
    http,
    kubernetes::NODE,
    loader::redirect,
    patience::patience,
    pod::Pod,
    protocol::{Dial, Family},
    scene::{Scene, To},
    tracer::Tracer,
};

/// What is to happen happens in less, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(40);

static DAEMONS: AtomicU32 = AtomicU32::new(0);

/// What a process takes of the machine.
#[derive(Clone, Debug)]
pub struct Usage {
    /// Resident memory, in kB.
    pub resident_kb: u64,
    /// Time on a CPU since it began, in itself and in the kernel.
    pub cpu: Duration,
    /// What its descriptors refer to.
    pub descriptors: Vec<PathBuf>,
}

/// A running daemon; killed with this value.
pub struct Daemon {
    child: Child,
    tracer: Option<Tracer>,
    socket: PathBuf,
    metrics: u16,
    log: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    /// Starts one for [`NODE`] with these arguments besides.
    pub fn start(server: &ApiServer, arguments: &[&str]) -> Self {
        Self::start_at(&Self::free_socket(), server, arguments)
    }

    /// Where no other one listens.
    pub fn free_socket() -> PathBuf {
        let serial = DAEMONS.fetch_add(1, Ordering::Relaxed);
        env::temp_dir().join(format!("redirect-daemon-{}-{serial}", process::id()))
    }

    /// Starts one that listens there.
    pub fn start_at(socket: &Path, server: &ApiServer, arguments: &[&str]) -> Self {
        Self::start_by(redirect(), socket, server, arguments)
    }

    /// Starts one by any call of `redirect`.
    pub fn start_by(
        redirect: Command,
        socket: &Path,
        server: &ApiServer,
        arguments: &[&str],
    ) -> Self {
        let metrics = free_port();
        let mut call = Self::call(redirect, socket, metrics, server);
        if !arguments.contains(&"--resync") {
            call.args(["--resync", "1s"]);
        }
        let mut child = call
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = log.clone();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(line);
            }
        });
        let daemon = Self {
            child,
            tracer: None,
            socket: socket.to_owned(),
            metrics,
            log,
        };
        daemon.until("it serves", || {
            (daemon.get("/healthz")?.0 == 200).then_some(())
        });
        daemon
    }

    /// The call of it.
    pub fn command(socket: &Path, metrics: u16, server: &ApiServer) -> Command {
        Self::call(redirect(), socket, metrics, server)
    }

    fn call(mut command: Command, socket: &Path, metrics: u16, server: &ApiServer) -> Command {
        command
            .arg("daemon")
            .env("NODE_NAME", NODE)
            .arg("--kubeconfig")
            .arg(server.kubeconfig())
            .arg("--socket")
            .arg(socket)
            .args(["--metrics", &format!("127.0.0.1:{metrics}")])
            .args(["--api-timeout", "2s", "--log-format", "json"]);
        command
    }

    /// What it takes of the machine.
    pub fn usage(&self) -> Usage {
        let process = Path::new("/proc").join(self.child.id().to_string());
        let status = fs::read_to_string(process.join("status")).unwrap();
        // proc_pid_status(5): kilobytes.
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix(" kB"));
        // proc_pid_stat(5): behind the name in brackets, the 12th and 13th field count hundredths of a second.
        let stat = fs::read_to_string(process.join("stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        let mut descriptors: Vec<PathBuf> = fs::read_dir(process.join("fd"))
            .unwrap()
            // One that is closed meanwhile is none.
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .collect();
        descriptors.sort();
        Usage {
            resident_kb: resident.unwrap().trim().parse().unwrap(),
            cpu: Duration::from_millis(10 * ticks),
            descriptors,
        }
    }

    /// Follows its calls to the kernel from now on.
    pub fn traced(mut self) -> Self {
        self.tracer = Some(Tracer::follow(self.child.id()));
        self
    }

    /// What follows the calls of a daemon that is [`Self::traced`].
    pub fn tracer(&self) -> &Tracer {
        self.tracer.as_ref().expect("a daemon that is traced")
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits for something of it to come true, and shows its log if it does not.
    pub fn until<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> T {
        self.until_within(PATIENCE, what, look)
    }

    /// The same, with another limit.
    pub fn until_within<T>(
        &self,
        limit: Duration,
        what: &str,
        mut look: impl FnMut() -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + patience(limit);
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "not in time: {what}\n{}",
                self.log().join("\n")
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until it knows the pods of the node.
    pub fn until_ready(&self) {
        self.until("it is ready", || {
            (self.get("/readyz")?.0 == 200).then_some(())
        });
    }

    /// Waits until a metric has that value.
    pub fn until_metric(&self, name: &str, value: f64) {
        self.until(&format!("{name} {value}"), || {
            (self.metric(name)? == value).then_some(())
        });
    }

    /// A metric by its name and labels, as they are written; `None` if it is not there.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics")?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        line.parse().ok()
    }

    /// What it answers over HTTP: code and body.
    pub fn get(&self, path: &str) -> Option<(u16, String)> {
        http::get(("127.0.0.1", self.metrics), path)
    }

    /// Asks one thing on its socket; again, as the plugin would, if it has too much to do at first.
    pub fn ask(&self, request: &Value) -> Value {
        self.until("an answer", || {
            let answers = self.say(&format!("{request}\n"));
            let [answer] = &answers[..] else {
                panic!("{request}: {answers:?}");
            };
            (!answer.contains("the daemon is busy")).then(|| serde_json::from_str(answer).unwrap())
        })
    }

    /// Says something on its socket, and hears until it has no more to say.
    pub fn say(&self, text: &str) -> Vec<String> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(patience(Duration::from_secs(15))))
            .unwrap();
        // It may hang up before it has heard all.
        let _cut_off = stream.write_all(text.as_bytes());
        let _hung_up = stream.shutdown(std::net::Shutdown::Write);
        BufReader::new(stream)
            .lines()
            .map_while(Result::ok)
            .collect()
    }

    /// Ends it without a chance to tidy up; its socket is removed.
    pub fn kill(&mut self) {
        self.end(Signal::SIGKILL);
        fs::remove_file(&self.socket).unwrap();
    }

    /// Asks it to end, and waits for that.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
        if let Some(tracer) = self.tracer.take() {
            tracer.wait();
        }
        let deadline = Instant::now() + patience(PATIENCE);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "it does not end: {:#?}",
                self.log()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has logged.
    pub fn log(&self) -> Vec<String> {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let is_traced = self.tracer.take().is_some_and(|tracer| {
            let _already_gone = self.child.kill();
            tracer.wait();
            true
        });
        // One that has ended before may have a successor on the same socket.
        if is_traced || matches!(self.child.try_wait(), Ok(None)) {
            let _already_gone = self.child.kill();
            let _reaped = self.child.wait();
            let _left_in_tmp = fs::remove_file(&self.socket);
        }
    }
}

/// A request about a pod's sandbox.
pub fn sandbox(op: &str, id: &str, pod: &Pod, object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut request = json!({
        "version": 1, "op": op, "container_id": id, "netns": pod.netns.path(),
        "pod": {"namespace": metadata["namespace"], "name": metadata["name"]},
    });
    if op == "add" {
        request["pod"]["uid"] = metadata["uid"].clone();
    }
    request
}

/// A TCP port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Who answers the application's call of that port outside.
pub fn out(scene: &mut Scene, port: u16) -> String {
    let to = scene.address(Family::V4, To::Service(port));
    scene
        .app
        .dial(&Dial::new(Family::V4, to))
        .outcome()
        .to_owned()
}

/// Who answers a call of that port of the pod from outside.
pub fn inward(scene: &mut Scene, port: u16) -> String {
    let to = scene.address(Family::V4, To::Own(port));
    scene
        .outside
        .dial(&Dial::new(Family::V4, to))
        .outcome()
        .to_owned()
}

/// Waits until that one answers.
pub fn until_out(daemon: &Daemon, scene: &mut Scene, port: u16, who: &str) {
    daemon.until(&format!("{port} is answered by {who}"), || {
        (out(scene, port) == who).then_some(())
    });
}
