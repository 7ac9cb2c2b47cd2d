//! Why a session ended.

use std::time::Duration;

use super::auth::Rejection;
use super::service::ServiceKey;
use super::wire::Opcode;

/// Why a session ended; its `Display` is a sentence for the log and for `necp status`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The peer's bytes do not begin with 0x414A where a header must stand (§5.2.2, §6.4).
    #[error("framing lost: a message must begin with 0x414a, got {identifier:#06x}; is the peer speaking NECP?")]
    Framing {
        /// The 16 bits found in place of the protocol identifier.
        identifier: u16,
    },
    /// The peer connected and sent no INIT in time (NE).
    #[error("no INIT within {0:?} of connecting")]
    InitDeadline(Duration),
    /// The NE answered none of our INITs (SE, §5.4).
    #[error("INIT sent {attempts} times, never answered; does a network element run at that address?")]
    InitUnanswered {
        /// How often INIT was sent on this connection.
        attempts: u32,
    },
    /// The NE answered our INIT with F_Error (SE).
    #[error("the network element refused our INIT")]
    InitRefused,
    /// Something else came before INIT (at the NE) or before INIT_ACK (at the SE) (§5.4).
    #[error("{0} came before the session was opened by INIT and INIT_ACK")]
    OutOfOrder(Opcode),
    /// A message was begun and not carried on fast enough.
    #[error("a message was begun and made too little progress for {0:?}")]
    ProgressDeadline(Duration),
    /// Three KEEPALIVEs in a row were not answered (§5.5).
    #[error("peer dead: {0} keepalives in a row unanswered")]
    DeadPeer(usize),
    /// The NE did not answer a request (SE).
    #[error("a request went unanswered for {0:?}")]
    AnswerDeadline(Duration),
    /// The NE insists on authentication, and INIT came without it (§5.4.2).
    #[error("the network element requires a key (--key-file FILE), and INIT came without authentication")]
    AuthRequired,
    /// The peer asks for authentication, and there is no key for its address (NE, §5.4.1).
    #[error("INIT asks for authentication, and there is no key for this address")]
    NoKey,
    /// The NE refused our authenticated INIT (SE, §5.8.3).
    #[error("the network element refuses our key: it has another one, or none, for this address")]
    KeyRefused,
    /// INIT had a wrong credential (NE, §5.8.3).
    #[error("INIT with a wrong credential: the server has another key than the one for its address here")]
    BadInit,
    /// INIT was authentic, and no fresh message followed: it may be a replay (NE, §6.10).
    #[error(
        "INIT was followed by no fresh message within {0:?}: a recorded one sent again, or a server that fell silent"
    )]
    Unconfirmed(Duration),
    /// Three messages in a row were rejected (§5.8.3).
    #[error("three messages in a row were rejected (the last: {0})")]
    Rejected(Rejection),
    /// A message on an authenticated connection is larger than what is held back until it is verified.
    #[error("a message of {0} bytes is more than can be authenticated")]
    MessageTooLarge(u32),
    /// The largest sequence number was used (§5.9).
    #[error("no sequence numbers left on this connection")]
    NumbersExhausted,
    /// An answer would repeat, or a KEEPALIVE asks, more units than allowed.
    #[error("more than {0} units would have to be repeated in one answer")]
    TooManyUnits(usize),
    /// The peer does not read what it is sent, or the caller goes on to feed bytes that are not wanted.
    #[error("{0} bytes wait for a peer that does not read, or came unasked")]
    Overflow(usize),
    /// The peer closed or reset the TCP connection.
    #[error("closed by peer")]
    ClosedByPeer,
    /// A new INIT from the same address on another connection (§5.4).
    #[error("superseded by a newer session from the same address")]
    Superseded,
    /// No farm admits the peer's address.
    #[error("no farm admits this address")]
    NotAdmitted,
    /// The limit of sessions is reached.
    #[error("too many sessions")]
    TooManySessions,
    /// Acknowledged state had to be dropped, such as by a new configuration: hard state ends with its session (§3).
    #[error("acknowledged state was dropped by a new configuration (first: {0})")]
    StateDropped(ServiceKey),
    /// This side shuts down.
    #[error("shutting down")]
    Shutdown,
}
