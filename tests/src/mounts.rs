//! What a test mounts where only its own processes see it: to be called in a mount namespace of its own ([`bpffs::private`]).
//!
//! [`bpffs::private`]: crate::bpffs::private

use std::fs;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::cgroup::mount_point;

/// Where the daemon's socket is unless somebody says otherwise.
pub const RUN: &str = "/run/redirect";
const CGROUPS: &str = "/sys/fs/cgroup";

/// An empty [`RUN`].
pub fn own_run_directory() {
    // It stays, empty: another test may have mounted its own there.
    fs::create_dir_all(RUN).unwrap();
    let nothing = None::<&str>;
    // What is mounted here from now on, nobody else sees; network namespaces that others mount still arrive.
    let slaves = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(nothing, "/", nothing, slaves, nothing).unwrap();
    mount(
        Some("tmpfs"),
        RUN,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )
    .unwrap();
}

/// Only cgroup2, at its usual place: what nodes have today, also where this machine has version 1 beside it.
pub fn only_cgroup2() {
    if mount_point() == std::path::Path::new(CGROUPS) {
        return;
    }
    umount2(CGROUPS, MntFlags::MNT_DETACH).unwrap();
    mount(
        Some("cgroup2"),
        CGROUPS,
        Some("cgroup2"),
        MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
}
