//! Metrics and health over HTTP.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::keeper::{Pulse, Work};
use super::metrics::Metrics;

/// A keeper without a sign of life for that long hangs. One pod may take seconds: a tentative IPv6 address is waited for.
const HANGS: Duration = Duration::from_secs(120);
/// How long a scrape waits for fresh counters; the last ones are told then.
const FRESH: Duration = Duration::from_secs(3);
/// What Prometheus expects of an OpenMetrics text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is shown.
#[derive(Clone)]
pub struct Shown {
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// The keeper's.
    pub pulse: Arc<Pulse>,
    /// The keeper.
    pub work: mpsc::Sender<Work>,
}

/// Serves `/metrics`, `/healthz` and `/readyz` for good.
pub async fn serve(listener: TcpListener, shown: Shown) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .route("/readyz", get(readiness))
        .with_state(shown);
    axum::serve(listener, router).await
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let (reply, fresh) = oneshot::channel();
    if shown.work.send(Work::Observe(reply)).is_ok() {
        let _old_ones_will_do = timeout(FRESH, fresh).await;
    }
    match shown.metrics.text() {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(header::CONTENT_TYPE, "text/plain")],
            format!("{error:#}\n"),
        ),
    }
}

async fn health(State(shown): State<Shown>) -> (StatusCode, String) {
    let age = shown.pulse.age();
    if age < HANGS {
        (StatusCode::OK, "ok\n".to_owned())
    } else {
        let seconds = age.as_secs();
        (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("no sign of life for {seconds} s\n"),
        )
    }
}

async fn readiness(State(shown): State<Shown>) -> (StatusCode, &'static str) {
    if shown.metrics.is_synced() {
        (StatusCode::OK, "ok\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the pods of this node are not known yet\n",
        )
    }
}
