//! The pods of this node, as the Kubernetes API tells them.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};

use super::api::PodName;
use super::metrics::{Metrics, Trouble};

/// Copies of the mirror pod of a static pod: kubelet names the cgroup by this, not by the mirror's own uid.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// After many errors in a row.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is known, by UID.
#[derive(Debug, Default)]
pub struct Pods {
    known: RwLock<HashMap<String, Arc<Pod>>>,
}

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This pod has come, changed or gone.
    One(String),
    /// All pods have been listed.
    All,
}

impl Pods {
    /// The pod with this UID.
    pub fn get(&self, uid: &str) -> Option<Arc<Pod>> {
        self.read().get(uid).cloned()
    }

    /// UIDs of all.
    pub fn uids(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<String, Arc<Pod>>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, Arc<Pod>>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows an event of the watch. `listed` gathers a list until it is complete.
    fn apply(&self, event: Event<Pod>, listed: &mut Vec<Pod>) -> Option<Change> {
        match event {
            Event::Init => {
                listed.clear();
                None
            }
            Event::InitApply(pod) => {
                listed.push(pod);
                None
            }
            Event::InitDone => {
                let pods = listed.drain(..).map(slim);
                *self.write() = pods
                    .filter_map(|pod| Some((uid(&pod)?.to_owned(), Arc::new(pod))))
                    .collect();
                Some(Change::All)
            }
            Event::Apply(pod) => {
                let pod = slim(pod);
                let uid = uid(&pod)?.to_owned();
                self.write().insert(uid.clone(), Arc::new(pod));
                Some(Change::One(uid))
            }
            Event::Delete(pod) => {
                let uid = uid(&pod)?.to_owned();
                self.write().remove(&uid);
                Some(Change::One(uid))
            }
        }
    }
}

/// Follows the pods of a node for good. Never ends: every error is retried, with pauses that grow to half a minute.
pub async fn follow(
    client: Client,
    node: &str,
    pods: &Pods,
    metrics: &Metrics,
    mut changed: impl FnMut(Change),
) {
    let config = || watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut backoff = watcher::DefaultBackoff::default();
    loop {
        let api: Api<Pod> = Api::all(client.clone());
        let mut events = std::pin::pin!(watcher(api, config()));
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    // The beginning of a list is no answer yet.
                    if !matches!(event, Event::Init) {
                        backoff.reset();
                    }
                    if let Some(change) = pods.apply(event, &mut listed) {
                        changed(change);
                    }
                }
                Err(error) => {
                    metrics.trouble(Trouble::Watch);
                    tracing::warn!(error = words(&error), "watching the pods of this node");
                    tokio::time::sleep(backoff.next().unwrap_or(LONGEST_PAUSE)).await;
                    if is_too_old(&error) {
                        break;
                    }
                }
            }
        }
    }
}

/// The watcher asks again with the version that the server has just refused, if the refusal is an answer of its own
/// and not a part of the stream: only a new list helps.
fn is_too_old(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

/// Asks for one pod. `None` if there is none of that name.
pub async fn get(client: &Client, name: &PodName) -> Result<Option<Pod>, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &name.namespace);
    Ok(api.get_opt(&name.name).await?.map(slim))
}

/// Large parts that nobody here reads.
fn slim(mut pod: Pod) -> Pod {
    pod.metadata.managed_fields = None;
    if let Some(spec) = &mut pod.spec {
        spec.volumes = None;
        spec.affinity = None;
        spec.tolerations = None;
    }
    pod
}

/// The UID of the API's object.
#[must_use]
pub fn uid(pod: &Pod) -> Option<&str> {
    pod.metadata.uid.as_deref()
}

/// The UID that kubelet uses on the node.
#[must_use]
pub fn uid_on_node(pod: &Pod) -> Option<&str> {
    let mirrored = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|all| all.get(MIRROR));
    mirrored.map(String::as_str).or_else(|| uid(pod))
}

/// The id of its container of that name, as the runtime has it, if it runs: an ordinary one, or an init container
/// that stays (native sidecar).
#[must_use]
pub fn running_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let status = pod.status.as_ref()?;
    let of = |list: &'a Option<Vec<ContainerStatus>>| list.iter().flatten();
    let container = of(&status.container_statuses)
        .chain(of(&status.init_container_statuses))
        .find(|container| container.name == name)?;
    // One that has ended keeps its id in the status until the next one runs.
    container.state.as_ref()?.running.as_ref()?;
    let id = container.container_id.as_deref()?;
    (!id.is_empty()).then_some(id)
}

/// Whether all its containers have ended for good.
#[must_use]
pub fn is_finished(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Its name, for messages.
#[must_use]
pub fn name(pod: &Pod) -> PodName {
    PodName {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        uid: pod.metadata.uid.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(uid: &str) -> Pod {
        let pod =
            json!({"metadata": {"namespace": "n", "name": uid, "uid": uid, "managedFields": [{}]}});
        serde_json::from_value(pod).expect("a pod")
    }

    #[test]
    fn complete_list_replaces_what_is_known_and_a_broken_one_does_not() {
        let (pods, mut listed) = (Pods::default(), Vec::new());
        let mut apply = |event| pods.apply(event, &mut listed);
        assert_eq!(apply(Event::Init), None);
        assert_eq!(apply(Event::InitApply(pod("a"))), None);
        assert!(pods.uids().is_empty());
        assert_eq!(apply(Event::InitDone), Some(Change::All));
        assert_eq!(
            apply(Event::Apply(pod("b"))),
            Some(Change::One("b".to_owned()))
        );
        assert!(pods.get("a").is_some() && pods.get("b").is_some());
        // The list breaks off and begins again.
        for event in [Event::Init, Event::InitApply(pod("c")), Event::Init] {
            assert_eq!(apply(event), None);
        }
        assert!(pods.get("a").is_some() && pods.get("c").is_none());
        assert_eq!(apply(Event::InitApply(pod("b"))), None);
        assert_eq!(apply(Event::InitDone), Some(Change::All));
        assert_eq!(pods.uids(), ["b"]);
        assert_eq!(
            apply(Event::Delete(pod("b"))),
            Some(Change::One("b".to_owned()))
        );
        assert!(pods.uids().is_empty());
    }

    #[test]
    fn only_a_container_that_runs_has_an_id() {
        let running = json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}});
        let with = |list: &str, container: Value| {
            let mut whole = json!({"metadata": {}, "status": {}});
            whole["status"][list] = json!([
                {"name": "app", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                 "containerID": "containerd://app", "state": running},
                container,
            ]);
            let pod: Pod = serde_json::from_value(whole).expect("a pod");
            running_container(&pod, "istio-proxy").map(str::to_owned)
        };
        let proxy = |state: &Value, id: &str| {
            json!({"name": "istio-proxy", "image": "", "imageID": "", "ready": true,
                   "restartCount": 0, "containerID": id, "state": state})
        };
        for list in ["containerStatuses", "initContainerStatuses"] {
            let found = with(list, proxy(&running, "containerd://p"));
            assert_eq!(found.as_deref(), Some("containerd://p"), "{list}");
        }
        let list = "containerStatuses";
        let ended = json!({"terminated": {"exitCode": 1}});
        for state in [&ended, &json!({"waiting": {}}), &json!({})] {
            assert_eq!(with(list, proxy(state, "containerd://p")), None, "{state}");
        }
        assert_eq!(with(list, proxy(&running, "")), None);
        assert_eq!(running_container(&pod("a"), "istio-proxy"), None);
    }

    #[test]
    fn static_pod_has_the_uid_that_kubelet_gave_it() {
        let mut mirror = pod("api");
        assert_eq!(uid_on_node(&mirror), Some("api"));
        mirror.metadata.annotations = Some([(MIRROR.to_owned(), "node".to_owned())].into());
        assert_eq!(uid_on_node(&mirror), Some("node"));
        assert_eq!(uid(&mirror), Some("api"));
    }
}
