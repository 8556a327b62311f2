//! The loader's notes about an attached pod.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use bytemuck::Zeroable;
use redirect_common::record::{RECORD_BYTES, Record};
use serde::{Deserialize, Serialize};

use crate::observe::netns::NetworkNamespace;
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
    /// [`routes_digest`](crate::settings::routes_digest) of what was written to `ROUTES`.
    #[serde(default)]
    pub routes: u64,
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
        let notes = Self::decode(&record)
            .with_context(|| {
                format!(
                    "the notes on cgroup {cgroup_id} in RECORDS are corrupt: what detaching would undo in its network namespace is known again once the pod is attached again"
                )
            });
        Ok(notes.inspect_err(|error| tracing::warn!("{error:#}")).ok())
    }

    fn decode(record: &Record) -> Result<Self> {
        let json = record
            .json
            .get(..record.length as usize)
            .with_context(|| format!("length {} is too large", record.length))?;
        Ok(serde_json::from_slice(json)?)
    }

    /// The network namespace by the path that it was attached with, if that still means the same. Inodes are used again,
    /// cookies are not.
    #[must_use]
    pub fn namespace(&self) -> Option<NetworkNamespace> {
        NetworkNamespace::open(self.netns.as_ref())
            .ok()
            .filter(|netns| self.is_of(netns))
    }

    /// Whether they are about that network namespace.
    #[must_use]
    pub fn is_of(&self, netns: &NetworkNamespace) -> bool {
        netns.inode() == self.netns_inode && netns.cookie().ok() == Some(self.netns_cookie)
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

#[cfg(test)]
mod fuzz {
    use ipnet::IpNet;
    use prop::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{bytes, config, edits, text};
    use crate::options::{IdRange, PortRange};
    use crate::proxy::ProxyContainer;

    fn notes() -> impl Strategy<Value = Notes> {
        let change = prop_oneof![
            any::<(bool, u32, u32)>().prop_map(|(ipv6, mark, table)| Change::Rule {
                ipv6,
                mark,
                table
            }),
            any::<(bool, u32)>().prop_map(|(ipv6, table)| Change::Route { ipv6, table }),
            (text(), text()).prop_map(|(path, before)| Change::Sysctl { path, before }),
        ];
        let nets = vec((any::<[u8; 16]>(), 0..=128_u8), 0..5);
        let ports = vec(any::<(u16, u16)>(), 0..5);
        let ids = vec(any::<(u32, u32)>(), 0..5);
        let texts = (text(), text(), text(), prop::option::of(text()));
        (
            texts,
            vec(change, 0..4),
            nets,
            ports,
            ids,
            any::<(u64, bool)>(),
        )
            .prop_map(
                |((a, b, c, sandbox), changes, nets, ports, ids, (number, flag))| {
                    let nets = nets
                        .into_iter()
                        .filter_map(|(ip, bits)| IpNet::new(ip.into(), bits).ok());
                    let ports = ports
                        .into_iter()
                        .map(|(first, last)| PortRange { first, last });
                    let ids = ids.into_iter().map(|(first, last)| IdRange { first, last });
                    let container = ProxyContainer {
                        id: c.clone(),
                        cgroup: a.clone().into(),
                        cgroup_id: number,
                        level: number as u16,
                    };
                    Notes {
                        version: a.clone(),
                        build: number,
                        layout: number as u32,
                        counted_before: vec![number; usize::from(flag)],
                        cgroup: b.clone().into(),
                        netns: c.clone(),
                        netns_cookie: number,
                        netns_inode: !number,
                        routes: number.rotate_left(7),
                        ipv6: flag,
                        run_by: flag.then_some(number as i32),
                        changes,
                        pod: flag.then_some(KubernetesPod {
                            namespace: a,
                            name: b,
                            uid: c,
                            sandbox,
                        }),
                        policy: Policy {
                            exclude_outbound_cidrs: nets.collect(),
                            exclude_inbound_ports: ports.collect(),
                            owner_groups_exclude: ids.collect(),
                            ..Policy::default()
                        },
                        proxy: ProxyIdentity::Container {
                            container: flag.then_some(container),
                        },
                    }
                },
            )
    }

    proptest! {
        #![proptest_config(config(4))]

        #[test]
        fn any_notes_are_read_as_they_were_written(notes in notes()) {
            let record = notes.encode().expect("short enough");
            prop_assert_eq!(Notes::decode(&record).expect("notes"), notes);
        }

        #[test]
        fn any_record_is_read_or_refused(notes in notes(), edits in edits(), length in prop::option::of(any::<u32>()), bytes in bytes()) {
            let whole = serde_json::to_string(&notes).expect("JSON");
            for json in [edits.of(&whole).as_bytes(), &bytes[..]] {
                let mut record = Record::zeroed();
                let used = json.len().min(RECORD_BYTES);
                record.json[..used].copy_from_slice(&json[..used]);
                record.length = length.unwrap_or(used as u32);
                // What can be read can be shown and stored again, whatever a later version has left out.
                if let Ok(read) = Notes::decode(&record) {
                    let _shown = (read.policy.to_string(), read.policy.digest());
                    prop_assert_eq!(Notes::decode(&read.encode().expect("no longer")).expect("notes"), read);
                }
            }
        }
    }
}
