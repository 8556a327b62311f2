//! Files that appear at once and whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::Path;

use anyhow::{Context, Result};

/// What the names of unfinished files begin with. Container runtimes read no file with such a name.
pub const TEMPORARY: &str = ".redirect-cni.";

/// Writes a file, with the mode and owner of `like`.
pub fn write(path: &Path, bytes: &[u8], like: &Path) -> Result<()> {
    let metadata = fs::metadata(like).with_context(|| like.display().to_string())?;
    put(path, bytes, |file| {
        fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
        file.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))
    })
}

/// Writes a program.
pub fn write_program(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, |file| {
        file.set_permissions(fs::Permissions::from_mode(0o755))
    })
}

fn put(path: &Path, bytes: &[u8], finish: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
    let directory = path.parent().context("a file in no directory")?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!("{TEMPORARY}{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        finish(&file)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    written
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("writing {}", path.display()))
}

/// Removes what a killed process left unfinished.
pub fn remove_temporaries(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if is_temporary(&entry.path()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Whether that is the name of an unfinished file.
pub fn is_temporary(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY))
}

/// Removes a file; it may be gone.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
