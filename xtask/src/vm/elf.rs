//! Which shared libraries a program needs, read from the files themselves, as ldd(1) tells.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};
use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, FileHeader64, PT_INTERP};
use object::read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _};
use object::{Endianness, StringTable};

const MAGIC: &[u8] = b"\x7fELF";

/// What an ELF file says about what it runs with.
#[derive(Debug, Default)]
struct Needs {
    interpreter: Option<PathBuf>,
    libraries: Vec<String>,
    folders: Vec<PathBuf>,
}

/// The libraries and the interpreter of a program or library, and theirs. Empty for other files.
pub fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let (mut found, mut pending) = (BTreeSet::new(), vec![program.to_owned()]);
    while let Some(file) = pending.pop() {
        let needs = needs(&file)?;
        let mut take = |path: PathBuf| {
            if found.insert(path.clone()) {
                pending.push(path);
            }
        };
        if let Some(interpreter) = needs.interpreter {
            take(interpreter);
        }
        for library in &needs.libraries {
            let folders = needs.folders.iter().chain(system_folders());
            match folders
                .map(|folder| folder.join(library))
                .find(|path| path.is_file())
            {
                Some(path) => take(path),
                None => bail!("{} needs {library}, which is nowhere", file.display()),
            }
        }
    }
    Ok(found)
}

fn needs(file: &Path) -> Result<Needs> {
    let data = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    if !data.starts_with(MAGIC) {
        return Ok(Needs::default());
    }
    let data = data.as_slice();
    let read = || -> object::Result<Needs> {
        let mut needs = Needs::default();
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        for segment in header.program_headers(endian, data)? {
            if segment.p_type(endian) == PT_INTERP {
                let text = segment.data(endian, data).unwrap_or_default();
                needs.interpreter = Some(text_of(text.strip_suffix(b"\0").unwrap_or(text)).into());
            }
        }
        let sections = header.sections(endian, data)?;
        let Some((entries, strings)) = sections.dynamic(endian, data)? else {
            return Ok(needs);
        };
        let strings = sections.strings(endian, data, strings)?;
        for entry in entries {
            let tag = entry.tag(endian);
            if tag == DT_NEEDED {
                needs.libraries.push(string(strings, entry.val32(endian)));
            } else if matches!(tag, DT_RPATH | DT_RUNPATH) {
                let origin = file
                    .parent()
                    .unwrap_or(Path::new("/"))
                    .display()
                    .to_string();
                let list = string(strings, entry.val32(endian)).replace("$ORIGIN", &origin);
                needs.folders.extend(list.split(':').map(PathBuf::from));
            }
        }
        Ok(needs)
    };
    read().with_context(|| format!("cannot read {} as ELF", file.display()))
}

fn string(strings: StringTable<'_>, offset: Option<u32>) -> String {
    text_of(
        offset
            .and_then(|offset| strings.get(offset).ok())
            .unwrap_or_default(),
    )
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Those of ld.so.conf(5), then its built-in ones.
fn system_folders() -> &'static [PathBuf] {
    static FOLDERS: OnceLock<Vec<PathBuf>> = OnceLock::new();
    FOLDERS.get_or_init(|| {
        let files = fs::read_dir("/etc/ld.so.conf.d").into_iter().flatten();
        let mut files: Vec<_> = files.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort();
        let listed = files
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.starts_with('/'));
        let default = ["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(str::to_owned);
        listed.chain(default).map(PathBuf::from).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_this_very_program_are_found() {
        let found = libraries(&std::env::current_exe().unwrap()).unwrap();
        let has = |start: &str| {
            found.iter().any(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(start))
            })
        };
        assert!(has("libc.so"), "{found:?}");
        assert!(has("ld-linux"), "{found:?}");
    }

    #[test]
    fn script_needs_no_library() {
        let script = tempfile::NamedTempFile::new().unwrap();
        fs::write(script.path(), "#!/bin/sh\n").unwrap();
        assert!(libraries(script.path()).unwrap().is_empty());
    }
}
