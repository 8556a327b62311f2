//! What the runtime says in environment variables.

use std::path::{Path, PathBuf};

use super::error::{Code, Failure, Result};
use crate::node::api::PodName;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// A sandbox has come.
    Add,
    /// Is it as `ADD` left it?
    Check,
    /// A sandbox goes.
    Del,
    /// These sandboxes are all there are.
    Gc,
    /// Would `ADD` work?
    Status,
    /// Which versions are spoken?
    Version,
}

/// A sandbox, as far as the variables tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`, as others see it too; `DEL` may come without.
    pub netns: Option<PathBuf>,
    /// Whose it is; none if Kubernetes has no part in it.
    pub pod: Option<PodName>,
}

type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Command {
    /// `CNI_COMMAND`.
    pub fn read(environment: Environment) -> Result<Self> {
        Ok(match required(environment, "CNI_COMMAND")?.as_str() {
            "ADD" => Self::Add,
            "CHECK" => Self::Check,
            "DEL" => Self::Del,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => {
                return Err(wrong(
                    "CNI_COMMAND",
                    other,
                    "ADD, CHECK, DEL, GC, STATUS and VERSION",
                ));
            }
        })
    }
}

impl Attachment {
    /// Reads what `command`, one of `ADD`, `CHECK` and `DEL`, has to come with.
    pub fn read(command: Command, environment: Environment) -> Result<Self> {
        let container_id = required(environment, "CNI_CONTAINERID")?;
        if !is_container_id(&container_id) {
            return Err(wrong(
                "CNI_CONTAINERID",
                &container_id,
                "letters, digits, '_', '.' and '-', a letter or digit first",
            ));
        }
        required(environment, "CNI_IFNAME")?;
        let netns = match command {
            Command::Del => environment("CNI_NETNS").filter(|path| !path.is_empty()),
            _ => Some(required(environment, "CNI_NETNS")?),
        };
        Ok(Self {
            container_id,
            netns: netns.map(|path| without_links(Path::new(&path))),
            pod: pod(&environment("CNI_ARGS").unwrap_or_default())?,
        })
    }
}

/// The pod that `CNI_ARGS` names. Arguments for other plugins are none of our business, with `IgnoreUnknown` and without.
fn pod(arguments: &str) -> Result<Option<PodName>> {
    let (mut namespace, mut name, mut uid) = (None, None, None);
    for pair in arguments.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(wrong("CNI_ARGS", pair, "KEY=VALUE, separated by ';'"));
        };
        let field = match key {
            "K8S_POD_NAMESPACE" => &mut namespace,
            "K8S_POD_NAME" => &mut name,
            "K8S_POD_UID" => &mut uid,
            _ => continue,
        };
        *field = Some(value.to_owned()).filter(|value| !value.is_empty());
    }
    match (namespace, name) {
        (_, None) => Ok(None),
        (None, Some(name)) => Err(Failure::new(
            Code::Environment,
            format!("CNI_ARGS: K8S_POD_NAME={name:?} without K8S_POD_NAMESPACE: both are needed"),
        )),
        (Some(namespace), Some(name)) => Ok(Some(PodName {
            namespace,
            name,
            uid,
        })),
    }
}

/// The specification's rule for it.
fn is_container_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// `/var/run` is a link to `/run` on the host, and need not be one where the daemon looks. The last part stays: in
/// `/proc/PID/ns/net` it is a link that leads nowhere by name.
fn without_links(path: &Path) -> PathBuf {
    let whole = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    whole().unwrap_or_else(|| path.to_owned())
}

fn required(environment: Environment, name: &str) -> Result<String> {
    environment(name)
        .filter(|value| !value.is_empty())
        .ok_or_else(|| {
            Failure::new(
                Code::Environment,
                format!("{name}: missing: the container runtime has to set it"),
            )
        })
}

fn wrong(name: &str, value: &str, allowed: &str) -> Failure {
    Failure::new(
        Code::Environment,
        format!("{name}: {value:?}: allowed are {allowed}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(command: Command, variables: &[(&str, &str)]) -> Result<Attachment> {
        Attachment::read(command, &|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const NAMES: (&str, &str) = ("CNI_CONTAINERID", "c-1");
    const NETNS: (&str, &str) = ("CNI_NETNS", "/proc/self/ns/net");
    const IFNAME: (&str, &str) = ("CNI_IFNAME", "eth0");

    #[test]
    fn pod_is_read_from_arguments_among_others() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u-1";
        let found = pod(text).expect("valid").expect("a pod");
        assert_eq!(
            (found.namespace, found.name, found.uid),
            (
                "shop".to_owned(),
                "cart-0".to_owned(),
                Some("u-1".to_owned())
            )
        );
        for none in ["", "IgnoreUnknown=1", "K8S_POD_NAME=;K8S_POD_NAMESPACE=a"] {
            assert_eq!(pod(none).expect("valid"), None, "{none}");
        }
        for bad in ["K8S_POD_NAME", "K8S_POD_NAME=a\nb"] {
            let error = pod(bad).expect_err(bad);
            assert_eq!(error.code, Code::Environment);
            assert_eq!(error.message.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn each_missing_or_wrong_variable_is_named() {
        assert!(read(Command::Add, &[NAMES, NETNS, IFNAME]).is_ok());
        for (variables, named) in [
            (&[NETNS, IFNAME][..], "CNI_CONTAINERID: missing"),
            (&[NAMES, IFNAME], "CNI_NETNS: missing"),
            (&[NAMES, NETNS], "CNI_IFNAME: missing"),
            (
                &[("CNI_CONTAINERID", "../etc"), NETNS, IFNAME],
                "CNI_CONTAINERID: \"../etc\"",
            ),
        ] {
            let error = read(Command::Add, variables).expect_err(named);
            assert_eq!(error.code, Code::Environment);
            assert!(error.message.starts_with(named), "{error}");
        }
        let gone = read(Command::Del, &[NAMES, IFNAME]).expect("DEL does without");
        assert_eq!(gone.netns, None);
    }

    #[test]
    fn links_on_the_way_to_a_namespace_are_followed_and_the_last_is_kept() {
        let found = without_links(Path::new("/proc/self/ns/net"));
        assert_eq!(
            found,
            Path::new(&format!("/proc/{}/ns/net", std::process::id()))
        );
        let missing = Path::new("/no/such/path");
        assert_eq!(without_links(missing), missing);
    }
}
