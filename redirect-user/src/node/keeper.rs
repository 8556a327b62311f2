//! Keeps this node as it should be: what is wanted, from the Kubernetes API and the CNI plugin, against what is attached.
//!
//! One thread does all that touches the kernel, one thing at a time. Requests of the plugin come before everything else:
//! a pod's start waits for them.

mod observe;
mod pulse;
mod requests;
mod states;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::oneshot;

pub use self::pulse::Pulse;
use self::states::{Known, State, may_be_behind};
use super::api::{Answer, Gone, PodName, Sandbox};
use super::decision::{Decision, ProxyBy, Rules, decide};
use super::metrics::{Metrics, Tally, Trouble};
use super::place::{self, Attempt, Proxy, Told};
use super::pods::{self, Change, Pods};
use super::reports::{Report, Reports};
use crate::attach::Outcome;
use crate::options::Policy;
use crate::record::{KubernetesPod, Notes};
use crate::{detach, status};

/// How soon to look again for a pod that has not got so far.
const WAITING: Duration = Duration::from_millis(500);
/// How soon to try again after an error, at first and at most.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How often a pod that has gone from the API, but not from the node, is looked at.
const LEAVING: Duration = Duration::from_secs(1);
/// How long a search of the cgroups may serve others.
const CGROUPS_AGE: Duration = Duration::from_millis(200);
/// Longest sleep, for the sign of life.
const NAP: Duration = Duration::from_secs(1);
/// Errors in a row before they become an Event: at the start of a pod, one may be none.
const REPORTED_AFTER: u32 = 3;

/// What the keeper is asked to do.
#[derive(Debug)]
pub enum Work {
    /// The pods of this node have changed.
    Changed(Change),
    /// A sandbox has been made for this pod.
    Add(Sandbox, Arc<Pod>, oneshot::Sender<Answer>),
    /// Is it still captured?
    Check(Sandbox, Arc<Pod>, oneshot::Sender<Answer>),
    /// A sandbox goes.
    Del(Gone, oneshot::Sender<Answer>),
    /// Only these sandboxes live.
    Gc(Vec<String>, oneshot::Sender<Answer>),
    /// Bring the metrics up to date.
    Observe(oneshot::Sender<()>),
    /// End; everything stays captured.
    Stop,
}

/// What the keeper works with.
#[derive(Debug)]
pub struct Keeper {
    rules: Rules,
    resync: Duration,
    pods: Arc<Pods>,
    metrics: Arc<Metrics>,
    reports: Reports,
    pulse: Arc<Pulse>,
    /// Whether the pods of this node have been listed.
    synced: bool,
    known: HashMap<String, Known>,
    /// What the daemon has attached, by UID: cgroup id and notes.
    attached: HashMap<String, (u64, Notes)>,
    /// Whether that could not be read when it was last to be.
    is_stale: bool,
    /// When the plugin told of which pod: the API may be behind.
    added: HashMap<String, Instant>,
    /// When the API has last told anything of the node's pods.
    heard: Option<Instant>,
    /// When to look at which pod again.
    due: HashMap<String, Instant>,
    cgroups: (Option<Instant>, HashMap<String, PathBuf>),
    tally: Tally,
}

impl Keeper {
    /// A keeper that knows of nothing.
    pub fn new(
        rules: Rules,
        resync: Duration,
        pods: Arc<Pods>,
        metrics: Arc<Metrics>,
        reports: Reports,
        pulse: Arc<Pulse>,
    ) -> Self {
        Self {
            rules,
            resync,
            pods,
            metrics,
            reports,
            pulse,
            synced: false,
            known: HashMap::new(),
            attached: HashMap::new(),
            is_stale: false,
            added: HashMap::new(),
            heard: None,
            due: HashMap::new(),
            cgroups: (None, HashMap::new()),
            tally: Tally::default(),
        }
    }

    /// Works until told to stop, or until nobody can tell.
    pub fn run(mut self, work: &Receiver<Work>) {
        self.restore();
        let mut next_resync = Instant::now() + self.resync;
        loop {
            self.pulse.beat();
            let now = Instant::now();
            if now >= next_resync {
                self.observe();
                self.resync();
                next_resync = now + self.resync;
            }
            let next = self.due.values().min().copied();
            let wait = match next {
                Some(due) if due <= now => Duration::ZERO,
                Some(due) => (due - now).min(NAP),
                None => NAP,
            };
            match work.recv_timeout(wait.min(next_resync - now)) {
                Ok(Work::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(work) => self.handle(work),
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(uid) = self.take_due() {
                        self.reconcile(&uid);
                    }
                }
            }
        }
    }

    fn handle(&mut self, work: Work) {
        if matches!(work, Work::Changed(_)) {
            self.heard = Some(Instant::now());
        }
        // Whoever asked may have given up waiting.
        match work {
            Work::Changed(Change::One(uid)) => {
                if self.pods.get(&uid).is_none() {
                    self.added.remove(&uid);
                }
                self.look_at(uid, Duration::ZERO);
            }
            Work::Changed(Change::All) => {
                self.synced = true;
                self.metrics.set_synced(true);
                self.resync();
            }
            Work::Add(sandbox, pod, reply) => drop(reply.send(self.add(&sandbox, &pod))),
            Work::Check(sandbox, pod, reply) => drop(reply.send(self.check(&sandbox, &pod))),
            Work::Del(gone, reply) => drop(reply.send(self.del(&gone))),
            Work::Gc(valid, reply) => drop(reply.send(self.gc(&valid))),
            Work::Observe(reply) => {
                self.observe();
                let _ = reply.send(());
            }
            Work::Stop => {}
        }
    }

    fn look_at(&mut self, uid: String, after: Duration) {
        self.due.insert(uid, Instant::now() + after);
    }

    fn take_due(&mut self) -> Option<String> {
        let now = Instant::now();
        let (uid, due) = self.due.iter().min_by_key(|(_, due)| **due)?;
        if *due > now {
            return None;
        }
        let uid = uid.clone();
        self.due.remove(&uid);
        Some(uid)
    }

    /// What an earlier daemon has attached, before the API has said anything.
    fn restore(&mut self) {
        self.read_attached();
        // What was counted before is the earlier daemon's.
        self.observe();
        for uid in self.attached.keys() {
            self.due.insert(uid.clone(), Instant::now());
        }
    }

    /// While the API has said nothing yet: what is attached goes on, with this build's programs and with the addresses and
    /// listeners of now.
    fn hold(&mut self, uid: &str) {
        let Some((_, notes)) = self.attached.get(uid).cloned() else {
            return;
        };
        let Some(pod) = notes.pod.clone().filter(|_| place::is_alive(&notes)) else {
            return;
        };
        let nothing = Told::default();
        let proxy = Proxy::AsBefore(notes.proxy.clone());
        let attempt = self.attach(&pod, uid, (&notes.policy, &proxy), &nothing, Some(&notes));
        let name = name_of(&pod);
        let known = self
            .known
            .entry(uid.to_owned())
            .or_insert_with(|| Known::new(name, State::Captured));
        known.enter(state_after(attempt));
        self.look_again(uid);
        self.count_pods();
    }

    /// Looks at every pod and at everything that is attached.
    fn resync(&mut self) {
        if let Err(error) = detach::collect() {
            self.metrics.trouble(Trouble::Detach);
            tracing::warn!("removing what has gone: {error:#}");
        }
        self.read_attached();
        let heard = self.heard;
        self.added.retain(|_, added| may_be_behind(heard, *added));
        let listed = self.pods.uids();
        let all = listed.iter().chain(self.attached.keys()).cloned();
        let all: Vec<String> = all.chain(self.known.keys().cloned()).collect();
        for uid in all {
            let now = Instant::now();
            // What is to be tried again later is not to be hurried by this.
            self.due.entry(uid).or_insert(now);
        }
    }

    fn read_attached(&mut self) {
        let records = status::attached();
        self.is_stale = records.is_err();
        match records {
            Ok(records) => {
                self.attached = records
                    .into_iter()
                    .filter_map(|(id, notes)| Some((notes.pod.clone()?.uid, (id, notes))))
                    .collect();
            }
            Err(error) => {
                self.metrics.trouble(Trouble::Observe);
                tracing::warn!("reading what is attached: {error:#}");
            }
        }
    }

    /// Makes sure that what is attached is known: without, a pod would stay captured that is to be let go.
    fn refresh(&mut self) -> Result<(), String> {
        if self.is_stale {
            self.read_attached();
        }
        if self.is_stale {
            return Err("what is attached cannot be read".to_owned());
        }
        Ok(())
    }

    /// Makes one pod what it should be.
    fn reconcile(&mut self, uid: &str) {
        if let Err(error) = self.refresh() {
            return match self.pods.get(uid) {
                Some(pod) => self.enter(uid, &pod, State::Failed(error)),
                None => self.look_at(uid.to_owned(), LEAVING),
            };
        }
        let pod = match self.pods.get(uid) {
            Some(pod) if !pods::is_finished(&pod) => pod,
            None if !self.synced => return self.hold(uid),
            _ => return self.depart(uid),
        };
        let decision = decide(&pod, &self.rules);
        let state = match &decision {
            Decision::Skip(skip) => match self.let_go(uid) {
                Ok(()) => State::Skipped(skip.clone()),
                Err(error) => State::Failed(error),
            },
            Decision::Invalid(error) => {
                // A mistake in an annotation must not end a capture: the last policy holds.
                let last = self
                    .attached
                    .get(uid)
                    .map(|(_, notes)| notes.policy.clone());
                if let Some(policy) = last {
                    let attempt = self.capture(&pod, uid, &policy);
                    if !matches!(attempt, State::Captured) {
                        tracing::warn!(uid, state = attempt.label(), "keeping the last policy");
                    }
                }
                State::Invalid(error.to_string())
            }
            Decision::Capture(policy) => self.capture(&pod, uid, policy),
        };
        self.enter(uid, &pod, state);
    }

    fn capture(&mut self, pod: &Pod, uid: &str, policy: &Policy) -> State {
        let notes = self.attached.get(uid).map(|(_, notes)| notes.clone());
        let kubernetes = KubernetesPod {
            sandbox: notes
                .as_ref()
                .and_then(|notes| notes.pod.as_ref()?.sandbox.clone()),
            ..kubernetes_pod(pod, uid)
        };
        let on_node = pods::uid_on_node(pod).unwrap_or(uid).to_owned();
        let (nothing, proxy) = (Told::default(), self.proxy(pod));
        let captured = (policy, &proxy);
        state_after(self.attach(&kubernetes, &on_node, captured, &nothing, notes.as_ref()))
    }

    /// Who is the proxy, by what is known of the pod now.
    fn proxy(&self, pod: &Pod) -> Proxy {
        match self.rules.proxy_by {
            ProxyBy::Uid => Proxy::Ids,
            ProxyBy::Container => {
                let id = pods::running_container(pod, &self.rules.proxy_container);
                Proxy::Container(id.map(str::to_owned))
            }
        }
    }

    /// Attaches, counts and logs; remembers what is attached. `on_node` is the uid that kubelet writes; `captured` says
    /// what is, and who is the proxy.
    fn attach(
        &mut self,
        pod: &KubernetesPod,
        on_node: &str,
        (policy, proxy): (&Policy, &Proxy),
        told: &Told,
        notes: Option<&Notes>,
    ) -> anyhow::Result<Attempt> {
        let last = notes.map(|notes| notes.cgroup.clone());
        let found = last
            .filter(|path| path.is_dir())
            .or_else(|| self.find_cgroup(on_node));
        let begun = Instant::now();
        let known = self.known.get(&pod.uid);
        let has_failed = known.is_some_and(|known| matches!(known.state, State::Failed(_)));
        let attempt = place::attach(
            pod.clone(),
            policy,
            proxy,
            told,
            found.as_deref(),
            notes,
            has_failed,
        );
        let (namespace, name, uid) = (&pod.namespace, &pod.name, &pod.uid);
        match &attempt {
            Ok(Attempt::Done(outcome)) => {
                self.metrics.attached(*outcome, begun.elapsed());
                let milliseconds = begun.elapsed().as_millis();
                match outcome {
                    Outcome::Attached => {
                        tracing::info!(namespace, name, uid, milliseconds, "attached");
                    }
                    Outcome::Changed => {
                        tracing::info!(namespace, name, uid, milliseconds, "changed");
                    }
                    Outcome::Unchanged => {}
                }
                if *outcome != Outcome::Unchanged {
                    self.read_attached();
                }
            }
            Ok(Attempt::NotYet(missing)) => {
                tracing::debug!(namespace, name, uid, missing, "not yet");
            }
            Err(error) => {
                self.metrics.trouble(Trouble::Attach);
                let error = format!("{error:#}");
                tracing::warn!(namespace, name, uid, error, "not attached");
            }
        }
        attempt
    }

    /// Notes the pod's state, and when to look again.
    fn enter(&mut self, uid: &str, pod: &Pod, state: State) {
        let known = self
            .known
            .entry(uid.to_owned())
            .or_insert_with(|| Known::new(pods::name(pod), State::Captured));
        known.enter(state);
        let news = known.news(REPORTED_AFTER);
        let invalid = matches!(known.state, State::Invalid(_));
        self.look_again(uid);
        if let Some(note) = news {
            if invalid {
                let PodName {
                    namespace, name, ..
                } = pods::name(pod);
                self.metrics.trouble(Trouble::InvalidPod);
                tracing::warn!(namespace, name, uid, error = note, "not captured as asked");
            }
            self.reports.send(Report::not_captured(pod, note));
        }
        self.count_pods();
    }

    /// The pod has gone from the API, or has ended. What still runs of it stays captured: it must not get out by that.
    fn depart(&mut self, uid: &str) {
        let known = self.known.remove(uid);
        if let Some((_, notes)) = self.attached.get(uid) {
            let name = notes.pod.as_ref().map(name_of);
            if place::is_alive(notes) || self.is_new(uid) {
                self.look_at(uid.to_owned(), LEAVING);
            } else if let (Err(error), Some(name)) = (self.let_go(uid), name) {
                // Shown until nothing is left of it.
                let known = known.unwrap_or_else(|| Known::new(name, State::Captured));
                self.known.insert(uid.to_owned(), known);
                self.fail(uid, error);
            }
        }
        self.count_pods();
    }

    /// Something has gone wrong with a pod that is known: it is tried again.
    fn fail(&mut self, uid: &str, error: String) {
        if let Some(known) = self.known.get_mut(uid) {
            known.enter(State::Failed(error));
            self.look_again(uid);
        }
    }

    /// Soon, as long as the pod has not got where it should.
    fn look_again(&mut self, uid: &str) {
        let again = match self.known.get(uid) {
            Some(known) => match known.state {
                State::Waiting(_) => WAITING,
                State::Failed(_) => known.pause(RETRY, RETRY_MAX),
                _ => return,
            },
            None => return,
        };
        self.look_at(uid.to_owned(), again);
    }

    /// Whether the plugin has just told of it, so that the API may not have yet.
    fn is_new(&self, uid: &str) -> bool {
        let added = self.added.get(uid);
        added.is_some_and(|added| may_be_behind(self.heard, *added))
    }

    /// Detaches a pod, if it is attached. The error is in words.
    fn let_go(&mut self, uid: &str) -> Result<(), String> {
        let Some((cgroup_id, notes)) = self.attached.get(uid).cloned() else {
            return Ok(());
        };
        // Its counters go with it.
        self.observe_traffic();
        match detach::detach(cgroup_id) {
            Ok(_) => {
                if let Some(pod) = &notes.pod {
                    let KubernetesPod {
                        namespace, name, ..
                    } = pod;
                    tracing::info!(namespace, name, uid, "detached");
                }
                self.attached.remove(uid);
                Ok(())
            }
            Err(error) => {
                self.metrics.trouble(Trouble::Detach);
                let error = format!("detaching: {error:#}");
                tracing::warn!(uid, error, "not detached");
                // For those who ask once only.
                self.look_at(uid.to_owned(), RETRY_MAX);
                Err(error)
            }
        }
    }

    /// The cgroup of the pod with this uid, as kubelet writes it.
    fn find_cgroup(&mut self, uid: &str) -> Option<PathBuf> {
        let (searched, found) = &self.cgroups;
        if let Some(path) = found.get(uid).filter(|path| path.is_dir()) {
            return Some(path.clone());
        }
        if searched.is_none_or(|at| at.elapsed() > CGROUPS_AGE) {
            match place::cgroups() {
                Ok(found) => self.cgroups = (Some(Instant::now()), found),
                Err(error) => tracing::warn!("searching the cgroups: {error:#}"),
            }
        }
        self.cgroups.1.get(uid).cloned()
    }
}

fn state_after(attempt: anyhow::Result<Attempt>) -> State {
    match attempt {
        Ok(Attempt::Done(_)) => State::Captured,
        Ok(Attempt::NotYet(missing)) => State::Waiting(missing),
        Err(error) => State::Failed(format!("{error:#}")),
    }
}

fn name_of(pod: &KubernetesPod) -> PodName {
    PodName {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: Some(pod.uid.clone()),
    }
}

fn kubernetes_pod(pod: &Pod, uid: &str) -> KubernetesPod {
    let name = pods::name(pod);
    KubernetesPod {
        namespace: name.namespace,
        name: name.name,
        uid: uid.to_owned(),
        sandbox: None,
    }
}
