//! `necp load` and `necp unload`: the packet path on an interface, without a daemon.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::lock::InstanceLock;
use super::plane_config;
use crate::config::ne::{NeConfig, PIN};
use crate::plane::{Plane, attached, unload};

/// `necp load`: attach the packet path to an interface and leave it there, pinned.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Attaches in native mode, else (mode = \"auto\", the default) in generic mode, and says which. Until `necp ne` fills the
tables all packets pass untouched.

Example:
  necp load --iface eth0 --config /etc/necp/ne.toml && bpftool map dump pinned /sys/fs/bpf/necp/ports")]
pub struct LoadArgs {
    /// One of the configuration's `interfaces`
    #[arg(long, value_name = "IF")]
    pub iface: String,
    /// The configuration of `necp ne`
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// `necp unload`: detach the packet path from an interface; with the last one its maps go too.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  necp unload --iface eth0")]
pub struct UnloadArgs {
    /// The interface
    #[arg(long, value_name = "IF")]
    pub iface: String,
    /// The pin directory (`pin` in the configuration)
    #[arg(long, value_name = "DIR", default_value = PIN)]
    pub pin: PathBuf,
}

/// Attaches, and says how.
///
/// # Errors
/// A bad configuration, a daemon that runs on the pin directory, an interface that is not there, or the kernel's refusal.
pub fn load(args: &LoadArgs) -> anyhow::Result<String> {
    let config = NeConfig::read(&args.config)?;
    ensure!(
        config.interfaces.contains(&args.iface),
        "{} is not among `interfaces` of {}: add it there, or name one of {}",
        args.iface,
        args.config.display(),
        config.interfaces.join(", ")
    );
    let _lock = InstanceLock::acquire(&config.pin)?;
    let mut plane_config = plane_config(&config);
    let there = |name: &String| attached(&config.pin, name);
    plane_config.interfaces.retain(|name| *name == args.iface || there(name).unwrap_or(false));
    let plane = Plane::open(&plane_config)?;
    let ports = plane.ports();
    let port =
        ports.iter().find(|port| port.name == args.iface).context("the interface is among those just attached")?;
    let text = format!(
        "attached to {} in {} mode, pinned in {}{}",
        port.name,
        port.mode,
        config.pin.display(),
        if plane.reused() { "; the maps of an earlier daemon are kept" } else { "" }
    );
    plane.close(true)?;
    Ok(text)
}

/// Detaches, and says so.
///
/// # Errors
/// If it is not attached there, a daemon runs, or the pins cannot be removed.
pub fn unload_from(args: &UnloadArgs) -> anyhow::Result<String> {
    let missing = || {
        format!(
            "the packet path of {} is not on {}; `ip link` and `bpftool net` show what is",
            args.pin.display(),
            args.iface
        )
    };
    ensure!(Path::exists(&args.pin), missing());
    let _lock = InstanceLock::acquire(&args.pin)?;
    ensure!(unload(&args.pin, &args.iface)?, missing());
    Ok(format!("detached from {}", args.iface))
}
