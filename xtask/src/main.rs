//! What a developer types: `cargo xtask setup | build | test | fuzz | conformance | soak | deny | demo | bench | image | vm`.

mod bench;
mod cargo;
mod conformance;
mod debian;
mod demo;
mod deny;
mod fuzz;
mod image;
mod preflight;
mod setup;
mod soak;
mod test;
mod ui;
#[cfg(test)]
mod unsafe_code;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Sets up, builds, tests and shows redirect"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing: packages, rust-src, bpf-linker, Envoy, Helm and kubectl
    Setup,
    /// Build the eBPF object and every program
    Build {
        /// With optimisations
        #[arg(long)]
        release: bool,
    },
    /// Check formatting and lints, run unit, property and kernel-level tests, with the image (as root)
    Test(test::Options),
    /// Feed every parser and conversion with random input, as long as wanted
    Fuzz(fuzz::Options),
    /// Check licences, sources and known weaknesses of every dependency with cargo-deny
    Deny,
    /// Make random connections under random options, beside real iptables, and compare (as root)
    Conformance(conformance::Options),
    /// Put pods under load while their capture changes at random, and check every connection (as root)
    Soak(soak::Options),
    /// Capture a pod with a real Envoy and show where its connections go (as root)
    Demo(demo::Options),
    /// Measure what capture costs, beside Istio's iptables rules (as root)
    Bench(bench::Options),
    /// Build the container image, without a container engine (as root)
    Image(image::Options),
    /// Boot another kernel under qemu, with redirect in it, and run something there
    #[command(subcommand)]
    Vm(vm::Task),
    #[command(name = "vm-init", hide = true)]
    VmInit,
    #[command(name = "bench-agent", hide = true)]
    BenchAgent(bench::Agent),
    /// The demo's processes inside the pod
    #[command(flatten)]
    Inside(demo::Inside),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().task {
        Task::Setup => setup::run(),
        Task::Build { release } => cargo::build(release),
        Task::Test(options) => test::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Deny => deny::run(),
        Task::Conformance(options) => conformance::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Demo(options) => demo::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Image(options) => image::run(&options),
        Task::Vm(task) => match task.run() {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Task::VmInit => vm::init(),
        Task::BenchAgent(agent) => agent.run(),
        Task::Inside(part) => part.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            anstream::eprintln!("{style}error:{style:#} {error:#}", style = ui::BAD);
            ExitCode::FAILURE
        }
    }
}
