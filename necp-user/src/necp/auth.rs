//! Authentication (§5.8) and sequence numbers (§5.9): keys, credentials, and which numbers are accepted.
//!
//! Every message of an authenticated connection ends with a credential, the HMAC-SHA1 over its header and payload:
//!
//! ```text
//!  | header, F_Auth_Credential_Provided set, payload_len + 20 | units ... | credential, 20 bytes |
//!  └────────────────── what is hashed ────────────────────────────────────┘
//! ```
//!
//! The MAC has no direction, and a key outlives its connections. What keeps messages of the other direction, and of other
//! connections, out is their number: a side that demands a first number chooses one that is far from all that it, or its
//! peer, has ever used with that key ([`InitialNumbers`], [`apart_from`]), and accepts only what follows that number
//! closely ([`Inbound`]).

mod numbers;

use std::fmt;
use std::sync::Arc;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha1::Sha1;
use zeroize::Zeroizing;

use super::wire::Header;

pub use numbers::{Freshness, Inbound, InitialNumbers, apart_from, is_apart};

/// Bytes of a credential (§5.8.1).
pub const CREDENTIAL_LEN: usize = 20;
/// Least bytes of a key.
pub const KEY_MIN: usize = 16;

/// A secret that an SE and an NE share (§5.8). It is never printed, and wiped when the last copy goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Arc<Zeroizing<Vec<u8>>>);

/// A secret of fewer than [`KEY_MIN`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key has at least {KEY_MIN} bytes, and this one has {0}")]
pub struct KeyTooShort(pub usize);

impl Key {
    /// A key of these bytes. Fails if there are fewer than [`KEY_MIN`].
    pub fn new(bytes: Vec<u8>) -> Result<Self, KeyTooShort> {
        let bytes = Zeroizing::new(bytes);
        if bytes.len() < KEY_MIN { Err(KeyTooShort(bytes.len())) } else { Ok(Self(Arc::new(bytes))) }
    }

    /// Begins the credential of a message. `header` is as it is sent: with the flag set and the credential's length
    /// included.
    #[must_use]
    pub fn sign(&self, header: &Header) -> Signer {
        Signer(self.mac(header))
    }

    /// Whether this is the credential of the message, `header` being as it came; takes the same time wherever it differs.
    #[must_use]
    pub fn verifies(&self, header: &Header, payload: &[u8], credential: &[u8]) -> bool {
        self.mac(header).chain_update(payload).verify_slice(credential).is_ok()
    }

    fn mac(&self, header: &Header) -> Hmac<Sha1> {
        let mac = Hmac::<Sha1>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.chain_update(header.encode())
    }
}

/// The credential of a message whose payload is still to be hashed.
#[derive(Debug, Clone)]
pub struct Signer(Hmac<Sha1>);

impl Signer {
    /// The next bytes of the payload.
    pub fn update(&mut self, payload: &[u8]) {
        self.0.update(payload);
    }

    /// All of the payload was hashed.
    #[must_use]
    pub fn credential(self) -> [u8; CREDENTIAL_LEN] {
        self.0.finalize().into_bytes().into()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

/// What one side of an authenticated session brings along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The secret shared with the peer.
    pub key: Key,
    /// The number that this side wants to receive first: never used before, see [`InitialNumbers`].
    pub first_seq_num: u64,
}

/// How an NE lets an address in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Access {
    /// Without authentication; an INIT that asks for it is refused, for there is no key.
    #[default]
    Open,
    /// With authentication only. Without credentials, for want of a key, every INIT is refused.
    Authenticated(Option<Credentials>),
}

/// Why a message was rejected (§5.8.3, §5.9.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Rejection {
    /// It carries no credential, on an authenticated connection.
    #[error("no credential")]
    NoCredential,
    /// Its credential is not that of the message and our key.
    #[error("wrong credential")]
    BadCredential,
    /// Its number is used up, or not one of this connection and direction.
    #[error("bad sequence number")]
    BadSequence,
}

#[cfg(test)]
mod tests;
