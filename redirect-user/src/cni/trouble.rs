//! Pods that started uncaptured: told, and counted beside the daemon's socket where the daemon can read it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::config::Config;
use super::error::Failure;
use crate::node::api::PodName;

/// How long the log may become, in bytes; then it starts anew, and the old one is kept once.
const LOG_LIMIT: u64 = 1 << 20;

/// How many pods this node has started uncaptured (`failOpen`) since it booted, for a daemon that listens at `socket`.
pub fn failed_open(socket: &Path) -> io::Result<u64> {
    match fs::read_to_string(counter(socket)) {
        Ok(text) => text.trim().parse().map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Notes one more. The pod starts even if that fails.
pub fn note(config: &Config, pod: &PodName, why: &Failure) {
    let text = format!(
        "pod {}/{} starts uncaptured, as failOpen says: {why}",
        pod.namespace, pod.name
    );
    tracing::warn!("{text}");
    if let Err(error) = count(&config.socket) {
        tracing::warn!("{}: {error}", counter(&config.socket).display());
    }
    if let Some(path) = &config.log_file
        && let Err(error) = log(path, &text)
    {
        tracing::warn!("logFile: {}: {error}", path.display());
    }
}

fn counter(socket: &Path) -> PathBuf {
    socket.with_file_name("failed-open")
}

fn count(socket: &Path) -> io::Result<()> {
    let path = counter(socket);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.lock()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // A file cut short by a full disk counts anew.
    let count: u64 = text.trim().parse().unwrap_or(0);
    file.rewind()?;
    writeln!(file, "{}", count + 1)
}

fn log(path: &Path, text: &str) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > LOG_LIMIT) {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        fs::rename(path, old)?;
    }
    let mut file: File = OpenOptions::new().append(true).create(true).open(path)?;
    let now = humantime::format_rfc3339_seconds(SystemTime::now());
    file.write_all(format!("{now} {text}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_counted_by_several_at_once() {
        let directory = std::env::temp_dir().join(format!("rd-count-{}", std::process::id()));
        let socket = directory.join("daemon.sock");
        assert_eq!(failed_open(&socket).expect("none yet"), 0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..25).for_each(|_| count(&socket).expect("counted")));
            }
        });
        assert_eq!(failed_open(&socket).expect("a number"), 100);
        fs::remove_dir_all(directory).expect("removed");
    }
}
