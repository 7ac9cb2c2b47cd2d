//! The state machines of both roles, and what they share.
//!
//! A machine is driven by `handle_input` and `handle_timeout`, and drained, after every call of any method, by
//! `poll_event`, `poll_transmit` and `poll_timeout`. Its caller
//! - reads from the peer only while `wants_input()` says so (bytes that come nevertheless wait inside, up to a limit);
//! - takes the next piece of output only when the one before is written, so that the machine sees a peer that does
//!   not read;
//! - once `closed()` is set, writes out what `poll_transmit` still gives, for a bounded time, then drops the TCP
//!   connection.

mod health;
mod keepalive;
mod link;
mod ne;
mod rng;
mod se;
mod secure;
mod units;

use std::time::Duration;

pub use ne::{NeEvent, NeSession};
pub use se::{RequestId, SeEvent, SeSession};

use super::auth::Rejection;
use super::wire::Opcode;

/// Times and limits of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// Time between two KEEPALIVEs (§5.5: 5 s); below a second it is legal, and 0 counts as 1 ms.
    pub keepalive: Duration,
    /// The random part, added or taken off (§5.5: 0 to 1 s); never more than a fifth of `keepalive`.
    pub jitter: Duration,
    /// NE: how long a peer may be connected without having sent INIT.
    pub init_deadline: Duration,
    /// SE: how often INIT is sent on one connection, 1, 2, 4 … s apart (§5.4), before the session is closed.
    pub init_attempts: u32,
    /// How long a message that has begun may take to complete, or to bring another [`Self::progress_bytes`].
    pub progress_deadline: Duration,
    /// Bytes that renew the progress deadline of a long message.
    pub progress_bytes: u32,
    /// Payload bytes of a message on an authenticated connection, at most: it is held back until it is verified (§5.8). A
    /// larger one is answered with F_Error, and the session closed.
    pub max_message: usize,
    /// SE: how long the NE may take to answer a request. While a long answer comes in, others wait behind it, and
    /// [`Self::progress_deadline`] holds.
    pub answer_deadline: Duration,
    /// Units repeated in one answer, at most; beyond it the answer is sent as it is, and the session closed (§5.2.3).
    pub max_failed_units: usize,
    /// NE: services that one SE may have started; a START beyond it is a failed unit.
    pub max_services: usize,
    /// SE: whether to ask the NE if it speaks the extension for exceptions of IPv6 ([`EXTENSION_QUERY`]), before the first
    /// request that has a use for it. Without it, exceptions of IPv6 fail here, and lists are of IPv4.
    ///
    /// [`EXTENSION_QUERY`]: super::message::EXTENSION_QUERY
    pub extension: bool,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            keepalive: Duration::from_secs(5),
            jitter: Duration::from_secs(1),
            init_deadline: Duration::from_secs(10),
            init_attempts: 5,
            progress_deadline: Duration::from_secs(10),
            progress_bytes: 64 * 1024,
            max_message: 1024 * 1024,
            answer_deadline: Duration::from_secs(30),
            max_failed_units: 65_536,
            max_services: 1024,
            extension: false,
        }
    }
}

/// Units in one [`NeEvent::Operations`], entries in one [`NeEvent::ListMore`] or [`SeEvent::Listed`], at most.
pub const MAX_BATCH: usize = 1024;
/// KEEPALIVEs in a row that may go unanswered; then the peer is dead (§5.5).
pub const MAX_MISSED: usize = 3;

/// Names what an event wants an answer to. It is never reused within a session; one that is no longer waited for is
/// ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u64);

/// Something that deserves a line in the log; each kind is told once per session, and counted always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A reserved opcode: skipped (§5.3).
    #[error("skipped a reserved {0}")]
    ReservedOpcode(Opcode),
    /// An opcode that this role never receives: skipped (§5.3).
    #[error("skipped {0}, which flows the other way")]
    WrongDirection(Opcode),
    /// The peer sent a version that is not spoken, or says that it does not speak ours (§5.2.1).
    #[error("version mismatch: the peer's message has version {version}, only version 1 is spoken here")]
    VersionMismatch {
        /// The version in the peer's header.
        version: u8,
    },
    /// A payload that is not made of units, or of the wrong number of them (§5.2.3).
    #[error("{0} with a payload that is not what it must be")]
    Malformed(Opcode),
    /// A health answer above 100 was discarded (§5.5.2).
    #[error("discarded a health answer above 100, or to another question")]
    BadHealth,
    /// A message was rejected, and not executed (§5.8.3, §5.9.2).
    #[error("rejected a message: {0}")]
    Rejected(Rejection),
    /// The peer rejected a message of ours (§5.8.3, §5.9.2).
    #[error("the peer rejected our message as not authentic: {0}")]
    RejectedByPeer(Opcode),
    /// An entry of a list that is out of range, or was not asked for, was discarded (§5.7.8).
    #[error("discarded a listed exception that is out of range, or was not asked for")]
    BadEntry,
    /// An answer to nothing outstanding was ignored.
    #[error("ignored {0}, an answer to nothing outstanding")]
    Unexpected(Opcode),
}

/// What a session has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Messages whose header was read.
    pub messages_in: u64,
    /// Messages sent.
    pub messages_out: u64,
    /// Bytes read.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Reserved opcodes, skipped.
    pub reserved_opcodes: u64,
    /// Opcodes that this role never receives, skipped.
    pub wrong_direction: u64,
    /// Headers with a version other than 1.
    pub version_mismatches: u64,
    /// Losses of framing: 0 or 1, for it ends the session.
    pub framing_errors: u64,
    /// Payloads that were not what they must be.
    pub malformed: u64,
    /// Health answers above 100, or to another question than was asked: discarded.
    pub discarded_health: u64,
    /// Listed exceptions out of range, or not asked for: discarded.
    pub discarded_entries: u64,
    /// Answers to nothing outstanding: ignored.
    pub unexpected_answers: u64,
    /// Units that failed, in either direction.
    pub failed_units: u64,
    /// KEEPALIVEs sent.
    pub keepalives_sent: u64,
    /// KEEPALIVEs that were answered.
    pub keepalives_answered: u64,
    /// What authentication kept out.
    pub rejected: Rejections,
}

/// What authentication kept out (§5.8, §5.9), by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rejections {
    /// NE: INITs without a credential where one is required.
    pub unauthenticated: u64,
    /// NE: INITs that ask for authentication, with no key for their address.
    pub no_key: u64,
    /// Messages with a wrong credential, INITs among them.
    pub bad_credential: u64,
    /// Messages without a credential on an authenticated connection.
    pub stripped: u64,
    /// Messages with a number that is used up, or not of this connection and direction.
    pub bad_sequence: u64,
    /// Messages beyond [`SessionConfig::max_message`].
    pub too_large: u64,
    /// NE: sessions whose INIT was authentic, and no fresh message followed it: a replay, or an SE that fell silent.
    pub unconfirmed: u64,
}

impl Rejections {
    fn count(&mut self, cause: Rejection) {
        match cause {
            Rejection::NoCredential => self.stripped += 1,
            Rejection::BadCredential => self.bad_credential += 1,
            Rejection::BadSequence => self.bad_sequence += 1,
        }
    }
}

#[cfg(test)]
mod tests;
