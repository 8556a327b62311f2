//! An image of one program, made without a C compiler.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::namespace::succeed;

/// `for (;;) pause();` for x86_64: `mov $34, %eax; syscall; jmp` to the beginning.
const PAUSE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
/// Where it is loaded.
const ADDRESS: u64 = 0x40_0000;

/// An archive in `directory`, which is made, with an image of that name: its only program waits for signals.
pub fn pause(directory: &Path, name: &str) -> PathBuf {
    fs::create_dir(directory).unwrap();
    let path = |name: &str| directory.join(name);
    fs::write(path("pause"), executable(&PAUSE)).unwrap();
    fs::set_permissions(path("pause"), Permissions::from_mode(0o755)).unwrap();
    let tar = |archive: &str, files: &[&str]| {
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(directory).arg("-cf").arg(path(archive));
        succeed(tar.args(files))
    };
    tar("layer.tar", &["pause"]);
    let sum = succeed(Command::new("sha256sum").arg(path("layer.tar")));
    let layer = format!("sha256:{}", sum.split(' ').next().unwrap());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": { "Entrypoint": ["/pause"] },
        "rootfs": { "type": "layers", "diff_ids": [layer] },
    });
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(path("config.json"), config.to_string()).unwrap();
    fs::write(path("manifest.json"), manifest.to_string()).unwrap();
    tar("image.tar", &["manifest.json", "config.json", "layer.tar"]);
    path("image.tar")
}

/// A static program (elf(5)): its header, one segment that is the whole file, and the code behind them.
fn executable(code: &[u8]) -> Vec<u8> {
    const FILE_HEADER: u16 = 64;
    const PROGRAM_HEADER: u16 = 56;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    const VERSION: u32 = 1;
    const LOAD: u32 = 1;
    const READ_AND_EXECUTE: u32 = 5;
    const PAGE: u64 = 0x1000;
    let headers = u64::from(FILE_HEADER + PROGRAM_HEADER);
    let size = headers + code.len() as u64;
    let half = |value: u16| value.to_le_bytes().to_vec();
    let word = |value: u32| value.to_le_bytes().to_vec();
    let long = |value: u64| value.to_le_bytes().to_vec();
    [
        // 64 bits, little-endian, version 1, of no particular system.
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec(),
        [half(EXECUTABLE), half(X86_64), word(VERSION)].concat(),
        // Entry, program headers, no section headers.
        [long(ADDRESS + headers), long(FILE_HEADER.into()), long(0)].concat(),
        [word(0), half(FILE_HEADER), half(PROGRAM_HEADER), half(1)].concat(),
        [half(0), half(0), half(0)].concat(),
        [word(LOAD), word(READ_AND_EXECUTE), long(0)].concat(),
        [
            long(ADDRESS),
            long(ADDRESS),
            long(size),
            long(size),
            long(PAGE),
        ]
        .concat(),
        code.to_vec(),
    ]
    .concat()
}
