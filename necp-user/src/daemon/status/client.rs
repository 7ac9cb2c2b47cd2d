//! The client's side: asks the daemon over its Unix socket and prints the answer.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use super::{Status, render};
use crate::config::ne::SOCKET;

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

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum Unreachable {
    /// Nobody listens.
    #[error(
        "no network element answers at {}: {source}; is `necp ne` running? If its configuration has another `socket`, \
         name it with --socket PATH{}", path.display(), as_root(source)
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("the network element at {} did not answer as it should: {what}; is it of another version? Its log may tell more", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What came, or did not.
        what: String,
    },
}

fn as_root(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::PermissionDenied { " (the socket is for root only)" } else { "" }
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
    let connect = |source| Unreachable::Connect { path: socket.into(), source };
    let failed = |what: String| Unreachable::Answer { path: socket.into(), what };
    let mut stream = UnixStream::connect(socket).map_err(connect)?;
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE))).map_err(connect)?;
    stream.write_all(b"{\"command\":\"status\"}\n").map_err(|error| failed(error.to_string()))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(|error| failed(error.to_string()))?;
    let mut answer: serde_json::Value = serde_json::from_str(&line).map_err(|error| failed(error.to_string()))?;
    if let Some(error) = answer.get("error") {
        return Err(failed(error.to_string()));
    }
    let status = answer.get_mut("status").map(serde_json::Value::take).unwrap_or_default();
    let text = serde_json::to_string_pretty(&status).map_err(|error| failed(error.to_string()))?;
    let status = serde_json::from_value(status).map_err(|error| failed(error.to_string()))?;
    Ok((text, status))
}
