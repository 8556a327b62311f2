//! What the CNI plugin and the node's daemon say to each other.
//!
//! A Unix stream socket. One JSON object per line is asked, one JSON object per line answers, in order; a connection may
//! carry several. A line, its newline included, is at most [`MAX_LINE`] bytes; each is awaited for [`TIMEOUT`], then the
//! daemon closes the connection. Only uid 0 of the initial user namespace is served, others are closed without an answer.
//!
//! A line asked looks like `{"version":1,"op":"add","container_id":"…","netns":"/run/netns/…","pod":{"namespace":"…","name":"…"}}`,
//! an answer like `{"result":"captured"}` or `{"error":"…","retry":true}`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/redirect/daemon.sock";
/// The only version of these messages.
pub const VERSION: u32 = 1;
/// Longest line, in bytes, its newline included.
pub const MAX_LINE: usize = 64 * 1024;
/// How long either side waits for a line of the other.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// What is asked: the version, and one operation beside it in the same JSON object.
///
/// Unknown fields, unknown operations and other versions are refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What to do.
    #[serde(flatten)]
    pub operation: Operation,
}

/// What the daemon is to do, named by the field `op`: `add`, `check`, `del`, `status`, `gc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Operation {
    /// Decide about a new sandbox and capture it before its containers start. May be repeated.
    ///
    /// Answered with `captured`, with `skipped` and why, or with an error.
    Add(Sandbox),
    /// Is the sandbox as `add` left it? Nothing is changed.
    ///
    /// Answered with `captured` or `skipped`, or with an error that says what is missing.
    Check(Sandbox),
    /// Forget a sandbox. May be repeated, and come after the sandbox, its namespace and the pod have gone; answered with `ok`.
    Del(Gone),
    /// Can the daemon serve `add`? Answered with `ok`, or with an error that says why not.
    Status {},
    /// Forget every sandbox that came by `add` and is not named here; answered with `ok`.
    Gc {
        /// The sandboxes that live.
        valid_container_ids: Vec<String>,
    },
}

/// A pod's sandbox, as the container runtime tells a CNI plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`: a path to the network namespace that the daemon can open too.
    pub netns: PathBuf,
    /// Whose sandbox it is.
    pub pod: PodName,
    /// The pod's cgroup, if the runtime tells it: below the cgroup2 mount, with or without a leading slash. The daemon
    /// finds it by the pod's UID otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup_parent: Option<String>,
    /// The pod's annotations, if the runtime tells them; what the Kubernetes API says is preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// The pod's labels, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
}

/// A sandbox that is being removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gone {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`, which runtimes leave out when the namespace has gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// Whose sandbox it was.
    pub pod: PodName,
}

/// A pod, as in `K8S_POD_NAMESPACE`, `K8S_POD_NAME` and `K8S_POD_UID`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name in the namespace.
    pub name: String,
    /// UID, which not every runtime tells. If given, a pod of the same name with another UID is another pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum Answer {
    /// It is done.
    Done {
        /// What came of it.
        result: Outcome,
        /// Why a pod is skipped, in words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// It could not be done, and nothing was changed.
    Failed {
        /// One line: the field, the value and what is allowed, or what could not be done.
        error: String,
        /// Whether the same request may succeed later.
        retry: bool,
    },
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The pod's traffic is captured.
    Captured,
    /// The pod is left alone.
    Skipped,
    /// What was asked is done.
    Ok,
}

impl From<Operation> for Request {
    fn from(operation: Operation) -> Self {
        Self {
            version: VERSION,
            operation,
        }
    }
}

/// serde cannot both flatten and refuse unknown fields: the version is taken out first.
impl TryFrom<serde_json::Map<String, serde_json::Value>> for Request {
    type Error = String;

    fn try_from(
        mut fields: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Self, Self::Error> {
        let version = fields
            .remove("version")
            .ok_or_else(|| format!("version: missing: allowed is {VERSION}"))?;
        if version != VERSION {
            return Err(format!("version: {version}: allowed is {VERSION}"));
        }
        serde_json::from_value(fields.into())
            .map(|operation: Operation| operation.into())
            .map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox() -> Sandbox {
        Sandbox {
            container_id: "c1".to_owned(),
            netns: "/run/netns/a".into(),
            pod: PodName {
                namespace: "shop".to_owned(),
                name: "cart-0".to_owned(),
                uid: None,
            },
            cgroup_parent: None,
            annotations: None,
            labels: None,
        }
    }

    #[test]
    fn requests_are_written_as_documented_and_read_back() {
        let named = r#""container_id":"c1","netns":"/run/netns/a","pod":{"namespace":"shop","name":"cart-0"}"#;
        for (operation, text) in [
            (
                Operation::Add(sandbox()),
                format!(r#"{{"version":1,"op":"add",{named}}}"#),
            ),
            (
                Operation::Check(sandbox()),
                format!(r#"{{"version":1,"op":"check",{named}}}"#),
            ),
            (
                Operation::Del(Gone {
                    container_id: "c1".to_owned(),
                    netns: None,
                    pod: sandbox().pod,
                }),
                r#"{"version":1,"op":"del","container_id":"c1","pod":{"namespace":"shop","name":"cart-0"}}"#
                    .to_owned(),
            ),
            (
                Operation::Status {},
                r#"{"version":1,"op":"status"}"#.to_owned(),
            ),
            (
                Operation::Gc {
                    valid_container_ids: vec!["a".to_owned()],
                },
                r#"{"version":1,"op":"gc","valid_container_ids":["a"]}"#.to_owned(),
            ),
        ] {
            let request = Request::from(operation);
            assert_eq!(serde_json::to_string(&request).expect("JSON"), text);
            let read: Request = serde_json::from_str(&text).expect(&text);
            assert_eq!(read, request);
        }
    }

    #[test]
    fn answers_are_written_as_documented_and_read_back() {
        for (answer, text) in [
            (
                Answer::Done {
                    result: Outcome::Captured,
                    reason: None,
                },
                r#"{"result":"captured"}"#,
            ),
            (
                Answer::Done {
                    result: Outcome::Skipped,
                    reason: Some("no proxy".to_owned()),
                },
                r#"{"result":"skipped","reason":"no proxy"}"#,
            ),
            (
                Answer::Failed {
                    error: "no cgroup".to_owned(),
                    retry: true,
                },
                r#"{"error":"no cgroup","retry":true}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&answer).expect("JSON"), text);
            let read: Answer = serde_json::from_str(text).expect(text);
            assert_eq!(read, answer);
        }
    }

    #[test]
    fn what_is_not_in_the_contract_is_refused_by_name() {
        for (text, named) in [
            (r#"{"op":"status"}"#, "version: missing"),
            (r#"{"version":2,"op":"status"}"#, "version: 2"),
            (r#"{"version":"1","op":"status"}"#, "version: \"1\""),
            (r#"{"version":1}"#, "op"),
            (r#"{"version":1,"op":"stop"}"#, "stop"),
            (r#"{"version":1,"op":"status","extra":1}"#, "extra"),
            (
                r#"{"version":1,"op":"add","container_id":"c","netns":"/n"}"#,
                "pod",
            ),
            (
                r#"{"version":1,"op":"del","container_id":"c","pod":{"namespace":"a","name":"b"},"ip":1}"#,
                "ip",
            ),
            (
                r#"{"version":1,"op":"del","container_id":"c","pod":{"namespace":"a","name":"b","node":"n"}}"#,
                "node",
            ),
            ("[]", "map"),
        ] {
            let error = serde_json::from_str::<Request>(text).expect_err(text);
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
    }
}
