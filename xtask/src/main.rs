//! `cargo xtask`: everything a person does with this repository, with what it needs installed on the way.
//!
//! It depends on no other package of the workspace, so that it builds in seconds and can install what they need.

mod apt;
#[cfg(test)]
mod conformance;
mod fuzz;
mod host;
mod kernels;
mod lint;
mod report;
mod run;
mod setup;
mod source;
mod test;
mod tree;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use host::Host;

/// Build, run, load, test, lint and bench the NECP load balancer.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

const EXAMPLES: &str = "Examples:
  cargo xtask run                                   the demonstration: a farm in network namespaces (root)
  cargo xtask run --config ne.toml                  the balancer on this host's interfaces (root)
  cargo xtask load --iface eth0 --config ne.toml    attach the packet path only (root)
  cargo xtask test                                  every test, with a total (root)
  cargo xtask test --only unit session              unit tests whose name holds `session`
  cargo xtask test --kernels                        the kernel program on Debian's kernels in QEMU (root)
  cargo xtask fuzz session --seconds 600            the session machines against any peer
  cargo xtask fuzz frames --seconds 600             the packet path, in the kernel and on the host (root)
  cargo xtask lint                                  formatting, clippy for host and BPF, architecture";

#[derive(Subcommand)]
enum Task {
    /// Install what is missing: toolchain, rust-src, bpf-linker, Debian packages, the BPF file system
    Setup,
    /// Build and run the demonstration or, with --config, the balancer (root)
    Run(run::RunArgs),
    /// Attach the packet path to an interface (root)
    Load(run::LoadArgs),
    /// Detach the packet path from an interface (root)
    Unload(run::UnloadArgs),
    /// Run the tests and print a total
    Test(test::TestArgs),
    /// Check formatting, clippy for host and BPF code, and the architecture's invariants
    Lint,
    /// Fuzz the protocol core (the decoder, the sessions of both roles) and the packet path
    Fuzz(fuzz::FuzzArgs),
    /// Measure the cost per packet of the packet path (root)
    Bench(run::BenchArgs),
}

fn main() -> ExitCode {
    let task = Cli::parse().task;
    let outcome = Host::find().and_then(|host| match task {
        Task::Setup => setup::everything(&host).map(|()| ExitCode::SUCCESS),
        Task::Run(args) => run::run(&host, &args),
        Task::Load(args) => run::load(&host, &args),
        Task::Unload(args) => run::unload(&host, &args),
        Task::Test(args) => test::test(&host, &args),
        Task::Fuzz(args) => fuzz::fuzz(&host, &args),
        Task::Lint => lint::lint(&host),
        Task::Bench(args) => run::bench(&host, &args),
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
