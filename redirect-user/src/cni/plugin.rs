//! One call of the plugin.

use std::io::Read;

use serde_json::json;

use super::call::{Attachment, Command};
use super::config::{Config, Version, version_asked_for};
use super::error::{Code, Failure, Result};
use super::{NAME, daemon, result, trouble};
use crate::node::api::{Gone, Operation, Outcome, PodName, Sandbox};
use crate::observe::netns::NetworkNamespace;

/// More than any runtime writes: annotations come to 256 KiB at most.
const MAX_INPUT: u64 = 4 << 20;

/// Does what the environment and standard input say. What is returned belongs on standard output; in the error case it is the error.
pub fn run(
    environment: &dyn Fn(&str) -> Option<String>,
    input: &mut dyn Read,
) -> std::result::Result<String, String> {
    let text = read(input);
    let version = text.as_ref().ok().and_then(|text| version_asked_for(text));
    Command::read(environment)
        .and_then(|command| execute(command, environment, &text?))
        .map_err(|failure| failure.to_json(version.as_deref().unwrap_or(Version::NEWEST.as_str())))
}

fn read(input: &mut dyn Read) -> Result<String> {
    let mut text = String::new();
    let length = input
        .take(MAX_INPUT + 1)
        .read_to_string(&mut text)
        .map_err(|error| Failure::new(Code::Io, format!("standard input: {error}")))?;
    if length as u64 > MAX_INPUT {
        return Err(Failure::new(
            Code::Undecodable,
            format!("standard input: more than {MAX_INPUT} bytes"),
        ));
    }
    Ok(text)
}

fn execute(
    command: Command,
    environment: &dyn Fn(&str) -> Option<String>,
    text: &str,
) -> Result<String> {
    match command {
        Command::Version => Ok(versions(text)),
        Command::Add => add(&Config::parse(text)?, environment),
        Command::Check => check(&Config::parse(text)?, environment),
        Command::Del => del(Config::parse(text), environment),
        Command::Status => status(&Config::parse(text)?),
        Command::Gc => gc(Config::parse(text)?),
    }
}

fn versions(text: &str) -> String {
    let version = version_asked_for(text);
    json!({
        "cniVersion": version.as_deref().unwrap_or(Version::NEWEST.as_str()),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
    .to_string()
}

fn add(config: &Config, environment: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let attachment = Attachment::read(Command::Add, environment)?;
    let echo = result::echo(config.previous.as_deref(), config.version)?;
    let Some(sandbox) = sandbox(config, attachment)? else {
        return Ok(echo);
    };
    let pod = sandbox.pod.clone();
    match ask(
        config,
        Operation::Add(sandbox),
        &[Outcome::Captured, Outcome::Skipped],
    ) {
        Err(failure) if config.fail_open => trouble::note(config, &pod, &failure),
        other => other?,
    }
    Ok(echo)
}

fn check(config: &Config, environment: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    since(config, Version::V0_4_0, "CHECK")?;
    let attachment = Attachment::read(Command::Check, environment)?;
    if config.previous.is_none() {
        return Err(Failure::new(
            Code::Config,
            "prevResult: missing: CHECK needs the result of ADD",
        ));
    }
    if let Some(sandbox) = sandbox(config, attachment)? {
        ask(
            config,
            Operation::Check(sandbox),
            &[Outcome::Captured, Outcome::Skipped],
        )?;
    }
    Ok(String::new())
}

/// Nothing that is wrong with this plugin, its configuration or its daemon may keep a pod from going. The daemon
/// forgets sandboxes whose network namespace has gone by itself.
fn del(config: Result<Config>, environment: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let config = match config {
        Err(failure) if failure.code == Code::Config => {
            tracing::warn!("DEL: {failure}");
            return Ok(String::new());
        }
        other => other?,
    };
    let attachment = Attachment::read(Command::Del, environment)?;
    if let Some(pod) = attachment.pod.filter(|pod| !is_left_alone(&config, pod)) {
        let operation = Operation::Del(Gone {
            container_id: attachment.container_id,
            netns: attachment.netns,
            pod,
        });
        if let Err(failure) = ask(&config, operation, &[Outcome::Ok]) {
            tracing::warn!("DEL: {failure}");
        }
    }
    Ok(String::new())
}

fn status(config: &Config) -> Result<String> {
    since(config, Version::V1_1_0, "STATUS")?;
    match ask(config, Operation::Status {}, &[Outcome::Ok]) {
        // ADD would succeed.
        Err(failure) if config.fail_open => tracing::warn!("STATUS: {failure}"),
        other => {
            other.map_err(|failure| Failure::new(Code::NotAvailable, failure.message))?;
        }
    }
    Ok(String::new())
}

fn gc(config: Config) -> Result<String> {
    since(&config, Version::V1_1_0, "GC")?;
    // Without the list, all would be forgotten.
    let Some(valid_container_ids) = config.valid_container_ids.clone() else {
        return Err(Failure::new(
            Code::Config,
            "cni.dev/valid-attachments: missing: GC needs the list of those that live",
        ));
    };
    let operation = Operation::Gc {
        valid_container_ids,
    };
    ask(&config, operation, &[Outcome::Ok])?;
    Ok(String::new())
}

fn since(config: &Config, first: Version, command: &str) -> Result<()> {
    if config.version >= first {
        return Ok(());
    }
    Err(Failure::new(
        Code::Version,
        format!(
            "cniVersion: {}: has no {command}: allowed are {first} and later",
            config.version
        ),
    ))
}

/// What the daemon is to be told; none if this pod is left alone.
fn sandbox(config: &Config, attachment: Attachment) -> Result<Option<Sandbox>> {
    let Some(pod) = attachment.pod.filter(|pod| !is_left_alone(config, pod)) else {
        return Ok(None);
    };
    let netns = attachment.netns.unwrap_or_default();
    NetworkNamespace::open(&netns)
        .map_err(|error| Failure::new(Code::Environment, format!("CNI_NETNS: {error}")))?;
    Ok(Some(Sandbox {
        container_id: attachment.container_id,
        netns,
        pod,
        cgroup_parent: config.cgroup_path.clone(),
        annotations: config.annotations.clone(),
        labels: None,
    }))
}

/// The daemon's own pod must be able to start without the daemon.
fn is_left_alone(config: &Config, pod: &PodName) -> bool {
    config.exclude_namespaces.contains(&pod.namespace)
        || config.pod_namespace.as_ref() == Some(&pod.namespace)
            && pod.name.starts_with(&config.pod_name_prefix)
}

fn ask(config: &Config, operation: Operation, allowed: &[Outcome]) -> Result<()> {
    let (outcome, reason) = daemon::ask(&config.socket, operation, config.timeout)?;
    if allowed.contains(&outcome) {
        tracing::debug!("{outcome:?} {}", reason.unwrap_or_default());
        return Ok(());
    }
    Err(Failure::new(
        Code::TryAgain,
        format!(
            "the redirect daemon at {} answered {outcome:?}: allowed are {allowed:?}; is {NAME} of another version?",
            config.socket.display()
        ),
    ))
}
