//! A pod as the container runtime hands it over to the CNI plugin: its annotations, maybe its labels, and no more.
//!
//! Whether that is enough to decide is said here, and nowhere else. What it does not tell, such as the proxy's user, is
//! taken as Istio has it by default; once the Kubernetes API has told of the pod, that counts.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde::Deserialize;

use super::{Rules, STATUS, inputs};
use crate::node::api::Sandbox;

/// Which of the injector's templates a pod wants; without it, the sidecar's.
const TEMPLATES: &str = "inject.istio.io/templates";
/// The template of sidecars.
const SIDECAR: &str = "sidecar";

/// What the injector writes into its annotation, as far as it is of use here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Injected {
    init_containers: Option<Vec<String>>,
    containers: Option<Vec<String>>,
}

/// The pod as far as it was handed over, if that is enough to decide; else what is missing.
pub fn handed_over(sandbox: &Sandbox, rules: &Rules) -> Result<Pod, String> {
    let Some(uid) = &sandbox.pod.uid else {
        return Err("no UID".to_owned());
    };
    // A kubelet adds some of its own to every pod: none at all means that they were not handed over.
    let annotations = sandbox.annotations.as_ref().filter(|all| !all.is_empty());
    let Some(annotations) = annotations else {
        return Err("no annotations".to_owned());
    };
    if rules.selector.is_some() && sandbox.labels.is_none() {
        return Err("no labels, which --label-selector is about".to_owned());
    }
    let injected = match annotations.get(STATUS) {
        Some(text) => injected(text, rules)?,
        // Its containers are not known, and the annotation decides.
        None => Injected {
            containers: Some(vec![rules.proxy_container.clone()]),
            init_containers: None,
        },
    };
    // Other templates give the proxy another part, which its arguments and variables tell, or another name.
    if let Some(templates) = annotations.get(TEMPLATES)
        && !templates.split(',').any(|name| name.trim() == SIDECAR)
    {
        return Err(format!(
            "annotation {TEMPLATES}: {templates:?} does not name {SIDECAR:?}"
        ));
    }
    let mut pod = Pod::default();
    pod.metadata.namespace = Some(sandbox.pod.namespace.clone());
    pod.metadata.name = Some(sandbox.pod.name.clone());
    pod.metadata.uid = Some(uid.clone());
    pod.metadata.annotations = Some(annotations.clone());
    pod.metadata.labels.clone_from(&sandbox.labels);
    pod.spec = Some(PodSpec {
        containers: named(injected.containers),
        init_containers: Some(named(injected.init_containers)),
        ..PodSpec::default()
    });
    Ok(pod)
}

/// Whether the annotation has a say in any of this.
pub fn is_read(annotation: &str) -> bool {
    [STATUS, TEMPLATES, super::INJECT].contains(&annotation) || inputs::is_read(annotation)
}

fn injected(text: &str, rules: &Rules) -> Result<Injected, String> {
    let injected: Injected = serde_json::from_str(text)
        .map_err(|error| format!("annotation {STATUS}: {text:?} cannot be read: {error}"))?;
    let lists = [&injected.containers, &injected.init_containers];
    let proxy = &rules.proxy_container;
    if lists
        .into_iter()
        .flatten()
        .any(|names| names.contains(proxy))
    {
        return Ok(injected);
    }
    Err(format!(
        "annotation {STATUS} does not name container {proxy}"
    ))
}

fn named(names: Option<Vec<String>>) -> Vec<Container> {
    let containers = names.into_iter().flatten().map(|name| Container {
        name,
        ..Container::default()
    });
    containers.collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Decision, ProxyBy, Skip, decide};
    use super::*;
    use crate::node::api::PodName;

    const SIDECAR_ONLY: &str = r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"],"volumes":["x"],"imagePullSecrets":null,"revision":"default"}"#;
    const NATIVE: &str =
        r#"{"initContainers":["istio-validation","istio-proxy"],"containers":null}"#;
    const WITH_INIT: &str = r#"{"initContainers":["istio-init"],"containers":["istio-proxy"]}"#;

    fn rules() -> Rules {
        Rules {
            exclude_namespaces: Vec::new(),
            proxy_container: "istio-proxy".to_owned(),
            selector: None,
            proxy_by: ProxyBy::Uid,
        }
    }

    fn sandbox(annotations: &[(&str, &str)]) -> Sandbox {
        let all = [("kubernetes.io/config.source", "api")];
        let all = all.iter().chain(annotations);
        Sandbox {
            container_id: "c".to_owned(),
            netns: "/n".into(),
            pod: PodName {
                namespace: "shop".to_owned(),
                name: "cart-0".to_owned(),
                uid: Some("u".to_owned()),
            },
            cgroup_parent: None,
            annotations: Some(
                all.map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
                    .collect(),
            ),
            labels: None,
        }
    }

    fn decided(sandbox: &Sandbox) -> Decision {
        decide(&handed_over(sandbox, &rules()).expect("enough"), &rules())
    }

    fn lacks(sandbox: &Sandbox, rules: &Rules) -> String {
        handed_over(sandbox, rules).expect_err("not enough")
    }

    #[test]
    fn injected_pod_is_captured_as_its_annotations_say_and_by_defaults() {
        let include = "traffic.sidecar.istio.io/includeInboundPorts";
        for status in [SIDECAR_ONLY, NATIVE] {
            let Decision::Capture(policy) = decided(&sandbox(&[(STATUS, status), (include, "80")]))
            else {
                panic!("{status}");
            };
            assert_eq!(policy.inbound_ports.to_string(), "80");
            assert_eq!(policy.proxy_uids[0].first, 1337);
        }
        let invalid = sandbox(&[(STATUS, NATIVE), (include, "http-and-more")]);
        assert!(matches!(decided(&invalid), Decision::Invalid(_)));
    }

    #[test]
    fn pods_are_skipped_for_what_the_annotations_tell() {
        assert_eq!(decided(&sandbox(&[])), Decision::Skip(Skip::NotInjected));
        let init = sandbox(&[(STATUS, WITH_INIT)]);
        assert_eq!(decided(&init), Decision::Skip(Skip::InitContainer));
        let refusing = sandbox(&[(STATUS, NATIVE), ("sidecar.istio.io/inject", "false")]);
        assert_eq!(decided(&refusing), Decision::Skip(Skip::Refused));
    }

    #[test]
    fn what_is_missing_is_named() {
        let injected = || sandbox(&[(STATUS, NATIVE)]);
        let mut nameless = injected();
        nameless.pod.uid = None;
        let mut bare = injected();
        bare.annotations = None;
        let mut empty = injected();
        empty.annotations = Some([].into());
        for (sandbox, words) in [
            (nameless, "no UID"),
            (bare, "no annotations"),
            (empty, "no annotations"),
            (
                sandbox(&[(STATUS, "{}")]),
                "does not name container istio-proxy",
            ),
            (sandbox(&[(STATUS, "injected")]), "cannot be read"),
            (
                sandbox(&[(STATUS, NATIVE), (TEMPLATES, "gateway")]),
                TEMPLATES,
            ),
            (
                sandbox(&[(STATUS, NATIVE), (TEMPLATES, "grpc-agent")]),
                TEMPLATES,
            ),
        ] {
            let missing = lacks(&sandbox, &rules());
            assert!(missing.contains(words), "{missing}");
        }
        let both = sandbox(&[(STATUS, NATIVE), (TEMPLATES, "sidecar, custom")]);
        assert!(handed_over(&both, &rules()).is_ok());
    }

    #[test]
    fn selector_asks_for_labels() {
        let rules = Rules {
            selector: Some("mesh=on".parse().expect("a selector")),
            ..rules()
        };
        let mut sandbox = sandbox(&[]);
        assert!(lacks(&sandbox, &rules).contains("no labels"));
        for (label, captured) in [("on", true), ("off", false)] {
            sandbox.labels = Some([("mesh".to_owned(), label.to_owned())].into());
            let pod = handed_over(&sandbox, &rules).expect("enough");
            let decision = decide(&pod, &rules);
            assert_eq!(
                matches!(decision, Decision::Capture(_)),
                captured,
                "{label}"
            );
        }
    }
}
