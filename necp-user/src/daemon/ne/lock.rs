//! One daemon per pin directory: two would write the same maps.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why the instance cannot be had.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another daemon has it.
    #[error(
        "{} is in use by {}: stop that one first, or give this instance its own `pin` and `socket`",
        path.display(), pid.map_or_else(|| "another process".to_owned(), |pid| format!("pid {pid}"))
    )]
    Held {
        /// The pin directory.
        path: PathBuf,
        /// Whose.
        pid: Option<u32>,
    },
    /// The directory cannot be made or opened.
    #[error("cannot use the pin directory {}: {source} (run as root; is a BPF file system mounted at /sys/fs/bpf?)", path.display())]
    Io {
        /// The pin directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The lock on a pin directory, held as long as this value (and no longer than this process) lives. It is on the directory
/// itself, so that it holds whatever socket or configuration file the other daemon uses.
#[derive(Debug)]
pub struct InstanceLock {
    _directory: File,
}

impl InstanceLock {
    /// Takes the lock, making the directory if need be.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn acquire(pin: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io { path: pin.into(), source };
        fs::create_dir_all(pin).map_err(failed)?;
        let directory = File::open(pin).map_err(failed)?;
        match directory.try_lock() {
            Ok(()) => Ok(Self { _directory: directory }),
            Err(TryLockError::WouldBlock) => Err(LockError::Held { path: pin.into(), pid: holder(&directory) }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

/// Who holds the lock, as `/proc/locks` says: `1: FLOCK  ADVISORY  WRITE PID MAJOR:MINOR:INODE 0 EOF`.
fn holder(directory: &File) -> Option<u32> {
    let facts = directory.metadata().ok()?;
    let file = format!("{:02x}:{:02x}:{}", libc::major(facts.dev()), libc::minor(facts.dev()), facts.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let fields = locks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let lock = fields.into_iter().find(|fields| fields.contains(&"FLOCK") && fields.contains(&file.as_str()))?;
    lock.iter().rev().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_told_who_has_the_directory() {
        let directory = tempfile::tempdir().expect("a directory");
        let pin = directory.path().join("necp");
        let first = InstanceLock::acquire(&pin).expect("free");
        let error = InstanceLock::acquire(&pin).expect_err("held").to_string();
        assert!(error.contains(&format!("{} is in use by pid {}", pin.display(), std::process::id())), "{error}");
        drop(first);
        InstanceLock::acquire(&pin).expect("free again");
    }

    #[test]
    fn a_place_that_cannot_be_used_is_named() {
        let error = InstanceLock::acquire(Path::new("/proc/no/pins")).expect_err("no directory can be made there");
        assert!(error.to_string().contains("/proc/no/pins"), "{error}");
    }
}
