//! `necp drain` and `necp resume`.

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{Common, fail, fetch, tell};
use crate::daemon::se::protocol::{AgentStatus, Request};
use crate::daemon::se::settings::Seconds;

/// How often the connections are counted.
const POLL: Duration = Duration::from_millis(200);

/// `necp drain`: the agent sends STOP for everything that it serves; a network element that has acknowledged it sends no
/// new flow. Flows in progress, the session and the exceptions stay. The agent goes on, and a network element that comes
/// back meanwhile is told STOP too.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp drain                  no new flows; back at once
  necp drain --wait 300 && systemctl restart nginx && necp resume

The drain ends with `necp resume`, and with the agent.

Exit codes: 0 every network element has acknowledged it (and with --wait, no connection is left), 1 one has refused or is
away (it is named), connections are left, or no agent answers.")]
pub struct DrainArgs {
    /// Then wait for the TCP connections of the served ports to end, at most so many seconds
    #[arg(long, value_name = "SECS")]
    pub wait: Option<Seconds>,
    #[command(flatten)]
    common: Common,
}

/// `necp resume`: the agent starts its services again after `necp drain`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  necp resume

Exit codes: 0 every network element sends new flows again, 1 one has refused or is away (it is named), or no agent
answers.")]
pub struct ResumeArgs {
    #[command(flatten)]
    common: Common,
}

/// Asks the agent, prints, and says how it went.
pub fn drain(args: &DrainArgs) -> ExitCode {
    let told = tell(&args.common, &Request::Drain);
    let Some(limit) = args.wait else { return told };
    // An element that is away sends nothing that could be waited for.
    match wait(&args.common, limit.duration()) {
        Ok(()) => told,
        Err(error) => fail(error),
    }
}

/// Asks the agent, prints, and says how it went.
pub fn resume(args: &ResumeArgs) -> ExitCode {
    tell(&args.common, &Request::Resume)
}

fn wait(common: &Common, limit: Duration) -> Result<(), String> {
    let end = Instant::now() + limit;
    loop {
        let fetched = fetch::<AgentStatus>(&common.socket, &Request::Status, "status");
        let (_, status) = fetched.map_err(|error| error.to_string())?;
        if status.serving {
            return Err("the drain was ended by `necp resume`".into());
        }
        let left = status.connections.ok_or("the agent cannot count connections; its log may tell why")?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(format!("{left} connections are left after {} s", limit.as_secs_f64()));
        }
        sleep(POLL.min(end.saturating_duration_since(Instant::now())));
    }
}
