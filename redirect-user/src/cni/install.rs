//! Puts the plugin into a node's CNI directories, keeps it there, and takes it out again.
//!
//! The program comes before the configuration that names it and goes after it: a runtime that finds an entry without its
//! program can neither start nor remove pods.

mod files;
pub(super) mod list;
mod watch;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use self::list::{Rest, Unfit};
use super::NAME;
use super::config::{ANNOTATIONS, CGROUP_PATH};

pub use watch::keep;

/// Where the plugin is to be, and what its entry says.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Network configurations: `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// Plugins: `/opt/cni/bin`.
    pub bin_dir: PathBuf,
    /// The file to be inserted into, in place of the first one.
    pub conf_name: Option<String>,
    /// The program to be installed.
    pub program: PathBuf,
    /// Fields of the entry.
    pub settings: Settings,
}

/// What the entry tells the plugin; see [`docs/kubernetes.md`](../../../docs/kubernetes.md).
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `socket`, unless it is the usual one.
    pub socket: Option<PathBuf>,
    /// `failOpen`
    pub fail_open: bool,
    /// `excludeNamespaces`, unless they are the usual ones.
    pub exclude_namespaces: Option<Vec<String>>,
    /// `podNamespace`
    pub pod_namespace: Option<String>,
}

/// What became of an installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The entry was put into this file.
    Inserted(PathBuf),
    /// Program and entry were in place.
    Unchanged(PathBuf),
    /// There is no network configuration yet that it could follow; why, in words.
    Waiting(String),
}

impl Settings {
    /// The entry, in JSON.
    fn entry(&self) -> String {
        let mut entry = json!({
            "type": NAME,
            "capabilities": { ANNOTATIONS: true, CGROUP_PATH: true },
        });
        if let Some(socket) = &self.socket {
            entry["socket"] = json!(socket);
        }
        if self.fail_open {
            entry["failOpen"] = json!(true);
        }
        if let Some(namespaces) = &self.exclude_namespaces {
            entry["excludeNamespaces"] = json!(namespaces);
        }
        if let Some(namespace) = &self.pod_namespace {
            entry["podNamespace"] = json!(namespace);
        }
        entry.to_string()
    }
}

/// Installs once. May be repeated; what is in place is not written again.
pub fn install(installation: &Installation) -> Result<State> {
    let Installation {
        conf_dir, bin_dir, ..
    } = installation;
    for directory in [conf_dir, bin_dir] {
        if !directory.is_dir() {
            let why = format!("{} is no directory yet", directory.display());
            return Ok(State::Waiting(why));
        }
        files::remove_temporaries(directory).with_context(|| directory.display().to_string())?;
    }
    let files = configurations(conf_dir)?;
    let primary = match primary(installation, &files)? {
        Ok(primary) => primary,
        Err(why) => return Ok(State::Waiting(why)),
    };
    let new_program = install_program(&installation.program, &bin_dir.join(NAME))?;
    let new_entry = insert(&primary, &installation.settings.entry())?;
    let inserted = primary.with_extension("conflist");
    for other in files
        .iter()
        .filter(|file| **file != primary && **file != inserted)
    {
        remove(other)?;
    }
    Ok(if new_program || new_entry {
        State::Inserted(inserted)
    } else {
        State::Unchanged(inserted)
    })
}

/// Takes the entry out of every configuration, then removes the program, unless runtimes may still call it: some do for
/// pods that were there before, from a copy of the configuration of that time.
pub fn uninstall(conf_dir: &Path, bin_dir: &Path, keep_program: bool) -> Result<()> {
    if conf_dir.is_dir() {
        for file in configurations(conf_dir)? {
            remove(&file)?;
        }
        files::remove_temporaries(conf_dir).with_context(|| conf_dir.display().to_string())?;
    }
    if bin_dir.is_dir() {
        files::remove_temporaries(bin_dir).with_context(|| bin_dir.display().to_string())?;
        let program = bin_dir.join(NAME);
        if !keep_program {
            files::remove(&program).with_context(|| program.display().to_string())?;
        }
    }
    Ok(())
}

/// The files that container runtimes look at, in their order.
fn configurations(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let listed = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    for entry in listed {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conf" | "conflist" | "json")) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The configuration that the runtime uses; in words if there is none.
fn primary(
    installation: &Installation,
    files: &[PathBuf],
) -> Result<std::result::Result<PathBuf, String>> {
    let directory = installation.conf_dir.display();
    let mut invalid = Vec::new();
    for file in files {
        if let Some(name) = &installation.conf_name
            && !is_called(file, name)
        {
            continue;
        }
        let Some(text) = read(file)? else { continue };
        let tried = if is_list(file) {
            list::insert(&text, &installation.settings.entry())
        } else {
            list::convert(&text, "", &installation.settings.entry())
        };
        match tried {
            Ok(_) => return Ok(Ok(file.clone())),
            Err(Unfit::Invalid(why)) => invalid.push(format!("{}: {why}", file.display())),
            Err(unfit @ Unfit::CannotFollow(_)) => bail!("{}: {unfit}", file.display()),
        }
    }
    let wanted = installation.conf_name.as_deref();
    Ok(Err(match (wanted, invalid.is_empty()) {
        (Some(name), true) => format!("no {name} in {directory}"),
        (None, true) => format!("no network configuration in {directory}"),
        (_, false) => format!(
            "no network configuration in {directory}: {}",
            invalid.join("; ")
        ),
    }))
}

/// By that name, or by the one that it got here.
fn is_called(file: &Path, name: &str) -> bool {
    let converted = Path::new(name).with_extension("conflist");
    file.file_name()
        .is_some_and(|found| found == name || found == converted)
}

fn is_list(file: &Path) -> bool {
    file.extension()
        .is_some_and(|extension| extension == "conflist")
}

/// Whether the file had to be changed.
fn insert(file: &Path, entry: &str) -> Result<bool> {
    let Some(text) = read(file)? else {
        bail!("{}: it has just gone", file.display());
    };
    if is_list(file) {
        let wanted = list::insert(&text, entry).with_context(|| file.display().to_string())?;
        if wanted == text {
            return Ok(false);
        }
        files::write(file, wanted.as_bytes(), file)?;
        return Ok(true);
    }
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let target = file.with_extension("conflist");
    if let Some(other) = read(&target)?
        && !matches!(list::remove(&other), Ok(Some(Rest::Single { file, .. })) if file == name)
    {
        bail!(
            "{}: cannot become a list: {} is there already, and not from here",
            file.display(),
            target.display()
        );
    }
    let wanted = list::convert(&text, &name, entry).with_context(|| file.display().to_string())?;
    files::write(&target, wanted.as_bytes(), file)?;
    files::remove(file).with_context(|| file.display().to_string())?;
    Ok(true)
}

/// Takes the entry out of a file, if it is in it. What was a single plugin's configuration becomes that again.
fn remove(file: &Path) -> Result<()> {
    if !is_list(file) {
        return Ok(());
    }
    let Some(text) = read(file)? else {
        return Ok(());
    };
    match list::remove(&text) {
        // Not ours if it cannot be read: nothing of the kind was ever written here.
        Err(_) | Ok(None) => return Ok(()),
        Ok(Some(Rest::List(rest))) => return files::write(file, rest.as_bytes(), file),
        Ok(Some(Rest::Single { file: name, text })) => {
            let single = file.with_file_name(name);
            // Written anew by its owner since: then that is the one to keep.
            if !single.exists() {
                files::write(&single, text.as_bytes(), file)?;
            }
        }
        Ok(Some(Rest::Nothing)) => {}
    }
    files::remove(file).with_context(|| file.display().to_string())
}

/// Whether it had to be written.
fn install_program(from: &Path, to: &Path) -> Result<bool> {
    let bytes = fs::read(from).with_context(|| from.display().to_string())?;
    if fs::read(to).is_ok_and(|found| found == bytes) {
        return Ok(false);
    }
    files::write_program(to, &bytes)?;
    Ok(true)
}

/// None if it is gone. Bytes that are no text belong to no configuration.
fn read(file: &Path) -> Result<Option<String>> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}
