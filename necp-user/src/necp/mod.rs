//! The sans-IO core of NECP, the Network Element Control Protocol (draft-cerpa-necp-02), both roles.
//!
//! Nothing here opens a socket, reads a clock or asks the system for randomness: bytes and the time come in through
//! `handle_*`, what is to be done comes out of `poll_*`.
//!
//! ```text
//!            bytes                     events                     decisions
//!  socket ──────────► Decoder ──────► NeSession ──► NeEvent ───► control
//!         ◄────────── poll_transmit ◄─ SeSession ◄── respond ◄──  maps written
//! ```
//!
//! Every message is a header of 20 bytes, big endian (§5.2), and a payload of 32-byte units (§5.2.3):
//!
//! ```text
//!   0                   1                   2                   3
//!   0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//!  +-------------------------------+-------------------------------+
//!  |  protocol_identifier (0x414A) |             flags             |
//!  +---------------+---------------+-------------------------------+
//!  |  version (1)  |    opcode     |          request_id           |
//!  +---------------+---------------+-------------------------------+
//!  |                        seq_num (64 bits)                      |
//!  |                0 on unauthenticated connections               |
//!  +---------------------------------------------------------------+
//!  |         payload_len, the credential of 20 bytes included      |
//!  +---------------------------------------------------------------+
//!  |  units of eight u32 each: data0 .. data7, unused ones 0       |
//!  +---------------------------------------------------------------+
//!  |  credential (160 bits), on authenticated connections          |
//!  +---------------------------------------------------------------+
//! ```
//!
//! - [`wire`]: header, flags, opcodes, units and the streaming [`Decoder`].
//! - [`service`]: forwarding types and service keys, with the names that people write (`l2`, `tcp/80`).
//! - [`message`]: what the units of each message mean, and which of them fail.
//! - [`session`]: the state machines of the network element ([`NeSession`]) and the server element ([`SeSession`]).
//! - [`auth`]: keys, credentials and sequence numbers.
//! - [`backoff`]: when a server element dials again.
//! - [`error`]: why a session ended.

pub mod auth;
pub mod backoff;
#[cfg(any(test, fuzzing))]
pub mod chaos;
pub mod error;
pub mod message;
pub mod service;
pub mod session;
#[cfg(test)]
mod vectors;
pub mod wire;

pub use auth::{Access, Credentials, InitialNumbers, Key};
pub use backoff::Backoff;
pub use error::CloseReason;
pub use message::{
    Exception, Family, Filter, Flows, HealthAnswer, Init, InitAck, Listed, Operation, Query, Scope, ServiceUnit,
    UnitError,
};
pub use service::{Forwarding, ServiceKey};
pub use session::{
    Counters, NeEvent, NeSession, Notice, Rejections, RequestId, SeEvent, SeSession, SessionConfig, Token,
};
pub use wire::{Decoder, Flags, Header, Opcode, PORT, Unit};
