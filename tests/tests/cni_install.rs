//! `redirect cni install` and `uninstall`: what they leave in a node's CNI directories.
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use redirect_tests::{
    cni::NAME,
    loader::{finish, redirect},
    namespace::errors,
    patience::patience,
    tracer::{self, Fault},
};
use rstest::rstest;
use serde_json::Value;
use tempfile::TempDir;

const LIST: &str = "{\n  \"name\": \"k8s\", \"cniVersion\": \"1.0.0\",\n  \"plugins\": [\n    {\"type\": \"bridge\", \"mtu\": 1.50e3},\n    {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}\n  ]\n}\n\n";
const SINGLE: &str = "{ \"cniVersion\": \"0.4.0\",\n  \"type\": \"calico\", \"name\": \"k8s\" }\n";

/// How long the watching installer may take; it pauses for at most 1 s between insertions in these tests.
const PATIENCE: Duration = Duration::from_secs(20);

/// A node's CNI directories.
struct Node {
    directory: TempDir,
}

/// Everything about the files of a directory that must come back: name, contents, mode and owner.
type Listing = BTreeMap<String, (Vec<u8>, u32, u32)>;

impl Node {
    fn new(files: &[(&str, &str)]) -> Self {
        let node = Self {
            directory: TempDir::new().unwrap(),
        };
        fs::create_dir(node.conf()).unwrap();
        fs::create_dir(node.bin()).unwrap();
        for (name, text) in files {
            fs::write(node.file(name), text).unwrap();
        }
        node
    }

    fn conf(&self) -> PathBuf {
        self.directory.path().join("net.d")
    }

    fn bin(&self) -> PathBuf {
        self.directory.path().join("bin")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.conf().join(name)
    }

    fn program(&self) -> PathBuf {
        self.bin().join(NAME)
    }

    fn command(&self, what: &str) -> Command {
        let mut command = redirect();
        command.args(["cni", what]);
        command.arg("--cni-conf-dir").arg(self.conf());
        command.arg("--cni-bin-dir").arg(self.bin());
        command
    }

    fn install(&self, more: &[&str]) -> Output {
        finish(self.command("install").args(more))
    }

    /// What a successful call says.
    fn installed(&self, more: &[&str]) -> String {
        let output = self.install(more);
        assert!(output.status.success(), "{}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn uninstall(&self, more: &[&str]) {
        let output = finish(self.command("uninstall").args(more));
        assert!(output.status.success(), "{}", errors(&output));
    }

    fn listing(&self) -> Listing {
        listing(&self.conf())
    }

    /// The types of a list's plugins.
    fn plugins(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.file(name)).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let plugins = value["plugins"].as_array().cloned().unwrap_or_default();
        plugins
            .iter()
            .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
            .collect()
    }

    fn watch(&self) -> Watching {
        let mut child = self
            .command("install")
            .arg("--watch")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let read = |stream: Box<dyn std::io::Read + Send>| {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let _nobody_listens = sender.send(line);
                }
            });
        };
        read(Box::new(child.stdout.take().unwrap()));
        read(Box::new(child.stderr.take().unwrap()));
        Watching { child, lines }
    }
}

fn listing(directory: &Path) -> Listing {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let name = entry.file_name().into_string().unwrap();
            let file = (
                fs::read(entry.path()).unwrap(),
                metadata.mode(),
                metadata.uid(),
            );
            (name, file)
        })
        .collect()
}

/// A watching installer; ended with this value.
struct Watching {
    child: Child,
    lines: Receiver<String>,
}

impl Watching {
    /// Waits for a line with that text.
    fn says(&self, text: &str) -> String {
        let deadline = Instant::now() + patience(PATIENCE);
        let mut heard = Vec::new();
        while let Ok(line) = self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if line.contains(text) {
                return line;
            }
            heard.push(line);
        }
        panic!("it does not say {text:?}, but {heard:?}");
    }

    /// Lines that come within a second and a half.
    fn more(&self) -> Vec<String> {
        thread::sleep(Duration::from_millis(1500));
        self.lines.try_iter().collect()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[rstest]
#[case::list("10-a.conflist", LIST)]
#[case::one_line(
    "10-a.conflist",
    "{\"plugins\":[{\"type\":\"x\"}],\"cniVersion\":\"0.3.1\",\"name\":\"n\"}"
)]
#[case::single("10-a.conf", SINGLE)]
#[case::json("10-a.json", SINGLE)]
fn directory_is_as_before_after_install_and_uninstall(#[case] name: &str, #[case] text: &str) {
    let node = Node::new(&[(name, text), ("99-z.conflist", LIST), ("readme", "mine")]);
    fs::set_permissions(node.file(name), fs::Permissions::from_mode(0o640)).unwrap();
    chown(node.file(name), Some(1000), Some(1000)).unwrap();
    let before = node.listing();

    let list = Path::new(name).with_extension("conflist");
    let list = list.to_str().unwrap();
    let said = node.installed(&[]);
    assert_eq!(
        said,
        format!("inserted into {}\n", node.file(list).display())
    );
    assert_eq!(node.plugins(list).last().unwrap(), NAME);
    assert_eq!(node.plugins("99-z.conflist"), ["bridge", "portmap"]);
    let during = node.listing();
    assert_eq!(during.len(), before.len(), "{:?}", during.keys());
    assert_eq!((during[list].1, during[list].2), (before[name].1, 1000));
    let mode = fs::metadata(node.program()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
    let found = fs::read(node.program()).unwrap();
    assert!(found == fs::read(redirect().get_program()).unwrap());

    // Again: nothing is written.
    let inode = fs::metadata(node.file(list)).unwrap().ino();
    assert!(node.installed(&[]).starts_with("unchanged in "));
    assert_eq!(fs::metadata(node.file(list)).unwrap().ino(), inode);
    assert_eq!(node.listing(), during);

    for _ in 0..2 {
        node.uninstall(&[]);
        assert_eq!(node.listing(), before);
        assert!(listing(&node.bin()).is_empty());
    }
}

#[test]
fn first_valid_configuration_is_chosen_and_others_are_cleared() {
    let node = Node::new(&[("20-b.conflist", LIST)]);
    node.installed(&[]);
    assert_eq!(node.plugins("20-b.conflist").last().unwrap(), NAME);
    // Another primary comes before it, and rubbish before that.
    fs::write(node.file("00-rubbish.conflist"), "{").unwrap();
    fs::write(node.file("05-empty.conf"), "").unwrap();
    fs::write(node.file("10-a.conflist"), LIST).unwrap();
    fs::write(node.file(".hidden"), LIST).unwrap();
    node.installed(&[]);
    assert_eq!(node.plugins("10-a.conflist").last().unwrap(), NAME);
    assert_eq!(
        fs::read_to_string(node.file("20-b.conflist")).unwrap(),
        LIST
    );
}

#[test]
fn named_configuration_is_chosen() {
    let node = Node::new(&[("10-a.conflist", LIST), ("20-b.conf", SINGLE)]);
    for said in ["inserted into", "unchanged in"] {
        assert!(
            node.installed(&["--conf-name", "20-b.conf"])
                .starts_with(said)
        );
        assert_eq!(node.plugins("20-b.conflist"), ["calico", NAME]);
        assert_eq!(
            fs::read_to_string(node.file("10-a.conflist")).unwrap(),
            LIST
        );
    }
}

#[test]
fn settings_reach_the_entry_and_change_with_the_flags() {
    let node = Node::new(&[("10-a.conf", SINGLE)]);
    node.installed(&[]);
    node.installed(&[
        "--fail-open",
        "--socket",
        "/run/x.sock",
        "--pod-namespace",
        "mesh",
        "--exclude-namespaces",
        "a,b",
    ]);
    let text = fs::read_to_string(node.file("10-a.conflist")).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let entry = &value["plugins"][1];
    assert_eq!(entry["failOpen"], true);
    assert_eq!(entry["socket"], "/run/x.sock");
    assert_eq!(entry["podNamespace"], "mesh");
    assert_eq!(entry["excludeNamespaces"], serde_json::json!(["a", "b"]));
    assert_eq!(entry["capabilities"]["cgroupPath"], true);
    assert_eq!(
        entry["capabilities"]["io.kubernetes.cri.pod-annotations"],
        true
    );
    node.uninstall(&[]);
    assert_eq!(fs::read_to_string(node.file("10-a.conf")).unwrap(), SINGLE);
}

#[test]
fn configuration_rewritten_by_its_owner_meanwhile_is_the_one_kept() {
    let newer = SINGLE.replace("calico", "newer");
    let node = Node::new(&[("10-a.conf", SINGLE)]);
    node.installed(&[]);
    fs::write(node.file("10-a.conf"), &newer).unwrap();
    node.installed(&[]);
    assert_eq!(node.plugins("10-a.conflist"), ["newer", NAME]);
    fs::write(node.file("10-a.conf"), &newer).unwrap();
    node.uninstall(&[]);
    assert_eq!(node.listing().keys().collect::<Vec<_>>(), ["10-a.conf"]);
    assert_eq!(fs::read_to_string(node.file("10-a.conf")).unwrap(), newer);
}

#[rstest]
#[case::too_old(&[("10-a.conflist", "{\"cniVersion\":\"0.2.0\",\"plugins\":[{\"type\":\"a\"}]}")], "cniVersion: \"0.2.0\": allowed are 0.3.0 and later")]
#[case::taken(&[("10-a.conf", SINGLE), ("10-a.conflist", LIST)], "is there already, and not from here")]
fn configuration_that_cannot_be_followed_is_an_error(
    #[case] files: &[(&str, &str)],
    #[case] words: &str,
) {
    let node = Node::new(files);
    let before = node.listing();
    let output = node.install(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains(words), "{}", errors(&output));
    assert_eq!(node.listing(), before);
}

#[rstest]
fn call_that_is_killed_at_a_call_of_its_own_is_made_good_by_the_next(
    #[values(("10-a.conflist", LIST), ("10-a.conf", SINGLE))] file: (&str, &str),
    #[values(["install", "uninstall"], ["uninstall", "install"])] calls: [&str; 2],
) {
    let [what, undo] = calls;
    let node = Node::new(&[file]);
    // Without the bytes of the program, which are many.
    let state = || {
        let programs = fs::read_dir(node.bin()).unwrap().map(Result::unwrap);
        let sizes = programs.map(|file| (file.file_name(), file.metadata().unwrap().len()));
        (node.listing(), sizes.collect::<BTreeMap<_, _>>())
    };
    let call = |what: &str| {
        let output = finish(&mut node.command(what));
        assert!(output.status.success(), "{what}: {}", errors(&output));
    };
    call(undo);
    let before = state();
    let calls = tracer::run(&node.command(what), None).calls;
    let wanted = state();
    assert_ne!(before, wanted);
    for after in 1..=calls.len() {
        call(undo);
        assert_eq!(state(), before);
        let traced = tracer::run(&node.command(what), Some(Fault::Kill { after }));
        let case = format!("killed after {after}, {}: {traced:?}", calls[after - 1]);
        assert!(traced.struck && traced.code.is_none(), "{case}");
        let is_whole = |(name, (bytes, ..)): (&String, &(Vec<u8>, u32, u32))| {
            !name.starts_with('.') && serde_json::from_slice::<Value>(bytes).is_ok()
        };
        assert!(node.listing().iter().any(is_whole), "{case}");
        let is_named = node.plugins("10-a.conflist").contains(&NAME.to_owned());
        assert!(node.program().exists() || !is_named, "{case}");
        call(what);
        assert_eq!(state(), wanted, "{case}");
    }
}

#[test]
fn unfinished_files_of_a_killed_installer_are_removed_and_never_read() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    for directory in [node.conf(), node.bin()] {
        fs::write(directory.join(".redirect-cni.10-a.conflist.1"), "{").unwrap();
    }
    node.installed(&[]);
    assert_eq!(node.listing().keys().collect::<Vec<_>>(), ["10-a.conflist"]);
    assert_eq!(listing(&node.bin()).keys().collect::<Vec<_>>(), [NAME]);
}

#[test]
fn program_can_be_left_for_pods_that_were_there_before() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    node.installed(&[]);
    node.uninstall(&["--keep-binary"]);
    assert!(node.program().exists());
    assert_eq!(
        fs::read_to_string(node.file("10-a.conflist")).unwrap(),
        LIST
    );
}

#[test]
fn program_stays_where_the_entry_cannot_be_taken_out() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    node.installed(&[]);
    let before = node.listing();
    // Root without capabilities cannot write there, and can remove the program.
    chown(node.conf(), Some(1000), Some(1000)).unwrap();
    let uninstall = node.command("uninstall");
    let mut restricted = Command::new("setpriv");
    restricted.args(["--inh-caps=-all", "--bounding-set=-all"]);
    restricted
        .arg(uninstall.get_program())
        .args(uninstall.get_args());
    let output = finish(&mut restricted);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        errors(&output).contains("10-a.conflist"),
        "{}",
        errors(&output)
    );
    assert_eq!(node.listing(), before);
    assert!(node.program().exists());
}

#[test]
fn installed_program_is_the_plugin() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    node.installed(&[]);
    let output = finish(
        Command::new(node.program())
            .env_clear()
            .env("CNI_COMMAND", "VERSION"),
    );
    assert!(output.status.success(), "{}", errors(&output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["supportedVersions"][4], "1.1.0");
}

#[test]
fn watching_installer_waits_for_a_network_and_puts_back_what_others_change() {
    let node = Node::new(&[]);
    let watching = node.watch();
    watching.says("waiting: no network configuration in");
    assert!(!node.program().exists(), "the program comes with the entry");
    fs::write(node.file("10-a.conflist"), LIST).unwrap();
    watching.says("inserted into");
    assert_eq!(node.plugins("10-a.conflist").last().unwrap(), NAME);
    // Its own writing is no reason to write again.
    assert!(
        watching
            .more()
            .iter()
            .all(|line| !line.contains("inserted"))
    );

    // As an agent that owns the file does: a new one in its place.
    let renamed = node.file("new.tmp");
    fs::write(&renamed, LIST).unwrap();
    fs::rename(renamed, node.file("10-a.conflist")).unwrap();
    watching.says("inserted into");
    assert_eq!(node.plugins("10-a.conflist").last().unwrap(), NAME);

    fs::remove_file(node.program()).unwrap();
    watching.says("inserted into");
    assert!(node.program().exists());

    fs::remove_file(node.file("10-a.conflist")).unwrap();
    watching.says("waiting: no network configuration in");
    fs::write(node.file("10-a.conf"), SINGLE).unwrap();
    watching.says("inserted into");
    assert_eq!(node.plugins("10-a.conflist"), ["calico", NAME]);
}

#[test]
fn watching_installer_ends_with_sigterm_and_leaves_what_it_did() {
    let node = Node::new(&[("10-a.conflist", LIST)]);
    let mut watching = node.watch();
    watching.says("inserted into");
    let pid = nix::unistd::Pid::from_raw(watching.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let deadline = Instant::now() + patience(PATIENCE);
    let status = loop {
        if let Some(status) = watching.child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{status}");
    assert_eq!(node.plugins("10-a.conflist").last().unwrap(), NAME);
}
