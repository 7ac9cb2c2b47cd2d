//! The demonstration of `cargo xtask run`: see [`necp_tests::demo`].

use std::process::ExitCode;

use clap::Parser;

/// A farm in network namespaces: servers join, fall ill, drain, lose their agents and vanish, while clients watch
///
/// It takes about a minute, needs root and no configuration, and removes what it made however it ends.
#[derive(Parser)]
#[command(name = "necp-demo", after_help = EXAMPLES)]
struct Args {
    /// Print lines instead of taking the terminal
    #[arg(long)]
    plain: bool,
}

const EXAMPLES: &str = "Examples:
  cargo xtask run               the play, with a live view
  cargo xtask run -- --plain    the same in plain lines

Exit codes: 0 every \"must\" of the summary holds, 1 one does not, or the play could not go on.";

fn main() -> ExitCode {
    let args = Args::parse();
    necp_tests::demo::run(args.plain).unwrap_or_else(|error| {
        eprintln!("necp-demo: {error:#}");
        ExitCode::FAILURE
    })
}
