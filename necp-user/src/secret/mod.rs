//! What authentication (draft §5.8, §5.9) needs of the disk: keys, and numbers that outlive the process.

pub mod key_file;
pub mod numbers;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

pub use key_file::KeyFileError;
pub use numbers::{NumberError, Numbers};

use crate::necp::{Credentials, Key};

/// How a server element proves who it is: its key, and the initial numbers of its sessions.
#[derive(Debug, Clone)]
pub struct Identity {
    key: Key,
    numbers: Arc<Numbers>,
}

/// Why a server element cannot prove who it is.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// There is no key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// There are no numbers.
    #[error(transparent)]
    Numbers(#[from] NumberError),
}

impl Identity {
    /// The key in `key_file`, and numbers that never repeat as long as `numbers` is kept. That file is made if need be;
    /// it is for one process at a time, and for this key's sessions of this host only.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn open(key_file: &Path, numbers: &Path) -> Result<Self, IdentityError> {
        let key = key_file::read(key_file)?;
        Ok(Self { key, numbers: Arc::new(Numbers::open(numbers)?) })
    }

    /// The file of numbers that goes with a socket or a lock: `se.numbers` beside `se.lock`.
    #[must_use]
    pub fn numbers_beside(path: &Path) -> PathBuf {
        Numbers::path_beside(path)
    }

    /// What a new session needs.
    ///
    /// # Errors
    /// If no number can be reserved.
    pub fn credentials(&self) -> Result<Credentials, NumberError> {
        Ok(Credentials { key: self.key.clone(), first_seq_num: self.numbers.next()? })
    }
}
