//! Making the events of the schedule happen, and writing them into the pod's history.

use std::{
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use super::{
    cast::Cast,
    draw::Kind,
    history::{Outage, State},
    policy::POLICIES,
};
use crate::{
    loader::{OtherBuild, attach_by, finish, redirect},
    namespace::errors,
    options::Options,
    play::now,
};

/// Lets it happen. What should have worked and did not is an error.
pub fn happen(
    cast: &mut Cast,
    kind: Kind,
    other: &OtherBuild,
    distortion: fn(Options) -> Options,
) -> Result<(), String> {
    match kind {
        Kind::Attach {
            policy,
            other_build,
            killed_us,
        } => {
            let is = cast
                .history
                .current()
                .iter()
                .rev()
                .find_map(|state| match state {
                    State::Attached { policy, .. } => Some(*policy),
                    State::Detached => None,
                });
            let policy = policy.or(is).unwrap_or(0);
            let options = distortion(POLICIES[policy].options);
            let by = if other_build {
                other.redirect()
            } else {
                redirect()
            };
            let mut command = attach_by(by, &cast.pod);
            command
                .args(options.arguments())
                .envs(options.environment());
            let state = cast.history.attaching(policy);
            if run(&mut command, killed_us)? {
                cast.history.done(state);
                cast.other_build = other_build;
            }
        }
        Kind::Detach { killed_us } => {
            let mut command = redirect();
            command
                .arg("detach")
                .arg("--cgroup")
                .arg(cast.pod.cgroup.path());
            let attached = cast.history.current() != [State::Detached];
            cast.history.detaching();
            if !attached {
                // It says that there was nothing to detach.
                finish(&mut command);
                cast.history.done(State::Detached);
            } else if run(&mut command, killed_us)? {
                cast.history.done(State::Detached);
            }
        }
        Kind::Restart { gap_ms } => {
            let begun = now();
            cast.kill_proxies();
            thread::sleep(Duration::from_millis(gap_ms));
            cast.start_proxy();
            cast.history.outage(begun, Outage::Killed);
        }
        Kind::Handover => cast.hand_over(),
        Kind::Retire => cast.retire(),
    }
    Ok(())
}

/// Runs to the end, or until it is killed; tells whether it came to its end.
fn run(command: &mut Command, killed_us: Option<u64>) -> Result<bool, String> {
    let Some(killed_us) = killed_us else {
        let output = finish(command);
        return if output.status.success() {
            Ok(true)
        } else {
            Err(format!("{command:?}: {}", errors(&output)))
        };
    };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_micros(killed_us));
    child.kill().unwrap();
    let status = child.wait().unwrap();
    match status.code() {
        Some(0) => Ok(true),
        Some(_) => Err(format!("{command:?}: {status}")),
        None => Ok(false),
    }
}
