//! The socket on which the CNI plugin asks; see [`api`](super::api).

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use nix::sys::stat::{Mode, umask};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::api::{
    Answer, DEFAULT_SOCKET, MAX_LINE, Operation, Outcome, PodName, Request, Sandbox, TIMEOUT,
};
use super::decision::{Rules, handed_over, skip_namespace};
use super::keeper::{Pulse, Work};
use super::metrics::{Metrics, Trouble};
use super::pods::{self, Pods};

/// Connections served at once; others wait to be accepted.
const CONNECTIONS: usize = 64;
/// How long the API may take to tell a pod: shorter than the plugin waits.
const API: Duration = Duration::from_secs(7);
/// Pause between two questions to the API.
const PAUSE: Duration = Duration::from_millis(500);

/// What requests are answered with.
#[derive(Clone)]
pub struct Server {
    /// The Kubernetes API.
    pub client: Client,
    /// What is known of it.
    pub pods: Arc<Pods>,
    /// Who is left alone.
    pub rules: Rules,
    /// The keeper.
    pub work: mpsc::Sender<Work>,
    /// Whether it lives.
    pub pulse: Arc<Pulse>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A listening socket; its file goes with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens, for root only. A socket that a killed daemon left is replaced, one that is answered is not.
    pub fn bind(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .with_context(|| format!("--socket: making {}", directory.display()))?;
            // Nobody else's, and a kubelet that has made it for a volume opened it to all.
            if Some(directory) == Path::new(DEFAULT_SOCKET).parent() {
                fs::set_permissions(directory, Permissions::from_mode(0o700))
                    .with_context(|| format!("--socket: closing {}", directory.display()))?;
            }
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => bail!(
                "--socket {}: is there and no socket: allowed is a path that is free",
                path.display()
            ),
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => bail!(
                "--socket {}: another daemon answers there: one runs on a node",
                path.display()
            ),
            Ok(_) => fs::remove_file(path)
                .with_context(|| format!("--socket: removing {}", path.display()))?,
            Err(_) => {}
        }
        // From the first moment on, not only after a chmod.
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        Ok(Self {
            listener: listener
                .with_context(|| format!("--socket: listening on {}", path.display()))?,
            path: path.to_owned(),
        })
    }

    /// Serves for good.
    pub async fn serve(&self, server: Server) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            // Never closed, so this waits for a slot only.
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let server = server.clone();
                    tokio::spawn(async move {
                        let _slot = slot;
                        server.converse(stream).await;
                    });
                }
                Err(error) => {
                    tracing::warn!("accepting on the socket: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

impl Server {
    async fn converse(&self, stream: UnixStream) {
        // The kernel translates ids: 0 is root of our own user namespace, which has to be the initial one.
        let uid = stream.peer_cred().map(|peer| peer.uid());
        if !matches!(uid, Ok(0)) {
            self.metrics.trouble(Trouble::Stranger);
            tracing::warn!(?uid, "somebody else than root on the socket");
            return;
        }
        let mut stream = BufReader::new(stream);
        loop {
            let line = match timeout(TIMEOUT, read_line(&mut stream)).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) | Err(_) => return,
                Ok(Err(error)) => {
                    self.metrics.trouble(Trouble::Request);
                    tracing::warn!("reading from the socket: {error}");
                    return;
                }
            };
            let answer = match serde_json::from_slice::<Request>(&line) {
                Ok(request) => self.answer(request.operation).await,
                Err(error) => {
                    self.metrics.trouble(Trouble::Request);
                    failed(format!("not a request: {error}"), false)
                }
            };
            let Ok(mut text) = serde_json::to_vec(&answer) else {
                return;
            };
            text.push(b'\n');
            if !matches!(timeout(TIMEOUT, stream.write_all(&text)).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    async fn answer(&self, operation: Operation) -> Answer {
        let op = match operation {
            Operation::Add(_) => "add",
            Operation::Check(_) => "check",
            Operation::Del(_) => "del",
            Operation::Status {} => "status",
            Operation::Gc { .. } => "gc",
        };
        // A little earlier than the plugin: it is to hear why.
        let limit = TIMEOUT.saturating_sub(Duration::from_secs(1));
        let answer = timeout(limit, self.carry_out(operation)).await;
        let answer = answer.unwrap_or_else(|_| {
            failed(
                "the daemon is busy: it has not come to this in time".to_owned(),
                true,
            )
        });
        let result = match &answer {
            Answer::Done { result, .. } => match result {
                Outcome::Captured => "captured",
                Outcome::Skipped => "skipped",
                Outcome::Ok => "ok",
            },
            Answer::Failed { .. } => "error",
        };
        self.metrics.called(op, result);
        answer
    }

    async fn carry_out(&self, operation: Operation) -> Answer {
        match operation {
            Operation::Add(sandbox) => match self.find(&sandbox).await {
                Ok(pod) => self.ask(|reply| Work::Add(sandbox, pod, reply)).await,
                Err(answer) => answer,
            },
            Operation::Check(sandbox) => match self.find(&sandbox).await {
                Ok(pod) => self.ask(|reply| Work::Check(sandbox, pod, reply)).await,
                Err(answer) => answer,
            },
            Operation::Del(gone) => self.ask(|reply| Work::Del(gone, reply)).await,
            Operation::Gc {
                valid_container_ids,
            } => self.ask(|reply| Work::Gc(valid_container_ids, reply)).await,
            Operation::Status {} if self.pulse.age() > TIMEOUT => {
                failed("the daemon hangs".to_owned(), true)
            }
            Operation::Status {} => Answer::Done {
                result: Outcome::Ok,
                reason: None,
            },
        }
    }

    async fn ask(&self, work: impl FnOnce(oneshot::Sender<Answer>) -> Work) -> Answer {
        let (reply, answer) = oneshot::channel();
        let ends = || failed("the daemon ends".to_owned(), true);
        if self.work.send(work(reply)).is_err() {
            return ends();
        }
        answer.await.unwrap_or_else(|_| ends())
    }

    /// The pod's object: the one that the watch has told, if it is certainly this pod; else what the runtime has handed
    /// over, if that is enough; else what the API answers now.
    async fn find(&self, sandbox: &Sandbox) -> Result<Arc<Pod>, Answer> {
        let name = &sandbox.pod;
        if let Some(skip) = skip_namespace(&name.namespace, &self.rules) {
            return Err(Answer::Done {
                result: Outcome::Skipped,
                reason: Some(skip.to_string()),
            });
        }
        if let Some(pod) = name.uid.as_deref().and_then(|uid| self.pods.get(uid)) {
            return Ok(pod);
        }
        let missing = match handed_over(sandbox, &self.rules) {
            Ok(pod) => return Ok(Arc::new(pod)),
            Err(missing) => missing,
        };
        let of_pod = format!("pod {}/{}", name.namespace, name.name);
        let mut last = format!("{of_pod}: the Kubernetes API does not answer");
        let deadline = Instant::now() + API;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match timeout(left, pods::get(&self.client, name)).await {
                Ok(Ok(Some(pod))) => match is_other(&pod, name) {
                    None => return Ok(Arc::new(pod)),
                    Some(other) => last = format!("{of_pod}: the Kubernetes API has {other}"),
                },
                Ok(Ok(None)) => last = format!("{of_pod}: the Kubernetes API knows none"),
                Ok(Err(error)) => {
                    self.metrics.trouble(Trouble::Watch);
                    last = format!("{of_pod}: asking the Kubernetes API: {error}");
                }
                Err(_) => break,
            }
            tokio::time::sleep(PAUSE).await;
        }
        let not_enough = "what the container runtime has handed over is not enough";
        Err(failed(format!("{last}; {not_enough}: {missing}"), true))
    }
}

/// In words, if the pod of that name is another one than is meant.
fn is_other(pod: &Pod, name: &PodName) -> Option<String> {
    let wanted = name.uid.as_deref()?;
    let known = [pods::uid(pod), pods::uid_on_node(pod)];
    (!known.contains(&Some(wanted))).then(|| {
        format!(
            "one with UID {}, not {wanted}",
            pods::uid(pod).unwrap_or("?")
        )
    })
}

/// A line without its end; `None` if there is no more.
async fn read_line(stream: &mut BufReader<UnixStream>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let most = MAX_LINE as u64;
    stream.take(most).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => {
            line.pop();
            Ok(Some(line))
        }
        Some(_) if line.len() >= MAX_LINE => Err(io::Error::other(format!(
            "a line is longer than {MAX_LINE} bytes"
        ))),
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn failed(error: String, retry: bool) -> Answer {
    Answer::Failed { error, retry }
}
