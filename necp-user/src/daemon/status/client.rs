//! The client's side: asks the daemon over its Unix socket and prints the answer.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;

use super::{Status, render};
use crate::config::ne::SOCKET;
use crate::daemon::admin::{Unreachable, Who, ask_as};
use crate::daemon::se::ctl;

/// How long the daemon may take to answer; after five seconds it says itself that it cannot.
const PATIENCE: Duration = Duration::from_secs(8);

/// `necp status`: farms, services and servers of the network element that runs on this host. On a host that has an agent
/// (`necp se`) and no network element: the agent, its network elements, health and exceptions.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp status
  necp status --json | jq '.farms[].services[].servers[] | {address, state, slots_percent}'
  watch -n1 necp status --socket /run/necp/b.sock
  necp status --agent --json | jq '.nes[] | {ne, state}'

Exit codes: 0 the daemon answered, 1 it did not.")]
pub struct Args {
    /// One JSON object instead of tables; its fields are stable
    #[arg(long)]
    pub json: bool,
    /// The daemon's socket (`socket` in its configuration) [default: /run/necp/ne.sock, with --agent /run/necp/se.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The agent of this host, and not the network element
    #[arg(long)]
    pub agent: bool,
}

/// Asks, prints, and says how it went: 0, or 1 if no daemon answered.
pub fn run(args: &Args) -> ExitCode {
    let socket = |default: &str| args.socket.clone().unwrap_or_else(|| default.into());
    // A script must get what it asked for, an operator what there is.
    let falls_back = args.socket.is_none() && !args.json;
    if args.agent || falls_back && !Path::new(SOCKET).exists() && Path::new(ctl::SOCKET).exists() {
        return ctl::status::run(&socket(ctl::SOCKET), args.json);
    }
    match fetch(&socket(SOCKET)) {
        Ok(status) => {
            let json = || serde_json::to_string_pretty(&status).unwrap_or_default();
            let text = if args.json { json() } else { render::tables(&status) };
            // Who reads on a closed pipe has seen enough.
            let _ = writeln!(io::stdout(), "{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("necp: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the daemon answers.
///
/// # Errors
/// See [`Unreachable`].
pub fn fetch(socket: &Path) -> Result<Status, Unreachable> {
    #[derive(Deserialize)]
    struct Answer {
        status: Status,
    }
    let answer: Answer = ask_as(Who::Ne, socket, &serde_json::json!({"command": "status"}), PATIENCE)?;
    Ok(answer.status)
}
