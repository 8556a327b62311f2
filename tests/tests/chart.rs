//! The Helm chart and the kustomizations, rendered by Helm and kubectl themselves.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::collections::BTreeSet;

use redirect_tests::{
    helm::Helm,
    kubectl, loader,
    manifests::{arguments, check_call, check_type, containers, list, manifest, of_kind},
    namespace::errors,
    skip,
};
use serde_json::{Value, json};

/// What a value is good for.
enum Effect {
    /// An argument of that container.
    Argument(&'static str, &'static str),
    /// A field of the DaemonSet.
    Field(&'static str, Value),
}

use Effect::{Argument, Field};

/// Every value of the chart, another one than the default, and what that has to bring about.
fn values() -> Vec<(&'static str, Value, Vec<Effect>)> {
    const POD: &str = "/spec/template/spec";
    let at = |place: &str, value: Value| Field(leak(&format!("{POD}/{place}")), value);
    let images =
        |image: &str| [0, 1].map(|number| at(&format!("containers/{number}/image"), json!(image)));
    let affinity = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": [{"key": "mesh", "operator": "Exists"}]}]}}});
    let resources =
        json!({"requests": {"cpu": "50m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}});
    let secrets = json!([{"name": "key"}]);
    let toleration =
        json!([{"key": "only", "operator": "Equal", "value": "mesh", "effect": "NoSchedule"}]);
    let removal = [
        "cni",
        "uninstall",
        "--cni-conf-dir=/host/etc/cni/net.d",
        "--cni-bin-dir=/host/opt/cni/bin",
    ];
    vec![
        (
            "image.repository",
            json!("registry.example/mesh/redirect"),
            images("registry.example/mesh/redirect:0.1.0").into(),
        ),
        ("image.tag", json!("1.2.3"), images("redirect:1.2.3").into()),
        (
            "image.pullPolicy",
            json!("Always"),
            [0, 1]
                .map(|number| {
                    at(
                        &format!("containers/{number}/imagePullPolicy"),
                        json!("Always"),
                    )
                })
                .into(),
        ),
        (
            "imagePullSecrets",
            secrets.clone(),
            vec![at("imagePullSecrets", secrets)],
        ),
        (
            "daemon.excludeNamespaces",
            json!(["kube-system", "infra"]),
            vec![
                Argument("daemon", "--exclude-namespaces=kube-system,infra"),
                Argument("cni", "--exclude-namespaces=kube-system,infra"),
            ],
        ),
        (
            "daemon.proxyContainer",
            json!("envoy"),
            vec![Argument("daemon", "--proxy-container=envoy")],
        ),
        (
            "daemon.proxyIdentity",
            json!("container"),
            vec![Argument("daemon", "--proxy-identity=container")],
        ),
        (
            "daemon.labelSelector",
            json!("mesh=yes"),
            vec![Argument("daemon", "--label-selector=mesh=yes")],
        ),
        (
            "daemon.metricsPort",
            json!(9014),
            vec![
                Argument("daemon", "--metrics=127.0.0.1:9014"),
                at("containers/0/ports/0/containerPort", json!(9014)),
                at("containers/0/ports/0/hostPort", json!(9014)),
                at("containers/0/livenessProbe/httpGet/port", json!(9014)),
                at("containers/0/readinessProbe/httpGet/port", json!(9014)),
            ],
        ),
        (
            "daemon.metricsAddress",
            json!("10.1.2.3"),
            vec![
                Argument("daemon", "--metrics=10.1.2.3:15014"),
                at("containers/0/livenessProbe/httpGet/host", json!("10.1.2.3")),
                at(
                    "containers/0/readinessProbe/httpGet/host",
                    json!("10.1.2.3"),
                ),
            ],
        ),
        (
            "daemon.logFormat",
            json!("json"),
            vec![Argument("daemon", "--log-format=json")],
        ),
        (
            "daemon.resources",
            resources.clone(),
            vec![at("containers/0/resources", resources.clone())],
        ),
        (
            "cni.enabled",
            json!(false),
            vec![
                at("containers/1", Value::Null),
                at("initContainers/0/args", json!(removal)),
            ],
        ),
        (
            "cni.failOpen",
            json!(true),
            vec![Argument("cni", "--fail-open")],
        ),
        (
            "cni.confDir",
            json!("/var/lib/cni/net.d"),
            vec![at("volumes/4/hostPath/path", json!("/var/lib/cni/net.d"))],
        ),
        (
            "cni.binDir",
            json!("/home/kubernetes/bin"),
            vec![at("volumes/5/hostPath/path", json!("/home/kubernetes/bin"))],
        ),
        (
            "cni.confName",
            json!("10-aws.conflist"),
            vec![Argument("cni", "--conf-name=10-aws.conflist")],
        ),
        (
            "cni.resources",
            resources.clone(),
            vec![at("containers/1/resources", resources)],
        ),
        // Maps are added to the default ones.
        (
            "nodeSelector",
            json!({"mesh": "yes"}),
            vec![at(
                "nodeSelector",
                json!({"kubernetes.io/os": "linux", "mesh": "yes"}),
            )],
        ),
        (
            "tolerations",
            toleration.clone(),
            vec![at("tolerations", toleration)],
        ),
        ("affinity", affinity.clone(), vec![at("affinity", affinity)]),
        (
            "priorityClassName",
            json!("system-cluster-critical"),
            vec![at("priorityClassName", json!("system-cluster-critical"))],
        ),
        (
            "maxUnavailable",
            json!("25%"),
            vec![Field(
                "/spec/updateStrategy/rollingUpdate/maxUnavailable",
                json!("25%"),
            )],
        ),
        (
            "appArmorProfile",
            json!({"type": "Localhost", "localhostProfile": "redirect"}),
            vec![at(
                "securityContext/appArmorProfile",
                json!({"type": "Localhost", "localhostProfile": "redirect"}),
            )],
        ),
        (
            "seLinuxOptions",
            json!({"type": "redirect_t"}),
            vec![at(
                "securityContext/seLinuxOptions",
                json!({"type": "redirect_t", "level": "s0"}),
            )],
        ),
    ]
}

fn leak(text: &str) -> &'static str {
    text.to_owned().leak()
}

/// Values as `--set PATH=VALUE` makes them.
fn set(path: &str, value: Value) -> Value {
    path.rsplit('.')
        .fold(value, |inner, name| json!({name: inner}))
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

/// All of them changed at once, but for those.
fn all_changed_but(kept: &[&str]) -> Value {
    let mut all = json!({});
    for (path, value, _) in values() {
        if !kept.contains(&path) {
            merge(&mut all, set(path, value));
        }
    }
    all
}

/// Such as people may give.
fn samples() -> Vec<Value> {
    let single = values()
        .into_iter()
        .map(|(path, value, _)| set(path, value));
    let more = [
        json!({}),
        all_changed_but(&[]),
        all_changed_but(&["cni.enabled"]),
    ];
    single.chain(more).collect()
}

fn container<'a>(daemon_set: &'a Value, name: &str) -> &'a Value {
    let found = containers(daemon_set).find(|one| one["name"] == name);
    found.unwrap_or_else(|| panic!("no container {name}"))
}

#[test]
fn linter_finds_nothing() {
    let helm = match Helm::find() {
        Ok(helm) => helm,
        Err(missing) => skip!("{missing}"),
    };
    let samples = samples();
    for (messages, values) in helm.lint(&samples).iter().zip(&samples) {
        let bad: Vec<_> = messages.iter().filter(|one| one.severity > 1).collect();
        assert!(bad.is_empty(), "{values}: {bad:?}");
    }
    // The linter is at work.
    let broken = helm.lint(&[json!({"priorityClassName": "a: b"})]);
    assert!(broken[0].iter().any(|one| one.severity > 1), "{broken:?}");
}

#[test]
fn objects_are_what_kubernetes_knows_and_call_what_the_program_has() {
    let helm = match Helm::find() {
        Ok(helm) => helm,
        Err(missing) => skip!("{missing}"),
    };
    let samples = samples();
    for (objects, values) in helm.render(&samples).into_iter().zip(&samples) {
        check_objects(&objects.unwrap_or_else(|error| panic!("{values}: {error}")));
    }
    let kubectl = match kubectl::find() {
        Ok(kubectl) => kubectl,
        Err(missing) => skip!("{missing}"),
    };
    for directory in ["base", "remove-cni"] {
        check_objects(&kubectl::kustomize(&kubectl, directory));
    }
}

fn check_objects(objects: &[Value]) {
    for object in objects {
        check_type(object).unwrap();
    }
    let daemon_set = of_kind(objects, "DaemonSet");
    let labels = &daemon_set["spec"]["template"]["metadata"]["labels"];
    let selected = daemon_set["spec"]["selector"]["matchLabels"].as_object();
    for (name, value) in selected.unwrap() {
        assert_eq!(&labels[name], value, "the DaemonSet selects its own pods");
    }
    let volumes: BTreeSet<_> = list(daemon_set, "/spec/template/spec/volumes")
        .iter()
        .map(|volume| volume["name"].as_str().unwrap())
        .collect();
    for container in containers(daemon_set) {
        check_call(&arguments(container)).unwrap();
        for mount in list(container, "/volumeMounts") {
            assert!(volumes.contains(mount["name"].as_str().unwrap()), "{mount}");
        }
        let context = &container["securityContext"];
        assert!(context["privileged"].is_null(), "{}", container["name"]);
        assert_eq!(context["allowPrivilegeEscalation"], false);
        assert_eq!(context["readOnlyRootFilesystem"], true);
        assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
    }
}

#[test]
fn what_kubernetes_does_not_know_is_noticed() {
    let mut objects = manifest("kustomize/base/daemonset.yaml");
    let daemon_set = &mut objects[0];
    check_type(daemon_set).unwrap();
    daemon_set["spec"]["template"]["spec"]["hostIPc"] = json!(true);
    let error = check_type(daemon_set).unwrap_err();
    assert_eq!(error, "DaemonSet: no field .spec.template.spec.hostIPc");
}

#[test]
fn every_value_has_its_effect_and_no_other_is_there() {
    let helm = match Helm::find() {
        Ok(helm) => helm,
        Err(missing) => skip!("{missing}"),
    };
    let table = values();
    let mut known = BTreeSet::new();
    for (section, value) in manifest("helm/redirect/values.yaml")[0]
        .as_object()
        .unwrap()
    {
        let fields = value
            .as_object()
            .filter(|_| ["image", "daemon", "cni"].contains(&section.as_str()));
        match fields {
            Some(fields) => known.extend(fields.keys().map(|field| format!("{section}.{field}"))),
            None => drop(known.insert(section.clone())),
        }
    }
    let tried: BTreeSet<_> = table.iter().map(|(path, ..)| (*path).to_owned()).collect();
    assert_eq!(tried, known, "values.yaml and the table of this test");

    let default = helm.render(&[json!({})]).remove(0).unwrap();
    let each: Vec<Value> = table
        .iter()
        .map(|(path, value, _)| set(path, value.clone()))
        .collect();
    for (rendered, (path, _, effects)) in helm.render(&each).into_iter().zip(&table) {
        let rendered = rendered.unwrap();
        let [was, is] = [&default, &rendered].map(|objects| of_kind(objects, "DaemonSet"));
        for effect in effects {
            match effect {
                Argument(name, argument) => {
                    let has = |object| arguments(container(object, name)).contains(argument);
                    assert!(has(is) && !has(was), "{path}: {argument}");
                }
                Field(pointer, value) => {
                    let field =
                        |object: &Value| object.pointer(pointer).cloned().unwrap_or_default();
                    assert_eq!(&field(is), value, "{path}: {pointer}");
                    assert_ne!(&field(was), value, "{path}: {pointer}");
                }
            }
        }
    }
}

#[test]
fn chart_and_kustomizations_agree() {
    let (helm, kubectl) = match Helm::find().and_then(|helm| Ok((helm, kubectl::find()?))) {
        Ok(programs) => programs,
        Err(missing) => skip!("{missing}"),
    };
    for (directory, values) in [
        ("base", json!({})),
        ("remove-cni", set("cni.enabled", json!(false))),
    ] {
        let ours = kubectl::kustomize(&kubectl, directory);
        let theirs = helm.render(&[values]).remove(0).unwrap();
        for kind in ["ServiceAccount", "ClusterRole", "ClusterRoleBinding"] {
            assert_eq!(of_kind(&ours, kind), of_kind(&theirs, kind), "{directory}");
        }
        let ours = of_kind(&ours, "DaemonSet");
        let mut theirs = of_kind(&theirs, "DaemonSet").clone();
        // What a chart lets people choose, and says although it is the default.
        let pod = theirs
            .pointer_mut("/spec/template/spec")
            .unwrap()
            .as_object_mut()
            .unwrap();
        assert_eq!(pod.remove("imagePullSecrets"), Some(json!([])));
        assert_eq!(pod.remove("affinity"), Some(json!({})));
        for field in ["initContainers", "containers"] {
            let containers = pod.get_mut(field).and_then(Value::as_array_mut);
            for container in containers.into_iter().flatten() {
                let container = container.as_object_mut().unwrap();
                assert_eq!(
                    container.remove("imagePullPolicy"),
                    Some(json!("IfNotPresent"))
                );
                container["args"]
                    .as_array_mut()
                    .unwrap()
                    .retain(|argument| {
                        ![
                            "--proxy-container=istio-proxy",
                            "--proxy-identity=uid",
                            "--log-format=text",
                        ]
                        .contains(&argument.as_str().unwrap())
                    });
            }
        }
        assert_eq!(ours, &theirs, "{directory}");
    }
}

#[test]
fn selectors_and_addresses_arrive_as_they_were_written() {
    let helm = match Helm::find() {
        Ok(helm) => helm,
        Err(missing) => skip!("{missing}"),
    };
    let selectors = [
        "mesh=yes",
        "!legacy",
        "app!=cart,team=a/b,mesh",
        "a.example/b==c,!d",
    ];
    let values = selectors.map(|selector| set("daemon.labelSelector", json!(selector)));
    for (objects, selector) in helm.render(&values).into_iter().zip(selectors) {
        let objects = objects.unwrap();
        let arguments = arguments(container(of_kind(&objects, "DaemonSet"), "daemon"));
        let expected = format!("--label-selector={selector}");
        assert!(arguments.contains(&expected.as_str()), "{arguments:?}");
        assert_read_by_the_daemon(&arguments);
    }
    for (address, listens, probed) in [
        ("0.0.0.0", "0.0.0.0:15014", "127.0.0.1"),
        ("::", "[::]:15014", "127.0.0.1"),
        ("2001:db8::1", "[2001:db8::1]:15014", "2001:db8::1"),
    ] {
        let values = set("daemon.metricsAddress", json!(address));
        let objects = helm.render(&[values]).remove(0).unwrap();
        check_objects(&objects);
        let daemon = container(of_kind(&objects, "DaemonSet"), "daemon");
        let expected = format!("--metrics={listens}");
        assert!(arguments(daemon).contains(&expected.as_str()));
        for probe in ["livenessProbe", "readinessProbe"] {
            assert_eq!(daemon[probe]["httpGet"]["host"], probed, "{address}");
        }
        assert_read_by_the_daemon(&arguments(daemon));
    }
}

/// The daemon gets as far as asking for the API: it has understood all arguments.
fn assert_read_by_the_daemon(arguments: &[&str]) {
    let nowhere = ["--node-name=n", "--kubeconfig=/nonexistent/kubeconfig"];
    let output = loader::run(arguments.iter().copied().chain(nowhere));
    let error = errors(&output);
    assert!(
        error.contains("/nonexistent/kubeconfig"),
        "{arguments:?}: {error}"
    );
    // A wrong one is told apart.
    let wrong = ["--label-selector==", "--node-name=n"];
    let output = loader::run(["daemon"].into_iter().chain(wrong));
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
}
