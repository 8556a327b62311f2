//! Kubernetes Events about pods that could not be captured.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource as _};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::metrics::{Metrics, Trouble};

/// Reports that wait to be written; what comes on top is counted as lost.
const WAITING: usize = 256;
/// Attempts to write one.
const ATTEMPTS: u32 = 5;
/// Pause after the first attempt; it doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest note that the API takes, in bytes.
const NOTE: usize = 1024;

/// One Event.
#[derive(Debug)]
pub struct Report {
    pod: ObjectReference,
    note: String,
}

impl Report {
    /// The pod is not captured, or not as it asks, and why.
    #[must_use]
    pub fn not_captured(pod: &Pod, mut note: String) -> Self {
        note.truncate(note.floor_char_boundary(NOTE));
        Self {
            pod: pod.object_ref(&()),
            note,
        }
    }
}

/// Where reports are handed in, without waiting.
#[derive(Clone, Debug)]
pub struct Reports {
    sender: Sender<Report>,
    metrics: Arc<Metrics>,
}

impl Reports {
    /// And where they come out.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> (Self, Receiver<Report>) {
        let (sender, receiver) = channel(WAITING);
        (Self { sender, metrics }, receiver)
    }

    /// Hands one in.
    pub fn send(&self, report: Report) {
        if self.sender.try_send(report).is_err() {
            self.metrics.trouble(Trouble::Event);
        }
    }
}

/// Writes reports until nobody can hand one in.
pub async fn write(client: Client, node: &str, mut reports: Receiver<Report>, metrics: &Metrics) {
    let reporter = Reporter {
        controller: "redirect".to_owned(),
        instance: Some(node.to_owned()),
    };
    let recorder = Recorder::new(client, reporter);
    while let Some(Report { pod, note }) = reports.recv().await {
        let event = Event {
            type_: EventType::Warning,
            reason: "NotCaptured".to_owned(),
            note: Some(note),
            action: "Capture".to_owned(),
            secondary: None,
        };
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            let Err(error) = recorder.publish(&event, &pod).await else {
                break;
            };
            if attempt == ATTEMPTS {
                metrics.trouble(Trouble::Event);
                let (namespace, name) = (&pod.namespace, &pod.name);
                tracing::warn!(?namespace, ?name, "writing an Event: {error}");
                break;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
}
