//! Random configurations, variables and results: each is read, or refused with one line.

use std::collections::{BTreeMap, HashMap};

use prop::collection::vec;
use prop::sample::select;
use proptest::prelude::*;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::NAME;
use super::call::{Attachment, Command};
use super::config::{Config, Version, version_asked_for};
use super::daemon::line_of;
use super::error::{Code, Failure};
use super::install::list::{Rest, convert, insert, remove};
use super::result::echo;
use crate::fuzz::{config, edits, is_one_line, text};
use crate::node::api::{MAX_LINE, Operation, PodName, Request, Sandbox};

const FIELDS: &[&str] = &[
    "cniVersion",
    "1.0.0",
    "0.3.1",
    "socket",
    "/run/a.sock",
    "timeout",
    "failOpen",
    "excludeNamespaces",
    "podNamespace",
    "podNamePrefix",
    "logFile",
    "runtimeConfig",
    "io.kubernetes.cri.pod-annotations",
    "cgroupPath",
    "prevResult",
    "cni.dev/valid-attachments",
    "containerID",
    "plugins",
    "type",
    "convertedFrom",
    NAME,
];
const ENTRY: &str = r#"{"type":"redirect-cni","failOpen":false}"#;

fn any_json() -> impl Strategy<Value = Value> {
    crate::fuzz::json(FIELDS)
}

/// A configuration whose fields are right, but for one.
fn nearly_right() -> impl Strategy<Value = Value> {
    (select(FIELDS), any_json()).prop_map(|(field, value)| {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "n", "type": NAME, "socket": "/run/a.sock", "timeout": 5,
            "runtimeConfig": {"cgroupPath": "/kubepods/podx", "io.kubernetes.cri.pod-annotations": {"a": "b"}},
            "cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}], "prevResult": {"cniVersion": "1.1.0"},
        });
        config[field] = value;
        config
    })
}

fn assert_told(failure: &Failure) {
    assert!(is_one_line(&failure.message), "{:?}", failure.message);
    let written: Value = serde_json::from_str(&failure.to_json("1.0.0")).expect("JSON");
    assert_eq!(written["code"], failure.code as u32);
    assert_eq!(written["msg"], failure.message);
}

fn assert_read_or_told(text: &str) {
    drop(version_asked_for(text));
    match Config::parse(text) {
        Ok(config) => {
            assert!(config.socket.is_absolute());
            assert!((1..=60).contains(&config.timeout.as_secs()));
            assert!(config.log_file.is_none_or(|path| path.is_absolute()));
            for version in Version::ALL {
                if let Err(failure) = echo(config.previous.as_deref(), version) {
                    assert_told(&failure);
                }
            }
        }
        Err(failure) => assert_told(&failure),
    }
}

/// A list of plugins, maybe with the entry among them, written in one of two ways.
fn plugin_list() -> impl Strategy<Value = String> {
    let plugin = prop_oneof![
        3 => "[a-z]{1,3}".prop_map(|kind| json!({"type": kind, "x": [1, {"plugins": []}]})),
        1 => Just(json!({"type": NAME})),
        1 => any_json().prop_map(|x| json!({"type": "a", "x": x})),
    ];
    (vec(plugin, 0..5), any::<bool>(), any_json()).prop_map(|(plugins, pretty, other)| {
        let list = json!({"cniVersion": "1.0.0", "name": "n", "plugins": plugins, "other": other});
        if pretty {
            serde_json::to_string_pretty(&list).unwrap_or_default()
        } else {
            list.to_string()
        }
    })
}

/// Reads no more than it needs: a number may be larger than any that a [`Value`] holds. Of a key that comes twice the last counts, as
/// for container runtimes.
fn kinds(list: &str) -> Vec<String> {
    type Object<'a> = HashMap<String, &'a RawValue>;
    let list: Object<'_> = serde_json::from_str(list).expect(list);
    let plugins: Vec<Object<'_>> = serde_json::from_str(list["plugins"].get()).expect("objects");
    let kinds = plugins.iter().map(|plugin| plugin["type"].get());
    kinds
        .map(|kind| serde_json::from_str(kind).expect("a string"))
        .collect()
}

#[test]
fn key_that_comes_twice_counts_the_last_time() {
    let list = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","type":"b"}]}"#;
    assert_eq!(kinds(&insert(list, ENTRY).expect("a list")), ["b", NAME]);
}

#[test]
fn number_that_is_too_large_for_us_is_left_alone() {
    let list =
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a","x":4.2e+396580182144175}]}"#;
    let with = insert(list, ENTRY).expect("a list");
    assert_eq!(kinds(&with), ["a", NAME]);
    assert!(with.contains("4.2e+396580182144175"), "{with}");
}

fn without_ours(mut kinds: Vec<String>) -> Vec<String> {
    kinds.retain(|kind| kind != NAME);
    kinds
}

proptest! {
    #![proptest_config(config(1))]

    #[test]
    fn any_configuration_is_read_or_refused(config in prop_oneof![any_json(), nearly_right()], edits in edits()) {
        assert_read_or_told(&config.to_string());
        assert_read_or_told(&edits.of(&serde_json::to_string_pretty(&config).unwrap_or_default()));
    }

    #[test]
    fn any_text_is_no_configuration_or_one(text in text()) {
        assert_read_or_told(&text);
    }

    #[test]
    fn any_variables_are_read_or_refused(
        values in vec(prop_oneof![text(), "[A-Za-z0-9_.-]{1,9}"], 5),
        arguments in prop_oneof![
            text(),
            text().prop_map(|name| format!("K8S_POD_NAME={name}")),
            "(K8S_POD_(NAME|NAMESPACE|UID)=[a-z]{0,3};?|Ignore=1;){0,5}",
        ],
        command in select(&["ADD", "CHECK", "DEL"][..]),
    ) {
        let environment = |name: &str| match name {
            "CNI_COMMAND" => Some(values[0].clone()),
            "CNI_CONTAINERID" => Some(values[1].clone()),
            "CNI_IFNAME" => Some(values[2].clone()),
            "CNI_NETNS" => Some(values[3].clone()),
            "CNI_ARGS" => Some(arguments.clone()),
            _ => None,
        };
        if let Err(failure) = Command::read(&environment) {
            assert_told(&failure);
        }
        let command = Command::read(&|_| Some(command.to_owned())).expect("a command");
        match Attachment::read(command, &environment) {
            Ok(attachment) => {
                prop_assert!(!attachment.container_id.contains(['/', '\0', '\n']));
                prop_assert!(attachment.pod.is_none_or(|pod| !pod.name.is_empty() && !pod.namespace.is_empty()));
            }
            Err(failure) => {
                assert_told(&failure);
                prop_assert_eq!(failure.code, Code::Environment);
            }
        }
    }

    #[test]
    fn entry_goes_into_any_list_and_out_again(list in plugin_list(), edits in edits()) {
        for text in [edits.of(&list), list] {
            let Ok(with) = insert(&text, ENTRY) else { continue };
            prop_assert_eq!(&insert(&with, ENTRY).expect("again"), &with);
            let own = [NAME.to_owned()];
            prop_assert_eq!(kinds(&with), [without_ours(kinds(&text)), own.to_vec()].concat());
            let Some(Rest::List(rest)) = remove(&with).expect("valid") else {
                panic!("no list is left of {with}");
            };
            prop_assert_eq!(kinds(&rest), without_ours(kinds(&text)));
            if !kinds(&text).contains(&own[0]) {
                prop_assert_eq!(rest, text);
            }
        }
    }

    #[test]
    fn any_single_plugin_becomes_a_list_and_comes_back(plugin in any_json(), kind in "[a-z]{1,3}", edits in edits()) {
        let mut plugin = plugin;
        if let Some(fields) = plugin.as_object_mut() {
            fields.insert("type".to_owned(), kind.into());
        }
        for text in [edits.of(&plugin.to_string()), plugin.to_string()] {
            let Ok(list) = convert(&text, "10-a.conf", ENTRY) else { continue };
            let single = Rest::Single { file: "10-a.conf".to_owned(), text };
            prop_assert_eq!(remove(&list), Ok(Some(single)));
        }
    }

    #[test]
    fn any_result_is_given_back_or_refused(result in prop_oneof![any_json(), any_json().prop_map(|ips| json!({"cniVersion": "0.4.0", "ips": ips}))]) {
        let raw = RawValue::from_string(result.to_string()).expect("JSON");
        for version in Version::ALL {
            match echo(Some(&raw), version) {
                Ok(text) => {
                    let field = |text: &str, name: &str| {
                        let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).expect(text);
                        fields.get(name).map(|raw| raw.get().to_owned())
                    };
                    prop_assert_eq!(field(&text, "cniVersion"), Some(json!(version.as_str()).to_string()));
                    prop_assert_eq!(field(&text, "ips"), field(raw.get(), "ips"));
                }
                Err(failure) => assert_told(&failure),
            }
        }
    }
}

proptest! {
    #![proptest_config(config(20))]

    #[test]
    fn any_annotations_leave_a_line_that_the_daemon_reads(lengths in vec(0..40_000_usize, 0..6), words in vec(text(), 4)) {
        let annotations = lengths.iter().enumerate().map(|(index, length)| (format!("{index}{}", words[0]), "\u{1}x".repeat(length / 2)));
        let sandbox = Sandbox {
            container_id: words[1].clone(),
            netns: words[2].clone().into(),
            pod: PodName { namespace: words[3].clone(), name: words[0].clone(), uid: None },
            cgroup_parent: None,
            annotations: Some(annotations.collect()),
            labels: None,
        };
        let line = line_of(Operation::Add(sandbox));
        prop_assert!(line.len() <= MAX_LINE);
        prop_assert_eq!(line.find('\n'), Some(line.len() - 1));
        let Operation::Add(read) = serde_json::from_str::<Request>(&line).expect("a request").operation else {
            panic!("{line}");
        };
        prop_assert_eq!(&read.container_id, &words[1]);
        prop_assert!(read.annotations.unwrap_or_default().len() <= lengths.len());
    }
}
