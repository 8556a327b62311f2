//! Envoy as Istio configures it: two listeners that ask for the original destination and pass connections through.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::pod::Pod;
use super::process::{Running, reachable_by_all};
use super::{APP_PORT, INBOUND_PORT, OUTBOUND_PORT, OWN_SERVICE_IP, POD_IP, PROXY_ID, access_log};

const TYPES: &str = "type.googleapis.com/envoy.extensions";

pub fn start(pod: &Pod, binary: &Path, shared: &Path) -> Result<Running> {
    let binary = reachable_by_all(binary, shared)?;
    let config = shared.join("envoy.json");
    fs::write(&config, serde_json::to_vec_pretty(&configuration())?)?;
    // Whatever the umask, Envoy's user must be able to read it.
    fs::set_permissions(&config, fs::Permissions::from_mode(0o644))?;

    let mut command = pod.command(PROXY_ID, &binary);
    command
        .arg("--config-path")
        .arg(&config)
        .args(["--concurrency", "1", "--disable-hot-restart"]);
    // The access log is otherwise written out every ten seconds.
    command.args([
        "--file-flush-interval-msec",
        "100",
        "--log-level",
        "warning",
    ]);
    Running::start("Envoy", &mut command)
}

fn configuration() -> Value {
    let own_service = filter_chain(
        "outbound",
        "own_service",
        Some(json!({
            "prefix_ranges": [{ "address_prefix": OWN_SERVICE_IP.to_string(), "prefix_len": 32 }]
        })),
    );
    let outbound = [own_service, filter_chain("outbound", "passthrough", None)];
    let inbound = [filter_chain("inbound", "inbound_passthrough", None)];
    json!({
        "static_resources": {
            "listeners": [
                listener("virtualOutbound", OUTBOUND_PORT, &outbound),
                listener("virtualInbound", INBOUND_PORT, &inbound),
            ],
            "clusters": [
                original_destination("passthrough", None),
                // Istio's InboundPassthroughCluster: 127.0.0.6 marks calls that came in already.
                original_destination("inbound_passthrough", Some("127.0.0.6")),
                {
                    "name": "own_service",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "load_assignment": {
                        "cluster_name": "own_service",
                        "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                            "address": socket_address(&POD_IP.to_string(), APP_PORT)
                        } }] }]
                    }
                }
            ]
        }
    })
}

fn listener(name: &str, port: u16, filter_chains: &[Value]) -> Value {
    json!({
        "name": name,
        "address": socket_address("0.0.0.0", port),
        "listener_filters": [{
            "name": "envoy.filters.listener.original_dst",
            "typed_config": { "@type": format!("{TYPES}.filters.listener.original_dst.v3.OriginalDst") }
        }],
        "filter_chains": filter_chains
    })
}

fn filter_chain(listener: &str, cluster: &str, matching: Option<Value>) -> Value {
    let log = access_log::format(
        listener,
        "%UPSTREAM_LOCAL_ADDRESS%",
        "%DOWNSTREAM_LOCAL_ADDRESS%",
        "%DOWNSTREAM_REMOTE_ADDRESS%",
        "%UPSTREAM_HOST%",
    );
    json!({
        "filter_chain_match": matching,
        "filters": [{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
                "stat_prefix": cluster,
                "cluster": cluster,
                "access_log": [{
                    "name": "envoy.access_loggers.stdout",
                    "typed_config": {
                        "@type": format!("{TYPES}.access_loggers.stream.v3.StdoutAccessLog"),
                        "log_format": { "text_format_source": { "inline_string": format!("{log}\n") } }
                    }
                }]
            }
        }]
    })
}

fn original_destination(name: &str, source: Option<&str>) -> Value {
    let bind =
        source.map(|address| json!({ "source_address": { "address": address, "port_value": 0 } }));
    json!({
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "5s",
        "upstream_bind_config": bind
    })
}

fn socket_address(address: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": address, "port_value": port } })
}
