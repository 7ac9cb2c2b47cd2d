//! What the tasks of a network element tell its [owner](super::owner), and how they are answered.

use std::net::Ipv4Addr;

use tokio::sync::{mpsc, oneshot};

use crate::daemon::status::Status;
use crate::necp::{CloseReason, HealthAnswer, Operation};

/// Inputs that may wait for the owner; whoever has more waits himself.
pub const CAPACITY: usize = 1024;

/// Names one TCP connection, for as long as the daemon runs.
pub type SessionId = u64;

/// Whose input it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct From {
    /// The server element: the source address of its connection.
    pub server: Ipv4Addr,
    /// The connection.
    pub session: SessionId,
}

/// One input of the owner.
#[derive(Debug)]
pub enum Input {
    /// INIT: delete what this server offers, never its flows (draft §5.4.1). Another session of the same server is
    /// superseded.
    Opened {
        /// Whose.
        from: From,
        /// Ends the session; the owner never waits for room in it.
        kick: mpsc::Sender<CloseReason>,
        /// Answered once that stands in the maps; dropped if the session is no longer the server's own.
        done: oneshot::Sender<Vec<usize>>,
    },
    /// START and STOP, in this order.
    Operations {
        /// Whose.
        from: From,
        /// What to do.
        operations: Vec<Operation>,
        /// Answered with the indices of those that failed once the others stand in the maps; dropped as above.
        done: oneshot::Sender<Vec<usize>>,
    },
    /// The server has told its health.
    Health {
        /// Whose.
        from: From,
        /// By service.
        answers: Vec<HealthAnswer>,
    },
    /// The session has ended.
    Lost {
        /// Whose.
        from: From,
        /// Why.
        reason: CloseReason,
    },
    /// Somebody wants to see everything.
    Status {
        /// Where to.
        done: oneshot::Sender<Status>,
    },
}
