//! A container runtime's end of a CNI plugin, and a daemon's end of the socket behind it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::symlink,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{loader::redirect, patience::patience};

/// The plugin's name.
pub const NAME: &str = "redirect-cni";
/// A result as another plugin leaves it, for each generation of the specification.
const RESULT_0: &str = r#"{ "cniVersion": "VERSION", "ips": [{"version": "4", "address": "10.0.0.2/24", "interface": 0}], "interfaces":[{"name":"eth0"}], "dns": {} }"#;
const RESULT_1: &str = r#"{ "cniVersion": "VERSION", "ips": [{"address": "10.0.0.2/24", "interface": 0}], "interfaces":[{"name":"eth0"}], "dns": {} }"#;

/// No call of the plugin takes longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the plugin before this one answered.
pub fn result(version: &str) -> String {
    let text = if version.starts_with('0') {
        RESULT_0
    } else {
        RESULT_1
    };
    text.replace("VERSION", version)
}

/// A call of the plugin in the making.
#[derive(Clone, Debug)]
pub struct Call {
    environment: Vec<(String, String)>,
    /// The network configuration.
    pub config: Value,
    previous: Option<String>,
}

/// What a call came to.
#[derive(Debug)]
pub struct Called {
    /// Whether it succeeded.
    pub ok: bool,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Call {
    /// As a kubelet's runtime calls it for a pod `shop/cart-0` in that namespace.
    pub fn new(command: &str, version: &str, netns: &Path, socket: &Path) -> Self {
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c-1"),
            ("CNI_NETNS", netns.to_str().unwrap()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=c-1;K8S_POD_UID=u-1",
            ),
        ];
        Self {
            environment: environment
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .to_vec(),
            config: json!({ "cniVersion": version, "name": "net", "type": NAME, "socket": socket, "timeout": 1 }),
            previous: Some(result(version)),
        }
    }

    /// With a variable set, or removed if the value is empty.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        if !value.is_empty() {
            self.environment.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    /// With a field of the configuration set.
    pub fn field(mut self, name: &str, value: Value) -> Self {
        self.config[name] = value;
        self
    }

    /// With another former result, in its own spelling.
    pub fn previous(mut self, text: Option<&str>) -> Self {
        self.previous = text.map(str::to_owned);
        self
    }

    /// Calls it as `redirect-cni`.
    pub fn run(&self) -> Called {
        self.run_with(&self.input())
    }

    /// What it would read.
    pub fn input(&self) -> String {
        let mut text = self.config.to_string();
        if let Some(previous) = &self.previous {
            // Spliced in: a JSON library would write it anew.
            text.pop();
            text += &format!(r#","prevResult":{previous}}}"#);
        }
        text
    }

    /// Calls it with another text on standard input.
    pub fn run_with(&self, input: &str) -> Called {
        let program = redirect();
        let directory = TempDir::new().unwrap();
        let link = directory.path().join(NAME);
        symlink(program.get_program(), &link).unwrap();
        let mut command = std::process::Command::new(&link);
        command.env_clear();
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        called(&mut command, input)
    }

    /// Calls it as `redirect cni`.
    pub fn run_by_subcommand(&self) -> Called {
        let mut command = redirect();
        command
            .arg("cni")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        called(&mut command, &self.input())
    }
}

fn called(command: &mut std::process::Command, input: &str) -> Called {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    // A plugin that ends without reading all of it closes the pipe.
    let writer = thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let deadline = Instant::now() + patience(PATIENCE);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the plugin hangs");
        }
        thread::sleep(Duration::from_millis(1));
    }
    writer.join().unwrap();
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    Called {
        ok: status.success(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

impl Called {
    /// The error it answered: code and message. Fails if it succeeded or said anything else.
    pub fn error(&self) -> (u64, String) {
        assert!(!self.ok, "it succeeded: {self:?}");
        let error: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert!(error["cniVersion"].is_string(), "{self:?}");
        (
            error["code"].as_u64().unwrap(),
            error["msg"].as_str().unwrap().to_owned(),
        )
    }
}

/// What a stub daemon does with a request line: the text that it writes back, newline included, before it hangs up.
type Behaviour = dyn FnMut(&Value) -> String + Send;

/// A daemon's end of the socket.
pub struct StubDaemon {
    directory: TempDir,
    asked: Arc<Mutex<Vec<Value>>>,
}

impl StubDaemon {
    /// One that answers as told. Its thread ends with the test's process.
    pub fn new(mut behaviour: impl FnMut(&Value) -> String + Send + 'static) -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("daemon.sock")).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A client that has gone is its own business.
                let _gone = serve(&stream, &log, &mut behaviour);
            }
        });
        Self { directory, asked }
    }

    /// One that always answers this line.
    pub fn answering(line: &'static str) -> Self {
        Self::new(move |_| format!("{line}\n"))
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("daemon.sock")
    }

    /// What it was asked, since the last time.
    pub fn asked(&self) -> Vec<Value> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn serve(
    stream: &UnixStream,
    log: &Mutex<Vec<Value>>,
    behaviour: &mut Behaviour,
) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let request: Value = serde_json::from_str(&line).unwrap_or(Value::String(line));
    log.lock().unwrap().push(request.clone());
    let answer = behaviour(&request);
    (&mut &*stream).write_all(answer.as_bytes())
}

/// A directory where no daemon listens.
pub struct NoDaemon(TempDir);

impl NoDaemon {
    /// A new directory.
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// Where a daemon would listen.
    pub fn socket(&self) -> PathBuf {
        self.0.path().join("daemon.sock")
    }

    /// How many pods the plugin says have started uncaptured.
    pub fn failed_open(&self) -> u64 {
        fs::read_to_string(self.0.path().join("failed-open"))
            .map_or(0, |text| text.trim().parse().unwrap())
    }
}

impl Default for NoDaemon {
    fn default() -> Self {
        Self::new()
    }
}
