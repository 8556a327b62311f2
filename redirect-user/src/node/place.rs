//! Attaching and detaching one pod, wherever on the node it is.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::attach::{self, Outcome, Request, captures_ipv6};
use crate::observe::cgroup::Cgroup;
use crate::observe::netns::NetworkNamespace;
use crate::observe::{containers, mounts, node_pods};
use crate::options::Policy;
use crate::passthrough;
use crate::proxy::{ProxyContainer, ProxyIdentity};
use crate::record::{KubernetesPod, Notes};

/// Where a pod is, as far as somebody has told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Its network namespace.
    pub netns: Option<PathBuf>,
    /// Its cgroup, below the mount point of cgroup2.
    pub cgroup: Option<String>,
}

/// Who is to be the proxy of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proxy {
    /// Whoever has its ids.
    Ids,
    /// Whoever is in its container, which runs with this id; None while that is not known.
    Container(Option<String>),
    /// Whoever it was.
    AsBefore(ProxyIdentity),
}

/// What came of an attempt.
#[derive(Debug)]
pub enum Attempt {
    /// Its traffic is captured.
    Done(Outcome),
    /// It has not got so far: what is missing.
    NotYet(&'static str),
}

/// Attaches a pod. `found` is its cgroup if it has been looked for, `notes` are those of the last time;
/// `has_failed` says whether it then failed.
pub fn attach(
    pod: KubernetesPod,
    policy: &Policy,
    proxy: &Proxy,
    told: &Told,
    found: Option<&Path>,
    notes: Option<&Notes>,
    has_failed: bool,
) -> Result<Attempt> {
    let told_cgroup = told.cgroup.as_deref().map(below_mountpoint).transpose()?;
    let Some(path) = told_cgroup
        .as_deref()
        .filter(|path| path.is_dir())
        .or(found)
    else {
        return Ok(Attempt::NotYet("kubelet has not made its cgroup"));
    };
    let cgroup = Cgroup::open(path)?;
    let Some(netns) = namespace(&cgroup, told.netns.as_deref(), notes)? else {
        return Ok(Attempt::NotYet("no process of it runs"));
    };
    ensure!(
        !netns.is_host()?,
        "{netns}: this is the host's own network namespace; allowed are those of pods"
    );
    if captures_ipv6(policy, &netns)? {
        passthrough::add(&netns)?;
    }
    let proxy = match proxy {
        Proxy::Ids => ProxyIdentity::Uid,
        Proxy::Container(id) => ProxyIdentity::Container {
            container: match id {
                Some(id) => container(&cgroup, id)?,
                None => None,
            },
        },
        Proxy::AsBefore(identity) => identity.clone(),
    };
    let request = Request {
        cgroup,
        proxy_cgroup: None,
        netns,
        run_by: None,
        pod: Some(pod),
        policy: policy.clone(),
        proxy,
    };
    // Nearly always, and a node has many pods. An attempt that failed may have left something.
    let outcome = if !has_failed && attach::is_settled(&request)? {
        Outcome::Unchanged
    } else {
        attach::attach(&request)?
    };
    Ok(Attempt::Done(outcome))
}

/// The pod's container with that id. None if it is not found: a pod whose proxy is not known is captured all the same.
fn container(pod: &Cgroup, id: &str) -> Result<Option<ProxyContainer>> {
    let found = containers::bare_id(id).and_then(|id| containers::find(pod.path(), id));
    let Some(path) = found else {
        tracing::warn!(
            id,
            "the proxy's container has no cgroup directly below {pod}: nobody is the proxy"
        );
        return Ok(None);
    };
    let cgroup = Cgroup::open(&path)?;
    let top = mounts::node()?;
    let below = cgroup
        .path()
        .strip_prefix(top.point.canonicalize()?)
        .with_context(|| format!("cgroup {cgroup} is not below {}", top.point.display()))?;
    Ok(Some(ProxyContainer {
        id: id.to_owned(),
        cgroup_id: cgroup.id(),
        level: u16::try_from(top.level + below.components().count())?,
        cgroup: cgroup.path().to_owned(),
    }))
}

/// Whether any process of the pod lives, or may live.
pub fn is_alive(notes: &Notes) -> bool {
    match Cgroup::open(&notes.cgroup) {
        Ok(cgroup) => cgroup.is_populated().unwrap_or(true),
        Err(_) => notes.cgroup.exists(),
    }
}

/// The pods' cgroups, by uid.
pub fn cgroups() -> Result<std::collections::HashMap<String, PathBuf>> {
    Ok(node_pods::cgroups(&mounts::node()?.point))
}

/// What the CNI plugin says; else what the pod's processes say; else, while none runs, that of the last time.
fn namespace(
    cgroup: &Cgroup,
    told: Option<&Path>,
    notes: Option<&Notes>,
) -> Result<Option<NetworkNamespace>> {
    if let Some(path) = told {
        return Ok(Some(NetworkNamespace::open(path)?));
    }
    let recorded = notes.and_then(Notes::namespace);
    let Some(found) = node_pods::namespace(cgroup)? else {
        return Ok(recorded);
    };
    // Under the path it has been known by, so that nothing changes in the notes.
    Ok(Some(match recorded {
        Some(recorded) if recorded.inode() == found.inode() => recorded,
        _ => found,
    }))
}

fn below_mountpoint(cgroup: &str) -> Result<PathBuf> {
    let relative = Path::new(cgroup.trim_start_matches('/'));
    let plain = |part| matches!(part, std::path::Component::Normal(_));
    ensure!(
        !cgroup.is_empty() && relative.components().all(plain),
        "cgroup_parent: {cgroup:?} is not a cgroup: allowed are paths below the cgroup2 mount, without `..`"
    );
    let top = mounts::node().context("cgroup_parent")?;
    Ok(top.point.join(relative))
}
