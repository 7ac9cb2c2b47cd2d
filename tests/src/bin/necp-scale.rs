//! `cargo xtask bench --sessions N`: what thousands of sessions cost the network element.

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use necp_tests::{process, scale::Scale};

/// Measures the network element with many sessions: CPU, memory, and the time until all are back after a restart.
///
/// Every session is a server of its own address, on one link with the balancer, that starts its services and answers
/// keepalives. Needs root.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  cargo xtask bench --sessions 10000\n  cargo xtask bench --sessions 10000 -- --services 4 --keys\n  necp-scale --sessions 2000 --services 4"
)]
struct Args {
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
}

fn main() -> Result<()> {
    let args = Args::parse();
    process::hide_output();
    let scale = Scale {
        sessions: args.sessions,
        services: args.services,
        watch: Duration::from_secs(args.seconds),
        keepalive: Duration::from_secs_f64(args.keepalive),
        keys: args.keys,
    };
    let figures = scale.run()?;
    let keys = if args.keys { ", with a key" } else { "" };
    println!("{} sessions of {} service(s), keepalive {} s{keys}", args.sessions, args.services, args.keepalive);
    println!("{figures}");
    ensure!(figures.lost == 0, "sessions were lost without a cause");
    Ok(())
}
