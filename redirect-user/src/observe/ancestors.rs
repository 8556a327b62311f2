//! The cgroups that this process is in, from the machine's root down. A cgroup namespace hides those above its own root from
//! everybody in it, but the kernel tells a program.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::OnceLock;

use aya_obj::generated::bpf_func_id::BPF_FUNC_get_current_ancestor_cgroup_id;

use crate::assembler::{R1, call, exit, set};
use crate::sys::bpf;

/// More than systemd, a container runtime and a kubelet nest within each other.
const DEEPEST: i32 = 64;

/// Lower halves of their ids, which no two cgroups share at one time. The root is the first, the own one the last.
pub fn ids() -> io::Result<&'static [u32]> {
    static IDS: OnceLock<Vec<u32>> = OnceLock::new();
    if let Some(ids) = IDS.get() {
        return Ok(ids);
    }
    let ids = ask()?;
    Ok(IDS.get_or_init(|| ids))
}

fn ask() -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for level in 0..DEEPEST {
        let program = bpf::load_raw_tracepoint(&[
            set(R1, level),
            call(BPF_FUNC_get_current_ancestor_cgroup_id),
            exit(),
        ])?;
        match bpf::run(program.as_fd())? {
            // Below the own one.
            0 => break,
            id => ids.push(id),
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::observe::mounts;

    #[test]
    fn own_cgroup_is_the_last_and_the_root_the_first() {
        let own = fs::read_to_string("/proc/self/cgroup").expect("procfs");
        let own = own.lines().find_map(|line| line.strip_prefix("0::"));
        let root = mounts::mountpoint().expect("cgroup2");
        let own = root.join(own.expect("cgroup2").trim_start_matches('/'));
        let id = |path: &std::path::Path| fs::metadata(path).expect("a cgroup").ino() as u32;
        let ids = ids().expect("told");
        assert_eq!(ids.last(), Some(&id(&own)));
        assert!(ids.contains(&id(&root)));
    }
}
