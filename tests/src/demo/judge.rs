//! What counts as a violation: pure rules over what was seen on the wire and what became of the connections.
//!
//! - An *outage* begins when the balancer must know: STOP_ACK on its way to the agent, the close of the session of an
//!   agent that was killed, or the moment at which the balancer declares a vanished server lost. It ends with the START
//!   of the server's return.
//! - A new connection whose first SYN came to the balancer more than [`TOLERANCE`] after that, and that was sent to that
//!   server all the same, is a violation. Before the balancer could know of a vanished server, it is "in the dark".
//! - An established connection that broke or moved is a violation, unless its server vanished while it lived.

use std::{collections::HashMap, net::SocketAddrV4, time::Duration};

use super::wire::{Observation, What};
use crate::{
    capture::WallTime,
    load::{Failure, Kind},
};

/// How long after an outage's beginning a first SYN may still be placed on its server.
pub const TOLERANCE: Duration = Duration::from_millis(10);

/// Why a server gets no new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It said STOP.
    Stopped,
    /// Its agent was killed.
    AgentKilled,
    /// Its link went down.
    Vanished,
}

/// A time without new connections for a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    /// The server, from 0.
    pub server: usize,
    /// Why.
    pub cause: Cause,
    /// When it was done: the signal was sent, the link went down.
    pub done: WallTime,
    /// When the balancer had confirmed or declared it: see the module's text.
    pub began: WallTime,
    /// When the server's START was on its way again.
    pub ended: Option<WallTime>,
}

/// A server was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The server, from 0.
    pub server: usize,
    /// How.
    pub cause: Cause,
    /// Just before it was done.
    pub at: WallTime,
}

/// The outage that a mark has brought about, if it was seen: `declared` are the moments at which the balancer said that
/// a server is lost.
pub fn outage_of(mark: &Mark, seen: &[Observation], declared: &[(WallTime, usize)]) -> Option<Outage> {
    let server = mark.server;
    let first =
        |what: What, from: WallTime| seen.iter().find(|seen| seen.at >= from && seen.what == what).map(|seen| seen.at);
    let closed = first(What::SessionClosed { server }, mark.at);
    let began = match mark.cause {
        Cause::Stopped => first(What::StopAck { server }, mark.at)?,
        Cause::AgentKilled => closed?,
        Cause::Vanished => {
            let declared = declared.iter().filter(|(at, whose)| *whose == server && *at >= mark.at);
            declared.map(|(at, _)| *at).chain(closed).min()?
        }
    };
    Some(Outage { server, cause: mark.cause, done: mark.at, began, ended: first(What::Start { server }, began) })
}

/// What has become of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was for.
    pub kind: Kind,
    /// The client's end, if it got that far.
    pub client: Option<SocketAddrV4>,
    /// Just before its first SYN.
    pub began: WallTime,
    /// When it came to its end.
    pub ended: WallTime,
    /// Who answered first, from 0.
    pub server: Option<usize>,
    /// Requests that were answered.
    pub answered: u64,
    /// What went wrong, if anything.
    pub failure: Option<Failure>,
}

/// How a connection's end is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Whole,
    /// Established, and broken or moved: a violation.
    Harmed,
    /// Established, and broken because its server vanished.
    WentWithItsServer,
    /// Never established: sent to a vanished server before its loss could be known.
    InTheDark,
    /// Never established, for another reason.
    Refused,
}

/// A connection attempt, as the wire shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The client's end.
    pub client: SocketAddrV4,
    /// When its first SYN came to the balancer.
    pub first_syn: WallTime,
    /// Where its SYNs were sent, and when; retransmissions included.
    pub placed: Vec<(WallTime, usize)>,
}

/// A new connection that should have gone elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// The server that it was placed on.
    pub server: usize,
    /// The client's end.
    pub client: SocketAddrV4,
    /// From the outage's beginning to the first SYN.
    pub after: Duration,
}

/// All connection attempts, in the order of their first SYNs.
#[derive(Clone, Debug, Default)]
pub struct Attempts {
    list: Vec<Attempt>,
    index: HashMap<(SocketAddrV4, u32), usize>,
}

impl Attempts {
    /// Takes note of a SYN; anything else is none of its business.
    pub fn note(&mut self, seen: &Observation) {
        let (client, isn, server) = match seen.what {
            What::SynArrived { client, isn } => (client, isn, None),
            What::SynPlaced { client, isn, server } => (client, isn, Some(server)),
            _ => return,
        };
        let at = *self.index.entry((client, isn)).or_insert_with(|| {
            self.list.push(Attempt { client, first_syn: seen.at, placed: Vec::new() });
            self.list.len() - 1
        });
        self.list[at].placed.extend(server.map(|server| (seen.at, server)));
    }

    /// All of them.
    pub fn all(&self) -> &[Attempt] {
        &self.list
    }

    /// The attempt that a connection of `client` made, which began just before `began`'s SYN: the last one that is not
    /// later than `ended`.
    pub fn of(&self, client: SocketAddrV4, began: WallTime, ended: WallTime) -> Option<&Attempt> {
        // Socket and capture read one clock; the first SYN is on the wire after `began` was read.
        self.list
            .iter()
            .rev()
            .find(|attempt| attempt.client == client && attempt.first_syn >= began && attempt.first_syn <= ended)
    }
}

/// New connections placed on a server that was stopped or lost, and known to be.
pub fn late(attempts: &[Attempt], outages: &[Outage]) -> Vec<Late> {
    let mut late = Vec::new();
    for attempt in attempts {
        for outage in outages {
            let known = attempt.first_syn > outage.began + TOLERANCE
                && outage.ended.is_none_or(|ended| attempt.first_syn < ended);
            if known && attempt.placed.iter().any(|(_, server)| *server == outage.server) {
                let after = attempt.first_syn - outage.began;
                late.push(Late { server: outage.server, client: attempt.client, after });
            }
        }
    }
    late
}

/// New connections that were sent to a vanished server before its loss could be known.
pub fn in_the_dark(attempts: &[Attempt], outage: &Outage) -> usize {
    let dark = |attempt: &&Attempt| {
        attempt.first_syn >= outage.done
            && attempt.first_syn <= outage.began + TOLERANCE
            && attempt.placed.iter().any(|(_, server)| *server == outage.server)
    };
    attempts.iter().filter(dark).count()
}

/// When new connections went elsewhere: the first one, placed on another server, after the last one that was placed on
/// this one in the outage. From `since` on; none if there is no such connection.
pub fn first_elsewhere(attempts: &[Attempt], outage: &Outage, since: WallTime) -> Option<Duration> {
    let during = |at: WallTime| at >= since && outage.ended.is_none_or(|ended| at < ended);
    let first_choice = attempts.iter().filter(|attempt| during(attempt.first_syn)).filter_map(|attempt| {
        let (_, server) = attempt.placed.first()?;
        Some((attempt.first_syn, *server))
    });
    let mut elsewhere = None;
    for (at, server) in first_choice {
        if server == outage.server {
            elsewhere = None;
        } else {
            elsewhere = elsewhere.or(Some(at - since));
        }
    }
    elsewhere
}

/// What a connection's end means. `wire` is the server that the wire shows, which counts where no answer came.
pub fn verdict(end: &Ended, wire: Option<usize>, outages: &[Outage]) -> Verdict {
    let Some(failure) = &end.failure else { return Verdict::Whole };
    let server = end.server.or(wire);
    let vanished = |outage: &&Outage| outage.cause == Cause::Vanished && Some(outage.server) == server;
    let mut vanished = outages.iter().filter(vanished);
    if !failure.hit_established() {
        let dark = |outage: &Outage| end.ended >= outage.done && end.began <= outage.began + TOLERANCE;
        return if vanished.any(dark) { Verdict::InTheDark } else { Verdict::Refused };
    }
    let lived = |outage: &Outage| end.began <= outage.began + TOLERANCE && end.ended >= outage.done;
    let moved = matches!(failure, Failure::Moved { .. });
    if !moved && vanished.any(lived) { Verdict::WentWithItsServer } else { Verdict::Harmed }
}

/// Downloads that were under way at a server at a moment: how many there were, and how many of them came whole.
pub fn downloads_across(ends: &[Ended], server: usize, at: WallTime) -> (usize, usize) {
    let across =
        |end: &&Ended| end.kind == Kind::Download && end.server == Some(server) && end.began <= at && end.ended >= at;
    let across: Vec<_> = ends.iter().filter(across).collect();
    (across.len(), across.iter().filter(|end| end.failure.is_none()).count())
}

/// Which part of the new connections between two moments was placed on a server, 0 to 1.
pub fn share(attempts: &[Attempt], server: usize, from: WallTime, to: WallTime) -> Option<f64> {
    let within = attempts.iter().filter(|attempt| (from..to).contains(&attempt.first_syn));
    let placed: Vec<usize> = within.filter_map(|attempt| attempt.placed.first().map(|(_, server)| *server)).collect();
    let own = placed.iter().filter(|other| **other == server).count();
    (!placed.is_empty()).then(|| own as f64 / placed.len() as f64)
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
