//! How long it takes until a pod's traffic is captured, against loading Istio's rules into it.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::Kind;
use super::pod::{Attached, Cgroup, Namespace, apply_rules, has_restore, join};
use super::report::{quantile, sorted};

/// As a busy node has them.
const PODS: usize = 30;

/// Times of one kind of call, as whole processes.
#[derive(Serialize)]
pub struct Times {
    what: String,
    median_ms: f64,
    quartiles_ms: [f64; 2],
    calls: usize,
}

/// Attaches one pod after the other. The first also loads the programs that all share, unless
/// something is attached on this machine already.
pub fn measure(cgroup2: &Path, redirect: &Path, kinds: &[Kind]) -> Result<Vec<Times>> {
    let mut pods = Vec::new();
    for number in 0..PODS {
        let name = format!("redirect-bench-{}-{number}", std::process::id());
        let namespace = Namespace::create(name.clone())?;
        let peer = Namespace::create(format!("{name}-peer"))?;
        join(&namespace, &peer)?;
        pods.push((Cgroup::create(cgroup2.join(&name))?, namespace, peer));
    }
    let mut attached = Vec::new();
    let mut milliseconds = Vec::new();
    for (cgroup, namespace, _) in &pods {
        let begin = Instant::now();
        attached.push(Attached::attach(redirect, cgroup, namespace)?);
        milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let further = milliseconds.split_off(1);
    let mut times = vec![
        times("redirect attach, first pod", milliseconds),
        times("redirect attach, further pod", further),
    ];
    drop(attached);
    for kind in kinds.iter().copied() {
        if matches!(kind, Kind::IptablesNft | Kind::IptablesLegacy) && has_restore(kind) {
            let mut milliseconds = Vec::new();
            for (_, namespace, _) in &pods {
                let begin = Instant::now();
                apply_rules(kind, namespace)?;
                milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            times.push(self::times(
                &format!("{}-restore, Istio's rules", kind.name()),
                milliseconds,
            ));
        }
    }
    Ok(times)
}

fn times(what: &str, milliseconds: Vec<f64>) -> Times {
    let calls = milliseconds.len();
    let sorted = sorted(milliseconds);
    Times {
        what: what.to_owned(),
        median_ms: quantile(&sorted, 0.5),
        quartiles_ms: [0.25, 0.75].map(|part| quantile(&sorted, part)),
        calls,
    }
}

/// Prints what [`measure`] found.
pub fn print(times: &[Times]) {
    for row in times {
        let [low, high] = row.quartiles_ms;
        anstream::println!(
            "{:<36} {:>8.1} ms   quartiles {low:.1}-{high:.1}, {} calls",
            row.what,
            row.median_ms,
            row.calls
        );
    }
}
