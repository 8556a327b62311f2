//! `cargo xtask bench`: what capture costs, against a direct dial of the proxy's listener and against Istio's iptables rules.
//!
//! Every kind has its own pod and peer, alike but for what captures. Short rounds go through all kinds in turn, each
//! round beginning with another one, and only ratios within one round are compared: what disturbs the machine for
//! longer than a round disturbs all kinds. What attaching takes is measured first, by itself.

mod agent;
mod attach;
mod machine;
mod pod;
mod report;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use clap::{Args, ValueEnum};

use crate::ui::{self, Mark};
use crate::{cargo, preflight};
pub use agent::Agent;
use agent::Work;
use pod::Pod;

const PROXY_ID: u32 = 1337;
const OUTBOUND_PORT: u16 = 15001;
const INBOUND_PORT: u16 = 15006;
const POD_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
const PEER_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
/// Nothing listens there: a connection that succeeds was captured.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const APP_PORT: u16 = 8080;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[derive(Args)]
pub struct Options {
    /// Use this program instead of building `redirect`
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// How often to go through all kinds
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Connections per kind, measure and round
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=4000))]
    connects: u64,
    /// 1-byte round trips per kind and round
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    trips: u64,
    /// MiB sent per kind and round
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    mebibytes: u64,
    /// Kinds to measure beside `direct`
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["redirect", "iptables-nft", "iptables-legacy"])]
    kinds: Vec<Kind>,
}

/// What captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Nothing: the client dials the proxy's listener.
    Direct,
    Redirect,
    IptablesNft,
    IptablesLegacy,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Redirect => "redirect",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    OutboundConnect,
    InboundConnect,
    RoundTrip,
    Bulk,
}

impl Measure {
    const ALL: [Self; 4] = [
        Self::OutboundConnect,
        Self::InboundConnect,
        Self::RoundTrip,
        Self::Bulk,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::OutboundConnect => "outbound connect",
            Self::InboundConnect => "inbound connect",
            Self::RoundTrip => "round trips",
            Self::Bulk => "bulk",
        }
    }

    fn work(self, options: &Options) -> Work {
        match self {
            Self::OutboundConnect | Self::InboundConnect => Work::Connect(options.connects),
            Self::RoundTrip => Work::RoundTrip(options.trips),
            Self::Bulk => Work::Bulk(options.mebibytes),
        }
    }

    fn target(self, kind: Kind) -> SocketAddr {
        match (self, kind) {
            (Self::InboundConnect, Kind::Direct) => (POD_IP, INBOUND_PORT).into(),
            (Self::InboundConnect, _) => (POD_IP, APP_PORT).into(),
            (_, Kind::Direct) => (Ipv4Addr::LOCALHOST, OUTBOUND_PORT).into(),
            (_, _) => (ELSEWHERE, 80).into(),
        }
    }
}

/// One kind's numbers for one measure: nanoseconds, one for each round.
struct Samples {
    kind: Kind,
    measure: Measure,
    nanoseconds: Vec<u64>,
}

pub fn run(options: &Options) -> Result<()> {
    let cgroup2 = preflight::check("bench")?;
    let redirect = match &options.binary {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no program at {}", path.display()))?,
        None => {
            ui::heading("build");
            cargo::build(true)?;
            cargo::built_binary(true)?
        }
    };
    // Children in the foreground get the signal too: reading from them fails, and the guards clean up.
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))
        .context("cannot catch Ctrl-C")?;

    ui::heading("attaching");
    let attach = attach::measure(&cgroup2, &redirect, &options.kinds)?;
    attach::print(&attach);

    ui::heading("pods");
    let mut pods = vec![Pod::create(Kind::Direct, &cgroup2, &redirect)?];
    for kind in options.kinds.iter().copied().filter(|k| *k != Kind::Direct) {
        match kind {
            Kind::IptablesNft | Kind::IptablesLegacy if !pod::has_restore(kind) => {
                ui::step(Mark::Warn, kind.name(), "not installed: left out");
            }
            _ => pods.push(Pod::create(kind, &cgroup2, &redirect)?),
        }
    }
    for pod in &pods {
        ui::step(Mark::Did, pod.kind().name(), &pod.place());
    }

    ui::heading("measuring");
    let load_before = machine::load();
    let samples = measure(&mut pods, options)?;
    drop(pods);
    let machine = machine::describe()?;
    let load = format!("load {load_before} before, {} after", machine::load());

    ui::heading("results");
    anstream::println!("{machine}; {load}");
    let rows = report::rows(&samples);
    report::print(&rows, options.rounds);
    let path = cargo::workspace()?.target.join("bench.json");
    let json = report::json(&rows, &samples, &attach, &machine, &load);
    fs::write(&path, serde_json::to_vec_pretty(&json)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    anstream::println!("written to {}", path.display());
    Ok(())
}

fn measure(pods: &mut [Pod], options: &Options) -> Result<Vec<Samples>> {
    let mut samples: Vec<Samples> = Vec::new();
    for measure in Measure::ALL {
        for pod in pods.iter() {
            samples.push(Samples {
                kind: pod.kind(),
                measure,
                nanoseconds: Vec::new(),
            });
        }
    }
    // Round 0 warms caches and neighbour tables up, and is thrown away.
    for round in 0..=options.rounds as usize {
        for measure in Measure::ALL {
            for turn in 0..pods.len() {
                if INTERRUPTED.load(Ordering::Relaxed) {
                    bail!("interrupted");
                }
                let index = (round + turn) % pods.len();
                let pod = &mut pods[index];
                let nanoseconds = pod.run(measure, measure.work(options))?;
                let kind = pod.kind();
                if round > 0 {
                    let ours = |s: &&mut Samples| s.kind == kind && s.measure == measure;
                    samples
                        .iter_mut()
                        .find(ours)
                        .context("a kind that was not planned")?
                        .nanoseconds
                        .push(nanoseconds);
                }
            }
        }
    }
    Ok(samples)
}
