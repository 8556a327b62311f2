//! runc where cgroup2 is mounted as on a node, while its controllers are bound to hierarchies of version 1.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use crate::cgroup::mount_point;

/// containerd gives each sandbox a share of the CPU.
const SCRIPT: &str = r#"#!/bin/sh
for word; do
    [ "$before" = --bundle ] && sed -i 's/"cpu":{"shares":2}/"cpu":{}/' "$word/config.json"
    before=$word
done
exec runc "$@"
"#;

/// A runc that asks for nothing of the CPU, in that directory; none if runc itself will do.
pub fn without_cpu(directory: &Path) -> Option<PathBuf> {
    let mount_point = mount_point();
    let controllers = fs::read_to_string(mount_point.join("cgroup.controllers")).unwrap();
    // Beside hierarchies of version 1, runc uses those.
    let is_alone = mount_point == Path::new("/sys/fs/cgroup");
    if !is_alone || controllers.split_whitespace().any(|one| one == "cpu") {
        return None;
    }
    let path = directory.join("runc");
    fs::write(&path, SCRIPT).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    Some(path)
}
