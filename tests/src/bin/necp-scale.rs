//! `cargo xtask bench --sessions N`: what thousands of sessions cost the network element.

use std::{env, time::Duration};

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use necp_tests::{floor::Floor, process, scale::Scale};

/// Measures the network element with many sessions: CPU, memory, and the time until all are back after a restart.
///
/// Every session is a server of its own address, on one link with the balancer, that starts its services and answers
/// keepalives. Needs root.
///
/// The floor is what as many plain TCP sessions cost that exchange messages of the same sizes at the same rates: measured in the
/// same bed, on the same runtime, with the same socket options, right before. The figure over it says what the daemon adds,
/// whatever the machine; on veth both include what the peers' kernel does to receive.
#[derive(Parser)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  cargo xtask bench --sessions 10000\n  cargo xtask bench --sessions 10000 -- --services 4 --keys\n  necp-scale --sessions 2000 --services 4 --no-floor"
)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Sessions
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// Services that each session starts
    #[arg(long, default_value_t = 1)]
    services: u16,
    /// Seconds over which CPU time is measured
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Seconds between two keepalives
    #[arg(long, default_value_t = 5.0)]
    keepalive: f64,
    /// All of them prove themselves with a key
    #[arg(long)]
    keys: bool,
    /// Without the floor, which takes as long as the rest
    #[arg(long)]
    no_floor: bool,
}

#[derive(Subcommand)]
enum Part {
    /// The floor's process in the network element's namespace
    #[command(hide = true)]
    Floor(Floor),
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(Part::Floor(floor)) = args.part {
        return floor.serve();
    }
    process::hide_output();
    let scale = Scale {
        sessions: args.sessions,
        services: args.services,
        watch: Duration::from_secs(args.seconds),
        keepalive: Duration::from_secs_f64(args.keepalive),
        keys: args.keys,
        floor: if args.no_floor { None } else { Some(env::current_exe()?) },
    };
    let figures = scale.run()?;
    let keys = if args.keys { ", with a key" } else { "" };
    println!("{} sessions of {} service(s), keepalive {} s{keys}", args.sessions, args.services, args.keepalive);
    println!("{figures}");
    ensure!(figures.lost == 0, "sessions were lost without a cause");
    Ok(())
}
