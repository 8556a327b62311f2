//! One question to the node's daemon.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::error::{Code, Failure, Result};
use crate::node::api::{Answer, MAX_LINE, Operation, Outcome, Request};
use crate::node::decision::is_read;

/// Asks, and waits for the answer for at most `timeout` in all. An error of the daemon is a [`Failure`] too.
pub fn ask(
    path: &Path,
    operation: Operation,
    timeout: Duration,
) -> Result<(Outcome, Option<String>)> {
    let away = |what: String| {
        Failure::new(
            Code::TryAgain,
            format!("the redirect daemon at {} {what}", path.display()),
        )
    };
    let line = line_of(operation);
    if line.len() > MAX_LINE {
        return Err(Failure::new(
            Code::Config,
            format!(
                "the request for the redirect daemon has {} bytes: allowed are {MAX_LINE}",
                line.len()
            ),
        ));
    }
    let answer = exchange(path, &line, timeout).map_err(|error| {
        away(match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "does not run".to_owned(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("did not answer within {} s", timeout.as_secs())
            }
            io::ErrorKind::UnexpectedEof => "hung up without an answer".to_owned(),
            _ => format!("cannot be asked: {error}"),
        })
    })?;
    match serde_json::from_slice(&answer) {
        Ok(Answer::Done { result, reason }) => Ok((result, reason)),
        Ok(Answer::Failed { error, retry }) => {
            let code = if retry { Code::TryAgain } else { Code::Refused };
            Err(Failure::new(code, format!("redirect: {error}")))
        }
        Err(error) => Err(away(format!(
            "gave an answer that is not understood: {error}"
        ))),
    }
}

/// Where all annotations are too long for one line, the longest of those go first that the daemon does not read. If the
/// others are too long by themselves, none is passed on: the daemon would take what is missing for what is not there.
pub fn line_of(operation: Operation) -> String {
    let mut request = Request::from(operation);
    loop {
        let mut line = serde_json::to_string(&request).unwrap_or_default();
        line.push('\n');
        let (Operation::Add(sandbox) | Operation::Check(sandbox)) = &mut request.operation else {
            return line;
        };
        let (true, Some(annotations)) = (line.len() > MAX_LINE, &mut sandbox.annotations) else {
            return line;
        };
        let unread = annotations.iter().filter(|(key, _)| !is_read(key));
        let longest = unread.max_by_key(|(key, value)| key.len() + value.len());
        if let Some(longest) = longest.map(|(key, _)| key.clone()) {
            tracing::warn!("annotation {longest} is not passed on: all together are too long");
            annotations.remove(&longest);
        } else {
            tracing::warn!("no annotation is passed on: all together are too long");
            sandbox.annotations = None;
        }
    }
}

fn exchange(path: &Path, line: &str, timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let mut stream = open(path, timeout)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(line.as_bytes())?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        // Per read: a daemon that sends a byte now and then must not hold the pod up for ever.
        stream.set_read_timeout(Some(left(deadline)?))?;
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        answer.extend_from_slice(&buffer[..length]);
        if let Some(end) = answer.iter().position(|byte| *byte == b'\n') {
            answer.truncate(end);
            return Ok(answer);
        }
        if answer.len() >= MAX_LINE {
            return Err(io::Error::other("its answer does not end"));
        }
    }
}

/// The send timeout bounds connect(2) too, which waits while the daemon's queue is full.
fn open(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let limit = TimeVal::new(timeout.as_secs() as i64, timeout.subsec_micros().into());
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::api::{PodName, Sandbox};

    fn add(annotations: &[(&str, usize)]) -> Operation {
        let pod = PodName {
            namespace: "a".to_owned(),
            name: "b".to_owned(),
            uid: None,
        };
        let annotations = annotations.iter();
        Operation::Add(Sandbox {
            container_id: "c".to_owned(),
            netns: "/n".into(),
            pod,
            cgroup_parent: None,
            annotations: Some(
                annotations
                    .map(|(key, length)| ((*key).to_owned(), "x".repeat(*length)))
                    .collect(),
            ),
            labels: None,
        })
    }

    #[test]
    fn longest_annotations_are_left_out_until_the_line_fits() {
        let line = line_of(add(&[("big", 60_000), ("bigger", 200_000), ("small", 9)]));
        assert!(line.len() <= MAX_LINE);
        assert!(line.contains("\"big\"") && line.contains("\"small\""));
        assert!(!line.contains("\"bigger\""));
        let line = line_of(add(&[("big", 60_000), ("small", 9)]));
        assert!(line.contains("\"big\"") && line.ends_with("}\n"));
        // What the daemon reads is passed on whole, or not at all.
        let (status, ports) = (
            "sidecar.istio.io/status",
            "traffic.sidecar.istio.io/includeInboundPorts",
        );
        let line = line_of(add(&[("big", 9_000), (status, 60_000), (ports, 9)]));
        assert!(line.len() <= MAX_LINE && !line.contains("\"big\""));
        assert!(line.contains(status) && line.contains(ports));
        let line = line_of(add(&[(status, 60_000), (ports, 9_000)]));
        assert!(!line.contains("annotations"), "{line}");
    }
}
