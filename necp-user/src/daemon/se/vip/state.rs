//! What an agent has set up, written down beside its lock: for its next start after a crash, and for the other agents of this
//! host, whose locks are in the same directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// More bytes are no state file.
const FILE_MAX: u64 = 1 << 20;
/// After the name of the lock.
const ENDING: &str = ".state";

/// What is written down before anything is changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Boot and network namespace for which the rest holds.
    pub(super) place: String,
    /// Settings that were changed, by this agent or by one that it has found.
    pub(super) changed: Vec<Changed>,
    /// The VIPs that the agent wants.
    #[serde(default)]
    pub(super) vips: Vec<IpAddr>,
    /// Those that it put there, or that an agent put there which it has found: the last one takes them away.
    #[serde(default)]
    pub(super) ours: Vec<IpAddr>,
}

/// A setting that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Changed {
    pub(super) path: String,
    pub(super) before: u32,
    pub(super) after: u32,
}

impl State {
    /// What an earlier run has written down. A file that cannot be read says nothing; it will be replaced.
    pub(super) fn load(path: &Path) -> Option<Self> {
        // The directory may be everybody's: neither a FIFO may hold us up nor another user tell us what to change.
        let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW).open(path);
        let file = options.ok()?;
        let facts = file.metadata().ok()?;
        // SAFETY: it has no arguments and cannot fail.
        let own = unsafe { libc::geteuid() };
        if !facts.is_file() || facts.uid() != own {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes it, whole or not at all.
    pub(super) fn save(&self, path: &Path) -> io::Result<()> {
        let new = beside(path, ".new");
        fs::write(&new, serde_json::to_string(self)?).and_then(|()| fs::rename(&new, path))
    }

    /// The states of the other agents here, the one that belongs to `path` left out.
    pub(super) fn of_others(path: &Path, place: &str) -> io::Result<Vec<Self>> {
        let mut states = Vec::new();
        for entry in fs::read_dir(directory(path))? {
            let entry = entry?;
            let is_another = entry.file_name().as_encoded_bytes().ends_with(ENDING.as_bytes())
                && Some(entry.file_name().as_os_str()) != path.file_name();
            if is_another {
                states.extend(Self::load(&entry.path()).filter(|state| state.place == place));
            }
        }
        Ok(states)
    }

    /// Whether the settings must stay as they are for it: IPv6 needs none.
    pub(super) fn needs_settings(&self) -> bool {
        self.vips.iter().any(IpAddr::is_ipv4)
    }
}

/// The state file that belongs to a lock file.
pub fn path_of(lock: &Path) -> PathBuf {
    beside(lock, ENDING)
}

/// Waits until no other agent of this directory is setting up or taking away; it is our turn while the file is open.
pub(super) async fn turn(path: &Path) -> io::Result<File> {
    let directory = File::open(directory(path))?;
    tokio::task::spawn_blocking(move || directory.lock().map(|()| directory)).await?
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Names this boot and the calling thread's network namespace: what was changed elsewhere is not ours to change back.
pub(super) fn place() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::metadata("/proc/thread-self/ns/net").map(|namespace| namespace.ino()).unwrap_or_default();
    format!("{}/{namespace}", boot.trim())
}
