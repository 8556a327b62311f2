//! Where unsafe code may be: docs/security.md lists the same files.

use std::fs;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

/// Files, and a directory of files. Whoever adds one explains it there.
const ALLOWED: [&str; 8] = [
    "redirect-ebpf/src/ctx",
    "redirect-ebpf/src/ctx.rs",
    "redirect-user/src/sys/bpf.rs",
    "redirect-user/src/sys/nsfs.rs",
    "tests/src/foreign.rs",
    "tests/src/map_ids.rs",
    "tests/src/raw.rs",
    "tests/src/sockopt.rs",
];
const CRATES: [&str; 5] = [
    "redirect-common",
    "redirect-ebpf",
    "redirect-user",
    "tests",
    "xtask",
];

fn sources(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = WalkDir::new(directory).into_iter();
    let paths = entries.map(|entry| entry.expect("a directory").into_path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
}

/// Blocks, functions, implementations and lifted lints; not attributes (`#[unsafe(no_mangle)]`), comments and names.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let keyword = ["{", "fn ", "impl ", "trait ", "extern "]
        .iter()
        .any(|what| code.contains(&["unsafe ", what].concat()));
    keyword
        || code.trim() == ["unsafe_", "code,"].concat()
        || code.contains(&["(unsafe_", "code"].concat())
}

#[test]
fn unsafe_code_is_only_where_the_documentation_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace");
    let mut found: Vec<String> = CRATES
        .iter()
        .flat_map(|name| sources(&root.join(name)))
        .filter(|file| {
            fs::read_to_string(file)
                .expect("text")
                .lines()
                .any(is_unsafe)
        })
        .map(|file| {
            let file = file.strip_prefix(root).expect("below");
            // A directory stands for the files in it.
            let directory = file.parent().expect("a directory");
            let known = ALLOWED
                .iter()
                .any(|allowed| directory == Path::new(allowed));
            let named = if known { directory } else { file };
            named.display().to_string()
        })
        .collect();
    found.sort();
    found.dedup();
    assert_eq!(found, ALLOWED);
    let documented = fs::read_to_string(root.join("docs/security.md")).expect("text");
    for file in ALLOWED {
        let name = file.rsplit('/').next().expect("a name");
        assert!(documented.contains(&format!("{name}`")), "{file}");
    }
}
