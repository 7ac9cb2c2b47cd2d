//! Files that hold a key (draft §5.8): whose they may be, who may read them, what they may hold.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::necp::Key;
use crate::necp::auth::KeyTooShort;

/// More bytes are no key.
const KEY_MAX: u64 = 4096;

/// Why a file gives no key.
#[derive(Debug, Error)]
#[error("key file {}: {what}", path.display())]
pub struct KeyFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong, and what to do.
    pub what: KeyFileFault,
}

/// What is wrong with a key file.
#[derive(Debug, Error)]
pub enum KeyFileFault {
    /// It cannot be opened or read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is a directory, a device or the like.
    #[error("it is no regular file")]
    Kind,
    /// It belongs to a user who could change it.
    #[error("it belongs to user {uid}, who could change it; `chown root` it, or give it to the user that reads it")]
    Owner {
        /// Whose it is.
        uid: u32,
    },
    /// Its group, or everybody, may use it.
    #[error("its mode is {mode:03o}, so that others than its owner have access to it; `chmod 600` it")]
    Mode {
        /// The permission bits.
        mode: u32,
    },
    /// It has too few bytes.
    #[error("{0}; make one with `head -c 32 /dev/urandom | base64 > FILE`")]
    Short(#[from] KeyTooShort),
    /// It has too many.
    #[error("more than {KEY_MAX} bytes are no key; is it the right file?")]
    Long,
}

/// Reads the key in a file: a regular file of root's or our own user's, nobody else's to read or write, with at least 16
/// bytes. One newline at the end is ignored.
///
/// # Errors
/// See [`KeyFileFault`].
pub fn read(path: &Path) -> Result<Key, KeyFileError> {
    key_of(path).map_err(|what| KeyFileError { path: path.into(), what })
}

fn key_of(path: &Path) -> Result<Key, KeyFileFault> {
    // A FIFO without a writer would hold us up for ever.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let facts = file.metadata()?;
    if !facts.is_file() {
        return Err(KeyFileFault::Kind);
    }
    // SAFETY: it has no arguments and cannot fail.
    let own = unsafe { libc::geteuid() };
    if facts.uid() != 0 && facts.uid() != own {
        return Err(KeyFileFault::Owner { uid: facts.uid() });
    }
    if facts.mode() & 0o077 != 0 {
        return Err(KeyFileFault::Mode { mode: facts.mode() & 0o777 });
    }
    let mut bytes = Vec::with_capacity(KEY_MAX as usize + 1);
    file.take(KEY_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > KEY_MAX {
        return Err(KeyFileFault::Long);
    }
    Ok(Key::of_file(bytes)?)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("web.key");
        fs::write(&path, content).expect("written");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("set");
        (directory, path)
    }

    fn error(content: &[u8], mode: u32) -> String {
        let (_directory, path) = file(content, mode);
        let error = read(&path).expect_err("no key").to_string();
        error.replace(&path.display().to_string(), "PATH")
    }

    #[test]
    fn a_key_is_the_bytes_of_its_file_without_one_newline() {
        for mode in [0o600, 0o400, 0o700] {
            let (_directory, path) = file(b"0123456789abcdef\n", mode);
            assert_eq!(read(&path).expect("a key"), Key::new(b"0123456789abcdef".to_vec()).expect("long enough"));
        }
    }

    #[test]
    fn what_others_can_read_or_change_is_no_key() {
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o601] {
            let expected = format!(
                "key file PATH: its mode is {mode:03o}, so that others than its owner have access to it; `chmod 600` it"
            );
            assert_eq!(error(b"0123456789abcdef", mode), expected);
        }
        let (_directory, path) = file(b"0123456789abcdef", 0o600);
        std::os::unix::fs::chown(&path, Some(65_534), None).expect("root may");
        let error = read(&path).expect_err("somebody else's").to_string();
        assert!(error.contains("belongs to user 65534"), "{error}");
    }

    #[test]
    fn what_is_no_key_is_named() {
        assert!(error(b"fifteen bytes..\n", 0o600).contains("at least 16 bytes, and this one has 15; make one with"));
        assert!(error(b"", 0o600).contains("this one has 0"));
        assert!(error(&[7; 4097], 0o600).contains("more than 4096 bytes"));
        let directory = tempfile::tempdir().expect("a directory");
        assert!(matches!(read(directory.path()).expect_err("a directory").what, KeyFileFault::Kind));
        let missing = read(&directory.path().join("none")).expect_err("nothing there").to_string();
        assert!(missing.contains("none: No such file"), "{missing}");
    }
}
