//! `necp health`.

use std::process::ExitCode;

use super::{Common, fail, fetch, print, render};
use crate::daemon::se::protocol::{Auto, HealthSetting, HealthStatus, Request};

/// `necp health`: show the Health Index that the agent answers with, or set it in place of its source: 100 is perfect, 1
/// barely able, 0 asks for no new flows. A network element learns it with its next keepalive (5 s unless configured).
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  necp health                 what is answered, and where it comes from
  necp health 40              40, whatever the source says
  necp health auto            what the source says, again

What is set ends with the agent.

Exit codes: 0 done, 1 no agent answers.")]
pub struct Args {
    /// 0 to 100, or `auto`
    #[arg(value_name = "INDEX", value_parser = parse)]
    set: Option<HealthSetting>,
    #[command(flatten)]
    common: Common,
}

fn parse(text: &str) -> Result<HealthSetting, String> {
    if text == "auto" {
        return Ok(HealthSetting::Auto(Auto::Auto));
    }
    let index = text.parse().ok().filter(|index| *index <= 100);
    index
        .map(HealthSetting::Index)
        .ok_or_else(|| "a health index is from 0 (no new flows) to 100 (perfect), or `auto`".into())
}

/// Asks the agent, prints, and says how it went.
pub fn run(args: &Args) -> ExitCode {
    match fetch::<HealthStatus>(&args.common.socket, &Request::Health { set: args.set }, "health") {
        Ok((value, health)) => {
            print(&if args.common.json { format!("{value:#}") } else { render::health(&health) });
            ExitCode::SUCCESS
        }
        Err(error) => fail(error),
    }
}
