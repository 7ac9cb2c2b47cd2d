//! The tasks that start one of our binaries, built with optimisation.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{
    host::{self, Host, say},
    setup,
};

/// Arguments of `cargo xtask run`.
#[derive(Args)]
pub struct RunArgs {
    /// Run the balancer with this configuration instead of the demonstration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Further arguments for `necp ne` or the demonstration
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<OsString>,
}

/// Arguments of `cargo xtask load`.
#[derive(Args)]
pub struct LoadArgs {
    /// The interface to attach to
    #[arg(long, value_name = "IF")]
    iface: OsString,
    /// The configuration of the balancer
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Further arguments for `necp load`
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<OsString>,
}

/// Arguments of `cargo xtask unload`.
#[derive(Args)]
pub struct UnloadArgs {
    /// The interface to detach from
    #[arg(long, value_name = "IF")]
    iface: OsString,
    /// Further arguments for `necp unload`
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<OsString>,
}

/// Arguments of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Instead, measure what so many sessions cost the daemon
    #[arg(long, value_name = "N")]
    sessions: Option<usize>,
    /// Arguments for the benchmark
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<OsString>,
}

/// `cargo xtask run`.
pub fn run(host: &Host, args: &RunArgs) -> Result<ExitCode> {
    let Some(config) = &args.config else {
        host.require_root("the demonstration")?;
        prepare(host, &["necp", "necp-demo"])?;
        return become_binary(host, "necp-demo", &args.rest);
    };
    host.require_root("the balancer")?;
    let config = readable(config)?;
    prepare(host, &["necp"])?;
    become_binary(host, "necp", &words(&["ne", "--config"], [config], &args.rest))
}

/// `cargo xtask load`.
pub fn load(host: &Host, args: &LoadArgs) -> Result<ExitCode> {
    host.require_root("attaching a program")?;
    let config = readable(&args.config)?;
    prepare(host, &["necp"])?;
    become_binary(
        host,
        "necp",
        &words(&["load", "--iface"], [args.iface.clone(), "--config".into(), config], &args.rest),
    )
}

/// `cargo xtask unload`.
pub fn unload(host: &Host, args: &UnloadArgs) -> Result<ExitCode> {
    host.require_root("detaching a program")?;
    prepare(host, &["necp"])?;
    become_binary(host, "necp", &words(&["unload", "--iface"], [args.iface.clone()], &args.rest))
}

/// `cargo xtask bench`.
pub fn bench(host: &Host, args: &BenchArgs) -> Result<ExitCode> {
    host.require_root("the benchmark")?;
    if let Some(sessions) = args.sessions {
        prepare(host, &["necp", "necp-scale"])?;
        return become_binary(host, "necp-scale", &words(&["--sessions"], [sessions.to_string().into()], &args.rest));
    }
    prepare(host, &["necp-bench"])?;
    become_binary(host, "necp-bench", &args.rest)
}

fn prepare(host: &Host, binaries: &[&str]) -> Result<()> {
    setup::build(host)?;
    setup::traffic(host)?;
    for name in binaries {
        // One build each, so that the daemon is never compiled with what only the tests switch on.
        let package = if *name == "necp" { "necp-user" } else { "necp-tests" };
        say(format_args!("building {name}"));
        let mut build = host.cargo(["build", "--release", "--package", package, "--bin", name]);
        host::execute(&mut build, "the compiler's message stands above")?;
    }
    Ok(())
}

/// Replaces this process, so that signals and the terminal reach the binary itself.
fn become_binary(host: &Host, name: &str, args: &[OsString]) -> Result<ExitCode> {
    let mut command = host.command(host.binary("release", name));
    command.args(args).env("NECP_BIN", host.binary("release", "necp")).stdin(Stdio::inherit());
    if let Ok(dir) = std::env::current_dir() {
        command.current_dir(dir);
    }
    Err(command.exec()).with_context(|| format!("{name} did not start"))
}

fn readable(config: &Path) -> Result<OsString> {
    std::fs::File::open(config).with_context(|| format!("cannot read the configuration {}", config.display()))?;
    Ok(config.as_os_str().to_owned())
}

fn words(head: &[&str], middle: impl IntoIterator<Item = OsString>, rest: &[OsString]) -> Vec<OsString> {
    head.iter().map(OsString::from).chain(middle).chain(rest.iter().cloned()).collect()
}
