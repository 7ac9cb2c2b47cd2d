//! The commands that speak to the agent over its socket: `necp except`, `drain`, `resume`, `health`, `status --agent`.
//!
//! None of them opens a session of its own: a second one from the same address would take the agent's away (§5.4).

pub mod drain;
pub mod except;
pub mod health;
mod render;
pub mod status;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::agent::ANSWER_WITHIN;
use super::protocol::{NeAnswer, Outcome, Request};
use crate::daemon::admin::{Unreachable, Who, ask};

/// Where the agent's socket is unless told otherwise.
pub const SOCKET: &str = "/run/necp/se.sock";

/// Longer than the agent waits for its network elements.
const PATIENCE: Duration = ANSWER_WITHIN.saturating_add(Duration::from_secs(5));

/// What all these commands take.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// JSON instead of a table; its fields are stable
    #[arg(long)]
    pub json: bool,
    /// The agent's socket (beside its --lock unless it was started with --socket)
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
}

/// What an agent answered under `key`, as it came and as it is understood.
fn fetch<T: DeserializeOwned>(socket: &Path, request: &Request, key: &str) -> Result<(Value, T), Unreachable> {
    let answer =
        |what: serde_json::Error| Unreachable::Answer { who: Who::Se, path: socket.into(), what: what.to_string() };
    let request = serde_json::to_value(request).map_err(answer)?;
    let value = ask(Who::Se, socket, &request, key, PATIENCE)?;
    let understood = serde_json::from_value(value.clone()).map_err(answer)?;
    Ok((value, understood))
}

/// Sends a request that every network element answers, shows the answers, and says whether all have done it.
fn tell(common: &Common, request: &Request) -> ExitCode {
    match fetch::<Vec<NeAnswer>>(&common.socket, request, "answers") {
        Ok((value, answers)) => {
            let text = if common.json { format!("{value:#}") } else { render::answers(&answers) };
            print(&text);
            judge(&answers)
        }
        Err(error) => fail(error),
    }
}

/// Failure if a network element has not done what was asked; says which.
fn judge(answers: &[NeAnswer]) -> ExitCode {
    let done = |answer: &&NeAnswer| matches!(answer.result, Outcome::Accepted | Outcome::OtherFamily);
    let failed: Vec<&str> = answers.iter().filter(|answer| !done(answer)).map(|answer| answer.ne.as_str()).collect();
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    fail(format_args!("not done by {} of {}: {}", failed.len(), answers.len(), failed.join(", ")))
}

fn print(text: &str) {
    // Who reads on a closed pipe has seen enough.
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
}

fn fail(error: impl std::fmt::Display) -> ExitCode {
    eprintln!("necp: {error}");
    ExitCode::FAILURE
}
