//! Against real cgroups.

use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::observe::testing::TestNamespace;

/// A cgroup with a child cgroup, removed on drop after its processes are killed.
struct TestCgroup {
    path: PathBuf,
    children: Vec<Child>,
}

impl TestCgroup {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes cgroups: run it as root"
        );
        let name = format!(
            "observe-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = mountpoint().unwrap().join(name);
        fs::create_dir_all(path.join("inner")).unwrap();
        Self {
            path,
            children: Vec::new(),
        }
    }

    fn start(&mut self, mut command: Command) -> i32 {
        let child = command.spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        self.children.push(child);
        fs::write(self.path.join("inner/cgroup.procs"), pid.to_string()).unwrap();
        pid
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir(self.path.join("inner"));
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn open_knows_id_and_population() {
    let mut test = TestCgroup::new();
    let cgroup = Cgroup::open(&test.path.join("inner/..")).unwrap();
    assert_eq!(cgroup.path(), test.path);
    assert_eq!(cgroup.id(), fs::metadata(&test.path).unwrap().ino());
    assert!(!cgroup.is_populated().unwrap());
    assert!(cgroup.processes().unwrap().is_empty());
    let mut sleep = Command::new("sleep");
    sleep.arg("60");
    let pid = test.start(sleep);
    assert!(cgroup.is_populated().unwrap());
    assert_eq!(cgroup.processes().unwrap(), [pid]);
    assert_eq!(
        Cgroup::of_process(pid).unwrap().path(),
        test.path.join("inner")
    );
}

#[test]
fn relatives_are_those_above_and_below() {
    let (test, other) = (TestCgroup::new(), TestCgroup::new());
    let id = |path: &Path| Cgroup::open(path).unwrap().id();
    let (outer, inner) = (id(&test.path), id(&test.path.join("inner")));
    let relatives = |path: &Path| Cgroup::open(path).unwrap().relatives().unwrap();
    assert!(relatives(&test.path).contains(&inner));
    assert!(relatives(&test.path.join("inner")).contains(&outer));
    assert!(!relatives(&test.path).contains(&outer));
    assert!(!relatives(&test.path).contains(&id(&other.path)));
}

#[test]
fn outsiders_are_processes_of_other_namespaces() {
    let (mut test, pod) = (TestCgroup::new(), TestNamespace::new());
    let mut inside = Command::new("ip");
    inside.args(["netns", "exec", &pod.name, "sleep", "60"]);
    let inside = test.start(inside);
    let mut outside = Command::new("sleep");
    outside.arg("60");
    let outside = test.start(outside);
    let ns = pod.open();
    let start = std::time::Instant::now();
    while ns.contains(inside) != Some(true) {
        assert!(
            start.elapsed().as_secs() < 10,
            "ip netns exec did not enter the namespace"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(
        Cgroup::open(&test.path).unwrap().outsiders(&ns).unwrap(),
        [outside]
    );
}

#[test]
fn open_refuses_what_is_no_pod_cgroup() {
    let mountpoint = mountpoint().unwrap();
    let refused = |path: &Path| Cgroup::open(path).unwrap_err();
    assert!(matches!(
        refused(&mountpoint.join("no-such")),
        Error::Missing { .. }
    ));
    assert!(matches!(
        refused(Path::new("/tmp")),
        Error::NotACgroup { .. }
    ));
    assert!(matches!(
        refused(Path::new("/etc/passwd")),
        Error::NotADirectory { .. }
    ));
    let root = refused(&mountpoint);
    assert!(matches!(root, Error::Root { .. }), "{root}");
}

#[test]
fn open_version_1_path_names_the_cgroup2_mount() {
    let path = Path::new("/sys/fs/cgroup/memory");
    if !path.is_dir() {
        println!(
            "skipped: {} is not there, this machine has no cgroup v1",
            path.display()
        );
        return;
    }
    let error = Cgroup::open(path).unwrap_err();
    assert!(matches!(error, Error::Version1 { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(mountpoint().unwrap().to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn of_process_that_is_gone_says_so() {
    assert!(matches!(
        Cgroup::of_process(i32::MAX),
        Err(Error::NoProcess { .. })
    ));
}
