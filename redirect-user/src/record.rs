//! The loader's notes about an attached pod.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use redirect_common::record::{RECORD_BYTES, Record};
use serde::{Deserialize, Serialize};

use crate::options::Policy;
use crate::proxy::ProxyIdentity;
use crate::tables::Tables;
use crate::tproxy::Change;

/// What is written down when a pod is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// Version of redirect that wrote it.
    pub version: String,
    /// [`build_id`](crate::programs::build_id) of the programs that are attached.
    pub build: u64,
    /// `POLICY_LAYOUT_VERSION` of the maps that they go by.
    #[serde(default = "first_layout")]
    pub layout: u32,
    /// Connections counted in maps of other layouts, by number of the rule.
    #[serde(default)]
    pub counted_before: Vec<u64>,
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// Path the network namespace was opened by; it may have gone since.
    pub netns: String,
    /// Network namespace cookie.
    pub netns_cookie: u64,
    /// Network namespace inode.
    pub netns_inode: u64,
    /// Whether IPv6 is captured.
    pub ipv6: bool,
    /// The `redirect run` that removes it again; None if it was attached for good.
    #[serde(default)]
    pub run_by: Option<i32>,
    /// What was made in the network namespace, or was about to be, and is to be taken back.
    #[serde(default)]
    pub changes: Vec<Change>,
    /// The Kubernetes pod, if the node's daemon attached it; None if somebody else did.
    #[serde(default)]
    pub pod: Option<KubernetesPod>,
    /// What is captured.
    pub policy: Policy,
    /// Who is the proxy.
    #[serde(default)]
    pub proxy: ProxyIdentity,
}

/// Of notes that do not tell.
const fn first_layout() -> u32 {
    1
}

/// A pod of Kubernetes that the node's daemon has attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesPod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name in it.
    pub name: String,
    /// UID, as the API tells it.
    pub uid: String,
    /// Id of the sandbox that the CNI plugin told of; None if it did not.
    #[serde(default)]
    pub sandbox: Option<String>,
}

impl Notes {
    /// Reads the notes on a cgroup. None if there are none, and, with a warning, if they are corrupt.
    pub fn read(tables: &Tables, cgroup_id: u64) -> Result<Option<Self>> {
        let Some(record) = tables.records.get(&cgroup_id).context("reading RECORDS")? else {
            return Ok(None);
        };
        let notes = Self::decode(cgroup_id, &record);
        Ok(notes.inspect_err(|error| tracing::warn!("{error:#}")).ok())
    }

    fn decode(cgroup_id: u64, record: &Record) -> Result<Self> {
        let json = record.json.get(..record.length as usize).with_context(|| {
            format!(
                "record of cgroup {cgroup_id}: length {} is too large",
                record.length
            )
        })?;
        serde_json::from_slice(json)
            .with_context(|| format!("record of cgroup {cgroup_id} is corrupt"))
    }

    /// These notes, with more to be taken back.
    #[must_use]
    pub fn with_also(&self, changes: &[Change]) -> Self {
        let mut notes = self.clone();
        notes.changes.extend_from_slice(changes);
        notes
    }

    /// As stored. An error if it does not fit.
    pub fn encode(&self) -> Result<Record> {
        let json = serde_json::to_vec(self)?;
        ensure!(
            json.len() <= RECORD_BYTES,
            "the policy is too long: it takes {} bytes to write down, allowed are {RECORD_BYTES}",
            json.len()
        );
        let mut record = Record::zeroed();
        record.length = json.len() as u32;
        record.json[..json.len()].copy_from_slice(&json);
        Ok(record)
    }
}

/// The notes on every attached pod, by cgroup id. A corrupt record is passed over with a warning.
pub fn all(tables: &Tables) -> Result<Vec<(u64, Notes)>> {
    let mut all = Vec::new();
    for cgroup_id in tables.records.keys().context("reading RECORDS")? {
        all.extend(Notes::read(tables, cgroup_id)?.map(|notes| (cgroup_id, notes)));
    }
    Ok(all)
}
