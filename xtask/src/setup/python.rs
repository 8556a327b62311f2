//! Python, for programs that come as its packages.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Result;

use super::apt;

/// One that has pip, installed if there is none.
pub fn with_pip() -> Result<PathBuf> {
    let candidates = ["python3", "/usr/bin/python3"];
    let works = |python: &&str| {
        let mut command = Command::new(python);
        command
            .args(["-m", "pip", "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if let Some(python) = candidates.iter().find(|p| works(p)) {
        return Ok(PathBuf::from(python));
    }
    apt::install(&["python3", "python3-pip"])?;
    Ok(PathBuf::from("/usr/bin/python3"))
}
