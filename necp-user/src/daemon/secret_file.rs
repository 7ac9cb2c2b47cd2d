//! Files that hold a secret: read only if nobody else can read or change them.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Bytes that are read, at most.
const LONGEST: u64 = 4096;

/// Why a file's secret is not used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be read.
    #[error("cannot read the key file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a device, …
    #[error("the key file {} is no regular file", .0.display())]
    Kind(PathBuf),
    /// Others can read or change it.
    #[error("the key file {} has mode {mode:03o}, so others can read or change it: `chmod 600 {}`", path.display(), path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is somebody else's.
    #[error("the key file {} belongs to user id {owner}: `chown root {}`", path.display(), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The secret is too short or too long.
    #[error("the key file {} holds {length} bytes; a key has {least} to {most}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes in it, one newline at the end not counted.
        length: usize,
        /// At least.
        least: usize,
        /// At most.
        most: usize,
    },
}

/// The secret in a file: its bytes, one newline at the end ignored; `least` to `most` of them.
///
/// # Errors
/// See [`SecretFileError`].
pub fn read(path: &Path, least: usize, most: usize) -> Result<Vec<u8>, SecretFileError> {
    let failed = |source| SecretFileError::Read { path: path.into(), source };
    // A FIFO without a writer would hold us up for ever.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    // Of the file that was opened: what stands at the path may be another one meanwhile.
    let facts = file.metadata().map_err(failed)?;
    if !facts.is_file() {
        return Err(SecretFileError::Kind(path.into()));
    }
    if facts.mode() & 0o077 != 0 {
        return Err(SecretFileError::Mode { path: path.into(), mode: facts.mode() & 0o777 });
    }
    // SAFETY: takes nothing and cannot fail.
    let own = unsafe { libc::geteuid() };
    if facts.uid() != 0 && facts.uid() != own {
        return Err(SecretFileError::Owner { path: path.into(), owner: facts.uid() });
    }
    let mut secret = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut secret).map_err(failed)?;
    if secret.last() == Some(&b'\n') {
        secret.pop();
    }
    if !(least..=most).contains(&secret.len()) {
        return Err(SecretFileError::Length { path: path.into(), length: secret.len(), least, most });
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("key");
        std::fs::write(&path, content).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
        (directory, path)
    }

    #[test]
    fn one_newline_is_no_part_of_it() {
        let (_directory, path) = file(b"secret \n\n", 0o600);
        assert_eq!(read(&path, 1, 80).expect("read"), b"secret \n");
        let (_directory, path) = file(b"secret", 0o400);
        assert_eq!(read(&path, 6, 6).expect("read"), b"secret");
    }

    #[test]
    fn what_others_can_read_or_change_is_refused() {
        for mode in [0o640, 0o604, 0o620, 0o602] {
            let (_directory, path) = file(b"secret", mode);
            let error = read(&path, 1, 80).expect_err("not private").to_string();
            assert!(error.contains(&format!("{mode:03o}")) && error.contains("chmod 600"), "{error}");
        }
        let (_directory, path) = file(b"secret", 0o600);
        std::os::unix::fs::chown(&path, Some(12345), None).expect("tests run as root");
        assert!(matches!(read(&path, 1, 80), Err(SecretFileError::Owner { owner: 12345, .. })));
    }

    #[test]
    fn no_file_no_secret_and_too_much_of_it() {
        let (directory, path) = file(b"\n", 0o600);
        assert!(matches!(read(&path, 1, 80), Err(SecretFileError::Length { length: 0, .. })));
        assert!(matches!(read(directory.path(), 1, 80), Err(SecretFileError::Kind(_))));
        assert!(matches!(read(&directory.path().join("x"), 1, 80), Err(SecretFileError::Read { .. })));
        let (_directory, path) = file(&[7; 5000], 0o600);
        assert!(matches!(read(&path, 1, 80), Err(SecretFileError::Length { most: 80, .. })));
    }
}
