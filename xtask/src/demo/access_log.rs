//! The proxy's access log: the address fields of Istio's own format, by name.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use super::process::Running;

const MARK: &str = "ACCESS ";
/// Longer than the interval at which Envoy writes its log out.
const SETTLE: Duration = Duration::from_millis(300);

#[derive(Clone)]
pub struct Line {
    text: String,
    pub listener: String,
    pub upstream_local: Option<SocketAddr>,
    /// The original destination: what SO_ORIGINAL_DST said.
    pub downstream_local: Option<SocketAddr>,
    /// The client, as the proxy sees it.
    pub downstream_remote: Option<SocketAddr>,
    pub upstream_host: Option<SocketAddr>,
}

impl Line {
    fn parse(text: &str) -> Option<Self> {
        let fields = text.strip_prefix(MARK)?;
        let field = |name: &str| {
            let mut pairs = fields
                .split_whitespace()
                .filter_map(|word| word.split_once('='));
            pairs
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        };
        let address = |name: &str| field(name)?.parse().ok();
        Some(Self {
            text: fields.to_owned(),
            listener: field("listener")?,
            upstream_local: address("upstream_local"),
            downstream_local: address("downstream_local"),
            downstream_remote: address("downstream_remote"),
            upstream_host: address("upstream_host"),
        })
    }

    pub fn text(&self) -> &str {
        &self.text
    }
}

/// The one format of the log, for Envoy's configuration (with its `%…%` commands) and the built-in proxy.
pub fn format(
    listener: &str,
    upstream_local: &str,
    downstream_local: &str,
    downstream_remote: &str,
    upstream_host: &str,
) -> String {
    format!(
        "{MARK}listener={listener} upstream_local={upstream_local} downstream_local={downstream_local} \
         downstream_remote={downstream_remote} upstream_host={upstream_host}"
    )
}

/// Waits for as many lines as are expected, then a little longer for any that are not.
pub fn wait_for(proxy: &Running, wanted: usize) -> Vec<Line> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while read(proxy).len() < wanted && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(SETTLE);
    read(proxy)
}

fn read(proxy: &Running) -> Vec<Line> {
    proxy
        .lines()
        .iter()
        .filter_map(|line| Line::parse(line))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_read_back_and_missing_addresses_are_none() {
        let text = format(
            "inbound",
            "127.0.0.6:40000",
            "10.77.0.2:8080",
            "10.77.0.1:5",
            "-",
        );
        let line = Line::parse(&text).expect("an access log line");
        assert_eq!(line.listener, "inbound");
        assert_eq!(line.downstream_local, "10.77.0.2:8080".parse().ok());
        assert_eq!(line.upstream_host, None);
        assert!(Line::parse("[info] starting").is_none());
    }
}
