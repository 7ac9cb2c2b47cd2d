//! `cargo xtask lint`: formatting, clippy for both targets, and the architecture's invariants.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{
    host::{Host, say},
    setup, tree,
};

/// Runs every check, also after one has failed.
pub fn lint(host: &Host) -> Result<ExitCode> {
    setup::build(host)?;
    let mut failed = Vec::new();
    let mut check = |name: &'static str, passed: bool, advice: &'static str| {
        say(format_args!("{name}: {}", if passed { "ok" } else { "FAILED" }));
        if !passed {
            failed.push((name, advice));
        }
    };
    let mut formatting = host.cargo(["fmt", "--all", "--check"]);
    check("formatting", passes(&mut formatting), "run `cargo fmt --all`");

    let broken = tree::check(&host.root)?;
    broken.iter().for_each(|offence| eprintln!("{offence}"));
    check(
        "architecture",
        broken.is_empty(),
        "move the code to where its kind belongs; xtask/src/tree.rs has the rules",
    );

    check("clippy for the host", passes(&mut clippy_host(host)), "see clippy's messages above");
    check("clippy for BPF", passes(&mut clippy_bpf(host)), "see clippy's messages above");

    for (name, advice) in &failed {
        eprintln!("xtask: {name} failed: {advice}");
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn clippy_host(host: &Host) -> Command {
    host.cargo(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])
}

fn clippy_bpf(host: &Host) -> Command {
    let mut clippy = host.cargo(["clippy", "--quiet", "--package", "necp-ebpf", "--target", "bpfel-unknown-none"]);
    clippy.args(["-Z", "build-std=core", "--target-dir"]);
    // A directory of its own: RUSTC_BOOTSTRAP is another environment for build scripts, which would all run again.
    clippy.arg(host.target.join("clippy-bpf")).args(["--", "-D", "warnings"]);
    // What necp-user's build script sets for the real build.
    clippy.env("RUSTC_BOOTSTRAP", "1");
    clippy.env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH));
    clippy
}

fn passes(command: &mut Command) -> bool {
    match command.status() {
        Ok(status) => status.success(),
        Err(error) => {
            say(format_args!("{} did not start: {error}", command.get_program().to_string_lossy()));
            false
        }
    }
}
