//! `necp status --agent`.

use std::path::Path;
use std::process::ExitCode;

use super::{fail, fetch, print, render};
use crate::daemon::se::protocol::{AgentStatus, Request};

/// Asks the agent, prints, and says how it went.
pub fn run(socket: &Path, json: bool) -> ExitCode {
    match fetch::<AgentStatus>(socket, &Request::Status, "status") {
        Ok((value, status)) => {
            print(&if json { format!("{value:#}") } else { render::status(&status) });
            ExitCode::SUCCESS
        }
        Err(error) => fail(error),
    }
}
