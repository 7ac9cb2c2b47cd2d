//! The program on interfaces: attached, replaced, detached; its links pinned beside the maps.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use aya::programs::{
    Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    xdp::XdpLink,
};
use necp_ebpf::abi::names;

use super::{PlaneError, load::LoadedPort};

/// How to attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver, or not at all.
    Native,
    /// In the kernel's generic path: any driver, several times slower.
    Generic,
    /// In the driver, else in the generic path.
    #[default]
    Auto,
}

/// How it was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// In the kernel's generic path.
    Generic,
}

impl fmt::Display for AttachedMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// Puts the program on an interface: in place of the one on the pinned link, or on a new link, which is pinned.
pub(super) fn attach(
    program: &mut Xdp,
    pin: &Path,
    name: &str,
    ifindex: u32,
    mode: AttachMode,
) -> Result<AttachedMode, PlaneError> {
    for attached in [AttachedMode::Native, AttachedMode::Generic] {
        let path = link_path(pin, name, ifindex, attached);
        let wanted = !matches!(
            (mode, attached),
            (AttachMode::Native, AttachedMode::Generic) | (AttachMode::Generic, AttachedMode::Native)
        );
        if let Ok(link) = PinnedLink::from_pin(&path) {
            if wanted && replace(program, link).is_ok() {
                return Ok(attached);
            }
            // Of another mode, or of an interface that is gone.
            remove(&path)?;
        }
    }
    let tries: &[AttachedMode] = match mode {
        AttachMode::Native => &[AttachedMode::Native],
        AttachMode::Generic => &[AttachedMode::Generic],
        AttachMode::Auto => &[AttachedMode::Native, AttachedMode::Generic],
    };
    let mut refusals = Vec::new();
    for &attached in tries {
        match attach_new(program, ifindex, attached, &link_path(pin, name, ifindex, attached)) {
            Ok(()) => return Ok(attached),
            Err(error) => refusals.push(format!("{attached}: {error:#}")),
        }
    }
    let busy = if refusals.iter().any(|text| text.contains("busy")) {
        "; another XDP program is on it: see `bpftool net`"
    } else {
        ""
    };
    Err(PlaneError::Bpf {
        what: format!("attaching to {name}"),
        source: anyhow::anyhow!("{}{busy}", refusals.join("; ")),
    })
}

/// Exchanges the program on a link; no packet is missed.
fn replace(program: &mut Xdp, link: PinnedLink) -> anyhow::Result<()> {
    let link = XdpLink::try_from(FdLink::from(link))?;
    let id = program.attach_to_link(link)?;
    // The pin holds the link from here on.
    drop(program.take_link(id)?);
    Ok(())
}

fn attach_new(program: &mut Xdp, ifindex: u32, mode: AttachedMode, path: &Path) -> anyhow::Result<()> {
    let mode = match mode {
        AttachedMode::Native => XdpMode::Driver,
        AttachedMode::Generic => XdpMode::Skb,
    };
    let id = program.attach_to_if_index(ifindex, mode).map_err(|error| {
        // aya says which call failed and hides why.
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        anyhow::anyhow!("{error}{}", reason.map(|r| format!(": {r}")).unwrap_or_default())
    })?;
    let link = FdLink::try_from(program.take_link(id)?)?;
    drop(link.pin(path)?);
    Ok(())
}

/// Where a link is pinned. Interface names may have dots, names on a BPF file system may not; the index tells them apart.
fn link_path(pin: &Path, name: &str, ifindex: u32, mode: AttachedMode) -> PathBuf {
    pin.join(format!("link-{}-{ifindex}-{mode}", name.replace('.', "_")))
}

/// The pinned links, with the name of each pin.
fn links(pin: &Path) -> Result<Vec<(String, PathBuf)>, PlaneError> {
    let entries = match fs::read_dir(pin) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(PlaneError::io(format!("reading {}", pin.display()))(error)),
    };
    let names = entries.flatten().map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()));
    Ok(names.filter(|(name, _)| name.starts_with("link-")).collect())
}

/// Detaches the program from interfaces that it is no longer wanted on.
pub(super) fn detach_others(pin: &Path, ports: &[LoadedPort]) -> Result<(), PlaneError> {
    let wanted: Vec<_> = ports.iter().map(|p| link_path(pin, &p.info.name, p.info.ifindex, p.info.mode)).collect();
    for (_, path) in links(pin)? {
        if !wanted.contains(&path) {
            tracing::info!(link = %path.display(), "detaching from an interface that is no longer configured");
            remove(&path)?;
        }
    }
    Ok(())
}

/// As [`detach_others`], by name.
pub(super) fn detach_all_but(pin: &Path, interfaces: &[String]) -> Result<(), PlaneError> {
    for (name, path) in links(pin)? {
        if !interfaces.iter().any(|interface| is_link_of(&name, interface)) {
            tracing::info!(link = %path.display(), "detaching from an interface that is no longer wanted");
            remove(&path)?;
        }
    }
    Ok(())
}

/// Whether a link to an interface of this name is pinned.
///
/// # Errors
/// If the pins cannot be read.
pub fn attached(pin: &Path, interface: &str) -> Result<bool, PlaneError> {
    Ok(links(pin)?.iter().any(|(name, _)| is_link_of(name, interface)))
}

fn is_link_of(name: &str, interface: &str) -> bool {
    let prefix = format!("link-{}-", interface.replace('.', "_"));
    let rest = name.strip_prefix(&prefix).and_then(|rest| rest.split_once('-'));
    rest.is_some_and(|(index, _)| index.bytes().all(|b| b.is_ascii_digit()))
}

/// Takes the program off one interface, and the maps away with the last one; false if it was not there.
///
/// # Errors
/// If the pins cannot be read or removed.
pub fn unload(pin: &Path, interface: &str) -> Result<bool, PlaneError> {
    let (mine, others): (Vec<_>, Vec<_>) = links(pin)?.into_iter().partition(|(name, _)| is_link_of(name, interface));
    for (_, path) in &mine {
        remove(path)?;
    }
    if others.is_empty() && !mine.is_empty() {
        remove_all(pin)?;
    }
    Ok(!mine.is_empty())
}

/// Detaches the program everywhere, and removes the maps and the directory.
pub(super) fn remove_all(pin: &Path) -> Result<(), PlaneError> {
    for (_, path) in links(pin)? {
        remove(&path)?;
    }
    remove_maps(pin)?;
    match fs::remove_dir(pin) {
        // Somebody else's pins, which stay.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(PlaneError::io(format!("removing {}", pin.display()))),
    }
}

/// Removes the pins of all maps.
pub(super) fn remove_maps(pin: &Path) -> Result<(), PlaneError> {
    names::PINNED.iter().try_for_each(|name| remove(&pin.join(name)))
}

fn remove(path: &Path) -> Result<(), PlaneError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(PlaneError::io(format!("removing {}", path.display()))),
    }
}
