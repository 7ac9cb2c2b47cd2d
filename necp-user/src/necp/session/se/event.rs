//! What the server element's side tells its caller.

use crate::necp::error::CloseReason;
use crate::necp::message::{Flows, Listed, Query};
use crate::necp::service::ServiceKey;
use crate::necp::session::{Notice, Token};

/// Names a request of this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(super) u64);

/// What [`SeSession`](super::SeSession) tells its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeEvent {
    /// INIT_ACK came: the NE holds nothing for us yet (§5.4); what was queued goes out now.
    Ready,
    /// The NE asks for the Health Index of these services: [`answer_health`](super::SeSession::answer_health).
    HealthQuery {
        /// For [`answer_health`](super::SeSession::answer_health).
        token: Token,
        /// The queries, in the order of the answers.
        queries: Vec<Query>,
    },
    /// The NE answered a START or STOP.
    Acked {
        /// What [`start`](super::SeSession::start) or [`stop`](super::SeSession::stop) returned.
        id: RequestId,
        /// The services of the request that failed; empty if all is well.
        failed: Vec<ServiceKey>,
    },
    /// The NE answered an EXCEPTION_ADD or EXCEPTION_DEL, or all messages that it was cut into.
    Excepted {
        /// What [`except_add`](super::SeSession::except_add) or [`except_del`](super::SeSession::except_del) returned.
        id: RequestId,
        /// The flows of the request that failed, each once; empty if all is well.
        failed: Vec<Flows>,
    },
    /// The NE answered an EXCEPTION_RESET.
    Reset {
        /// What [`except_reset`](super::SeSession::except_reset) returned.
        id: RequestId,
        /// Whether it was done.
        done: bool,
    },
    /// A piece of the answer to an EXCEPTION_QUERY. Take it soon: while pieces wait, nothing more is read from the NE,
    /// which closes a session that does not read for three keepalives.
    Listed {
        /// What [`except_query`](super::SeSession::except_query) returned.
        id: RequestId,
        /// At most [`MAX_BATCH`] entries that match the filter, of any SE; the last piece may be empty. One may be
        /// named twice: an NE keeps the number that it announced, though entries have gone meanwhile.
        ///
        /// [`MAX_BATCH`]: crate::necp::session::MAX_BATCH
        entries: Vec<Listed>,
        /// No more follow.
        last: bool,
    },
    /// The NE refused an EXCEPTION_QUERY, or answered what makes no sense. Pieces that came before are not all.
    ListFailed {
        /// What [`except_query`](super::SeSession::except_query) returned.
        id: RequestId,
    },
    /// The NE's own Health Index, 0 to 100.
    NeHealth(u8),
    /// Worth a line in the log; a version mismatch is told here.
    Notice(Notice),
    /// The session has ended; the last event.
    Closed(CloseReason),
}
