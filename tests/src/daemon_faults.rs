//! What the node's daemon leaves when it is killed after a call to the kernel that changes something, and how it goes on when it is
//! refused one. Connections meet the old state or the new one at every moment; a new daemon, or the same one by itself, gets there.

use std::{
    env, thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::{
    actor::Actor,
    api_server::ApiServer,
    bpffs::{Objects, State},
    daemon::Daemon,
    faults::{Ends, Suffers, converse, ends, establish, scene},
    kubernetes::object,
    patience::{amount, patience},
    pod::Pod,
    protocol::Identity,
    scene::Scene,
    tracer::Fault,
    traces::Traces,
};

/// At most so many calls of a piece of work suffer in one run; which ones, the seed says.
const MOST: u32 = 24;
const MOST_WHEN_SLOW: u32 = 6;
/// Chooses the calls; drawn and printed if it is not set.
const SEED: &str = "REDIRECT_FAULTS_SEED";

/// The daemon looks at everything when it starts, and then does only what it has cause for.
pub const QUIET: [&str; 2] = ["--resync", "1h"];

/// How an error is logged.
const WARNING: &str = "\"WARN\"";
/// How a capture is.
const ATTACHED: &str = "\"attached\"";
const LOOK: Duration = Duration::from_millis(10);
/// A daemon that has made no call for so long has no more to do.
const REST: Duration = Duration::from_millis(300);

/// How long a refused daemon is given for what it does by itself: its first pauses are half a second, a second and two.
const RECOVERY: Duration = Duration::from_secs(20);

/// One piece of work of the daemon: the pod's object changes.
pub struct Work {
    /// Before; `None` if the API does not know the pod yet.
    pub before: Option<&'static [(&'static str, &'static str)]>,
    /// The annotations afterwards; `None` if the pod has left the mesh.
    pub after: Option<&'static [(&'static str, &'static str)]>,
    /// What connections meet before.
    pub old: Ends,
    /// What they meet afterwards.
    pub new: Ends,
}

/// A pod, its API server, and the work.
struct Play {
    scene: Scene,
    server: ApiServer,
    work: Work,
    is_known: bool,
}

/// Has the daemon suffer at some calls of that work, one after another.
pub fn endure(work: Work, suffers: Suffers) {
    let mut play = Play {
        scene: scene(),
        server: ApiServer::start(),
        work,
        is_known: false,
    };
    let (old, new) = (play.work.old, play.work.new);
    let mut daemon = play.daemon();
    play.rewind(&daemon);
    let rest = play.settled(&daemon, old);
    daemon.tracer().arm(None);
    play.go();
    let wanted = play.settled(&daemon, new);
    let calls = daemon.tracer().calls();
    let chosen = choose(&calls, suffers);
    eprintln!("{suffers:?} at {} of {} calls", chosen.len(), calls.len());
    assert!(chosen.len() > 3, "{calls:?}");

    let (mut wrong, mut told) = (Vec::new(), 0);
    for &point in &chosen {
        play.rewind(&daemon);
        play.until(&daemon, old, &rest).unwrap();
        establish(&mut play.scene);
        let fault = suffers.fault(point);
        let result = match suffers {
            Suffers::Kill => play.kill(&mut daemon, fault, &wanted),
            Suffers::Refusal => play.refuse(&daemon, fault, &wanted, &mut told),
        };
        let result = result.and_then(|()| converse(&mut play.scene, "afterwards"));
        if let Err(error) = result {
            let log = daemon.log().join("\n");
            wrong.push(format!("{fault:?}, {}: {error}\n{log}", calls[point - 1]));
            assert!(wrong.len() < 4, "and so on:\n{}", wrong.join("\n"));
            drop(daemon);
            daemon = play.daemon();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    eprintln!("{suffers:?}: {told} of {} were told", chosen.len());
    // Nearly all are told when a pod appears, and a third when it leaves the mesh.
    assert!(
        suffers == Suffers::Kill || told * 10 > chosen.len(),
        "{told} were told"
    );
}

/// Which calls suffer, counted from 1: at equal distances among those that matter.
fn choose(calls: &[String], suffers: Suffers) -> Vec<usize> {
    let seed = env::var(SEED).map_or_else(
        |_| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.subsec_micros() as usize
        },
        |text| text.parse().unwrap(),
    );
    let points = (1..=calls.len()).filter(|point| suffers.minds(&calls[point - 1]));
    let points: Vec<usize> = points.collect();
    let step = points
        .len()
        .div_ceil(amount(MOST, MOST_WHEN_SLOW) as usize)
        .max(1);
    eprintln!("{SEED}={seed}: one of {step}");
    points.into_iter().skip(seed % step).step_by(step).collect()
}

impl Play {
    fn daemon(&self) -> Daemon {
        let daemon = Daemon::start(&self.server, &QUIET).traced();
        daemon.until_ready();
        daemon
    }

    /// The pod's object; without annotations it has left the mesh.
    fn object(&self, annotations: Option<&[(&str, &str)]>) -> Value {
        let mut object = object(&self.scene.pod, annotations.unwrap_or_default());
        if annotations.is_none() {
            object["metadata"]["annotations"] = json!({});
        }
        object["spec"]["containers"][1]["env"] =
            json!([{"name": "ISTIO_DUAL_STACK", "value": "true"}]);
        object
    }

    /// Lets the work begin.
    fn go(&mut self) {
        self.server.apply(&self.object(self.work.after));
        self.is_known = true;
    }

    /// Brings the pod back to where it was before the work.
    fn rewind(&mut self, daemon: &Daemon) {
        if self.is_known {
            // Out of the mesh first: a pod that is deleted while it runs stays captured.
            self.server.apply(&self.object(None));
            daemon.until_metric("redirect_pods{state=\"skipped\"}", 1.0);
        }
        match self.work.before {
            Some(annotations) => self.server.apply(&self.object(Some(annotations))),
            None if self.is_known => self.server.delete(&self.object(None)),
            None => return,
        }
        self.is_known = self.work.before.is_some();
    }

    /// What there is once the pod's connections meet those ends and the daemon rests.
    fn settled(&mut self, daemon: &Daemon, wanted: Ends) -> Traces {
        daemon.until("the work is done", || {
            (ends(&mut self.scene, None).ok()? == wanted).then_some(())
        });
        let mut calls = 0;
        loop {
            thread::sleep(patience(REST));
            let now = daemon.tracer().calls().len();
            if now == calls {
                return Traces::read([&self.scene]);
            }
            calls = now;
        }
    }

    /// Waits until the daemon has got there.
    fn until(&mut self, daemon: &Daemon, met: Ends, wanted: &Traces) -> Result<(), String> {
        let deadline = Instant::now() + patience(RECOVERY);
        loop {
            let now = ends(&mut self.scene, None)?;
            let mut differences = Vec::new();
            if now == met {
                daemon.tracer().hold();
                differences = Traces::read([&self.scene]).differences(wanted);
                daemon.tracer().release();
                if differences.is_empty() {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                return Err(format!("met in the end: {now:?}; {differences:?}"));
            }
            thread::sleep(LOOK);
        }
    }

    /// Nothing moves now: it is all old, or all new.
    fn is_whole(&mut self) -> Result<(), String> {
        let met = ends(&mut self.scene, None)?;
        if met != self.work.old && met != self.work.new {
            return Err(format!("half captured: {met:?}"));
        }
        converse(&mut self.scene, "disturbed")
    }

    fn kill(&mut self, daemon: &mut Daemon, fault: Fault, wanted: &Traces) -> Result<(), String> {
        let tracer = daemon.tracer();
        tracer.arm(Some(fault));
        self.go();
        let deadline = Instant::now() + patience(RECOVERY);
        while !tracer.has_ended() {
            if Instant::now() > deadline {
                return Err(format!("not so many calls: {:?}", tracer.calls()));
            }
            thread::sleep(LOOK);
        }
        self.is_whole()?;
        *daemon = self.daemon();
        self.until(daemon, self.work.new, wanted)
    }

    /// The daemon says what it was refused, or can do without it.
    fn refuse(
        &mut self,
        daemon: &Daemon,
        fault: Fault,
        wanted: &Traces,
        told: &mut usize,
    ) -> Result<(), String> {
        let (errors, lines) = (errors(daemon), daemon.log().len());
        daemon.tracer().arm(Some(fault));
        self.go();
        let deadline = Instant::now() + patience(RECOVERY);
        loop {
            if daemon.tracer().has_struck()
                && daemon.log()[lines..]
                    .iter()
                    .any(|line| line.contains(WARNING))
            {
                daemon.tracer().hold();
                let whole = self.is_whole();
                daemon.tracer().release();
                whole?;
                if self::errors(daemon) <= errors {
                    return Err("no metric tells of it".to_owned());
                }
                *told += 1;
                break;
            }
            if daemon.tracer().has_struck() && ends(&mut self.scene, None)? == self.work.new {
                break;
            }
            if Instant::now() > deadline {
                return Err("nothing happens".to_owned());
            }
            thread::sleep(LOOK);
        }
        self.until(daemon, self.work.new, wanted)
    }
}

/// What the kernel takes away while the daemon attaches a pod.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Vanishes {
    /// Its processes and its cgroup.
    Cgroup,
    /// Its processes and its network namespace.
    Namespace,
    /// All.
    Both,
}

/// Has a pod vanish at some calls of its attachment by the daemon: it is forgotten, and nothing is left of it.
pub fn vanish(vanishes: Vanishes) {
    let server = ApiServer::start();
    let daemon = Daemon::start(&server, &QUIET).traced();
    daemon.until_ready();
    let (rest, loaded) = (State::read(), Objects::loaded());
    // The first one is captured, and vanishes then.
    let mut points = vec![None];
    while let Some(call) = points.pop() {
        let pod = Pod::new();
        let process = Actor::start(
            &pod.netns.path(),
            Some(pod.cgroup.child("app")),
            Identity::APP,
        );
        let object = object(&pod, &[]);
        daemon.tracer().arm(call.map(|call| Fault::Hold { call }));
        server.apply(&object);
        if let Some(call) = call {
            daemon.until(&format!("call {call}"), || {
                daemon.tracer().has_struck().then_some(())
            });
        } else {
            // Not by the metrics: to tell them, the daemon reads its maps.
            daemon.until("it is attached", || {
                let log = daemon.log();
                log.iter().any(|line| line.contains(ATTACHED)).then_some(())
            });
            let calls = daemon.tracer().calls();
            points.extend(choose(&calls, Suffers::Kill).into_iter().map(Some));
        }

        drop(process);
        let Pod { netns, cgroup, .. } = pod;
        let (mut netns, mut cgroup) = (Some(netns), Some(cgroup));
        if vanishes != Vanishes::Namespace {
            cgroup = None;
        }
        if vanishes != Vanishes::Cgroup {
            netns = None;
        }
        daemon.tracer().release();
        server.delete(&object);
        daemon.until_metric("redirect_pods{state=\"captured\"}", 0.0);
        let deadline = Instant::now() + patience(RECOVERY);
        loop {
            daemon.tracer().hold();
            let left = State::read().differences(&rest);
            daemon.tracer().release();
            let alive = Objects::loaded().without(&loaded);
            if left.is_empty() && alive.is_empty() {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{vanishes:?} at {call:?}: {left:?} {alive:?}\n{}",
                daemon.log().join("\n")
            );
            thread::sleep(LOOK);
        }
        drop((netns, cgroup));
    }
}

/// How many errors the metrics count.
fn errors(daemon: &Daemon) -> f64 {
    let (_, text) = daemon.get("/metrics").unwrap();
    let lines = text.lines();
    lines
        .filter(|line| line.starts_with("redirect_errors_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}
