//! EXCEPTION_QUERYs between their arrival and the end of their answer.
//!
//! The answer is one message, for the draft knows no chaining (§6.5), and its header says beforehand how many units it
//! has. So they are counted first, and the count is kept: entries that are gone when their turn comes are made up for by
//! repeating the unit before.

use std::collections::VecDeque;

use super::NeEvent;
use crate::necp::message::{Filter, Listed};
use crate::necp::session::link::Link;
use crate::necp::session::{MAX_BATCH, Token};
use crate::necp::wire::{Flags, Header, Opcode, Unit};

/// Queries that may wait for their turn before no more input is looked at.
const MAX_WAITING: usize = 16;
/// The most units that a header can announce, with room for a credential.
const MAX_UNITS: u32 = u32::MAX / 32 - 1;

#[derive(Debug, Default)]
pub(super) struct Listings {
    /// Not told to the caller yet.
    waiting: VecDeque<Waiting>,
    current: Option<Current>,
}

#[derive(Debug)]
struct Waiting {
    token: Token,
    request_id: u16,
    filter: Filter,
}

/// The one that the caller is at work on.
#[derive(Debug)]
struct Current {
    token: Token,
    request_id: u16,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The caller counts.
    Counting,
    /// The header is out, and `left` units are not.
    Listing {
        left: u32,
        /// Repeated for what is gone.
        last: Unit,
        /// The caller was asked for more.
        asked: bool,
        /// The caller has no more.
        ended: bool,
    },
}

impl Listings {
    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// Whether a RESP is in progress that waits for the caller, and not for the peer.
    pub(super) fn waits_for_caller(&self) -> bool {
        self.current
            .as_ref()
            .is_some_and(|current| matches!(current.state, State::Counting | State::Listing { asked: true, .. }))
    }

    /// INIT: what was not begun is forgotten. What was begun is framed, and goes on to its end.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.current.take_if(|current| matches!(current.state, State::Counting));
    }

    /// A query that came.
    pub(super) fn add(&mut self, token: Token, request_id: u16, filter: Filter, events: &mut VecDeque<NeEvent>) {
        self.waiting.push_back(Waiting { token, request_id, filter });
        self.next(events);
    }

    pub(super) fn list(
        &mut self,
        token: Token,
        count: u32,
        sample: Option<Listed>,
        link: &mut Link,
        events: &mut VecDeque<NeEvent>,
    ) {
        let Some(current) = self.counting(token) else { return };
        match sample.map(|sample| sample.unit()) {
            Some(last) if count > 0 => {
                let left = count.min(MAX_UNITS);
                link.begin_stream(Opcode::EXCEPTION_RESP, current.request_id, left as usize);
                current.state = State::Listing { left, last, asked: false, ended: false };
                self.pump(link, events);
            }
            _ => {
                link.send(Opcode::EXCEPTION_RESP, Flags::NONE, current.request_id, &[]);
                self.end(link, events);
            }
        }
    }

    pub(super) fn refuse(&mut self, token: Token, link: &mut Link, events: &mut VecDeque<NeEvent>) {
        let Some(current) = self.counting(token) else { return };
        link.send(Opcode::EXCEPTION_RESP, Flags::ERROR, current.request_id, &[]);
        self.end(link, events);
    }

    pub(super) fn more(
        &mut self,
        token: Token,
        entries: &[Listed],
        is_last: bool,
        link: &mut Link,
        events: &mut VecDeque<NeEvent>,
    ) {
        let Some(Current { state: State::Listing { left, last, asked: asked @ true, ended }, .. }) =
            self.current.as_mut().filter(|current| current.token == token)
        else {
            return;
        };
        for entry in entries.iter().take(*left as usize) {
            *last = entry.unit();
            link.stream_unit(last);
            *left -= 1;
        }
        (*asked, *ended) = (false, is_last);
        self.pump(link, events);
    }

    /// Goes on with the answer as far as the peer has read: to be called whenever output was taken.
    pub(super) fn pump(&mut self, link: &mut Link, events: &mut VecDeque<NeEvent>) {
        if link.closed().is_some() {
            return;
        }
        let Some(Current { token, state: State::Listing { left, last, asked, ended }, .. }) = &mut self.current else {
            return;
        };
        let room = link.stream_room();
        if *ended {
            for _ in 0..room.min(*left as usize) {
                link.stream_unit(last);
                *left -= 1;
            }
        }
        if *left == 0 {
            // An answer that is on its way to us is for a token that is void.
            link.end_stream();
            self.end(link, events);
        } else if !*ended && !*asked && room > 0 {
            *asked = true;
            events.push_back(NeEvent::ListMore { token: *token, max: room.min(*left as usize).min(MAX_BATCH) });
        }
    }

    fn counting(&mut self, token: Token) -> Option<&mut Current> {
        let current = self.current.as_mut()?;
        (current.token == token && matches!(current.state, State::Counting)).then_some(current)
    }

    fn end(&mut self, link: &Link, events: &mut VecDeque<NeEvent>) {
        self.current = None;
        if link.closed().is_none() {
            self.next(events);
        }
    }

    fn next(&mut self, events: &mut VecDeque<NeEvent>) {
        if self.current.is_none()
            && let Some(Waiting { token, request_id, filter }) = self.waiting.pop_front()
        {
            self.current = Some(Current { token, request_id, state: State::Counting });
            events.push_back(NeEvent::Query { token, filter });
        }
    }
}

/// An EXCEPTION_QUERY as it comes in: one unit.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) header: Header,
    pub(super) unit: Option<Unit>,
}
