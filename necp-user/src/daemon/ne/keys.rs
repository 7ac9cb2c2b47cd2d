//! The keys of all farms, as their files say; read at the start, and again on SIGHUP.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ipnet::IpNet;

use crate::config::ne::{NeConfig, Proof};
use crate::daemon::status::Rejected;
use crate::necp::{Access, Credentials, Key, Rejections};
use crate::secret::{KeyFileError, NumberError, Numbers, key_file};

/// Shared by all connections.
pub struct Keys {
    config: Arc<NeConfig>,
    numbers: Numbers,
    keys: RwLock<HashMap<PathBuf, Key>>,
}

/// What a reload came to.
#[derive(Debug, Default)]
pub struct Reloaded {
    /// Files that hold another key than before.
    pub changed: Vec<PathBuf>,
    /// What is wrong: the keys that were there before stay.
    pub failed: Vec<ReloadError>,
}

/// Why a key was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// Its file is wrong.
    #[error(transparent)]
    File(#[from] KeyFileError),
    /// The kernel does not take it.
    #[error("the TCP-MD5 key of {net} in {} cannot be set: {source}", path.display())]
    Socket {
        /// Whose key.
        net: IpNet,
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Keys {
    /// Keeps the keys that were [`read`], and the file of sequence numbers beside the daemon's socket.
    ///
    /// # Errors
    /// As [`Numbers::open`].
    pub fn new(config: Arc<NeConfig>, keys: HashMap<PathBuf, Key>) -> Result<Arc<Self>, NumberError> {
        let numbers = Numbers::open(&Numbers::path_beside(&config.socket))?;
        Ok(Arc::new(Self { config, numbers, keys: RwLock::new(keys) }))
    }

    /// How a connection from this address, which a farm admits, is let in.
    ///
    /// # Errors
    /// If it must authenticate, and there is no sequence number for it.
    pub fn access(&self, address: IpAddr) -> Result<Access, NumberError> {
        let file = match self.config.proof(address) {
            None | Some(Proof::None) => return Ok(Access::Open),
            Some(Proof::Key(file)) => file,
        };
        let key = file.and_then(|file| self.keys.read().unwrap_or_else(PoisonError::into_inner).get(file).cloned());
        let credentials = key.map(|key| Ok(Credentials { key, first_seq_num: self.numbers.next()? }));
        Ok(Access::Authenticated(credentials.transpose()?))
    }

    /// Reads the files again. Sessions that are open keep their key.
    pub fn reload(&self) -> Reloaded {
        let mut reloaded = Reloaded::default();
        for file in self.config.key_files() {
            match key_file::read(file) {
                Ok(key) => {
                    let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
                    if keys.insert(file.into(), key.clone()) != Some(key) {
                        reloaded.changed.push(file.into());
                    }
                }
                Err(error) => reloaded.failed.push(error.into()),
            }
        }
        reloaded
    }
}

/// Reads all key files of a configuration.
///
/// # Errors
/// All that are wrong.
pub fn read(config: &NeConfig) -> Result<HashMap<PathBuf, Key>, Vec<KeyFileError>> {
    let (mut keys, mut errors) = (HashMap::new(), Vec::new());
    for file in config.key_files() {
        match key_file::read(file) {
            Ok(key) => _ = keys.insert(file.into(), key),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(keys) } else { Err(errors) }
}

/// Sums of the [`Rejections`] of all sessions.
#[derive(Debug, Default)]
pub struct Tally {
    unauthenticated: AtomicU64,
    no_key: AtomicU64,
    bad_credential: AtomicU64,
    stripped: AtomicU64,
    bad_sequence: AtomicU64,
    too_large: AtomicU64,
    unconfirmed: AtomicU64,
}

impl Tally {
    /// Adds what a session has rejected since `before`.
    pub fn add(&self, now: &Rejections, before: &Rejections) {
        let add = |sum: &AtomicU64, now: u64, before: u64| _ = sum.fetch_add(now - before, Ordering::Relaxed);
        add(&self.unauthenticated, now.unauthenticated, before.unauthenticated);
        add(&self.no_key, now.no_key, before.no_key);
        add(&self.bad_credential, now.bad_credential, before.bad_credential);
        add(&self.stripped, now.stripped, before.stripped);
        add(&self.bad_sequence, now.bad_sequence, before.bad_sequence);
        add(&self.too_large, now.too_large, before.too_large);
        add(&self.unconfirmed, now.unconfirmed, before.unconfirmed);
    }

    /// The sums so far.
    pub fn read(&self) -> Rejected {
        let read = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        Rejected {
            unauthenticated: read(&self.unauthenticated),
            no_key: read(&self.no_key),
            bad_credential: read(&self.bad_credential),
            stripped: read(&self.stripped),
            bad_sequence: read(&self.bad_sequence),
            too_large: read(&self.too_large),
            unconfirmed: read(&self.unconfirmed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const WITH_KEY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 11));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 12));

    fn config(directory: &Path, auth: &str) -> Arc<NeConfig> {
        let text = format!(
            "interfaces = [\"eth0\"]\nsocket = \"{0}/ne.sock\"\n[[farm]]\nname = \"web\"\nvips = [\"192.0.2.10\"]\n\
             services = [\"tcp/80\"]\nforwarding = [\"l2\"]\nservers = [\"10.0.0.0/24\"]\n{1}\n",
            directory.display(),
            auth.replace("DIR", &directory.display().to_string())
        );
        Arc::new(NeConfig::parse(&text).expect("a configuration"))
    }

    fn write(path: &Path, content: &str, mode: u32) {
        fs::write(path, content).expect("written");
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("set");
    }

    fn key(keys: &Keys, address: IpAddr) -> Option<Key> {
        match keys.access(address).expect("a number") {
            Access::Authenticated(credentials) => credentials.map(|credentials| credentials.key),
            Access::Open => panic!("it has to authenticate"),
        }
    }

    #[test]
    fn a_reload_takes_what_is_right_and_keeps_what_was() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("web.key");
        let config = config(directory.path(), "keys = { \"10.0.0.11\" = \"DIR/web.key\" }");
        write(&path, "the first secret key", 0o640);
        assert_eq!(read(&config).expect_err("its mode").len(), 1);
        write(&path, "the first secret key", 0o600);
        let keys = Keys::new(Arc::clone(&config), read(&config).expect("a key")).expect("numbers");
        let first = key(&keys, WITH_KEY).expect("it has a key");
        assert_eq!(key(&keys, OTHER), None, "it has none");
        assert!(keys.reload().changed.is_empty());

        write(&path, "the second secret key", 0o644);
        let reloaded = keys.reload();
        assert_eq!((reloaded.changed.len(), reloaded.failed.len()), (0, 1));
        assert_eq!(key(&keys, WITH_KEY), Some(first.clone()), "the file is wrong");
        write(&path, "the second secret key", 0o600);
        assert_eq!(keys.reload().changed, [path]);
        assert_ne!(key(&keys, WITH_KEY), Some(first));
    }

    #[test]
    fn every_connection_begins_with_a_number_of_its_own() {
        let directory = tempfile::tempdir().expect("a directory");
        write(&directory.path().join("web.key"), "the first secret key", 0o600);
        let config = config(directory.path(), "key_file = \"DIR/web.key\"");
        let mut seen = Vec::new();
        for _ in 0..3 {
            // A daemon that restarts within the second.
            let keys = Keys::new(Arc::clone(&config), read(&config).expect("a key")).expect("numbers");
            for _ in 0..2 {
                let Access::Authenticated(Some(credentials)) = keys.access(OTHER).expect("a number") else {
                    panic!("it has a key");
                };
                seen.push(credentials.first_seq_num);
            }
        }
        assert!(seen.is_sorted_by(|a, b| a < b), "{seen:x?}");
    }

    #[test]
    fn rejections_are_summed() {
        let tally = Tally::default();
        let first = Rejections { bad_credential: 2, stripped: 1, ..Rejections::default() };
        tally.add(&first, &Rejections::default());
        let second =
            Rejections { unconfirmed: 1, too_large: 4, no_key: 5, unauthenticated: 6, bad_sequence: 7, ..first };
        tally.add(&second, &first);
        let expected = Rejected {
            unauthenticated: 6,
            no_key: 5,
            bad_credential: 2,
            stripped: 1,
            bad_sequence: 7,
            too_large: 4,
            unconfirmed: 1,
        };
        assert_eq!(tally.read(), expected);
    }
}
