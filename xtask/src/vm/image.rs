//! The guest's files: programs of this machine with the libraries they need, the modules and the job.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use walkdir::WalkDir;

use super::cpio::{self, Writer};
use super::elf;
use super::job::{self, Job};
use super::modules::Module;
use crate::preflight::find_program;

/// Programs that tests call, or that a person wants in a shell.
const PROGRAMS: &[&str] = &[
    "sh",
    "bash",
    "cat",
    "cp",
    "dmesg",
    "echo",
    "env",
    "false",
    "find",
    "grep",
    "head",
    "id",
    "install",
    "ip",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mount",
    "nsenter",
    "ps",
    "readlink",
    "rm",
    "sed",
    "seq",
    "setpriv",
    "setsid",
    "sha256sum",
    "sleep",
    "ss",
    "stat",
    "sysctl",
    "tail",
    "tar",
    "tc",
    "timeout",
    "true",
    "umount",
    "uname",
    "unshare",
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "iptables-legacy",
    "iptables-legacy-save",
    "iptables-legacy-restore",
    "ip6tables-legacy",
    "ip6tables-legacy-save",
    "ip6tables-legacy-restore",
    "iptables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
    "ip6tables-nft",
    "ip6tables-nft-save",
    "ip6tables-nft-restore",
];
/// Without these a guest is of no use.
const INDISPENSABLE: &[&str] = &["sh", "ip", "nsenter", "setsid"];
/// Libraries that programs open by name, which no ELF header tells of.
const PLUGINS: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu/xtables",
    "/usr/lib/aarch64-linux-gnu/xtables",
    "/usr/lib64/xtables",
];
/// Small files that programs read.
const FILES: &[&str] = &[
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/protocols",
    "/etc/resolv.conf",
    "/etc/ssl/certs/ca-certificates.crt",
];
const FOLDERS: &[&str] = &[
    "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var", "vm",
];

enum Entry {
    Directory,
    /// Copied when the archive is written.
    Copy(PathBuf),
    Content(Vec<u8>),
    Link(PathBuf),
}

/// A root file system in the making. Paths are those of this machine.
pub struct Image {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Image {
    /// The programs every guest has.
    pub fn new() -> Result<Self> {
        let mut image = Self {
            entries: BTreeMap::new(),
        };
        for folder in FOLDERS {
            image.entries.insert(folder.into(), Entry::Directory);
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            if let Ok(target) = fs::read_link(Path::new("/").join(folder)) {
                image.entries.insert(folder.into(), Entry::Link(target));
            }
        }
        for file in FILES.iter().map(Path::new).filter(|file| file.is_file()) {
            image.put(file, Entry::Copy(file.to_owned()));
        }
        for name in PROGRAMS {
            match find_program(name) {
                Some(path) => image.add(&path)?,
                None if INDISPENSABLE.contains(name) => bail!("no {name} on this machine"),
                None => {}
            }
        }
        for folder in PLUGINS
            .iter()
            .map(Path::new)
            .filter(|folder| folder.is_dir())
        {
            image.add_folder(folder)?;
        }
        Ok(image)
    }

    /// Adds a file of this machine at its own path, the links that lead to it, and the libraries it needs.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let (folder, name) = (path.parent(), path.file_name());
        let (Some(folder), Some(name)) = (folder, name) else {
            bail!("{} is no file", path.display());
        };
        let folder = fs::canonicalize(folder)
            .with_context(|| format!("cannot find {}", folder.display()))?;
        let path = folder.join(name);
        if self.entries.contains_key(relative(&path)) {
            return Ok(());
        }
        if let Ok(target) = fs::read_link(&path) {
            let next = folder.join(&target);
            self.put(&path, Entry::Link(target));
            return self.add(&next);
        }
        self.put(&path, Entry::Copy(path.clone()));
        for library in elf::libraries(&path)? {
            self.add(&library)?;
        }
        Ok(())
    }

    /// Adds all files of a folder, at their own paths.
    pub fn add_folder(&mut self, folder: &Path) -> Result<()> {
        for entry in WalkDir::new(folder) {
            let entry = entry?;
            if !entry.file_type().is_dir() {
                self.add(entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds a program of this machine at another path.
    pub fn add_as(&mut self, path: &Path, goal: &str) -> Result<()> {
        for library in elf::libraries(path)? {
            self.add(&library)?;
        }
        self.put(Path::new(goal), Entry::Copy(path.to_owned()));
        Ok(())
    }

    /// Adds the modules, in this order, and the job.
    pub fn set_job(&mut self, modules: Vec<Module>, job: &Job) -> Result<()> {
        for (number, module) in modules.into_iter().enumerate() {
            let path = format!("{}/{number:03}-{}", job::MODULES, module.name);
            self.put(Path::new(&path), Entry::Content(module.content));
        }
        let job = serde_json::to_vec_pretty(job)?;
        self.put(Path::new(job::PATH), Entry::Content(job));
        Ok(())
    }

    fn put(&mut self, path: &Path, entry: Entry) {
        let path = relative(path);
        for folder in path.ancestors().skip(1) {
            if !folder.as_os_str().is_empty() {
                self.entries
                    .entry(folder.to_owned())
                    .or_insert(Entry::Directory);
            }
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes the archive. Directories come before what is in them: so they sort.
    pub fn write(&self, to: impl io::Write) -> Result<()> {
        let mut archive = Writer::new(BufWriter::new(to));
        for (path, entry) in &self.entries {
            let name = path.to_str().context("a path is not UTF-8")?;
            match entry {
                Entry::Directory => archive.entry(name, cpio::DIRECTORY | 0o755, &[])?,
                Entry::Link(target) => {
                    let target = target.to_str().context("a path is not UTF-8")?;
                    archive.entry(name, cpio::LINK | 0o777, target.as_bytes())?;
                }
                Entry::Content(content) => {
                    archive.entry(name, cpio::REGULAR | 0o644, content)?;
                }
                Entry::Copy(source) => {
                    let content = fs::read(source)
                        .with_context(|| format!("cannot read {}", source.display()))?;
                    let mode = fs::metadata(source)?.permissions().mode() & 0o777;
                    archive.entry(name, cpio::REGULAR | mode, &content)?;
                }
            }
        }
        archive.finish()?;
        Ok(())
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_is_carried_with_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let here = fs::canonicalize(folder.path()).unwrap();
        fs::write(here.join("script"), "#!/bin/sh\n").unwrap();
        std::os::unix::fs::symlink("script", here.join("link")).unwrap();
        let mut image = Image {
            entries: BTreeMap::new(),
        };
        image.add(&here.join("link")).unwrap();
        let entry = |path: PathBuf| image.entries.get(relative(&path));
        assert!(
            matches!(entry(here.join("link")), Some(Entry::Link(to)) if to == Path::new("script"))
        );
        assert!(matches!(entry(here.join("script")), Some(Entry::Copy(_))));
        // And the directories on the way, which the kernel does not make by itself.
        assert!(
            here.ancestors()
                .all(|path| path == Path::new("/") || entry(path.to_owned()).is_some())
        );
    }
}
