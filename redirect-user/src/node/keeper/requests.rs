//! What the CNI plugin asks.

use std::time::Instant;

use k8s_openapi::api::core::v1::Pod;

use super::states::State;
use super::{Attempt, Decision, Keeper, Told, decide, kubernetes_pod, place, pods};
use crate::node::api::{Answer, Gone, Outcome, Sandbox};
use crate::observe::netns::NetworkNamespace;
use crate::record::{KubernetesPod, Notes};
use crate::status;

impl Keeper {
    /// A sandbox has been made; its containers start when this is answered.
    pub(super) fn add(&mut self, sandbox: &Sandbox, pod: &Pod) -> Answer {
        let Some(uid) = pods::uid(pod).map(str::to_owned) else {
            return failed("the pod has no UID".to_owned(), true);
        };
        self.added.insert(uid.clone(), Instant::now());
        if let Err(error) = self.refresh() {
            self.enter(&uid, pod, State::Failed(error.clone()));
            return failed(error, true);
        }
        let policy = match decide(pod, &self.rules) {
            Decision::Capture(policy) => policy,
            Decision::Skip(skip) => {
                if let Err(error) = self.let_go(&uid) {
                    self.enter(&uid, pod, State::Failed(error.clone()));
                    return failed(error, true);
                }
                let reason = skip.to_string();
                self.enter(&uid, pod, State::Skipped(skip));
                return skipped(reason);
            }
            Decision::Invalid(error) => {
                let error = error.to_string();
                self.enter(&uid, pod, State::Invalid(error.clone()));
                return failed(error, false);
            }
        };
        let told = Told {
            netns: Some(sandbox.netns.clone()),
            cgroup: sandbox.cgroup_parent.clone(),
        };
        let of_kubernetes = KubernetesPod {
            sandbox: Some(sandbox.container_id.clone()),
            ..kubernetes_pod(pod, &uid)
        };
        let notes = self.attached.get(&uid).map(|(_, notes)| notes.clone());
        let on_node = pods::uid_on_node(pod).unwrap_or(&uid).to_owned();
        let captured = (&*policy, &self.proxy(pod));
        // The kubelet has made it a moment ago: that a search before did not find it says nothing.
        self.cgroups.0 = None;
        match self.attach(&of_kubernetes, &on_node, captured, &told, notes.as_ref()) {
            Ok(Attempt::Done(_)) => {
                self.enter(&uid, pod, State::Captured);
                done(Outcome::Captured)
            }
            Ok(Attempt::NotYet(missing)) => {
                self.enter(&uid, pod, State::Waiting(missing));
                failed(missing.to_owned(), true)
            }
            Err(error) => {
                let error = format!("{error:#}");
                self.enter(&uid, pod, State::Failed(error.clone()));
                failed(error, true)
            }
        }
    }

    /// Nothing is changed.
    pub(super) fn check(&mut self, sandbox: &Sandbox, pod: &Pod) -> Answer {
        if let Decision::Skip(skip) = decide(pod, &self.rules) {
            return skipped(skip.to_string());
        }
        self.read_attached();
        if let Err(error) = self.refresh() {
            return failed(error, true);
        }
        let uid = pods::uid(pod).unwrap_or_default();
        let Some((cgroup_id, notes)) = self.attached.get(uid) else {
            return failed("the pod is not attached".to_owned(), false);
        };
        match NetworkNamespace::open(&sandbox.netns) {
            Ok(netns) if netns.inode() == notes.netns_inode => {
                match status::is_capturing(*cgroup_id, notes) {
                    Ok(true) => done(Outcome::Captured),
                    Ok(false) => failed(
                        "the pod is attached, but not captured: some of it has been removed or replaced"
                            .to_owned(),
                        false,
                    ),
                    Err(error) => failed(format!("{error:#}"), true),
                }
            }
            Ok(_) => failed(
                format!(
                    "netns: {}: the pod is attached in another one, {}",
                    sandbox.netns.display(),
                    notes.netns
                ),
                false,
            ),
            Err(error) => failed(format!("netns: {error}"), false),
        }
    }

    /// A sandbox goes. It may have gone long ago, and the pod may have another one by now.
    pub(super) fn del(&mut self, gone: &Gone) -> Answer {
        self.read_attached();
        if let Err(error) = self.refresh() {
            return failed(error, true);
        }
        let uids: Vec<String> = self
            .attached
            .iter()
            .filter(|(_, (_, notes))| ends(notes, gone))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in &uids {
            self.added.remove(uid);
            if let Err(error) = self.let_go(uid) {
                return failed(error, true);
            }
        }
        done(Outcome::Ok)
    }

    /// Only these live. One with living processes is kept all the same: it must not get out by a mistake in a list.
    pub(super) fn gc(&mut self, valid: &[String]) -> Answer {
        self.read_attached();
        let dead = |notes: &Notes| {
            let sandbox = notes.pod.as_ref().and_then(|pod| pod.sandbox.as_ref());
            sandbox.is_some_and(|id| !valid.contains(id)) && !place::is_alive(notes)
        };
        let uids: Vec<String> = self
            .attached
            .iter()
            .filter(|(_, (_, notes))| dead(notes))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in uids {
            // It is tried again without being asked.
            let _told_already = self.let_go(&uid);
        }
        done(Outcome::Ok)
    }
}

/// Whether the end of that sandbox is the end of this attachment.
fn ends(notes: &Notes, gone: &Gone) -> bool {
    let Some(pod) = &notes.pod else {
        return false;
    };
    match &pod.sandbox {
        Some(sandbox) => *sandbox == gone.container_id,
        // Attached without the plugin: the name tells, as long as the namespace is not a living one of another sandbox.
        None => {
            let named = pod.namespace == gone.pod.namespace && pod.name == gone.pod.name;
            let is_uid = gone.pod.uid.as_ref().is_none_or(|uid| *uid == pod.uid);
            let netns = gone.netns.as_deref().map(NetworkNamespace::open);
            let is_netns = match netns {
                Some(Ok(netns)) => netns.inode() == notes.netns_inode,
                _ => notes.namespace().is_none(),
            };
            named && is_uid && is_netns && !place::is_alive(notes)
        }
    }
}

fn done(result: Outcome) -> Answer {
    Answer::Done {
        result,
        reason: None,
    }
}

fn skipped(reason: String) -> Answer {
    Answer::Done {
        result: Outcome::Skipped,
        reason: Some(reason),
    }
}

fn failed(error: String, retry: bool) -> Answer {
    Answer::Failed { error, retry }
}
