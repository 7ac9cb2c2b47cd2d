//! The client's side: asks the daemon over its Unix socket and prints the answer.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::{Status, render};
use crate::config::ne::SOCKET;
use crate::daemon::admin::{Unreachable, Who, ask};

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// `necp status`: farms, services and servers of the network element that runs on this host.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp status
  necp status --json | jq '.farms[].services[].servers[] | {address, state, slots_percent}'
  watch -n1 necp status --socket /run/necp/b.sock

Exit codes: 0 the daemon answered, 1 it did not.")]
pub struct Args {
    /// One JSON object instead of tables; its fields are stable
    #[arg(long)]
    pub json: bool,
    /// The daemon's socket (`socket` in its configuration)
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
}

/// Asks, prints, and says how it went: 0, or 1 if no daemon answered.
pub fn run(args: &Args) -> ExitCode {
    match fetch(&args.socket) {
        Ok((line, status)) => {
            let text = if args.json { line } else { render::tables(&status) };
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

/// The daemon's answer, as it came and as it is understood.
///
/// # Errors
/// See [`Unreachable`].
pub fn fetch(socket: &Path) -> Result<(String, Status), Unreachable> {
    let status = ask(Who::Ne, socket, &serde_json::json!({"command": "status"}), "status", PATIENCE)?;
    let text = format!("{status:#}");
    let status = serde_json::from_value(status).map_err(|error| Unreachable::Answer {
        who: Who::Ne,
        path: socket.into(),
        what: error.to_string(),
    })?;
    Ok((text, status))
}
