//! How the proxy is told from everybody else in its pod.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What makes a connection the proxy's. In either case it is about who created the socket, not about who
/// connects it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum ProxyIdentity {
    /// Its user or group is one of the policy's (`-u`, `-g`).
    #[default]
    Uid,
    /// Its container is the proxy's, whatever its user and group.
    Container {
        /// None while it is not known: nobody is the proxy then.
        container: Option<ProxyContainer>,
    },
}

/// The container that the proxy runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyContainer {
    /// Its id, as the pod's status has it: `containerd://…`.
    pub id: String,
    /// Its cgroup's directory.
    pub cgroup: PathBuf,
    /// That cgroup's id.
    pub cgroup_id: u64,
    /// How many cgroups that one has above it, the root among them.
    pub level: u16,
}

impl ProxyIdentity {
    /// False while the proxy's container is not known.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        !matches!(self, Self::Container { container: None })
    }
}
