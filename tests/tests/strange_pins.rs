//! What is found where the loader has its pins is not what it has put there: another object, or notes that nobody can read.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test panics where it fails, also in its helpers"
)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use aya::maps::{HashMap, Map, MapData};
use nix::mount::{MsFlags, mount, umount};
use redirect_common::record::{RECORD_BYTES, Record};
use redirect_tests::{
    backend::Backend::Redirect,
    bpffs::{self, ROOT},
    daemon::{inward, out},
    loader::{self, attach_command, finish, status_mentions},
    namespace::errors,
    options::Options,
    scene::Scene,
    traces::Traces,
};
use rstest::rstest;

/// Attaching is refused in one line that says all of this.
fn refused(scene: &Scene, says: &[&str]) {
    let output = finish(attach_command(&scene.pod).args(Options::ISTIO.arguments()));
    let said = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let refusals: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("redirect: "))
        .collect();
    assert_eq!(refusals.len(), 1, "{said}");
    for word in says {
        assert!(refusals[0].contains(word), "{word}: {said}");
    }
}

fn is_captured(scene: &mut Scene) -> bool {
    let met = (out(scene, 80), inward(scene, 8080));
    match (met.0.as_str(), met.1.as_str()) {
        ("15001", "15006") => true,
        ("service", "app") => false,
        _ => panic!("half captured: {met:?}"),
    }
}

/// Puts one pin in the place of another.
fn replace(place: &PathBuf, by: PathBuf) {
    fs::remove_file(place).unwrap();
    fs::hard_link(by, place).unwrap();
}

/// The only directory of programs, and a program in it.
fn program(name: &str) -> PathBuf {
    let mut entries = fs::read_dir(ROOT)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let programs = entries.find(|path| path.to_string_lossy().contains("/programs-"));
    programs.unwrap().join(name)
}

fn link(scene: &Scene, name: &str) -> PathBuf {
    bpffs::link_pin(&scene.pod.cgroup, name)
}

#[rstest]
#[case::of_another_type("DESTINATIONS", "FLOWS", "LruHash")]
#[case::with_other_keys("DESTINATIONS", "PODS", "keys of 8")]
fn map_of_somebody_else_is_refused_before_anything_changes(
    #[case] name: &str,
    #[case] theirs: &str,
    #[case] says: &str,
) {
    bpffs::private(|| {
        let (mut scene, mut first) = (Scene::new(), Scene::new());
        // Where else to get maps like ours from?
        first.attach(Redirect, &Options::ISTIO);
        let elsewhere = Path::new("/sys/fs/bpf/elsewhere");
        fs::hard_link(bpffs::map_pin(theirs).unwrap(), elsewhere).unwrap();
        first.detach();
        let place = Path::new(ROOT).join("maps").join(name);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::hard_link(elsewhere, &place).unwrap();
        refused(&scene, &[place.to_str().unwrap(), says, "has to be"]);
        assert!(!is_captured(&mut scene));
        // The control: it was that pin.
        fs::remove_file(place).unwrap();
        scene.attach(Redirect, &Options::ISTIO);
        assert!(is_captured(&mut scene));
        fs::remove_file(elsewhere).unwrap();
    });
}

/// Something else is pinned there while a pod is attached: that one goes on, another one is refused, and once it is removed
/// all is well.
#[rstest]
#[case::program_for_a_map(|| bpffs::map_pin("PODS").unwrap(), || program("redirect_connect4"), "it is a program, and has to be a map")]
#[case::map_for_a_program(|| program("redirect_connect4"), || bpffs::map_pin("PODS").unwrap(), "it is a map, and has to be a program")]
#[case::program_for_a_jump(|| program("redirect_sk_lookup_jump"), || program("redirect_connect4"), "it is a program, and has to be a map")]
fn object_of_another_kind_is_told(
    #[case] place: fn() -> PathBuf,
    #[case] other: fn() -> PathBuf,
    #[case] says: &str,
) {
    bpffs::private(|| {
        let (mut scene, mut bystander) = (Scene::new(), Scene::new());
        bystander.attach(Redirect, &Options::ISTIO);
        let place = place();
        let saved = PathBuf::from("/sys/fs/bpf/saved");
        fs::hard_link(&place, &saved).unwrap();
        replace(&place, other());
        refused(&scene, &[place.to_str().unwrap(), says]);
        assert!(!is_captured(&mut scene));
        assert!(is_captured(&mut bystander));
        replace(&place, saved.clone());
        fs::remove_file(saved).unwrap();
        scene.attach(Redirect, &Options::ISTIO);
        assert!(is_captured(&mut scene) && is_captured(&mut bystander));
    });
}

#[rstest]
#[case::connect("connect4")]
#[case::sk_lookup("sk_lookup")]
fn pod_whose_link_is_something_else_is_refused_and_can_be_detached(#[case] name: &str) {
    bpffs::private(|| {
        let (mut scene, mut bystander) = (Scene::new(), Scene::new());
        bystander.attach(Redirect, &Options::ISTIO);
        let alone = Traces::read([&scene, &bystander]);
        scene.attach(Redirect, &Options::ISTIO);
        assert!(is_captured(&mut scene));
        replace(&link(&scene, name), bpffs::map_pin("PODS").unwrap());
        refused(&scene, &[name, "it is a map, and has to be a link"]);
        // Another pod's trouble is none of this one's.
        loader::attach(&bystander.pod, &Options::ISTIO);
        assert!(is_captured(&mut bystander));
        let detached = loader::detach(scene.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        scene.adopt(&Options::ISTIO);
        assert!(!is_captured(&mut scene) && is_captured(&mut bystander));
        let differences = Traces::read([&scene, &bystander]).differences(&alone);
        assert!(differences.is_empty(), "{differences:#?}");
    });
}

/// Makes a directory that cannot be removed before the one in it, which is answered, is unmounted.
fn hold(directory: &Path) -> PathBuf {
    let held = directory.join("held");
    fs::create_dir_all(&held).unwrap();
    let nothing = None::<&str>;
    mount(nothing, &held, Some("tmpfs"), MsFlags::empty(), nothing).unwrap();
    held
}

/// A pod without one of its links is removed and attached anew. If it cannot be removed, it is not half attached instead.
#[rstest]
fn pod_that_cannot_be_removed_is_not_attached_again() {
    bpffs::private(|| {
        let mut scene = Scene::new();
        scene.attach(Redirect, &Options::ISTIO);
        let connect = link(&scene, "connect4");
        let held = hold(connect.parent().unwrap());
        fs::remove_file(&connect).unwrap();
        refused(&scene, &["detaching cgroup /", "busy"]);
        umount(&held).unwrap();
        loader::attach(&scene.pod, &Options::ISTIO);
        assert!(is_captured(&mut scene));
    });
}

/// What is left of a pod that has gone cannot be removed, as something is mounted there: that is told, and is no reason not to
/// attach and detach others.
#[rstest]
fn pod_that_cannot_be_removed_keeps_no_other_from_being_attached_or_detached() {
    const SAYS: &str = "detaching cgroup number 4711: ";
    bpffs::private(|| {
        let (mut scene, mut bystander) = (Scene::new(), Scene::new());
        bystander.attach(Redirect, &Options::ISTIO);
        let left = Path::new(ROOT).join(format!("pods/{:016x}", 4711));
        let held = hold(&left);

        let attached = finish(attach_command(&scene.pod).args(Options::ISTIO.arguments()));
        let said = errors(&attached);
        assert!(attached.status.success() && said.contains(SAYS), "{said}");
        assert!(is_captured(&mut scene));
        let detached = loader::detach(bystander.pod.cgroup.path());
        let said = errors(&detached);
        assert!(detached.status.success() && said.contains(SAYS), "{said}");
        bystander.adopt(&Options::ISTIO);
        assert!(!is_captured(&mut bystander) && is_captured(&mut scene));

        let all = || finish(loader::redirect().args(["detach", "--all"]));
        let detached = all();
        let said = errors(&detached);
        assert_eq!(detached.status.code(), Some(1), "{said}");
        assert!(said.starts_with(&format!("redirect: {SAYS}")), "{said}");
        assert!(!is_captured(&mut scene));
        // The control: it was that mount.
        umount(&held).unwrap();
        let detached = all();
        assert!(detached.status.success(), "{}", errors(&detached));
        assert!(!left.exists());
    });
}

/// Writes something else into the pod's notes.
fn spoil(scene: &Scene, spoil: fn(&mut Record)) {
    let map = Map::HashMap(bpffs::map("RECORDS").unwrap());
    let mut map: HashMap<MapData, u64, [u8; size_of::<Record>()]> = map.try_into().unwrap();
    let id = scene.pod.cgroup.id();
    let mut record: Record = bytemuck::pod_read_unaligned(&map.get(&id, 0).unwrap());
    spoil(&mut record);
    let bytes: [u8; size_of::<Record>()] = bytemuck::bytes_of(&record).try_into().unwrap();
    map.insert(id, bytes, 0).unwrap();
}

/// Notes that cannot be read: capture goes on and is told, attaching writes them anew, and detaching leaves nothing.
#[rstest]
#[case::cut_off(|record: &mut Record| record.length /= 2)]
#[case::too_long(|record: &mut Record| record.length = RECORD_BYTES as u32 + 1)]
#[case::no_text(|record: &mut Record| record.json.fill(0xff))]
#[case::empty(|record: &mut Record| record.length = 0)]
fn notes_that_cannot_be_read_are_written_anew(
    #[case] how: fn(&mut Record),
    #[values(false, true)] detach_at_once: bool,
) {
    bpffs::private(|| {
        let (mut scene, mut bystander) = (Scene::new(), Scene::new());
        bystander.attach(Redirect, &Options::ISTIO);
        let alone = Traces::read([&scene, &bystander]);
        scene.attach(Redirect, &Options::ISTIO);
        assert!(is_captured(&mut scene));
        let both = Traces::read([&scene, &bystander]);
        assert!(!both.differences(&alone).is_empty());
        spoil(&scene, how);
        assert!(
            !both
                .differences(&Traces::read([&scene, &bystander]))
                .is_empty()
        );
        let told = finish(loader::redirect().arg("status"));
        assert!(errors(&told).contains("corrupt"), "{}", errors(&told));
        assert!(is_captured(&mut scene) && is_captured(&mut bystander));
        if !detach_at_once {
            loader::attach(&scene.pod, &Options::ISTIO);
            assert!(is_captured(&mut scene) && is_captured(&mut bystander));
            let differences = Traces::read([&scene, &bystander]).differences(&both);
            assert!(differences.is_empty(), "{differences:#?}");
            assert!(status_mentions(&scene.pod));
        }
        let detached = loader::detach(scene.pod.cgroup.path());
        assert!(detached.status.success(), "{}", errors(&detached));
        assert!(!is_captured(&mut scene) && is_captured(&mut bystander));
        let differences = Traces::read([&scene, &bystander]).differences(&alone);
        assert!(differences.is_empty(), "{differences:#?}");
    });
}
