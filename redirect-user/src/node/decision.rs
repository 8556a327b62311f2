//! Whether a pod is captured, and how: what istio-cni decides from the pod's object. Pure.
//!
//! The order of the rules is istio-cni's: each answers with another reason, and people look for that reason.

mod handed_over;
mod inputs;
mod selector;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::options::{OptionError, Policy, boolean};
pub use handed_over::{handed_over, is_read};
pub use selector::LabelSelector;

/// Istio's init container: it captures the pod itself.
const INIT_CONTAINER: &str = "istio-init";
/// Label and annotation by which a pod refuses its sidecar; the label is stronger.
const INJECT: &str = "sidecar.istio.io/inject";
/// Written by the injector into every pod that it gives a sidecar.
const STATUS: &str = "sidecar.istio.io/status";

/// What the operator of the node has said.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Kubernetes namespaces whose pods are left alone.
    pub exclude_namespaces: Vec<String>,
    /// Name of the proxy's container.
    pub proxy_container: String,
    /// Captures the pods it selects, in the place of the injector's marks.
    pub selector: Option<LabelSelector>,
    /// How the proxy is told from everybody else in its pod.
    pub proxy_by: ProxyBy,
}

/// How the proxy is told from everybody else in its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProxyBy {
    /// By its user and group, as iptables does
    Uid,
    /// By its container: others that run as its user do not escape
    Container,
}

/// What is to be done about a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Its traffic is captured.
    Capture(Box<Policy>),
    /// It is left alone.
    Skip(Skip),
    /// It is to be captured, but how cannot be read.
    Invalid(OptionError),
}

/// Why a pod is left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skip {
    /// The operator says so.
    ExcludedNamespace(String),
    /// It has no network namespace of its own.
    HostNetwork,
    /// Istio's init container captures it.
    InitContainer,
    /// `DISABLE_ENVOY` is set.
    ProxyDisabled(String),
    /// No container is the proxy.
    NoProxy(String),
    /// The proxy is a gateway or the like.
    NotASidecar(String),
    /// `sidecar.istio.io/inject` is false.
    Refused,
    /// The injector has not marked it.
    NotInjected,
    /// The operator's selector does not select it.
    NotSelected,
}

impl Skip {
    /// A short name, for metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::ExcludedNamespace(_) => "excluded-namespace",
            Self::HostNetwork => "host-network",
            Self::InitContainer => "init-container",
            Self::ProxyDisabled(_) => "proxy-disabled",
            Self::NoProxy(_) => "no-proxy",
            Self::NotASidecar(_) => "not-a-sidecar",
            Self::Refused => "refused",
            Self::NotInjected => "not-injected",
            Self::NotSelected => "not-selected",
        }
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExcludedNamespace(name) => write!(f, "namespace {name} is excluded"),
            Self::HostNetwork => f.write_str("it is in the host's network (hostNetwork)"),
            Self::InitContainer => {
                write!(f, "its container {INIT_CONTAINER} captures it")
            }
            Self::ProxyDisabled(name) => write!(f, "container {name} has DISABLE_ENVOY=true"),
            Self::NoProxy(name) => write!(f, "it has no container {name}"),
            Self::NotASidecar(kind) => write!(f, "its proxy is a {kind}, not a sidecar"),
            Self::Refused => write!(f, "{INJECT} is false"),
            Self::NotInjected => write!(f, "it has no annotation {STATUS}"),
            Self::NotSelected => f.write_str("the label selector does not select it"),
        }
    }
}

/// Decides about a pod.
#[must_use]
pub fn decide(pod: &Pod, rules: &Rules) -> Decision {
    if let Some(skip) = skip(pod, rules) {
        return Decision::Skip(skip);
    }
    match inputs::policy(pod, proxy(pod, rules), &rules.proxy_container) {
        Ok(policy) => Decision::Capture(Box::new(policy)),
        Err(error) => Decision::Invalid(error),
    }
}

/// Whether the operator leaves a whole namespace alone: known before the pod's object is.
#[must_use]
pub fn skip_namespace(namespace: &str, rules: &Rules) -> Option<Skip> {
    rules
        .exclude_namespaces
        .iter()
        .any(|excluded| excluded == namespace)
        .then(|| Skip::ExcludedNamespace(namespace.to_owned()))
}

fn skip(pod: &Pod, rules: &Rules) -> Option<Skip> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    if let Some(skip) = skip_namespace(namespace, rules) {
        return Some(skip);
    }
    if is_host_network(pod) {
        return Some(Skip::HostNetwork);
    }
    if containers(pod).any(|container| container.name == INIT_CONTAINER) {
        return Some(Skip::InitContainer);
    }
    let proxy = proxy(pod, rules);
    if proxy.is_some_and(|proxy| is_true(variable(proxy, "DISABLE_ENVOY"))) {
        return Some(Skip::ProxyDisabled(rules.proxy_container.clone()));
    }
    if rules.selector.is_none() && proxy.is_none() {
        return Some(Skip::NoProxy(rules.proxy_container.clone()));
    }
    if let Some(kind) = proxy.and_then(proxy_type).filter(|kind| *kind != "sidecar") {
        return Some(Skip::NotASidecar(kind.to_owned()));
    }
    if refuses(pod) {
        return Some(Skip::Refused);
    }
    match &rules.selector {
        Some(selector) => (!selector.selects(pod)).then_some(Skip::NotSelected),
        None => annotation(pod, STATUS)
            .is_none()
            .then_some(Skip::NotInjected),
    }
}

fn is_host_network(pod: &Pod) -> bool {
    pod.spec
        .as_ref()
        .is_some_and(|spec| spec.host_network == Some(true))
}

/// Ordinary containers first: a native sidecar is an init container.
fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_deref());
    spec.map(|spec| spec.containers.as_slice())
        .into_iter()
        .chain(init)
        .flatten()
}

fn proxy<'a>(pod: &'a Pod, rules: &Rules) -> Option<&'a Container> {
    containers(pod).find(|container| container.name == rules.proxy_container)
}

/// The word behind `proxy` in the proxy's arguments.
fn proxy_type(proxy: &Container) -> Option<&str> {
    match proxy.args.as_deref()? {
        [command, kind, ..] if command == "proxy" => Some(kind),
        _ => None,
    }
}

fn refuses(pod: &Pod) -> bool {
    let label = get(&pod.metadata.labels, INJECT);
    // Not a boolean: as if it were not there. An empty text is none here.
    label
        .or_else(|| annotation(pod, INJECT))
        .is_some_and(|text| !text.is_empty() && boolean(text) == Ok(false))
}

fn is_true(text: Option<&str>) -> bool {
    text.is_some_and(|text| boolean(text) == Ok(true))
}

/// A variable with a plain value; those taken from elsewhere are not known here.
fn variable<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let variables = container.env.as_deref().unwrap_or_default();
    // The last one counts, as in the container.
    let variable = variables
        .iter()
        .rev()
        .find(|variable| variable.name == name);
    variable?.value.as_deref()
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    get(&pod.metadata.annotations, name)
}

fn get<'a>(map: &'a Option<BTreeMap<String, String>>, name: &str) -> Option<&'a str> {
    map.as_ref()?.get(name).map(String::as_str)
}
