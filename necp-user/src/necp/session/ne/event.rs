//! What the network element's side tells its caller.

use crate::necp::error::CloseReason;
use crate::necp::message::{Filter, HealthAnswer, Operation};
use crate::necp::session::{Notice, Token};

/// What [`NeSession`](super::NeSession) tells its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NeEvent {
    /// The SE opens the session, or starts over: delete its offers and exceptions, never its flows, then
    /// [`respond`](super::NeSession::respond); INIT_ACK goes out then (§5.4). Tokens from before are void.
    Init {
        /// For [`respond`](super::NeSession::respond).
        token: Token,
    },
    /// Carry these out in this order, write the maps, then [`respond`](super::NeSession::respond) (§3).
    Operations {
        /// For [`respond`](super::NeSession::respond).
        token: Token,
        /// At most [`MAX_BATCH`]; a message is handed over in as many pieces as it takes.
        ///
        /// [`MAX_BATCH`]: crate::necp::session::MAX_BATCH
        operations: Vec<Operation>,
    },
    /// Delete all exceptions of this SE, write the maps, then [`respond`](super::NeSession::respond); a non-empty
    /// `failed` says that it could not be done (§5.7.5).
    Reset {
        /// For [`respond`](super::NeSession::respond).
        token: Token,
    },
    /// The SE asks for the exceptions in force, of any SE, that match (§5.7.7), as they are after the operations told
    /// before: count them, then [`list`](super::NeSession::list).
    Query {
        /// For [`list`](super::NeSession::list).
        token: Token,
        /// Which.
        filter: Filter,
    },
    /// There is room for more of the list: [`list_more`](super::NeSession::list_more), once.
    ListMore {
        /// That of the [`NeEvent::Query`].
        token: Token,
        /// How many entries, at most; 1 at least.
        max: usize,
    },
    /// The SE answered for these services (§5.5.2).
    Health(Vec<HealthAnswer>),
    /// Worth a line in the log.
    Notice(Notice),
    /// The session has ended; the last event.
    Closed(CloseReason),
}
