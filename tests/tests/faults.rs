//! The loader is killed after, or refused, its calls to the kernel that change something, one after another: connections meet the old
//! state or the new one, and the next call puts everything right.
#![allow(
    missing_docs,
    reason = "a test binary has no readers of its documentation"
)]

use std::process::Command;

use nix::errno::Errno;
use redirect_tests::{
    bpffs::{self, Objects},
    container::Container,
    faults::{
        self, Case, Cast, DIRECT, Ends, ISTIO, MACHINE_OPTIONS, OTHER, OTHER_OPTIONS,
        Suffers::{self, Kill, Refusal},
        THIRD, THIRD_OPTIONS, attach, detach, ends, run,
    },
    loader::{self, OtherBuild, attach_by},
    options::Options,
    pod::Pod,
    tracer::{self, Fault},
};
use rstest::rstest;

const EVERYWHERE: fn(&str) -> bool = |_| true;
/// Where the programs are loaded already, opening what is pinned is the same for every attachment.
const CHANGES: fn(&str) -> bool = |call| call != "bpf OBJ_GET";
const LINKS: fn(&str) -> bool = |call| call == "bpf LINK_DETACH";
const PINS: fn(&str) -> bool = |call| ["unlinkat", "unlink", "rmdir", "rename"].contains(&call);

#[rstest]
fn first_attach_ever(#[values(Kill, Refusal)] suffers: Suffers) {
    bpffs::private(|| {
        Case {
            casts: vec![Cast::new(DIRECT, ISTIO, ISTIO)],
            prepare: &|_| (),
            command: &attach_istio,
            repair: &attach_istio,
            restore: &|casts| {
                run(&mut detach_first(casts));
                bpffs::remove_root();
            },
        }
        .endure(suffers, EVERYWHERE);
    });
}

#[rstest]
#[case::repeated(ISTIO, attach_istio)]
#[case::given_up(DIRECT, detach_first)]
fn attach_of_a_second_pod(
    #[values(Kill, Refusal)] suffers: Suffers,
    #[case] repaired: Ends,
    #[case] repair: fn(&[Cast]) -> Command,
) {
    bpffs::private(|| {
        let casts = vec![Cast::new(DIRECT, ISTIO, repaired), Cast::bystander(OTHER)];
        run(&mut attach(&casts[1].scene, &OTHER_OPTIONS));
        Case {
            casts,
            prepare: &|_| (),
            command: &attach_istio,
            repair: &repair,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure(suffers, EVERYWHERE);
    });
}

/// Links that were made before the one that is refused do not stay attached until somebody else calls.
#[rstest]
fn refused_first_attach_leaves_no_link() {
    bpffs::private(|| {
        let (mut scene, bystander) = (faults::scene(), faults::scene());
        run(&mut attach(&bystander, &OTHER_OPTIONS));
        let before = Objects::loaded();
        let command = attach(&scene, &Options::ISTIO);
        let calls = tracer::run(&command, None).calls;
        run(&mut detach(&scene));
        let last = calls.iter().rposition(|call| call == "bpf LINK_CREATE");
        let refused = Fault::Refuse {
            call: last.unwrap() + 1,
            error: Errno::EPERM,
        };
        let traced = tracer::run(&command, Some(refused));
        assert_eq!(traced.code, Some(1), "{traced:?}");
        assert!(traced.errors.contains("connect6"), "{traced:?}");
        let left = Objects::loaded().without(&before).wait_until_freed();
        assert!(left.is_empty(), "{left:?}");
        // The control: without the refusal there are some.
        run(&mut attach(&scene, &Options::ISTIO));
        let links = Objects::loaded().without(&before);
        assert!(!links.links().is_empty());
        assert_eq!(ends(&mut scene, None).unwrap(), ISTIO);
        run(&mut detach(&scene));
    });
}

#[rstest]
fn change_of_policy(#[values(Kill, Refusal)] suffers: Suffers) {
    bpffs::private(|| {
        let casts = vec![Cast::new(ISTIO, OTHER, OTHER), Cast::bystander(THIRD)];
        // Stays attached throughout, so that the programs stay loaded.
        run(&mut attach(&casts[1].scene, &THIRD_OPTIONS));
        Case {
            casts,
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &attach_other,
            repair: &attach_other,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure(suffers, EVERYWHERE);
    });
}

#[rstest]
fn detach_of_one_pod(#[values(Kill, Refusal)] suffers: Suffers) {
    bpffs::private(|| {
        let casts = vec![Cast::new(OTHER, DIRECT, DIRECT), Cast::bystander(ISTIO)];
        run(&mut attach(&casts[1].scene, &Options::ISTIO));
        Case {
            casts,
            prepare: &|casts| run(&mut attach_other(casts)),
            command: &detach_first,
            repair: &detach_first,
            restore: &|_| (),
        }
        .endure(suffers, EVERYWHERE);
    });
}

#[rstest]
#[case::repeated(EVERYWHERE, DIRECT, detach_first)]
// Until the pins go it is the same as for one pod of several.
#[case::attached_again(PINS, ISTIO, attach_istio)]
fn detach_of_the_last_pod(
    #[values(Kill, Refusal)] suffers: Suffers,
    #[case] at: fn(&str) -> bool,
    #[case] repaired: Ends,
    #[case] repair: fn(&[Cast]) -> Command,
) {
    endure_detach_of_the_last_pod(suffers, at, repaired, repair);
}

/// A link may have been cut off and still be pinned: the next attach does not take it for one that captures. To be refused there
/// is no failure.
#[rstest]
fn detach_that_is_killed_between_links_and_attach() {
    endure_detach_of_the_last_pod(Kill, LINKS, ISTIO, attach_istio);
}

fn endure_detach_of_the_last_pod(
    suffers: Suffers,
    at: fn(&str) -> bool,
    repaired: Ends,
    repair: fn(&[Cast]) -> Command,
) {
    bpffs::private(|| {
        Case {
            casts: vec![Cast::new(ISTIO, DIRECT, repaired)],
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &detach_first,
            repair: &repair,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure(suffers, at);
    });
}

#[rstest]
fn upgrade(#[values(Kill, Refusal)] suffers: Suffers) {
    let other = OtherBuild::new();
    bpffs::private(|| {
        let casts = vec![Cast::bystander(ISTIO), Cast::bystander(OTHER)];
        // Keeps the programs of the old build loaded.
        run(&mut attach(&casts[1].scene, &OTHER_OPTIONS));
        let upgrade = |casts: &[Cast]| {
            let mut command = attach_by(other.redirect(), &casts[0].scene.pod);
            command.args(Options::ISTIO.arguments());
            command
        };
        Case {
            casts,
            prepare: &|casts| run(&mut attach_istio(casts)),
            command: &upgrade,
            repair: &upgrade,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure(suffers, EVERYWHERE);
    });
}

#[rstest]
fn collection_of_a_pod_that_vanished(#[values(Kill, Refusal)] suffers: Suffers) {
    bpffs::private(|| {
        let casts = vec![Cast::bystander(OTHER)];
        run(&mut attach_other(&casts));
        Case {
            casts,
            prepare: &|_| vanish(),
            command: &attach_other,
            repair: &attach_other,
            restore: &|_| (),
        }
        .endure(suffers, EVERYWHERE);
    });
}

/// Connections from outside keep their address.
const TPROXY: Ends = &[
    "15001",
    "15001",
    "15001",
    "service",
    "15006",
    "15006 in place",
    "15006 in place",
];
const TPROXY_OPTIONS: Options = Options {
    tproxy: true,
    ..Options::ISTIO
};

#[rstest]
#[case::attach(DIRECT, attach_tproxy, TPROXY)]
#[case::change_of_mode(OTHER, attach_tproxy, TPROXY)]
#[case::change_back(TPROXY, attach_other, OTHER)]
#[case::detach(TPROXY, detach_first, DIRECT)]
fn tproxy(
    #[values(Kill, Refusal)] suffers: Suffers,
    #[case] old: Ends,
    #[case] command: fn(&[Cast]) -> Command,
    #[case] new: Ends,
) {
    let cast = || Cast::new(old, new, new);
    endure_beside_another(cast, suffers, command, &move |casts| {
        if old == TPROXY {
            run(&mut attach_tproxy(casts));
        } else if old == OTHER {
            run(&mut attach_other(casts));
        }
    });
}

/// With a virtual machine that is not captured.
const ISTIO_ALONE: Ends = &[
    "15001", "15001", "15001", "service", "15006", "15006", "15006", "service", "service",
];
const MACHINE: Ends = &[
    "15001", "15001", "15001", "service", "15006", "15006", "15006", "15001", "15001",
];
const MACHINE_DIRECT: Ends = &[
    "service", "service", "service", "service", "app", "app", "app", "service", "service",
];

#[rstest]
#[case::attach(MACHINE_DIRECT, attach_machine, MACHINE)]
#[case::added(ISTIO_ALONE, attach_machine, MACHINE)]
#[case::removed(MACHINE, attach_istio, ISTIO_ALONE)]
#[case::detach(MACHINE, detach_first, MACHINE_DIRECT)]
fn virtual_machine(
    #[values(Kill, Refusal)] suffers: Suffers,
    #[case] old: Ends,
    #[case] command: fn(&[Cast]) -> Command,
    #[case] new: Ends,
) {
    let cast = || Cast::new(old, new, new).with_machine();
    endure_beside_another(cast, suffers, command, &move |casts| {
        if old == MACHINE {
            run(&mut attach_machine(casts));
        } else if old == ISTIO_ALONE {
            run(&mut attach_istio(casts));
        }
    });
}

/// Another pod stays attached throughout, so that the programs stay loaded.
fn endure_beside_another(
    cast: impl FnOnce() -> Cast + Send,
    suffers: Suffers,
    command: fn(&[Cast]) -> Command,
    prepare: &(dyn Fn(&[Cast]) + Sync),
) {
    bpffs::private(|| {
        let casts = vec![cast(), Cast::bystander(THIRD)];
        run(&mut attach(&casts[1].scene, &THIRD_OPTIONS));
        Case {
            casts,
            prepare,
            command: &command,
            repair: &command,
            restore: &|casts| run(&mut detach_first(casts)),
        }
        .endure(suffers, CHANGES);
    });
}

#[rstest]
#[case::attach(DIRECT, init, ISTIO)]
#[case::cleanup(ISTIO, clean_up, DIRECT)]
fn init_container(#[case] old: Ends, #[case] command: fn(&[Cast]) -> Command, #[case] new: Ends) {
    bpffs::private(|| {
        let casts = vec![Cast::new(old, new, new), Cast::bystander(THIRD)];
        run(&mut attach(&casts[1].scene, &THIRD_OPTIONS));
        Case {
            casts,
            prepare: &|casts| {
                if old == ISTIO {
                    run(&mut init(casts));
                }
            },
            command: &command,
            repair: &command,
            restore: &|casts| run(&mut clean_up(casts)),
        }
        .endure(Kill, CHANGES);
    });
}

fn init(casts: &[Cast]) -> Command {
    let container = Container::new(&casts[0].scene.pod, "init");
    let container = container.variable("ISTIO_DUAL_STACK", "true");
    container.call(&[
        "-p", "15001", "-z", "15006", "-u", "1337", "-i", "*", "-b", "*",
    ])
}

fn clean_up(casts: &[Cast]) -> Command {
    Container::new(&casts[0].scene.pod, "init").call(&["--cleanup-only"])
}

fn attach_tproxy(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &TPROXY_OPTIONS)
}

fn attach_machine(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &MACHINE_OPTIONS)
}

fn attach_istio(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &Options::ISTIO)
}

fn attach_other(casts: &[Cast]) -> Command {
    attach(&casts[0].scene, &OTHER_OPTIONS)
}

fn detach_first(casts: &[Cast]) -> Command {
    detach(&casts[0].scene)
}

/// Leaves behind what a pod leaves that is deleted while attached.
fn vanish() {
    let pod = Pod::new();
    loader::attach(&pod, &Options::ISTIO);
    drop(pod);
    bpffs::wait_until_cut_off();
}
