//! What the node's administrator sets up: cgroup2, the BPF file system, and this process' own rights.

use nix::errno::Errno;

use super::{Finding, Level};
use crate::kernel::{self, Task};
use crate::observe::mounts;
use crate::pins;

pub(super) fn findings() -> Vec<Finding> {
    vec![cgroup2(), bpffs(), rights()]
}

fn cgroup2() -> Finding {
    let (level, detail) = match mounts::mountpoint() {
        Ok(point) => (Level::Ok, format!("mounted at {}", point.display())),
        Err(error) => (Level::Bad, error.to_string()),
    };
    Finding::new("cgroup2", level, detail)
}

fn bpffs() -> Finding {
    let (level, detail) = match pins::require_bpffs() {
        Ok(()) => (Level::Ok, "mounted at /sys/fs/bpf".to_owned()),
        // There is nothing to mount it on.
        Err(error) if error.is::<Errno>() => (Level::Bad, format!("{error:#}")),
        Err(_) => (
            Level::Note,
            "not mounted at /sys/fs/bpf: the first attach will do that; an init container needs it before".to_owned(),
        ),
    };
    Finding::new("bpffs", level, detail)
}

fn rights() -> Finding {
    let (level, detail) = match kernel::require_rights(Task::AnyPod) {
        Ok(()) => (
            Level::Ok,
            "this process has all capabilities it needs".to_owned(),
        ),
        Err(error) => (Level::Bad, format!("{error:#}")),
    };
    Finding::new("capabilities", level, detail)
}
