//! A pod's annotations and its proxy's settings, as istio-iptables' options.
//!
//! They become [`CaptureFlags`], so that their values are read by the one parser of options.

use k8s_openapi::api::core::v1::{Container, Pod};

use super::{annotation, variable};
use crate::options::{CaptureFlags, OptionError, Policy, boolean};

/// Never captured inbound, whatever the pod says: the proxy's own status and metrics.
const STATUS_PORTS: &str = "15020,15021,15090";
/// The proxy's user and group, unless its container says otherwise.
const PROXY_ID: i64 = 1337;

/// An annotation, in the place of a flag.
struct Input {
    /// Names of the annotation; the first that is there counts.
    annotations: &'static [&'static str],
    /// The flag, as errors name it.
    flag: &'static str,
    /// Its value where there is no annotation.
    default: &'static str,
    field: fn(&mut CaptureFlags) -> &mut Option<String>,
}

const INPUTS: &[Input] = &[
    Input {
        annotations: &["sidecar.istio.io/interceptionMode"],
        flag: "--istio-inbound-interception-mode",
        default: "REDIRECT",
        field: |flags| &mut flags.istio_inbound_interception_mode,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/includeOutboundIPRanges"],
        flag: "--istio-service-cidr",
        default: "*",
        field: |flags| &mut flags.istio_service_cidr,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/excludeOutboundIPRanges"],
        flag: "--istio-service-exclude-cidr",
        default: "",
        field: |flags| &mut flags.istio_service_exclude_cidr,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/includeInboundPorts"],
        flag: "--istio-inbound-ports",
        default: "*",
        field: |flags| &mut flags.istio_inbound_ports,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/excludeInboundPorts"],
        flag: EXCLUDE_INBOUND,
        default: "15020",
        field: |flags| &mut flags.istio_local_exclude_ports,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/includeOutboundPorts"],
        flag: "--istio-outbound-ports",
        default: "",
        field: |flags| &mut flags.istio_outbound_ports,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/excludeOutboundPorts"],
        flag: "--istio-local-outbound-ports-exclude",
        default: "15020",
        field: |flags| &mut flags.istio_local_outbound_ports_exclude,
    },
    Input {
        annotations: &["traffic.sidecar.istio.io/excludeInterfaces"],
        flag: "--istio-exclude-interfaces",
        default: "",
        field: |flags| &mut flags.istio_exclude_interfaces,
    },
    Input {
        annotations: &[
            "istio.io/reroute-virtual-interfaces",
            "traffic.sidecar.istio.io/kubevirtInterfaces",
        ],
        flag: "--kube-virt-interfaces",
        default: "",
        field: |flags| &mut flags.kube_virt_interfaces,
    },
];

/// Whether the annotation is one of the inputs.
pub(super) fn is_read(annotation: &str) -> bool {
    INPUTS
        .iter()
        .any(|input| input.annotations.contains(&annotation))
}

const EXCLUDE_INBOUND: &str = "--istio-local-exclude-ports";

impl Input {
    /// The annotation that counts, and its text.
    fn given<'a>(&self, pod: &'a Pod) -> Option<(&'static str, &'a str)> {
        self.annotations
            .iter()
            .find_map(|name| Some((*name, annotation(pod, name)?)))
    }
}

/// The pod's policy, or which annotation or setting of the proxy cannot be read.
pub(super) fn policy(
    pod: &Pod,
    proxy: Option<&Container>,
    proxy_name: &str,
) -> Result<Policy, OptionError> {
    let mut flags = CaptureFlags {
        proxy_uid: Some(id(proxy, |context| context.run_as_user).to_string()),
        proxy_gid: Some(id(proxy, |context| context.run_as_group).to_string()),
        redirect_dns: switch(pod, proxy, "ISTIO_META_DNS_CAPTURE"),
        capture_all_dns: switch(pod, proxy, "ISTIO_META_DNS_CAPTURE"),
        dual_stack: switch(pod, proxy, "ISTIO_DUAL_STACK"),
        ..CaptureFlags::default()
    };
    for input in INPUTS {
        let text = input.given(pod).map_or(input.default, |(_, text)| text);
        *(input.field)(&mut flags) = Some(if input.flag == EXCLUDE_INBOUND {
            format!("{text},{STATUS_PORTS}")
        } else {
            text.to_owned()
        });
    }
    // The environment is this program's own, not the pod's.
    flags
        .validate(&|_| None)
        .map_err(|error| said_by_the_pod(error, pod, proxy, proxy_name))
}

fn id(
    proxy: Option<&Container>,
    field: impl FnOnce(&k8s_openapi::api::core::v1::SecurityContext) -> Option<i64>,
) -> i64 {
    proxy
        .and_then(|proxy| field(proxy.security_context.as_ref()?))
        .filter(|id| *id != 0)
        .unwrap_or(PROXY_ID)
}

/// A variable of the proxy; what is not a boolean counts as false, as with Istio.
fn switch(pod: &Pod, proxy: Option<&Container>, name: &str) -> Option<String> {
    let text = variable(proxy?, name)?;
    let on = boolean(text).unwrap_or_else(|_| {
        let (namespace, pod) = (&pod.metadata.namespace, &pod.metadata.name);
        tracing::warn!(
            ?namespace,
            ?pod,
            "{name}: {text:?} is not a boolean: taken as false"
        );
        false
    });
    Some(on.to_string())
}

/// Names what was written in the pod, instead of the flag it stands for.
fn said_by_the_pod(
    error: OptionError,
    pod: &Pod,
    proxy: Option<&Container>,
    proxy_name: &str,
) -> OptionError {
    let of_proxy = |what: &str, text: &str| -> (String, String) {
        (format!("container {proxy_name}: {what}"), text.to_owned())
    };
    let origin = error.origin();
    let input = INPUTS.iter().find(|input| input.flag == origin);
    let (place, text) = match (input, origin) {
        (Some(input), _) => {
            let (name, text) = input
                .given(pod)
                .unwrap_or((input.annotations[0], input.default));
            (format!("annotation {name}"), text.to_owned())
        }
        (None, "--proxy-uid") => of_proxy(
            "securityContext.runAsUser",
            &id(proxy, |context| context.run_as_user).to_string(),
        ),
        (None, "--proxy-gid") => of_proxy(
            "securityContext.runAsGroup",
            &id(proxy, |context| context.run_as_group).to_string(),
        ),
        (None, "--redirect-dns") => of_proxy("env ISTIO_META_DNS_CAPTURE", "true"),
        _ => return error,
    };
    error.given_as(&place, &text)
}
