//! One agent per host: a new session from the same address would supersede the older one (§5.4), and two agents would
//! take the sessions away from each other for ever.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why the lock could not be had.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another agent of this host runs.
    #[error(
        "{} is held by {}: one agent per host (stop that one, or serve through it; `--lock PATH` only where two \
         agents use different `--source` addresses)",
        path.display(), pid.map_or_else(|| "another process".to_owned(), |pid| format!("the agent with pid {pid}"))
    )]
    Held {
        /// The lock file.
        path: PathBuf,
        /// The holder's process id, if it has written it yet.
        pid: Option<u32>,
    },
    /// The file or its directory cannot be made, opened or written.
    #[error("cannot use the lock file {}: {source} (run as root, or choose another place with `--lock PATH`)", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The lock, held as long as this value (and no longer than this process) lives.
#[derive(Debug)]
pub struct HostLock {
    file: File,
}

impl HostLock {
    /// Takes the lock at `path`, making its directory if need be, and writes this process's id into it.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io { path: path.into(), source };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LockError::Held { path: path.into(), pid: holder(&mut file) }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { file })
    }
}

impl Drop for HostLock {
    fn drop(&mut self) {
        // The file itself stays: who removes a lock file can remove one that another has just locked.
        // An old process id in it is harmless, so a failure here is too.
        let _ = self.file.set_len(0);
    }
}

fn holder(file: &mut File) -> Option<u32> {
    file.rewind().ok()?;
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_who_holds_the_lock() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("necp/se.lock");
        let first = HostLock::acquire(&path).expect("free");
        let error = HostLock::acquire(&path).expect_err("held");
        assert!(matches!(error, LockError::Held { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        assert_eq!(fs::read_to_string(&path).expect("the file stays"), "");
        HostLock::acquire(&path).expect("free again");
    }

    #[test]
    fn a_stale_id_in_the_file_does_not_hold_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("se.lock");
        fs::write(&path, "4294967295 and much more text than a process id has").expect("written");
        let _held = HostLock::acquire(&path).expect("nobody holds it");
        assert_eq!(fs::read_to_string(&path).expect("readable"), format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_place_that_cannot_be_used_is_named() {
        let error = HostLock::acquire(Path::new("/proc/no/se.lock")).expect_err("no directory can be made there");
        assert!(matches!(error, LockError::Io { .. }));
        assert!(error.to_string().contains("/proc/no/se.lock"), "{error}");
    }
}
