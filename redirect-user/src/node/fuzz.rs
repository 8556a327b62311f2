//! Random requests on the daemon's socket, and random pods of the API.

use k8s_openapi::api::core::v1::Pod;
use prop::collection::{btree_map, vec};
use prop::option;
use prop::sample::select;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::api::{Answer, Gone, Operation, Outcome, PodName, Request, Sandbox, VERSION};
use super::decision::{Decision, LabelSelector, ProxyBy, Rules, decide};
use crate::fuzz::{bytes, config, edits, is_one_line, text};
use crate::options::Policy;

const FIELDS: &[&str] = &[
    "version",
    "op",
    "add",
    "check",
    "del",
    "status",
    "gc",
    "container_id",
    "netns",
    "pod",
    "namespace",
    "name",
    "uid",
    "cgroup_parent",
    "annotations",
    "labels",
    "valid_container_ids",
    "result",
    "captured",
    "reason",
    "error",
    "retry",
];

fn pod_name() -> impl Strategy<Value = PodName> {
    (text(), text(), option::of(text())).prop_map(|(namespace, name, uid)| PodName {
        namespace,
        name,
        uid,
    })
}

fn sandbox() -> impl Strategy<Value = Sandbox> {
    let strings = || option::of(btree_map(text(), text(), 0..3));
    (
        text(),
        text(),
        pod_name(),
        option::of(text()),
        strings(),
        strings(),
    )
        .prop_map(
            |(container_id, netns, pod, cgroup_parent, annotations, labels)| Sandbox {
                container_id,
                netns: netns.into(),
                pod,
                cgroup_parent,
                annotations,
                labels,
            },
        )
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        sandbox().prop_map(Operation::Add),
        sandbox().prop_map(Operation::Check),
        (text(), option::of(text()), pod_name()).prop_map(|(container_id, netns, pod)| {
            Operation::Del(Gone {
                container_id,
                netns: netns.map(Into::into),
                pod,
            })
        }),
        Just(Operation::Status {}),
        vec(text(), 0..4).prop_map(|valid_container_ids| Operation::Gc {
            valid_container_ids
        }),
    ]
}

fn answer() -> impl Strategy<Value = Answer> {
    let outcome = select(&[Outcome::Captured, Outcome::Skipped, Outcome::Ok][..]);
    prop_oneof![
        (outcome, option::of(text())).prop_map(|(result, reason)| Answer::Done { result, reason }),
        (text(), any::<bool>()).prop_map(|(error, retry)| Answer::Failed { error, retry }),
    ]
}

/// What is read says the same when it is written and read again.
fn assert_read_or_told(bytes: &[u8]) {
    match serde_json::from_slice::<Request>(bytes) {
        Ok(request) => {
            assert_eq!(request.version, VERSION);
            let line = serde_json::to_string(&request).expect("JSON");
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(
                serde_json::from_str::<Request>(&line).expect(&line),
                request
            );
        }
        Err(error) => {
            let error = format!("not a request: {error}");
            let answer = serde_json::to_string(&Answer::Failed {
                error,
                retry: false,
            });
            assert!(!answer.expect("JSON").contains('\n'));
        }
    }
    drop(serde_json::from_slice::<Answer>(bytes));
}

const ANNOTATIONS: &[&str] = &[
    "sidecar.istio.io/inject",
    "sidecar.istio.io/interceptionMode",
    "traffic.sidecar.istio.io/includeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    "traffic.sidecar.istio.io/includeInboundPorts",
    "traffic.sidecar.istio.io/excludeInboundPorts",
    "traffic.sidecar.istio.io/includeOutboundPorts",
    "traffic.sidecar.istio.io/excludeOutboundPorts",
    "traffic.sidecar.istio.io/excludeInterfaces",
    "traffic.sidecar.istio.io/kubevirtInterfaces",
    "istio.io/reroute-virtual-interfaces",
];
const VARIABLES: &[&str] = &[
    "DISABLE_ENVOY",
    "ISTIO_META_DNS_CAPTURE",
    "ISTIO_DUAL_STACK",
];

/// A pod with a sidecar, whose annotations and settings are random.
fn pod() -> impl Strategy<Value = Value> {
    let value = || prop_oneof![3 => "(\\*|true|false|0|TPROXY|eth\\+|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5})?|1[0-9.]{6,9}/[0-9]{1,2}|)", 1 => text()];
    let id = || option::of(prop_oneof![any::<i64>(), 0..100_000_i64]);
    let variables = vec((select(VARIABLES), option::of(value())), 0..4);
    let annotations = btree_map(
        prop_oneof![6 => select(ANNOTATIONS).prop_map(str::to_owned), 1 => text()],
        value(),
        0..5,
    );
    let labels = btree_map(
        prop_oneof![Just("sidecar.istio.io/inject".to_owned()), text()],
        value(),
        0..2,
    );
    let name = || prop_oneof![4 => Just("istio-proxy".to_owned()), 1 => Just("istio-init".to_owned()), 2 => text()];
    (annotations, labels, variables, (id(), id()), vec(name(), 0..3), any::<Option<bool>>(), option::of(vec(text(), 0..3))).prop_map(
        |(mut annotations, labels, variables, (user, group), names, host, args)| {
            annotations.insert("sidecar.istio.io/status".to_owned(), String::new());
            let env: Vec<Value> = variables.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
            let args = args.unwrap_or_else(|| vec!["proxy".to_owned(), "sidecar".to_owned()]);
            let containers: Vec<Value> = names
                .into_iter()
                .map(|name| json!({"name": name, "args": args, "env": env, "securityContext": {"runAsUser": user, "runAsGroup": group}}))
                .collect();
            json!({
                "metadata": {"namespace": "shop", "name": "cart-0", "annotations": annotations, "labels": labels},
                "spec": {"containers": containers, "hostNetwork": host},
            })
        },
    )
}

fn rules(selector: Option<LabelSelector>) -> Rules {
    Rules {
        exclude_namespaces: vec!["kube-system".to_owned()],
        proxy_container: "istio-proxy".to_owned(),
        proxy_by: ProxyBy::Uid,
        selector,
    }
}

proptest! {
    #![proptest_config(config(1))]

    #[test]
    fn any_bytes_are_a_request_or_refused(bytes in bytes(), value in crate::fuzz::json(FIELDS)) {
        assert_read_or_told(&bytes);
        assert_read_or_told(value.to_string().as_bytes());
    }

    #[test]
    fn any_request_is_read_as_it_was_written(operation in operation(), edits in edits()) {
        let request = Request::from(operation);
        let line = serde_json::to_string(&request).expect("JSON");
        prop_assert!(!line.contains('\n'));
        prop_assert_eq!(serde_json::from_str::<Request>(&line).expect("a request"), request);
        assert_read_or_told(edits.of(&line).as_bytes());
    }

    #[test]
    fn any_answer_is_read_as_it_was_written(answer in answer(), edits in edits()) {
        let line = serde_json::to_string(&answer).expect("JSON");
        prop_assert!(!line.contains('\n'));
        prop_assert_eq!(serde_json::from_str::<Answer>(&line).expect("an answer"), answer);
        drop(serde_json::from_str::<Answer>(&edits.of(&line)));
    }

    #[test]
    fn any_selector_is_read_or_refused(selector in prop_oneof![text(), "(!?[a-z./]{1,4}((=|==|!=)[a-z]{0,3})?,?){0,4}"], pod in pod()) {
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        match selector.parse::<LabelSelector>() {
            Ok(selector) => drop(decide(&pod, &rules(Some(selector)))),
            Err(error) => prop_assert!(is_one_line(&error), "{}", error),
        }
    }
}

proptest! {
    #![proptest_config(config(4))]

    #[test]
    fn any_pod_is_captured_skipped_or_its_mistake_named(pod in pod()) {
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        match decide(&pod, &rules(None)) {
            Decision::Capture(policy) => {
                let written = serde_json::to_string(&policy).expect("JSON");
                prop_assert_eq!(serde_json::from_str::<Policy>(&written).expect("a policy"), *policy);
            }
            Decision::Skip(skip) => prop_assert!(!skip.to_string().is_empty() && !skip.label().is_empty()),
            Decision::Invalid(error) => {
                let text = error.to_string();
                prop_assert!(is_one_line(&text), "{}", text);
                prop_assert!(text.starts_with("annotation ") || text.starts_with("container istio-proxy: "), "{}", text);
            }
        }
    }
}
