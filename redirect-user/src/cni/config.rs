//! The network configuration on standard input.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::error::{Code, Failure, Result};
use crate::node::api;

/// The runtime hands a pod's annotations over under this name, if the configuration asks for that capability.
pub const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The same for the pod's cgroup.
pub const CGROUP_PATH: &str = "cgroupPath";
/// What `GC` comes with.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// A version of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0, the first with `CHECK`
    V0_4_0,
    /// 1.0.0
    V1_0_0,
    /// 1.1.0, the first with `GC` and `STATUS`
    V1_1_0,
}

impl Version {
    /// All that are spoken.
    pub const ALL: [Self; 5] = [
        Self::V0_3_0,
        Self::V0_3_1,
        Self::V0_4_0,
        Self::V1_0_0,
        Self::V1_1_0,
    ];
    /// The newest of them.
    pub const NEWEST: Self = Self::V1_1_0;

    /// None if it is not spoken.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|version| version.as_str() == text)
    }

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Whether results of the two have the same fields: 1.0.0 took the `version` out of `ips`.
    pub fn reads_as(self, other: Self) -> bool {
        (self >= Self::V1_0_0) == (other >= Self::V1_0_0)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The configuration of one call. Fields that are not here are other people's, and ignored.
#[derive(Debug)]
pub struct Config {
    /// `cniVersion`
    pub version: Version,
    /// `socket`: where the daemon listens.
    pub socket: PathBuf,
    /// `timeout`: how long the daemon may take.
    pub timeout: Duration,
    /// `failOpen`: whether pods start uncaptured while the daemon is away or fails.
    pub fail_open: bool,
    /// `excludeNamespaces`: Kubernetes namespaces that are left alone.
    pub exclude_namespaces: Vec<String>,
    /// `podNamespace`: the daemon's own Kubernetes namespace.
    pub pod_namespace: Option<String>,
    /// `podNamePrefix`: what the names of the daemon's own pods begin with.
    pub pod_name_prefix: String,
    /// `logFile`: where pods that started uncaptured are noted too, beside standard error.
    pub log_file: Option<PathBuf>,
    /// `runtimeConfig`'s annotations of the pod.
    pub annotations: Option<BTreeMap<String, String>>,
    /// `runtimeConfig`'s cgroup of the pod.
    pub cgroup_path: Option<String>,
    /// `prevResult`, as it came.
    pub previous: Option<Box<RawValue>>,
    /// The sandboxes that `GC` names.
    pub valid_container_ids: Option<Vec<String>>,
}

type Fields = BTreeMap<String, Box<RawValue>>;

/// `cniVersion` as it was written, for error messages before anything else is known.
pub fn version_asked_for(text: &str) -> Option<String> {
    let fields: Fields = serde_json::from_str(text).ok()?;
    serde_json::from_str(fields.get("cniVersion")?.get()).ok()
}

impl Config {
    /// Reads and checks all of it.
    pub fn parse(text: &str) -> Result<Self> {
        let fields: Fields = serde_json::from_str(text).map_err(|error| {
            Failure::new(
                Code::Undecodable,
                format!("standard input: {error}: a network configuration in JSON is needed"),
            )
        })?;
        let version = version(&fields)?;
        let runtime: Option<Fields> = read(&fields, "runtimeConfig", "an object")?;
        let runtime = runtime.unwrap_or_default();
        Ok(Self {
            version,
            socket: absolute(&fields, "socket")?
                .unwrap_or_else(|| PathBuf::from(api::DEFAULT_SOCKET)),
            timeout: timeout(&fields)?,
            fail_open: read(&fields, "failOpen", "true and false")?.unwrap_or(false),
            exclude_namespaces: read(
                &fields,
                "excludeNamespaces",
                "a list of Kubernetes namespaces",
            )?
            .unwrap_or_else(|| vec!["kube-system".to_owned()]),
            pod_namespace: read(&fields, "podNamespace", "a Kubernetes namespace")?,
            pod_name_prefix: read(&fields, "podNamePrefix", "the beginning of a pod's name")?
                .unwrap_or_else(|| "redirect-".to_owned()),
            log_file: absolute(&fields, "logFile")?,
            annotations: within(
                "runtimeConfig",
                read(&runtime, ANNOTATIONS, "an object of strings"),
            )?,
            cgroup_path: within("runtimeConfig", read(&runtime, CGROUP_PATH, "a path"))?,
            previous: fields
                .get("prevResult")
                .filter(|raw| raw.get() != "null")
                .cloned(),
            valid_container_ids: valid_container_ids(&fields)?,
        })
    }
}

fn version(fields: &Fields) -> Result<Version> {
    let text: Option<String> = read(fields, "cniVersion", "a version of the CNI specification")?;
    let spoken = Version::ALL.map(Version::as_str).join(", ");
    // The specification reads a missing one as 0.1.0.
    let text = text.unwrap_or_else(|| "0.1.0".to_owned());
    Version::parse(&text).ok_or_else(|| {
        Failure::new(
            Code::Version,
            format!("cniVersion: {text:?}: allowed are {spoken}"),
        )
    })
}

fn timeout(fields: &Fields) -> Result<Duration> {
    const ALLOWED: &str = "whole seconds from 1 to 60";
    match read::<u64>(fields, "timeout", ALLOWED)? {
        None => Ok(api::TIMEOUT),
        Some(seconds @ 1..=60) => Ok(Duration::from_secs(seconds)),
        Some(seconds) => Err(wrong("timeout", seconds, ALLOWED)),
    }
}

fn absolute(fields: &Fields, name: &str) -> Result<Option<PathBuf>> {
    const ALLOWED: &str = "an absolute path";
    let path: Option<String> = read(fields, name, ALLOWED)?;
    match path {
        Some(path) if !Path::new(&path).is_absolute() => {
            Err(wrong(name, format!("{path:?}"), ALLOWED))
        }
        path => Ok(path.map(PathBuf::from)),
    }
}

fn valid_container_ids(fields: &Fields) -> Result<Option<Vec<String>>> {
    #[derive(serde::Deserialize)]
    struct Valid {
        #[serde(rename = "containerID")]
        container_id: String,
    }
    let attachments: Option<Vec<Valid>> = read(
        fields,
        VALID_ATTACHMENTS,
        "a list of objects with containerID and ifname",
    )?;
    Ok(attachments.map(|all| all.into_iter().map(|one| one.container_id).collect()))
}

/// A field that is `null` counts as absent.
fn read<T: DeserializeOwned>(fields: &Fields, name: &str, allowed: &str) -> Result<Option<T>> {
    let Some(raw) = fields.get(name) else {
        return Ok(None);
    };
    // The value may have been written on several lines; the message is one.
    let value = || raw.get().replace(char::is_control, " ");
    serde_json::from_str(raw.get()).map_err(|_| wrong(name, value(), allowed))
}

fn within<T>(outer: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| Failure::new(error.code, format!("{outer}.{error}")))
}

fn wrong(name: &str, value: impl fmt::Display, allowed: &str) -> Failure {
    Failure::new(Code::Config, format!("{name}: {value}: allowed: {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(fields: &str) -> Result<Config> {
        Config::parse(&format!(r#"{{"cniVersion":"1.0.0"{fields}}}"#))
    }

    #[test]
    fn fields_of_others_are_ignored_and_ours_have_defaults() {
        let config = with(r#","name":"n","type":"redirect-cni","plugins":7,"ipam":{}"#);
        let config = config.expect("valid");
        assert_eq!(config.socket, Path::new(api::DEFAULT_SOCKET));
        assert_eq!(config.timeout, api::TIMEOUT);
        assert!(!config.fail_open);
        assert_eq!(config.exclude_namespaces, ["kube-system"]);
        assert!(config.previous.is_none() && config.annotations.is_none());
    }

    #[test]
    fn what_the_runtime_hands_over_is_read() {
        let config = with(
            r#","runtimeConfig":{"portMappings":[],"cgroupPath":"/kubepods/podx","io.kubernetes.cri.pod-annotations":{"a":"b"}},
               "cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}],"prevResult":{"x":1}"#,
        )
        .expect("valid");
        assert_eq!(config.cgroup_path.as_deref(), Some("/kubepods/podx"));
        assert_eq!(config.annotations.expect("annotations")["a"], "b");
        assert_eq!(config.valid_container_ids.expect("ids"), ["c1"]);
        assert_eq!(config.previous.expect("a result").get(), r#"{"x":1}"#);
    }

    #[test]
    fn wrong_fields_are_named_with_value_and_allowed() {
        for (fields, message) in [
            (
                r#","failOpen":"yes""#,
                r#"failOpen: "yes": allowed: true and false"#,
            ),
            (r#","socket":7"#, "socket: 7: allowed: an absolute path"),
            (
                r#","socket":"a/b""#,
                r#"socket: "a/b": allowed: an absolute path"#,
            ),
            (
                r#","timeout":0"#,
                "timeout: 0: allowed: whole seconds from 1 to 60",
            ),
            (
                r#","timeout":1.5"#,
                "timeout: 1.5: allowed: whole seconds from 1 to 60",
            ),
            (
                r#","excludeNamespaces":"a""#,
                r#"excludeNamespaces: "a": allowed: a list of Kubernetes namespaces"#,
            ),
            (
                r#","runtimeConfig":[]"#,
                "runtimeConfig: []: allowed: an object",
            ),
            (
                ",\"runtimeConfig\":[1,\n2]",
                "runtimeConfig: [1, 2]: allowed: an object",
            ),
            (
                r#","runtimeConfig":{"cgroupPath":1}"#,
                "runtimeConfig.cgroupPath: 1: allowed: a path",
            ),
            (
                r#","runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"a":1}}"#,
                r#"runtimeConfig.io.kubernetes.cri.pod-annotations: {"a":1}: allowed: an object of strings"#,
            ),
        ] {
            let error = with(fields).expect_err(fields);
            assert_eq!(
                (error.code, error.message.as_str()),
                (Code::Config, message)
            );
        }
    }

    #[test]
    fn versions_that_are_not_spoken_are_refused_as_such() {
        for text in [
            r#"{"cniVersion":"0.2.0"}"#,
            r#"{"cniVersion":"2.0.0"}"#,
            "{}",
        ] {
            let error = Config::parse(text).expect_err(text);
            assert_eq!(error.code, Code::Version);
            assert!(
                error
                    .message
                    .ends_with("allowed are 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
                "{error}"
            );
        }
        for text in ["", "{", "[]", "null", "{\"cniVersion\":\"1.0.0\"} x"] {
            let error = Config::parse(text).expect_err(text);
            assert_eq!(error.code, Code::Undecodable, "{text}: {error}");
        }
        assert_eq!(
            Config::parse(r#"{"cniVersion":1}"#)
                .expect_err("a number")
                .code,
            Code::Config
        );
    }
}
