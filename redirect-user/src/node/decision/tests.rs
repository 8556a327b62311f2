use serde_json::{Value, json};

use super::*;
use crate::options::{Dns, Ipv6};

fn rules() -> Rules {
    Rules {
        exclude_namespaces: vec!["kube-system".to_owned(), "istio-system".to_owned()],
        proxy_container: "istio-proxy".to_owned(),
        selector: None,
        proxy_by: ProxyBy::Uid,
    }
}

/// A pod as the injector leaves it, with its parts replaced.
fn pod(changes: &[(&str, Value)]) -> Pod {
    let mut pod = json!({
        "metadata": {
            "namespace": "shop", "name": "cart-0", "uid": "u",
            "annotations": {"sidecar.istio.io/status": "{}"}, "labels": {},
        },
        "spec": {"containers": [
            {"name": "app"},
            {"name": "istio-proxy", "args": ["proxy", "sidecar"],
             "securityContext": {"runAsUser": 1337, "runAsGroup": 1337}, "env": []},
        ]},
    });
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let key = key.replace("~1", "/");
        match pod.pointer_mut(parent).expect(pointer) {
            Value::Object(map) => drop(map.insert(key, value.clone())),
            Value::Array(list) => list[key.parse::<usize>().expect("an index")] = value.clone(),
            other => panic!("{pointer}: {other}"),
        }
    }
    serde_json::from_value(pod).expect("a pod")
}

fn annotated(name: &str, value: &str) -> Pod {
    let pointer = format!("/metadata/annotations/{}", name.replace('/', "~1"));
    pod(&[(&pointer, json!(value))])
}

fn with_env(name: &str, value: &str) -> Pod {
    pod(&[(
        "/spec/containers/1/env",
        json!([{"name": name, "value": value}]),
    )])
}

fn captured(pod: &Pod) -> Policy {
    match decide(pod, &rules()) {
        Decision::Capture(policy) => *policy,
        other => panic!("{other:?}"),
    }
}

/// The policy as flags, without the ports that are the same in all.
fn shown(pod: &Pod) -> String {
    captured(pod).to_string()
}

fn skipped(pod: &Pod) -> Skip {
    match decide(pod, &rules()) {
        Decision::Skip(skip) => skip,
        other => panic!("{other:?}"),
    }
}

const DEFAULT: &str = "-p 15001 -z 15006 -u 1337 -g 1337 -i * -o 15020 -b * -d 15020-15021,15090";

#[test]
fn pod_without_annotations_has_istio_cnis_defaults() {
    let policy = captured(&pod(&[]));
    assert!(policy.include_outbound_cidrs.is_all());
    assert!(policy.inbound_ports.is_all());
    assert_eq!((policy.outbound_port, policy.inbound_port), (15001, 15006));
    assert_eq!(policy.ipv6, Ipv6::Auto);
    assert_eq!(policy.dns, Dns::Off);
    let ports = |ranges: &[crate::options::PortRange]| -> Vec<(u16, u16)> {
        ranges
            .iter()
            .map(|range| (range.first, range.last))
            .collect()
    };
    assert_eq!(ports(&policy.exclude_outbound_ports), [(15020, 15020)]);
    assert_eq!(
        ports(&policy.exclude_inbound_ports),
        [(15020, 15021), (15090, 15090)]
    );
    assert_eq!(policy.to_string(), DEFAULT);
}

#[test]
fn each_annotation_sets_its_option_and_no_other() {
    const T: &str = "traffic.sidecar.istio.io";
    for (name, value, from, to) in [
        ("sidecar.istio.io/interceptionMode", "REDIRECT", "", ""),
        (
            &format!("{T}/includeOutboundIPRanges"),
            "10.0.0.0/8",
            "-i *",
            "-i 10.0.0.0/8",
        ),
        (&format!("{T}/includeOutboundIPRanges"), "", " -i *", ""),
        (&format!("{T}/includeOutboundIPRanges"), "*", "", ""),
        (
            &format!("{T}/excludeOutboundIPRanges"),
            "10.1.0.0/16",
            "-i *",
            "-i * -x 10.1.0.0/16",
        ),
        (
            &format!("{T}/includeInboundPorts"),
            "8080, 9090",
            "-b *",
            "-b 8080,9090",
        ),
        (&format!("{T}/includeInboundPorts"), "", " -b *", ""),
        (&format!("{T}/includeInboundPorts"), "*", "", ""),
        (
            &format!("{T}/excludeInboundPorts"),
            "8080",
            "-d 15020-15021",
            "-d 8080,15020-15021",
        ),
        (&format!("{T}/excludeInboundPorts"), "", "", ""),
        (
            &format!("{T}/includeOutboundPorts"),
            "3306",
            "-i *",
            "-i * -q 3306",
        ),
        (
            &format!("{T}/excludeOutboundPorts"),
            "443",
            "-o 15020",
            "-o 443",
        ),
        (&format!("{T}/excludeOutboundPorts"), "", " -o 15020", ""),
        ("status.sidecar.istio.io/port", "15999", "", ""),
        ("sidecar.istio.io/inject", "true", "", ""),
        ("example.com/other", "x", "", ""),
    ] {
        let expected = DEFAULT.replacen(from, to, usize::from(!from.is_empty()));
        assert_eq!(
            shown(&annotated(name, value)),
            expected,
            "{name}: {value:?}"
        );
    }
}

#[test]
fn first_name_of_the_virtual_interfaces_counts_even_if_it_is_empty() {
    let deprecated = "/metadata/annotations/traffic.sidecar.istio.io~1kubevirtInterfaces";
    let current = "/metadata/annotations/istio.io~1reroute-virtual-interfaces";
    let both = |value: &str| pod(&[(deprecated, json!("not/a/name")), (current, json!(value))]);
    assert_eq!(shown(&both("")), DEFAULT);
    for pod in [pod(&[(deprecated, json!("not/a/name"))]), both("also/bad")] {
        assert!(matches!(decide(&pod, &rules()), Decision::Invalid(_)));
    }
}

#[test]
fn bad_annotations_are_named_with_their_value_and_what_is_allowed() {
    const T: &str = "traffic.sidecar.istio.io";
    for (name, value, part) in [
        (
            "sidecar.istio.io/interceptionMode",
            "NONE",
            "REDIRECT and TPROXY",
        ),
        (
            "sidecar.istio.io/interceptionMode",
            "tproxy",
            "REDIRECT and TPROXY",
        ),
        (
            &format!("{T}/includeOutboundIPRanges"),
            "10.0.0.0",
            "has no prefix length",
        ),
        (
            &format!("{T}/includeOutboundIPRanges"),
            "*,10.0.0.0/8",
            "must stand alone",
        ),
        (
            &format!("{T}/excludeOutboundIPRanges"),
            "*",
            "is not a CIDR",
        ),
        (&format!("{T}/includeInboundPorts"), "70000", "0-65535"),
        (&format!("{T}/excludeInboundPorts"), "*", "is not a port"),
        (&format!("{T}/excludeInboundPorts"), "none", "is not a port"),
        (&format!("{T}/includeOutboundPorts"), "-1", "is not a port"),
        (&format!("{T}/excludeOutboundPorts"), "*", "is not a port"),
        (
            &format!("{T}/excludeInterfaces"),
            "an-interface-name-too-long",
            "15 characters",
        ),
        (&format!("{T}/kubevirtInterfaces"), "a b", "not a name"),
        ("istio.io/reroute-virtual-interfaces", "a/b", "not a name"),
    ] {
        let Decision::Invalid(error) = decide(&annotated(name, value), &rules()) else {
            panic!("{name}: {value}");
        };
        let text = error.to_string();
        let named = format!("annotation {name}: ");
        assert!(text.starts_with(&named), "{text}");
        // The value as written in the pod, without what is added to it.
        assert!(
            text.contains(&format!("{value:?}")) && !text.contains("15090"),
            "{text}"
        );
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn proxys_ids_are_those_of_its_container_unless_it_is_root() {
    for (context, uid, gid) in [
        (json!(null), 1337, 1337),
        (json!({}), 1337, 1337),
        (json!({"runAsUser": 0, "runAsGroup": 0}), 1337, 1337),
        (json!({"runAsUser": 2000}), 2000, 1337),
        (json!({"runAsGroup": 3000}), 1337, 3000),
        (json!({"runAsUser": 2000, "runAsGroup": 3000}), 2000, 3000),
    ] {
        let pod = pod(&[("/spec/containers/1/securityContext", context.clone())]);
        let policy = captured(&pod);
        assert_eq!(policy.proxy_uids[0].first, uid, "{context}");
        assert_eq!(policy.proxy_gids[0].first, gid, "{context}");
    }
    let impossible = pod(&[(
        "/spec/containers/1/securityContext",
        json!({"runAsUser": -5}),
    )]);
    let Decision::Invalid(error) = decide(&impossible, &rules()) else {
        panic!("a negative uid is accepted");
    };
    let text = error.to_string();
    assert!(
        text.contains("container istio-proxy: securityContext.runAsUser"),
        "{text}"
    );
}

#[test]
fn proxys_variables_are_read_and_what_is_no_boolean_is_false() {
    for (value, expected) in [
        ("true", Ipv6::DualStack),
        ("1", Ipv6::DualStack),
        ("false", Ipv6::Auto),
        ("", Ipv6::Auto),
        ("maybe", Ipv6::Auto),
    ] {
        let policy = captured(&with_env("ISTIO_DUAL_STACK", value));
        assert_eq!(policy.ipv6, expected, "{value:?}");
    }
    for name in ["INVALID_DROP", "ISTIO_META_OTHER", "ISTIO_SERVICE_CIDR"] {
        assert_eq!(shown(&with_env(name, "true")), DEFAULT, "{name}");
    }
    for value in ["false", "maybe"] {
        assert_eq!(
            captured(&with_env("ISTIO_META_DNS_CAPTURE", value)).dns,
            Dns::Off
        );
    }
    let elsewhere =
        json!([{"name": "ISTIO_DUAL_STACK", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]);
    let pod = pod(&[("/spec/containers/1/env", elsewhere)]);
    assert_eq!(captured(&pod).ipv6, Ipv6::Auto);
}

#[test]
fn captured_dns_is_that_to_any_server() {
    match decide(&with_env("ISTIO_META_DNS_CAPTURE", "true"), &rules()) {
        Decision::Capture(policy) => assert_eq!(policy.dns, Dns::All),
        Decision::Invalid(error) => assert!(
            error
                .to_string()
                .starts_with("container istio-proxy: env ISTIO_META_DNS_CAPTURE"),
            "{error}"
        ),
        Decision::Skip(skip) => panic!("{skip}"),
    }
}

#[test]
fn each_reason_to_skip_is_found() {
    let proxy = |args: Value| json!({"name": "istio-proxy", "args": args});
    for (changes, expected) in [
        (
            vec![("/metadata/namespace", json!("istio-system"))],
            Skip::ExcludedNamespace("istio-system".to_owned()),
        ),
        (vec![("/spec/hostNetwork", json!(true))], Skip::HostNetwork),
        (
            vec![("/spec/initContainers", json!([{"name": "istio-init"}]))],
            Skip::InitContainer,
        ),
        (
            vec![("/spec/containers/0", json!({"name": "istio-init"}))],
            Skip::InitContainer,
        ),
        (
            vec![(
                "/spec/containers/1/env",
                json!([{"name": "DISABLE_ENVOY", "value": "true"}]),
            )],
            Skip::ProxyDisabled("istio-proxy".to_owned()),
        ),
        (
            vec![("/spec/containers/1/name", json!("envoy"))],
            Skip::NoProxy("istio-proxy".to_owned()),
        ),
        (
            vec![("/spec/containers/1", proxy(json!(["proxy", "router"])))],
            Skip::NotASidecar("router".to_owned()),
        ),
        (
            vec![("/metadata/labels/sidecar.istio.io~1inject", json!("false"))],
            Skip::Refused,
        ),
        (
            vec![(
                "/metadata/annotations/sidecar.istio.io~1inject",
                json!("false"),
            )],
            Skip::Refused,
        ),
        (
            vec![("/metadata/annotations", json!({}))],
            Skip::NotInjected,
        ),
        (
            vec![("/metadata/annotations", json!(null))],
            Skip::NotInjected,
        ),
    ] {
        assert_eq!(skipped(&pod(&changes)), expected, "{changes:?}");
    }
}

#[test]
fn what_looks_like_a_reason_to_skip_but_is_none_is_captured() {
    let inject = |place: &str| format!("/metadata/{place}/sidecar.istio.io~1inject");
    for changes in [
        vec![("/metadata/namespace".to_owned(), json!("kube-system-2"))],
        vec![("/spec/hostNetwork".to_owned(), json!(false))],
        vec![(
            "/spec/containers/1/args".to_owned(),
            json!(["other", "router"]),
        )],
        vec![("/spec/containers/1/args".to_owned(), json!(["proxy"]))],
        vec![("/spec/containers/1/args".to_owned(), json!(null))],
        // The label is stronger, and what is no boolean does not count.
        vec![
            (inject("labels"), json!("true")),
            (inject("annotations"), json!("false")),
        ],
        vec![
            (inject("labels"), json!("never")),
            (inject("annotations"), json!("false")),
        ],
        vec![(inject("annotations"), json!(""))],
        vec![(
            "/spec/containers/1/env".to_owned(),
            json!([{"name": "DISABLE_ENVOY", "value": "no"}]),
        )],
        // Istio CNI's validator is no istio-init.
        vec![(
            "/spec/initContainers".to_owned(),
            json!([{"name": "istio-validation"}]),
        )],
    ] {
        let changes: Vec<_> = changes
            .iter()
            .map(|(pointer, value)| (pointer.as_str(), value.clone()))
            .collect();
        assert_eq!(shown(&pod(&changes)), DEFAULT, "{changes:?}");
    }
}

#[test]
fn native_sidecar_is_the_proxy() {
    let pod = pod(&[
        ("/spec/containers/1/name", json!("other")),
        (
            "/spec/initContainers",
            json!([{"name": "istio-validation"}, {"name": "istio-proxy", "restartPolicy": "Always",
                    "args": ["proxy", "sidecar"], "securityContext": {"runAsUser": 2000}}]),
        ),
    ]);
    assert_eq!(captured(&pod).proxy_uids[0].first, 2000);
}

#[test]
fn reasons_are_looked_at_in_istio_cnis_order() {
    // Each change alone is a reason; the first of those left is the answer.
    let mut changes = vec![
        ("/metadata/namespace", json!("kube-system")),
        ("/spec/hostNetwork", json!(true)),
        ("/spec/initContainers", json!([{"name": "istio-init"}])),
        (
            "/spec/containers/1",
            json!({"name": "istio-proxy", "args": ["proxy", "router"],
                   "env": [{"name": "DISABLE_ENVOY", "value": "1"}]}),
        ),
        ("/metadata/labels/sidecar.istio.io~1inject", json!("false")),
        (
            "/metadata/annotations",
            json!({"traffic.sidecar.istio.io/includeInboundPorts": "bad"}),
        ),
    ];
    let mut seen = Vec::new();
    while !changes.is_empty() {
        seen.push(skipped(&pod(&changes)).label());
        changes.remove(0);
    }
    assert_eq!(
        seen,
        [
            "excluded-namespace",
            "host-network",
            "init-container",
            "proxy-disabled",
            "refused",
            "not-injected"
        ]
    );
    let router = pod(&[
        ("/spec/containers/1/args", json!(["proxy", "router"])),
        ("/metadata/labels/sidecar.istio.io~1inject", json!("false")),
    ]);
    assert_eq!(skipped(&router).label(), "not-a-sidecar");
}

#[test]
fn selector_takes_the_place_of_the_injectors_marks() {
    let rules = Rules {
        selector: Some("mesh=on".parse().expect("a selector")),
        proxy_container: "envoy".to_owned(),
        ..rules()
    };
    let bare = |label: &str| {
        pod(&[
            ("/metadata/annotations", json!({})),
            ("/metadata/labels/mesh", json!(label)),
            (
                "/spec/containers/1",
                json!({"name": "envoy", "securityContext": {"runAsUser": 2000}}),
            ),
        ])
    };
    let Decision::Capture(policy) = decide(&bare("on"), &rules) else {
        panic!("selected, but not captured");
    };
    assert_eq!(policy.proxy_uids[0].first, 2000);
    assert_eq!(
        decide(&bare("off"), &rules),
        Decision::Skip(Skip::NotSelected)
    );
    // A proxy that is no container of its own.
    let alone = pod(&[
        ("/metadata/labels/mesh", json!("on")),
        ("/spec/containers/1/name", json!("other")),
    ]);
    assert!(matches!(decide(&alone, &rules), Decision::Capture(_)));
    // The other reasons hold.
    let host = pod(&[
        ("/metadata/labels/mesh", json!("on")),
        ("/spec/hostNetwork", json!(true)),
    ]);
    assert_eq!(decide(&host, &rules), Decision::Skip(Skip::HostNetwork));
}
