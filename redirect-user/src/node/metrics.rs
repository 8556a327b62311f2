//! What the daemon counts, for Prometheus.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use anyhow::{Context, Result};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use redirect_common::verdict::{Action, Rule};

use super::api::PodName;
use crate::attach::Outcome;
use crate::status::Traffic;

/// Upper bounds of the buckets of attach times, in seconds.
const ATTACH_SECONDS: [f64; 9] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 10.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ConnectionLabels {
    direction: &'static str,
    verdict: &'static str,
    rule: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Attach {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Call {
    op: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Map {
    map: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PodLabels {
    namespace: String,
    pod: String,
}

/// What went wrong: the values of the label `reason` of `redirect_errors_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// An annotation, or a setting of the proxy, cannot be read.
    InvalidPod,
    /// A pod could not be attached.
    Attach,
    /// A pod could not be detached.
    Detach,
    /// The Kubernetes API did not answer, or not as it should.
    Watch,
    /// An Event could not be written.
    Event,
    /// Somebody else than root called the socket.
    Stranger,
    /// What was said on the socket is no request.
    Request,
    /// The state of the kernel's maps could not be read.
    Observe,
}

impl Trouble {
    const ALL: [Self; 8] = [
        Self::InvalidPod,
        Self::Attach,
        Self::Detach,
        Self::Watch,
        Self::Event,
        Self::Stranger,
        Self::Request,
        Self::Observe,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::InvalidPod => "invalid-pod",
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::Watch => "watch",
            Self::Event => "event",
            Self::Stranger => "stranger",
            Self::Request => "request",
            Self::Observe => "observe",
        }
    }
}

/// The metrics, shared by all tasks.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    connections: Family<ConnectionLabels, Counter>,
    pods: Family<State, Gauge>,
    skipped: Family<Reason, Gauge>,
    attaches: Family<Attach, Counter>,
    attach_seconds: Histogram,
    errors: Family<Reason, Counter>,
    calls: Family<Call, Counter>,
    listeners_missing: Family<Direction, Gauge>,
    proxies_unknown: Gauge,
    invalid: Family<PodLabels, Gauge>,
    map_entries: Family<Map, Gauge>,
    map_capacity: Family<Map, Gauge>,
    synced: Gauge,
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("redirect"),
            connections: Family::default(),
            pods: Family::default(),
            skipped: Family::default(),
            attaches: Family::default(),
            attach_seconds: Histogram::new(ATTACH_SECONDS),
            errors: Family::default(),
            calls: Family::default(),
            listeners_missing: Family::default(),
            proxies_unknown: Gauge::default(),
            invalid: Family::default(),
            map_entries: Family::default(),
            map_capacity: Family::default(),
            synced: Gauge::default(),
        };
        metrics.register();
        // Present from the start: an alert on a rate needs the zero before the first one.
        for trouble in Trouble::ALL {
            let reason = trouble.label();
            drop(metrics.errors.get_or_create(&Reason { reason }));
        }
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "connections",
            "Connections decided about, since the daemon began",
            self.connections.clone(),
        );
        registry.register("pods", "Pods of this node by state", self.pods.clone());
        registry.register(
            "pods_skipped",
            "Pods that are left alone, by reason",
            self.skipped.clone(),
        );
        registry.register(
            "attaches",
            "Attaches, by what they changed",
            self.attaches.clone(),
        );
        registry.register(
            "attach_seconds",
            "Time to attach a pod, in seconds",
            self.attach_seconds.clone(),
        );
        registry.register("errors", "What went wrong, by reason", self.errors.clone());
        registry.register(
            "socket_requests",
            "Requests on the daemon's socket",
            self.calls.clone(),
        );
        registry.register(
            "listeners_missing",
            "Captured pods whose proxy does not listen",
            self.listeners_missing.clone(),
        );
        registry.register(
            "proxies_unknown",
            "Captured pods whose proxy's container is not known",
            self.proxies_unknown.clone(),
        );
        registry.register(
            "pod_invalid",
            "Pods whose annotations cannot be read",
            self.invalid.clone(),
        );
        registry.register(
            "map_entries",
            "Entries of the eBPF maps",
            self.map_entries.clone(),
        );
        registry.register(
            "map_capacity",
            "Most entries that the eBPF maps can hold",
            self.map_capacity.clone(),
        );
        registry.register(
            "watch_synced",
            "1 once the pods of this node are known from the Kubernetes API",
            self.synced.clone(),
        );
    }

    /// As a scrape wants them.
    pub fn text(&self) -> Result<String> {
        let mut text = String::new();
        encode(&mut text, &self.registry).context("writing the metrics")?;
        Ok(text)
    }

    /// Something went wrong.
    pub fn trouble(&self, trouble: Trouble) {
        let reason = trouble.label();
        self.errors.get_or_create(&Reason { reason }).inc();
    }

    /// A pod was attached.
    pub fn attached(&self, outcome: Outcome, took: Duration) {
        let outcome = outcome.label();
        self.attaches.get_or_create(&Attach { outcome }).inc();
        self.attach_seconds.observe(took.as_secs_f64());
    }

    /// A request on the socket was answered.
    pub fn called(&self, op: &'static str, result: &'static str) {
        self.calls.get_or_create(&Call { op, result }).inc();
    }

    /// Whether the pods of the node are known.
    pub fn set_synced(&self, synced: bool) {
        self.synced.set(i64::from(synced));
    }

    /// Whether they are.
    pub fn is_synced(&self) -> bool {
        self.synced.get() == 1
    }

    /// How many pods are in each state, how many are skipped for each reason, and which are invalid.
    pub fn set_pods(
        &self,
        states: &BTreeMap<&'static str, i64>,
        skipped: &BTreeMap<&'static str, i64>,
        invalid: &[PodName],
    ) {
        for (state, count) in states {
            self.pods.get_or_create(&State { state }).set(*count);
        }
        self.skipped.clear();
        for (reason, count) in skipped {
            self.skipped.get_or_create(&Reason { reason }).set(*count);
        }
        self.invalid.clear();
        for pod in invalid {
            let labels = PodLabels {
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
            };
            self.invalid.get_or_create(&labels).set(1);
        }
    }

    /// How full a map is.
    pub fn set_map(&self, map: &'static str, entries: usize, capacity: u32) {
        let labels = Map { map };
        let entries = i64::try_from(entries).unwrap_or(i64::MAX);
        self.map_entries.get_or_create(&labels).set(entries);
        self.map_capacity
            .get_or_create(&labels)
            .set(i64::from(capacity));
    }

    /// How many captured pods have no listener of the proxy.
    pub fn set_listeners_missing(&self, outbound: i64, inbound: i64) {
        for (direction, count) in [("outbound", outbound), ("inbound", inbound)] {
            self.listeners_missing
                .get_or_create(&Direction { direction })
                .set(count);
        }
    }

    /// How many captured pods have a proxy that is known by its container, which is not known.
    pub fn set_proxies_unknown(&self, count: i64) {
        self.proxies_unknown.set(count);
    }

    fn count(&self, rule: Rule, connections: u64) {
        self.connections
            .get_or_create(&labels(rule))
            .inc_by(connections);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn labels(rule: Rule) -> ConnectionLabels {
    let label = rule.label();
    let direction = match label.split_once('-') {
        Some((direction @ ("outbound" | "inbound" | "machine"), _)) => direction,
        // Found out when the connection arrives at the proxy's door.
        _ => "any",
    };
    let verdict = match (rule, rule.action()) {
        (Rule::NoRoute | Rule::NoListener | Rule::FlowLost | Rule::MachineDropped, _) => "refused",
        (_, Action::Pass) => "passed",
        _ => "captured",
    };
    ConnectionLabels {
        direction,
        verdict,
        rule: label,
    }
}

/// Makes counters that only grow out of the kernel's, which go with their pod.
#[derive(Debug, Default)]
pub struct Tally {
    /// What has been counted of each network namespace; None until the first look.
    seen: Option<HashMap<u64, BTreeMap<u32, u64>>>,
}

impl Tally {
    /// Adds what came since the last look. What was there before the first one is not added: an earlier daemon has
    /// counted it.
    pub fn look(&mut self, traffic: &[Traffic], metrics: &Metrics) {
        let mut now = HashMap::new();
        for pod in traffic {
            let counts: BTreeMap<u32, u64> = pod
                .connections
                .iter()
                .map(|(rule, count)| (*rule as u32, *count))
                .collect();
            if let Some(seen) = &self.seen {
                let before = seen.get(&pod.netns_cookie);
                for (rule, count) in &pod.connections {
                    let before = before.and_then(|counts| counts.get(&(*rule as u32)));
                    // Less than before: detached and attached again meanwhile.
                    let before = before.filter(|before| *before <= count).unwrap_or(&0);
                    if count > before {
                        metrics.count(*rule, count - before);
                    }
                }
            }
            now.insert(pod.netns_cookie, counts);
        }
        self.seen = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(cookie: u64, counts: &[(Rule, u64)]) -> Traffic {
        Traffic {
            netns_cookie: cookie,
            capturing: true,
            connections: counts.to_vec(),
            knows_proxy: true,
            listeners: [1, 1],
        }
    }

    fn line(metrics: &Metrics, rule: Rule) -> Option<u64> {
        let text = metrics.text().expect("metrics");
        let rule = format!("rule=\"{}\"", rule.label());
        let line = text.lines().find(|line| line.contains(&rule))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    #[test]
    fn counters_grow_by_what_is_new_and_never_shrink() {
        let (metrics, mut tally) = (Metrics::new(), Tally::default());
        let rule = Rule::IncludedCidr;
        tally.look(&[traffic(1, &[(rule, 100)])], &metrics);
        assert_eq!(line(&metrics, rule), None);
        for (pods, expected) in [
            (vec![traffic(1, &[(rule, 105)])], 5),
            (vec![traffic(1, &[(rule, 105)])], 5),
            (
                vec![traffic(1, &[(rule, 106)]), traffic(2, &[(rule, 10)])],
                16,
            ),
            // A pod went.
            (vec![traffic(2, &[(rule, 11)])], 17),
            // A pod was attached anew, and its counters with it.
            (vec![traffic(2, &[(rule, 3)])], 20),
            (vec![], 20),
        ] {
            tally.look(&pods, &metrics);
            assert_eq!(line(&metrics, rule), Some(expected));
        }
    }

    #[test]
    fn every_rule_has_a_direction_and_a_verdict() {
        for rule in Rule::ALL {
            let labels = labels(*rule);
            let refused = matches!(
                rule,
                Rule::NoRoute | Rule::NoListener | Rule::FlowLost | Rule::MachineDropped
            );
            assert_eq!(labels.verdict == "refused", refused, "{labels:?}");
            let any = matches!(rule, Rule::NoListener | Rule::FlowLost | Rule::NoDnsSlot);
            assert_eq!(labels.direction == "any", any, "{labels:?}");
        }
        assert_eq!(labels(Rule::IncludedPort).verdict, "captured");
        assert_eq!(labels(Rule::InboundCaptured).direction, "inbound");
        assert_eq!(labels(Rule::ProxyToSelf).direction, "outbound");
        assert_eq!(labels(Rule::Proxy).verdict, "passed");
    }

    #[test]
    fn errors_are_shown_before_the_first_one() {
        let metrics = Metrics::new();
        let text = metrics.text().expect("metrics");
        for trouble in Trouble::ALL {
            let zero = format!("redirect_errors_total{{reason=\"{}\"}} 0", trouble.label());
            assert!(text.contains(&zero), "{text}");
        }
        metrics.trouble(Trouble::Attach);
        let text = metrics.text().expect("metrics");
        assert!(text.contains("redirect_errors_total{reason=\"attach\"} 1"));
    }
}
