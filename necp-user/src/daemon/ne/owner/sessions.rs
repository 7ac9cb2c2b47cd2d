//! What servers say: they join, start and stop services, and go.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::Owner;
use super::acks::Ack;
use super::exceptions::Tally;
use crate::control::config::Forwarding;
use crate::daemon::ne::hosts::Sight;
use crate::daemon::ne::input::{From, SessionId};
use crate::necp::{CloseReason, Operation, ServiceKey};

/// How long a START may wait for the next hop of its server to be known.
const NEXT_HOP_WAIT: Duration = Duration::from_secs(1);

/// The session that speaks for a server.
pub(super) struct Current {
    session: SessionId,
    kick: mpsc::Sender<CloseReason>,
    started: BTreeSet<ServiceKey>,
    /// What became of its exceptions since it was logged.
    pub(super) tally: Tally,
}

impl Owner {
    pub(super) fn is_current(&self, from: From) -> bool {
        self.sessions.get(&from.server).is_some_and(|current| current.session == from.session)
    }

    /// Makes this session its server's own; false if a newer one is.
    pub(super) fn supersede(&mut self, from: From, kick: mpsc::Sender<CloseReason>) -> bool {
        match self.sessions.get(&from.server) {
            Some(current) if current.session > from.session => return false,
            Some(current) if current.session < from.session => {
                if self.limits.voices().may_speak(from.server) {
                    tracing::info!("{} has opened a new session: the old one is closed", from.server);
                }
                // If there is no room, it is being closed already.
                let _ = current.kick.try_send(CloseReason::Superseded);
            }
            _ => {}
        }
        self.sessions.insert(
            from.server,
            Current { session: from.session, kick, started: BTreeSet::new(), tally: Tally::default() },
        );
        true
    }

    pub(super) async fn open(&mut self, from: From, done: oneshot::Sender<Vec<usize>>) {
        let server = from.server;
        self.hosts.follow(server).await;
        let now = Instant::now();
        match self.cluster.init(server, self.hosts.is_on_link(server), now) {
            Ok(change) => {
                self.acks.add(Ack::init(server, change, done));
                if self.limits.voices().may_speak(server) {
                    tracing::info!("{server} has joined");
                }
            }
            // The door admits by the same prefixes.
            Err(error) => tracing::error!("{error}"),
        }
        if self.hosts.sight(server) == Sight::NoWay && self.limits.voices().may_speak(server) {
            tracing::warn!("no route by any of `interfaces` leads to {server}: its packets could not reach it");
        }
        self.lost.remove(&server);
        self.report_sight(server);
        self.must_write();
    }

    pub(super) fn operate(&mut self, server: IpAddr, operations: &[Operation], done: oneshot::Sender<Vec<usize>>) {
        let now = Instant::now();
        let mut ack = Ack::operations(server, now + NEXT_HOP_WAIT, done);
        let limits = Arc::clone(&self.limits);
        let voices = limits.voices();
        let mut started = self.sessions.get_mut(&server).map(|session| std::mem::take(&mut session.started));
        for (index, operation) in operations.iter().enumerate() {
            let Some(key) = operation.service() else {
                self.except(server, index, operation, now, &mut ack);
                continue;
            };
            match operation {
                Operation::Stop(_) => {
                    ack.wait(index, self.cluster.stop(server, key.protocol(), key.port(), now));
                    if started.as_mut().is_some_and(|started| started.remove(&key)) && voices.may_speak(server) {
                        tracing::info!("{server} stops {key}");
                    }
                }
                Operation::Start(unit) => {
                    let forwarding = Forwarding::from_wire(unit.forwarding.code().into()).unwrap_or(Forwarding::Layer2);
                    match self.cluster.start(server, forwarding, key.protocol(), key.port(), now) {
                        Ok(change) => {
                            ack.wait_for_start(index, change);
                            if started.as_mut().is_some_and(|started| started.insert(key)) && voices.may_speak(server) {
                                tracing::info!("{server} starts {key} by {}", unit.forwarding);
                            }
                        }
                        Err(error) => {
                            ack.fail(index);
                            if voices.may_speak(server) {
                                tracing::warn!("{server} cannot start {key} by {}: {error}", unit.forwarding);
                            }
                        }
                    }
                }
                Operation::Except(_) | Operation::Unexcept(_) => {}
            }
        }
        if let (Some(session), Some(started)) = (self.sessions.get_mut(&server), started) {
            session.started = started;
        }
        self.acks.add(ack);
        self.must_write();
    }

    pub(super) fn lose(&mut self, server: IpAddr, reason: &CloseReason) {
        self.tell_exceptions(server);
        let serving = self.sessions.remove(&server).is_some_and(|session| !session.started.is_empty());
        if !self.limits.voices().may_speak(server) {
            // It comes and goes: what it does is counted as lines that were left out.
        } else if serving {
            tracing::warn!("session of {server} lost ({reason}): it gets no new flows, its flows stay");
        } else {
            tracing::info!("{server} has left ({reason})");
        }
        self.cluster.session_lost(server, Instant::now());
        self.hosts.probe([server]);
        self.lost.insert(server);
        self.report_sight(server);
        self.must_write();
    }

    /// Servers with a session.
    pub(super) fn open_sessions(&self) -> usize {
        self.sessions.len()
    }
}
