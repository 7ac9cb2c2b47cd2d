//! The `necp` command.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use necp_user::daemon::se::ctl::{drain, except, health};
use necp_user::daemon::{ne, se, status};
use tracing_subscriber::EnvFilter;

/// A layer-4 load balancer whose servers talk to it: NECP (draft-cerpa-necp-02) over eBPF/XDP.
#[derive(Debug, Parser)]
#[command(
    name = "necp",
    version,
    after_help = "\
Examples:
  necp ne --config /etc/necp/ne.toml            on the balancer
  necp se --ne 10.0.0.1 --serve tcp/80=l2       on each server
  necp status                                   on the balancer: who serves what, who gets what
  necp drain --wait 60                          on a server: no new flows, wait for those that are there

`necp COMMAND --help` has more."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, for the time of a command line")]
enum Command {
    /// Run the network element: the load balancer's daemon
    Ne(ne::Args),
    /// Run the server element: the agent of a server
    Se(se::Args),
    /// Show farms, services and servers of the network element on this host; on a server, its agent
    Status(status::Args),
    /// Add, delete and list flows that this server does not want
    Except(except::Args),
    /// Take no new flows on this server, until `necp resume`
    Drain(drain::DrainArgs),
    /// Take new flows again
    Resume(drain::ResumeArgs),
    /// Show or set the health that this server tells its network elements
    Health(health::Args),
    /// Attach the packet path to an interface, without a daemon
    Load(ne::load::LoadArgs),
    /// Detach the packet path from an interface
    Unload(ne::load::UnloadArgs),
}

/// How long what the agent has left behind may take to end.
const AGENT_END: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let command = Cli::parse().command;
    log_to_stderr();
    match command {
        Command::Ne(args) => ne::run(&args),
        Command::Se(args) => finish(agent(args).map(|()| None)),
        Command::Status(args) => status::run(&args),
        Command::Except(args) => except::run(args),
        Command::Drain(args) => drain::drain(&args),
        Command::Resume(args) => drain::resume(&args),
        Command::Health(args) => health::run(&args),
        Command::Load(args) => finish(ne::load::load(&args).map(Some)),
        Command::Unload(args) => finish(ne::load::unload_from(&args).map(Some)),
    }
}

fn agent(args: se::Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(se::run(args));
    // A health check may hang in the kernel, reading a file or asking for a name: that is no reason to stay.
    runtime.shutdown_timeout(AGENT_END);
    ended
}

fn finish(result: anyhow::Result<Option<String>>) -> ExitCode {
    match result {
        Ok(text) => {
            text.into_iter().for_each(|text| println!("{text}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("necp: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One line per event; `RUST_LOG` chooses which, `info` by default.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
}
