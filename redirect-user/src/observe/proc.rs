//! The few things read from `/proc` by more than one observer.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// Every process id visible in `/proc`, in no particular order. Empty when `/proc` is not mounted.
pub(crate) fn pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Inode of a process's namespace (`net`, `user`, …), or `None` when the process is gone, a zombie or not ours to see.
pub(crate) fn namespace_inode(pid: i32, kind: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/{kind}"))
        .ok()
        .map(|metadata| metadata.ino())
}

/// When the process began, in clock ticks since boot; `None` when it is gone.
pub(super) fn start_time(pid: i32) -> Option<u64> {
    start_time_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn start_time_in(stat: &str) -> Option<u64> {
    // proc_pid_stat(5): field 22; the command, field 2, may contain anything.
    let (_, behind_command) = stat.rsplit_once(')')?;
    behind_command.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, edits, text};

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_command_leaves_the_start_time_readable(command in text(), numbers: [i32; 18], start: u64, edits in edits()) {
            let numbers: Vec<String> = numbers.iter().map(i32::to_string).collect();
            let stat = format!("4711 ({command}) S {} {start} 4096 7\n", numbers.join(" "));
            prop_assert_eq!(start_time_in(&stat), Some(start));
            let _read_or_not = start_time_in(&edits.of(&stat));
        }
    }
}
