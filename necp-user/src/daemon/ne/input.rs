//! What the tasks of a network element tell its [owner](super::owner), and how they are answered.

use std::net::IpAddr;

use tokio::sync::{mpsc, oneshot};

use crate::control::exceptions::Listing;
use crate::daemon::status::Status;
use crate::necp::{CloseReason, Filter, HealthAnswer, Listed, Operation};

/// Inputs that may wait for the owner; whoever has more waits himself.
pub const CAPACITY: usize = 1024;

/// Names one TCP connection, for as long as the daemon runs.
pub type SessionId = u64;

/// Whose input it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct From {
    /// The server element: the source address of its connection.
    pub server: IpAddr,
    /// The connection.
    pub session: SessionId,
}

/// A step of a list, of a bounded number of entries.
#[derive(Debug)]
pub enum ListStep {
    /// Begin to count, with what stands there now.
    Begin(Filter),
    /// Count on.
    Count(Listing),
    /// Some entries, at most so many.
    Read(Listing, usize),
}

/// How far a step came.
#[derive(Debug)]
pub enum ListPart {
    /// There is more to count.
    Counting(Listing),
    /// So many entries.
    Counted(Listing, u32),
    /// The next entries, perhaps none; without a listing they are the last.
    Entries(Option<Listing>, Vec<Listed>),
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
    /// Services and exceptions, in this order.
    Operations {
        /// Whose.
        from: From,
        /// What to do.
        operations: Vec<Operation>,
        /// Answered with the indices of those that failed once the others stand in the maps; dropped as above.
        done: oneshot::Sender<Vec<usize>>,
    },
    /// Delete this server's exceptions (draft §5.7.5).
    Reset {
        /// Whose.
        from: From,
        /// Answered once that stands in the maps, with an index if it failed; dropped as above.
        done: oneshot::Sender<Vec<usize>>,
    },
    /// One more step of a list of exceptions (draft §5.7.7). Between two, the owner keeps nothing of it.
    List {
        /// Whose.
        from: From,
        /// Which step.
        step: ListStep,
        /// Dropped as above.
        done: oneshot::Sender<ListPart>,
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
    /// The path to these takes shorter packets than it did, perhaps.
    PathMtu {
        /// Addresses that ICMP errors came about, some of them perhaps no server's.
        servers: Vec<IpAddr>,
    },
    /// Somebody wants to see everything.
    Status {
        /// Where to.
        done: oneshot::Sender<Status>,
    },
}
