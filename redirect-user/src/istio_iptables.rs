//! In the place of istio-iptables: captures the pod that this process runs in, as an init container does.

mod transcript;
pub mod validation;

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::attach::{self, Request, captures_ipv6};
use crate::detach;
use crate::kernel::{self, Task};
use crate::observe::cgroup::Cgroup;
use crate::observe::netns::NetworkNamespace;
use crate::observe::pod_cgroup;
use crate::options::{Change, IstioIptables, Policy};
use crate::output::say;
use crate::proxy::ProxyIdentity;
use crate::{passthrough, pins};

/// Does what was asked for. A failed validation is a [`validation::Failed`].
pub fn run(call: IstioIptables) -> Result<()> {
    if let Some(dry_run) = &call.dry_run {
        let text = transcript::of(&call)?;
        say(text.trim_end())?;
        if let Some(path) = &dry_run.transcript {
            fs::write(path, text)
                .with_context(|| format!("DRY_RUN_FILE_PATH: writing {}", path.display()))?;
        }
        return Ok(());
    }
    match call.change {
        Change::Attach => attach_own(call.policy.clone())?,
        Change::Detach => detach_own()?,
        Change::None => {}
    }
    match call.validation {
        Some(validation) => validation::run(&call.policy, &own_namespace()?, validation),
        None => Ok(()),
    }
}

fn attach_own(policy: Policy) -> Result<()> {
    kernel::require(Task::OwnPod)?;
    pins::require_bpffs()?;
    let (netns, cgroup) = (own_namespace()?, own_pod()?);
    if captures_ipv6(&policy, &netns)? {
        passthrough::add(&netns)?;
    }
    let name = cgroup.path().display().to_string();
    let outcome = attach::attach(&Request {
        cgroup,
        proxy_cgroup: None,
        netns,
        run_by: None,
        pod: None,
        policy,
        proxy: ProxyIdentity::Uid,
    })?;
    say(format_args!("{} {name}", outcome.label()))?;
    Ok(())
}

fn detach_own() -> Result<()> {
    kernel::require(Task::OwnPod)?;
    pins::require_bpffs()?;
    let (netns, cgroup) = (own_namespace()?, own_pod()?);
    let was = detach::detach(cgroup.id())?;
    passthrough::remove(&netns)?;
    let what = if was { "detached" } else { "not attached" };
    say(format_args!("{what} {}", cgroup.path().display()))?;
    Ok(())
}

fn own_namespace() -> Result<NetworkNamespace> {
    let netns = NetworkNamespace::own()?;
    ensure!(
        !netns.is_initial()?,
        "this process is in the host's own network namespace (hostNetwork): allowed are those of pods"
    );
    Ok(netns)
}

fn own_pod() -> Result<Cgroup> {
    Ok(Cgroup::open(&pod_cgroup::find()?)?)
}
