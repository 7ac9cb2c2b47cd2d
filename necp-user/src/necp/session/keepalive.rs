//! The keepalive clock (§5.5), the same for both roles.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::rng::Rng;
use super::{MAX_MISSED, SessionConfig};
use crate::necp::service::ServiceKey;

/// A KEEPALIVE that is not answered yet, and what it asked.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) request_id: u16,
    pub(super) queries: Vec<ServiceKey>,
}

/// What the clock says when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tick {
    /// Send a KEEPALIVE.
    Send,
    /// Too many in a row went unanswered.
    Dead,
    /// They did, but it is not the peer's fault.
    Wait,
}

/// Stopped until [`KeepaliveClock::start`].
#[derive(Debug)]
pub(super) struct KeepaliveClock {
    interval: Duration,
    jitter: Duration,
    rng: Rng,
    next: Option<Instant>,
    /// When the next one might have been due, had chance wanted it so.
    earliest: Option<Instant>,
    outstanding: VecDeque<Asked>,
}

impl KeepaliveClock {
    pub(super) fn new(config: &SessionConfig, rng: Rng) -> Self {
        let interval = config.keepalive.max(Duration::from_millis(1));
        Self {
            interval,
            jitter: config.jitter.min(interval / 5),
            rng,
            next: None,
            earliest: None,
            outstanding: VecDeque::with_capacity(MAX_MISSED),
        }
    }

    /// Starts anew, with nothing outstanding.
    pub(super) fn start(&mut self, now: Instant) {
        self.outstanding.clear();
        self.postpone(now);
    }

    pub(super) fn stop(&mut self) {
        self.outstanding.clear();
        (self.next, self.earliest) = (None, None);
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.next
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.next.is_some_and(|next| now >= next)
    }

    /// Whether a KEEPALIVE may go before it is due, with the answer to one of the peer's: in one segment, where there would
    /// be two. It is never earlier than the jitter allows, and a peer that owes an answer is asked when it is due.
    pub(super) fn may_go_along(&self, now: Instant) -> bool {
        self.outstanding.is_empty() && self.earliest.is_some_and(|earliest| now >= earliest)
    }

    /// Asks the clock, when it is due; `excused` says that answers may have come and were not read, or cannot have
    /// come.
    pub(super) fn tick(&mut self, now: Instant, excused: bool) -> Tick {
        // From now, not from when it was due: after a pause nobody needs the ones that were missed.
        self.postpone(now);
        match (self.has_room(), excused) {
            (true, _) => Tick::Send,
            (false, true) => Tick::Wait,
            (false, false) => Tick::Dead,
        }
    }

    /// Asks nothing for another interval.
    pub(super) fn postpone(&mut self, now: Instant) {
        self.next = Some(now + self.delay());
        self.earliest = Some(now + self.interval - self.jitter);
    }

    pub(super) fn sent(&mut self, asked: Asked) {
        self.outstanding.push_back(asked);
    }

    /// Takes the KEEPALIVE that this id answers, and forgets the older ones: those in a row are what counts.
    pub(super) fn answered(&mut self, request_id: u16) -> Option<Asked> {
        let position = self.outstanding.iter().position(|asked| asked.request_id == request_id)?;
        self.outstanding.drain(..=position).next_back()
    }

    pub(super) fn uses(&self, request_id: u16) -> bool {
        self.outstanding.iter().any(|asked| asked.request_id == request_id)
    }

    pub(super) fn has_room(&self) -> bool {
        self.outstanding.len() < MAX_MISSED
    }

    /// Interval ± a random part of at most the jitter.
    fn delay(&mut self) -> Duration {
        let span = 2 * self.jitter.as_nanos();
        let part = (u128::from(self.rng.next()) * span) >> 64;
        self.interval - self.jitter + Duration::from_nanos(part as u64)
    }
}
