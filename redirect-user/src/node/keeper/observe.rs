//! What the kernel's maps say, for the metrics.

use super::Keeper;
use crate::node::metrics::Trouble;
use crate::status;

impl Keeper {
    /// Brings all metrics up to date.
    pub(super) fn observe(&mut self) {
        self.observe_traffic();
        self.count_pods();
        match status::fill() {
            Ok(maps) => {
                for fill in maps {
                    self.metrics.set_map(fill.map, fill.entries, fill.capacity);
                }
            }
            Err(error) => self.unobserved(&error),
        }
    }

    /// Adds up what the pods have done.
    pub(super) fn observe_traffic(&mut self) {
        match status::traffic() {
            Ok(traffic) => {
                self.tally.look(&traffic, &self.metrics);
                let missing = |port: usize| {
                    let capturing = traffic.iter().filter(|pod| pod.capturing);
                    let count = capturing.filter(|pod| pod.listeners[port] == 0).count();
                    i64::try_from(count).unwrap_or(i64::MAX)
                };
                self.metrics.set_listeners_missing(missing(0), missing(1));
                let unknown = traffic.iter().filter(|pod| !pod.knows_proxy).count();
                self.metrics
                    .set_proxies_unknown(i64::try_from(unknown).unwrap_or(i64::MAX));
            }
            Err(error) => self.unobserved(&error),
        }
    }

    fn unobserved(&self, error: &anyhow::Error) {
        self.metrics.trouble(Trouble::Observe);
        tracing::warn!("reading the maps: {error:#}");
    }
}
