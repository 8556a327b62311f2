//! Cgroups of version 2, wherever this machine has mounted them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{patience::patience, pod::Regrets};

/// How long a killed process may take to leave its cgroup.
const PATIENCE: Duration = Duration::from_secs(3);

/// A cgroup that is removed with this value, and its children before it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A new cgroup directly below the mount point.
    pub fn new(name: &str) -> Self {
        let path = mount_point().join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    /// A new cgroup below another; to be dropped before that.
    pub fn below(parent: &Self, name: &str) -> Self {
        Self {
            path: parent.child(name),
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the kernel calls it.
    pub fn id(&self) -> u64 {
        fs::metadata(&self.path).unwrap().ino()
    }

    /// The directory of a child, which is made if it is not there.
    pub fn child(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                panic!("{}: {error}", path.display())
            }
            _ => path,
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut regrets = Regrets::new(&self.path.display().to_string());
        let _older_than_5_14 = fs::write(self.path.join("cgroup.kill"), "1");
        let deadline = Instant::now() + patience(PATIENCE);
        while let Err(error) = remove(&self.path) {
            if Instant::now() > deadline {
                regrets.add(error);
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Where cgroup2 is mounted for this thread.
pub fn mount_point() -> PathBuf {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    // proc_pid_mountinfo(5): the fifth field is the mount point, the type follows the separator.
    let found = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let is_cgroup2 = right.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| left.split(' ').nth(4)).flatten()
    });
    PathBuf::from(found.expect("no cgroup2 in /proc/thread-self/mountinfo"))
}
