//! HTTP clients that notice: who answered, when the first SYN went out, and whether a connection broke or moved.

mod client;
mod drive;

use std::{
    fmt::{self, Display, Formatter},
    net::SocketAddrV4,
    time::{Duration, Instant},
};

pub use client::Client;
pub use drive::{Load, Mix};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One request, then close.
    Short,
    /// One large answer, whose checksum is compared.
    Download,
    /// Requests now and then over one connection.
    KeepAlive,
}

/// Why a connection failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It was never established: refused, unreachable, or no answer in time.
    Connect(String),
    /// It was established, and then reset, closed early or silent for too long.
    Broken(String),
    /// An HTTP status other than 200.
    Status(u16),
    /// The answer's length or checksum is not that of the content.
    Checksum,
    /// Another server than before answered on the same connection.
    Moved {
        /// The server that answered first.
        from: String,
        /// The server that answered then.
        to: String,
    },
}

impl Failure {
    /// Did it hit a connection that was established?
    pub fn hit_established(&self) -> bool {
        !matches!(self, Self::Connect(_))
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "not established: {why}"),
            Self::Broken(why) => write!(f, "broken: {why}"),
            Self::Status(status) => write!(f, "HTTP status {status}"),
            Self::Checksum => f.write_str("wrong length or checksum"),
            Self::Moved { from, to } => write!(f, "moved from {from} to {to}"),
        }
    }
}

/// A connection's whole story.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it was for.
    pub kind: Kind,
    /// The client's end, once bound.
    pub local: Option<SocketAddrV4>,
    /// Read just before the first SYN was sent.
    pub first_syn: Instant,
    /// How long the handshake took, if it came to an end.
    pub connected: Option<Duration>,
    /// From the first SYN to the end.
    pub lasted: Duration,
    /// The server that answered first (its `X-Server`).
    pub server: Option<String>,
    /// Requests answered in full.
    pub answered: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// What went wrong, if anything.
    pub failure: Option<Failure>,
}

/// What happens while a load runs.
#[derive(Clone, Debug)]
pub enum Event {
    /// A server has sent its first answer's head on a new connection.
    Placed {
        /// The connection's purpose.
        kind: Kind,
        /// Who answered.
        server: String,
        /// When the connection's first SYN was sent.
        first_syn: Instant,
    },
    /// A request was answered in full.
    Answered {
        /// The connection's purpose.
        kind: Kind,
        /// Who answered.
        server: String,
    },
    /// A connection has come to its end, good or bad.
    Ended(Outcome),
}
