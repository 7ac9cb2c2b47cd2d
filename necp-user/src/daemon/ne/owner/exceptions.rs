//! Exceptions: what servers add and delete, the lists that they ask for, and what the log says of it.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::time::Instant;

use tokio::sync::oneshot;

use super::Owner;
use super::acks::Ack;
use crate::control::cluster::Cluster;
use crate::control::exceptions::ExceptError;
use crate::daemon::ne::input::{ListPart, ListStep};
use crate::necp::Operation;

/// Entries that one step of a list looks at: well under a millisecond.
const STEP: usize = 4096;

/// Steps of lists that wait. Each round of the owner does one, so that lists hold up nobody who changes something.
#[derive(Default)]
pub(super) struct Lists {
    waiting: VecDeque<(ListStep, oneshot::Sender<ListPart>)>,
}

impl Lists {
    /// A list begins at once, so that it shows what was done before, and nothing that is done after.
    pub(super) fn take(&mut self, step: ListStep, done: oneshot::Sender<ListPart>, cluster: &Cluster) {
        match step {
            ListStep::Begin(_) => answer(step, done, cluster),
            ListStep::Count(_) | ListStep::Read(..) => self.waiting.push_back((step, done)),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn step(&mut self, cluster: &Cluster) {
        if let Some((step, done)) = self.waiting.pop_front() {
            answer(step, done, cluster);
        }
    }
}

fn answer(step: ListStep, done: oneshot::Sender<ListPart>, cluster: &Cluster) {
    let (mut listing, max) = match step {
        ListStep::Begin(filter) => (cluster.except_list(filter), None),
        ListStep::Count(listing) => (listing, None),
        ListStep::Read(listing, max) => (listing, Some(max)),
    };
    let part = if let Some(max) = max {
        let mut entries = Vec::with_capacity(max);
        let is_last = listing.read(cluster, max, STEP, &mut entries);
        ListPart::Entries((!is_last).then_some(listing), entries)
    } else {
        match listing.count(cluster, STEP) {
            Some(count) => ListPart::Counted(listing, count),
            None => ListPart::Counting(listing),
        }
    };
    // The session may have ended meanwhile.
    let _ = done.send(part);
}

/// What became of a server's exceptions within a second: one line, however many they are.
#[derive(Debug, Default)]
pub(super) struct Tally {
    added: u64,
    deleted: u64,
    resets: u64,
    refused: u64,
    first_refusal: Option<ExceptError>,
}

impl Tally {
    fn is_empty(&self) -> bool {
        self.added + self.deleted + self.resets + self.refused == 0
    }
}

impl fmt::Display for Tally {
    /// `3 added, 1 deleted, 2 refused: the server has …`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts =
            [(self.added, "added"), (self.deleted, "deleted"), (self.resets, "resets"), (self.refused, "refused")];
        let parts: Vec<String> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        f.write_str(&parts.join(", "))?;
        match &self.first_refusal {
            Some(error) => write!(f, ": {error}"),
            None => Ok(()),
        }
    }
}

impl Owner {
    /// A unit of EXCEPTION_ADD or EXCEPTION_DEL.
    pub(super) fn except(&mut self, server: IpAddr, index: usize, operation: &Operation, now: Instant, ack: &mut Ack) {
        let mut nobody = Tally::default();
        let tally = self.sessions.get_mut(&server).map_or(&mut nobody, |session| &mut session.tally);
        match operation {
            Operation::Except(exception) => match self.cluster.except_add(server, exception, now) {
                Ok(change) => {
                    ack.wait(index, change);
                    tally.added += 1;
                }
                Err(error) => {
                    ack.fail(index);
                    tally.refused += 1;
                    tally.first_refusal.get_or_insert(error);
                }
            },
            Operation::Unexcept(flows) => match self.cluster.except_del(server, flows, now) {
                Ok(change) => {
                    ack.wait(index, change);
                    tally.deleted += 1;
                }
                Err(error) => {
                    ack.fail(index);
                    tally.refused += 1;
                    tally.first_refusal.get_or_insert(error);
                }
            },
            Operation::Start(_) | Operation::Stop(_) => {}
        }
    }

    pub(super) fn reset_exceptions(&mut self, server: IpAddr, done: oneshot::Sender<Vec<usize>>) {
        let now = Instant::now();
        let mut ack = Ack::operations(server, now, done);
        ack.wait(0, self.cluster.except_reset(server, now));
        self.acks.add(ack);
        if let Some(session) = self.sessions.get_mut(&server) {
            session.tally.resets += 1;
        }
        self.must_write();
    }

    pub(super) fn tell_all_exceptions(&mut self) {
        let talked = self.sessions.iter().filter(|(_, session)| !session.tally.is_empty());
        let servers: Vec<IpAddr> = talked.map(|(server, _)| *server).collect();
        servers.into_iter().for_each(|server| self.tell_exceptions(server));
    }

    /// Logs what became of this server's exceptions since that was logged.
    pub(super) fn tell_exceptions(&mut self, server: IpAddr) {
        let Some(session) = self.sessions.get_mut(&server) else { return };
        let tally = std::mem::take(&mut session.tally);
        if tally.is_empty() || !self.limits.voices().may_speak(server) {
            return;
        }
        if tally.refused > 0 {
            tracing::warn!("exceptions of {server}: {tally}");
        } else {
            tracing::info!("exceptions of {server}: {tally}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_is_one_line() {
        let tally = Tally { added: 3, refused: 2, first_refusal: Some(ExceptError::Full(9)), ..Tally::default() };
        let line = "3 added, 2 refused: there are 9 exceptions, and there may be no more: \
                    raise `max_exceptions` at the top of the configuration";
        assert_eq!(tally.to_string(), line);
        assert_eq!(Tally { deleted: 1, resets: 1, ..Tally::default() }.to_string(), "1 deleted, 1 resets");
    }
}
