//! The Kubernetes API, as far as pods and Events go, played over HTTP: lists and watches with resource versions, bookmarks,
//! and every way to misbehave.

mod service_account;

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path as Segments, RawQuery, State},
    http::{StatusCode, header},
    response::Response,
    routing::{get, patch, post},
};
use futures::stream;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket},
    runtime::Runtime,
    sync::watch,
};

pub use service_account::ServiceAccount;

/// A hanging server must not hold a test for ever.
const HANG: Duration = Duration::from_secs(600);

/// How requests are answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Manner {
    /// As by a good server.
    Well,
    /// Not at all; what streams, streams no more.
    Hang,
    /// With what is no JSON.
    Nonsense,
    /// With an error of the server.
    Fail,
    /// Watches with `410 Gone` as the answer itself, lists well.
    Gone,
}

/// How often was asked.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Asked {
    /// Lists of pods.
    pub lists: u32,
    /// Watches of pods.
    pub watches: u32,
}

#[derive(Default)]
struct Cluster {
    version: u64,
    /// By namespace and name.
    pods: BTreeMap<(String, String), Value>,
    /// What happened: version and watch event.
    history: Vec<(u64, Value)>,
    /// Versions up to this are forgotten.
    compacted: u64,
    /// Watches of an earlier one are cut off.
    connections: u64,
    manner: Option<Manner>,
    events: Vec<Value>,
    asked: Asked,
}

struct Shared {
    cluster: Mutex<Cluster>,
    changed: watch::Sender<()>,
}

/// A running server; ends with this value.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// Bound there, and never listens: nobody else gets the port while the server is away.
    _reserved: TcpSocket,
    runtime: Option<Runtime>,
    kubeconfig: PathBuf,
}

static SERVERS: AtomicU32 = AtomicU32::new(0);

impl ApiServer {
    /// Starts one that knows of no pod.
    pub fn start() -> Self {
        let mut server = Self::away();
        server.come();
        server
    }

    /// One that does not listen yet, at an address that is kept for it.
    pub fn away() -> Self {
        let (changed, _) = watch::channel(());
        let shared = Arc::new(Shared {
            cluster: Mutex::new(Cluster {
                version: 100,
                ..Cluster::default()
            }),
            changed,
        });
        let reserved = bound((Ipv4Addr::LOCALHOST, 0).into());
        let address = reserved.local_addr().unwrap();
        let serial = SERVERS.fetch_add(1, Ordering::Relaxed);
        let kubeconfig =
            std::env::temp_dir().join(format!("kubeconfig-{}-{serial}", process::id()));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        fs::write(&kubeconfig, config.to_string()).unwrap();
        Self {
            shared,
            address,
            _reserved: reserved,
            runtime: None,
            kubeconfig,
        }
    }

    /// Begins to listen.
    pub fn come(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let address = self.address;
        let listener = runtime.block_on(async move { bound(address).listen(64).unwrap() });
        runtime.spawn(serve(listener, self.shared.clone()));
        self.runtime = Some(runtime);
    }

    /// Stops listening and cuts every connection; what is known stays.
    pub fn go(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// What a client is to be given.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Adds a pod, or changes it.
    pub fn apply(&self, pod: &Value) {
        let key = key(pod);
        self.change(|cluster| {
            let is_new = !cluster.pods.contains_key(&key);
            let pod = cluster.stamp(pod);
            cluster.pods.insert(key, pod.clone());
            cluster.record(if is_new { "ADDED" } else { "MODIFIED" }, pod);
        });
    }

    /// Removes a pod.
    pub fn delete(&self, pod: &Value) {
        let key = key(pod);
        self.change(|cluster| {
            let pod = cluster.pods.remove(&key).expect("a pod that is there");
            let pod = cluster.stamp(&pod);
            cluster.record("DELETED", pod);
        });
    }

    /// From now on, requests are answered like this; streams that run are cut off.
    pub fn behave(&self, manner: Manner) {
        self.change(|cluster| {
            cluster.manner = Some(manner);
            cluster.connections += 1;
        });
    }

    /// Cuts streams off.
    pub fn disconnect(&self) {
        self.change(|cluster| cluster.connections += 1);
    }

    /// Forgets what has happened: a watch from before is told `410 Gone` in its stream.
    pub fn compact(&self) {
        self.change(|cluster| {
            cluster.version += 1;
            cluster.compacted = cluster.version;
            cluster.history.clear();
            cluster.connections += 1;
        });
    }

    /// Tells all watches the version, and nothing else.
    pub fn bookmark(&self) {
        self.change(|cluster| {
            cluster.version += 1;
            let version = cluster.version.to_string();
            let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": version}});
            cluster.record("BOOKMARK", object);
        });
    }

    /// The Events that were written.
    pub fn events(&self) -> Vec<Value> {
        self.lock().events.clone()
    }

    /// How often was asked.
    pub fn asked(&self) -> Asked {
        self.lock().asked
    }

    fn change(&self, change: impl FnOnce(&mut Cluster)) {
        change(&mut self.lock());
        self.shared.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, Cluster> {
        self.shared.lock()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.go();
        let _left_in_tmp = fs::remove_file(&self.kubeconfig);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    fn stamp(&mut self, pod: &Value) -> Value {
        self.version += 1;
        let mut pod = pod.clone();
        pod["metadata"]["resourceVersion"] = json!(self.version.to_string());
        pod
    }

    fn record(&mut self, kind: &str, object: Value) {
        let event = json!({"type": kind, "object": object});
        self.history.push((self.version, event));
    }
}

fn key(pod: &Value) -> (String, String) {
    let text = |name: &str| pod["metadata"][name].as_str().unwrap().to_owned();
    (text("namespace"), text("name"))
}

fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    // Also beside another that is bound there.
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    axum::serve(listener, router(shared)).await.unwrap();
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/api/v1/pods", get(pods))
        .route("/api/v1/namespaces/{namespace}/pods/{name}", get(pod))
        .route(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events",
            post(event),
        )
        .route(
            "/apis/events.k8s.io/v1/namespaces/{namespace}/events/{name}",
            patch(event),
        )
        .with_state(shared)
}

async fn event(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    if let Some(answer) = misbehave(&shared).await {
        return answer;
    }
    let event: Value = serde_json::from_slice(&body).unwrap();
    shared.lock().events.push(event.clone());
    answer(StatusCode::CREATED, event.to_string())
}

async fn pod(
    State(shared): State<Arc<Shared>>,
    Segments(key): Segments<(String, String)>,
) -> Response {
    if let Some(answer) = misbehave(&shared).await {
        return answer;
    }
    match shared.lock().pods.get(&key) {
        Some(pod) => answer(StatusCode::OK, pod.to_string()),
        None => refusal(404, "NotFound"),
    }
}

async fn pods(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default().replace("%3D", "=");
    let parameter = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_owned())
    };
    let node = parameter("fieldSelector")
        .and_then(|selector| selector.strip_prefix("spec.nodeName=").map(str::to_owned));
    let watches = parameter("watch").is_some_and(|value| value == "true" || value == "1");
    {
        let asked = &mut shared.lock().asked;
        *(if watches {
            &mut asked.watches
        } else {
            &mut asked.lists
        }) += 1;
    }
    if watches && shared.lock().manner == Some(Manner::Gone) {
        return refusal(410, "Expired");
    }
    if let Some(answer) = misbehave(&shared).await {
        return answer;
    }
    if watches {
        let version = parameter("resourceVersion").and_then(|text| text.parse().ok());
        return watch_pods(shared, node, version.unwrap_or(0));
    }
    let cluster = shared.lock();
    let items: Vec<&Value> = cluster
        .pods
        .values()
        .filter(|pod| is_on(pod, node.as_deref()))
        .collect();
    let version = cluster.version.to_string();
    let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
    answer(StatusCode::OK, list.to_string())
}

fn is_on(pod: &Value, node: Option<&str>) -> bool {
    node.is_none_or(|node| pod["spec"]["nodeName"] == node)
}

/// Events behind a version, and all that come.
fn watch_pods(shared: Arc<Shared>, node: Option<String>, from: u64) -> Response {
    struct Watch {
        shared: Arc<Shared>,
        changes: watch::Receiver<()>,
        connection: u64,
        node: Option<String>,
        told: u64,
        is_over: bool,
    }
    let (connection, is_gone) = {
        let cluster = shared.lock();
        (cluster.connections, from < cluster.compacted)
    };
    if is_gone {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
                            "reason": "Expired", "message": "too old resource version"});
        let line = json!({"type": "ERROR", "object": status}).to_string() + "\n";
        return answer(StatusCode::OK, line);
    }
    let changes = shared.changed.subscribe();
    let state = Watch {
        shared,
        changes,
        connection,
        node,
        told: from,
        is_over: false,
    };
    let lines = stream::unfold(state, |mut watch| async move {
        loop {
            if watch.is_over {
                return None;
            }
            let (lines, is_cut, manner) = {
                let cluster = watch.shared.lock();
                let mut lines = String::new();
                for (version, event) in &cluster.history {
                    let object = &event["object"];
                    let is_bookmark = event["type"] == "BOOKMARK";
                    if *version > watch.told
                        && (is_bookmark || is_on(object, watch.node.as_deref()))
                    {
                        lines += &(event.to_string() + "\n");
                    }
                }
                watch.told = watch.told.max(cluster.version);
                (
                    lines,
                    cluster.connections != watch.connection,
                    cluster.manner,
                )
            };
            if is_cut {
                watch.is_over = true;
                match manner {
                    Some(Manner::Hang) => tokio::time::sleep(HANG).await,
                    Some(Manner::Nonsense) => {
                        return Some((Ok::<_, std::io::Error>("<html>\n".to_owned()), watch));
                    }
                    _ => {}
                }
                return None;
            }
            if !lines.is_empty() {
                return Some((Ok(lines), watch));
            }
            if watch.changes.changed().await.is_err() {
                return None;
            }
        }
    });
    Response::builder()
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from_stream(lines))
        .unwrap()
}

/// The answer of a server that does not do as it should.
async fn misbehave(shared: &Shared) -> Option<Response> {
    let manner = shared.lock().manner.unwrap_or(Manner::Well);
    match manner {
        Manner::Well | Manner::Gone => None,
        Manner::Hang => {
            tokio::time::sleep(HANG).await;
            None
        }
        Manner::Nonsense => Some(answer(StatusCode::OK, "<html>busy</html>".to_owned())),
        Manner::Fail => Some(refusal(500, "InternalError")),
    }
}

fn refusal(code: u16, reason: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                        "reason": reason, "message": reason});
    answer(StatusCode::from_u16(code).unwrap(), status.to_string())
}

fn answer(code: StatusCode, text: String) -> Response {
    Response::builder()
        .status(code)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(text))
        .unwrap()
}
