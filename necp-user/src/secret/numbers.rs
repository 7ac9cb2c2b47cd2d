//! Initial sequence numbers that never repeat (draft §5.9.2), however often the process restarts and whatever the clock
//! does: what is in use is written down before it is used.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use crate::necp::InitialNumbers;

/// Numbers that are reserved by one write.
const BLOCK: u32 = 64;

/// Why there are no numbers.
#[derive(Debug, Error)]
pub enum NumberError {
    /// The file cannot be read or written.
    #[error("cannot use {}, which keeps sequence numbers from repeating: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else, or the last number.
    #[error(
        "{} holds no number below 4294967295: remove it if no message that was recorded with these keys is to be feared, \
         else change the keys too", path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// The numbers of one daemon or agent, and the file that outlives it.
#[derive(Debug)]
pub struct Numbers {
    path: PathBuf,
    numbers: Mutex<InitialNumbers>,
}

impl Numbers {
    /// The file that goes with a socket or lock: beside it, `ne.numbers` beside `ne.sock`.
    pub fn path_beside(path: &Path) -> PathBuf {
        path.with_extension("numbers")
    }

    /// Continues from a file; without one, begins at the clock.
    ///
    /// # Errors
    /// See [`NumberError`].
    pub fn open(path: &Path) -> Result<Self, NumberError> {
        let reserved = match fs::read_to_string(path) {
            Ok(text) => text.trim().parse().map_err(|_| NumberError::Content { path: path.into() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(source) => return Err(NumberError::Io { path: path.into(), source }),
        };
        Ok(Self { path: path.into(), numbers: Mutex::new(InitialNumbers::continued(reserved)) })
    }

    /// A number that no connection has ever begun with.
    ///
    /// # Errors
    /// See [`NumberError`].
    pub fn next(&self) -> Result<u64, NumberError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.next_at(u32::try_from(since.as_secs()).unwrap_or(u32::MAX))
    }

    fn next_at(&self, clock: u32) -> Result<u64, NumberError> {
        let spent = || NumberError::Content { path: self.path.clone() };
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = *numbers;
        if next.reserve(clock, BLOCK) {
            let reserved = next.reserved().ok_or_else(spent)?;
            self.write(reserved).map_err(|source| NumberError::Io { path: self.path.clone(), source })?;
        }
        let number = next.take().ok_or_else(spent)?;
        // Only now: what could not be written down is not in use.
        *numbers = next;
        Ok(number)
    }

    /// Replaces the file as a whole, and waits for the disk.
    fn write(&self, reserved: u32) -> io::Result<()> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let new = self.path.with_extension("numbers.new");
        let mut file = File::create(&new)?;
        writeln!(file, "{reserved}")?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        match self.path.parent() {
            Some(directory) => File::open(directory)?.sync_all(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(path: &Path, clock: u32, count: usize) -> Vec<u64> {
        let numbers = Numbers::open(path).expect("usable");
        (0..count).map(|_| numbers.next_at(clock).expect("a number")).collect()
    }

    #[test]
    fn numbers_never_repeat_over_restarts_and_set_back_clocks() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("new/ne.numbers");
        let mut all = Vec::new();
        for (clock, count) in [(1_000_000, 1), (1_000_000, 1), (1_000_000, 200), (5, 3), (0, 1), (1_000_001, 2)] {
            all.extend(take(&path, clock, count));
        }
        assert_eq!(all[0], 1_000_000 << 32);
        assert!(all.is_sorted_by(|a, b| a < b), "{all:x?}");
        assert!(all.iter().all(|number| *number as u32 == 0));
        assert_eq!(take(&path, 2_000_000, 1), [2_000_000 << 32], "the clock again, once it has caught up");
    }

    #[test]
    fn a_number_is_on_disk_before_it_is_used() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("ne.numbers");
        let numbers = Numbers::open(&path).expect("usable");
        for expected in 700..1000u64 {
            let number = numbers.next_at(700).expect("a number");
            assert_eq!(number >> 32, expected);
            let written: u64 = fs::read_to_string(&path).expect("there").trim().parse().expect("a number");
            assert!(written > expected, "{written} is what a new process would begin with");
        }
    }

    #[test]
    fn what_cannot_be_written_down_is_not_used() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("ne.numbers");
        let numbers = Numbers::open(&path).expect("usable");
        fs::create_dir(path.with_extension("numbers.new")).expect("in the way");
        assert!(matches!(numbers.next_at(5), Err(NumberError::Io { .. })));
        fs::remove_dir(path.with_extension("numbers.new")).expect("out of the way");
        assert_eq!(numbers.next_at(5).expect("a number"), 5 << 32);
        for broken in ["", "x", "-1", "4294967296"] {
            fs::write(&path, broken).expect("written");
            let error = Numbers::open(&path).expect_err(broken).to_string();
            assert!(error.contains("ne.numbers holds no number"), "{error}");
        }
    }
}
