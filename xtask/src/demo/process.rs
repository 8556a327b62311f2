//! A process that runs beside the demo, its output kept line by line.

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};

pub struct Running {
    name: String,
    child: Child,
    output: Lines,
    errors: Lines,
}

impl Running {
    pub fn start(name: &str, command: &mut Command) -> Result<Self> {
        let command = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let output = Lines::collect(child.stdout.take());
        let errors = Lines::collect(child.stderr.take());
        Ok(Self {
            name: name.to_owned(),
            child,
            output,
            errors,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn lines(&self) -> Vec<String> {
        self.output.so_far()
    }

    /// What it last said on stderr, for an error about it.
    pub fn complaint(&self) -> String {
        let lines = self.errors.so_far();
        format!(
            "{} says: {}",
            self.name,
            lines[lines.len().saturating_sub(8)..].join("\n  ")
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Drained by a thread: a process whose pipe is full stands still.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn collect(source: Option<impl Read + Send + 'static>) -> Self {
        let lines = Self::default();
        let kept = lines.clone();
        if let Some(source) = source {
            thread::spawn(move || {
                for line in BufReader::new(source).lines().map_while(Result::ok) {
                    kept.0
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(line);
                }
            });
        }
        lines
    }

    fn so_far(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// The program itself where every user can execute it, else a copy in `shared`.
pub fn reachable_by_all(program: &Path, shared: &Path) -> Result<PathBuf> {
    let program = program
        .canonicalize()
        .with_context(|| format!("no program at {}", program.display()))?;
    // Directories need search permission, the program read and execute.
    let open_to_all = |path: &Path, bits: u32| {
        fs::metadata(path).is_ok_and(|m| m.permissions().mode() & bits == bits)
    };
    if open_to_all(&program, 0o005)
        && program
            .ancestors()
            .skip(1)
            .all(|folder| open_to_all(folder, 0o001))
    {
        return Ok(program);
    }
    let copy = shared.join(program.file_name().context("a program without a name")?);
    fs::copy(&program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}
