//! `--decap`: where GRE is unwrapped, and from whom.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, ensure};
use sha1::{Digest as _, Sha1};

use super::settings::Settings;
use crate::client::NeAddress;
use crate::plane::decap::Decap;
use crate::plane::interface_name;
use crate::plane::neighbours::Neighbours;

/// Directory of the pins beside which every agent has its own.
const PINS: &str = "/sys/fs/bpf";

/// On which interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DecapOn {
    /// Those that lead to the network elements.
    Auto,
    /// This one.
    Interface(String),
}

impl FromStr for DecapOn {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "auto" { Self::Auto } else { Self::Interface(text.into()) })
    }
}

/// Begins to unwrap, as the settings say. What an agent that crashed has left on other interfaces is taken away.
///
/// # Errors
/// A network element that cannot be found, an interface that is not there, a kernel that refuses; then nothing is left.
pub async fn begin(settings: &Settings) -> anyhow::Result<Option<Decap>> {
    let pins = pins(&settings.lock);
    let begun = attach(settings, &pins).await;
    // Who cannot look there has left nothing there.
    if !matches!(begun, Ok(Some(_)))
        && pins.exists()
        && let Err(second) = Decap::remove_leftovers(&pins)
    {
        tracing::warn!("taking away what an earlier run has left of `--decap`: {second}");
    }
    begun
}

async fn attach(settings: &Settings, pins: &Path) -> anyhow::Result<Option<Decap>> {
    let Some(on) = &settings.decap else { return Ok(None) };
    let mut nes = BTreeSet::new();
    for ne in &settings.nes {
        nes.extend(addresses(ne).await?);
    }
    let interfaces = match on {
        DecapOn::Interface(name) => vec![name.clone()],
        DecapOn::Auto => towards(&nes).await?,
    };
    let sources: BTreeSet<IpAddr> = nes.iter().chain(&settings.decap_from).copied().collect();
    let sources: Vec<_> = sources.into_iter().collect();
    let decap = Decap::attach(pins, interfaces, &sources);
    Ok(Some(decap.context("`--decap` is not possible")?))
}

async fn addresses(ne: &NeAddress) -> anyhow::Result<Vec<IpAddr>> {
    let found = tokio::net::lookup_host((ne.host.as_str(), ne.port)).await;
    let found = found.with_context(|| format!("`--decap` must know the address of {}", ne.host))?;
    Ok(found.map(|address| address.ip().to_canonical()).collect())
}

/// The interfaces by which these are reached.
async fn towards(nes: &BTreeSet<IpAddr>) -> anyhow::Result<Vec<String>> {
    let (neighbours, _changes, driver) = Neighbours::open()?;
    let driver = tokio::spawn(driver);
    let mut interfaces = BTreeSet::new();
    for ne in nes {
        if let Some(route) = neighbours.route(*ne).await? {
            interfaces.insert(interface_name(route.ifindex)?);
        }
    }
    driver.abort();
    ensure!(
        !interfaces.is_empty(),
        "`--decap` finds no route to a network element: name the interface that its packets come by, as `--decap eth0`"
    );
    Ok(interfaces.into_iter().collect())
}

/// As many agents as there are locks, and no two with the same name: what is there is taken away at the start.
fn pins(lock: &Path) -> PathBuf {
    // The lock is held, so it is there.
    let lock = lock.canonicalize().unwrap_or_else(|_| lock.into());
    let readable: String =
        lock.display().to_string().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    // `/a/b` and `/a_b` are two.
    let digest = Sha1::digest(lock.as_os_str().as_encoded_bytes());
    Path::new(PINS)
        .join(format!("necp-se{readable}-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]))
}
