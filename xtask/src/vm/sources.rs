//! Which `redirect` it is that runs on other kernels: by its sources, since programs differ from machine to machine.

use std::fs;
use std::path::Path;

use anyhow::Result;
use sha2::{Digest as _, Sha256};
use walkdir::WalkDir;

use crate::cargo;

/// What `redirect` is made of.
const SOURCES: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "redirect-common/Cargo.toml",
    "redirect-common/src",
    "redirect-ebpf/Cargo.toml",
    "redirect-ebpf/src",
    "redirect-user/Cargo.toml",
    "redirect-user/build.rs",
    "redirect-user/src",
];

/// SHA-256 of what `redirect` is made of, in hexadecimal digits.
pub fn hash() -> Result<String> {
    hash_of(&cargo::workspace()?.root, SOURCES)
}

/// SHA-256 of these files' and directories' names and contents, in hexadecimal digits: the same on every machine.
fn hash_of(root: &Path, sources: &[&str]) -> Result<String> {
    let mut digest = Sha256::new();
    for source in sources {
        for entry in WalkDir::new(root.join(source)).sort_by_file_name() {
            let entry = entry?;
            if !entry.file_type().is_file() {
                continue;
            }
            let name = entry.path().strip_prefix(root)?.display().to_string();
            let content = fs::read(entry.path())?;
            // With lengths, or the end of one could be the beginning of the next.
            digest.update(format!("{name} {}\n", content.len()));
            digest.update(content);
        }
    }
    let digits = digest.finalize();
    Ok(digits.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_of_names_and_contents_wherever_they_are() {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for folder in &folders {
            fs::create_dir(folder.path().join("src")).unwrap();
            fs::write(folder.path().join("src/a.rs"), "a").unwrap();
        }
        let [one, other] = folders
            .each_ref()
            .map(|folder| move || hash_of(folder.path(), &["src"]).unwrap());
        let before = one();
        assert_eq!(before, other());
        fs::write(folders[0].path().join("src/a.rs"), "b").unwrap();
        fs::rename(
            folders[1].path().join("src/a.rs"),
            folders[1].path().join("src/b.rs"),
        )
        .unwrap();
        assert_ne!(one(), before);
        assert_ne!(other(), before);
        assert!(hash_of(folders[0].path(), &["nothing"]).is_err());
    }
}
