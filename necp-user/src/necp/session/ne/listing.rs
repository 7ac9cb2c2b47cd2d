//! EXCEPTION_QUERYs between their arrival and the end of their answer.
//!
//! The answer is one message, for the draft knows no chaining (§6.5), and its header says beforehand how many units it
//! has. The caller counts first, and then gives as many, piece by piece, as the peer reads them.

use std::collections::VecDeque;

use super::NeEvent;
use crate::necp::message::{Family, Listed};
use crate::necp::session::link::Link;
use crate::necp::session::units::{AnyUnit, Form};
use crate::necp::session::{MAX_BATCH, Token};
use crate::necp::wire::{Header, Opcode};

/// Queries that are not answered, before no more input is looked at.
const MAX_OPEN: usize = 16;
/// The most units that a header can announce, with room for a preamble and a credential.
const fn max_units(form: Form) -> u32 {
    u32::MAX / form.unit_len() as u32 - 1
}

/// The queries that are not answered to the end, in the order of their arrival, which is that of their answers.
#[derive(Debug, Default)]
pub(super) struct Listings {
    open: VecDeque<Open>,
}

#[derive(Debug)]
struct Open {
    token: Token,
    request_id: u16,
    form: Form,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The caller counts.
    Counting,
    /// So many units, when its turn comes.
    Counted(u32),
    /// The header is out, and `left` units are not; whether the caller was asked for more.
    Listing { left: u32, asked: bool },
}

impl Listings {
    pub(super) fn is_full(&self) -> bool {
        self.open.len() >= MAX_OPEN
    }

    /// Whether the next answer waits for the caller, and not for the peer.
    pub(super) fn waits_for_caller(&self) -> bool {
        let waits = |open: &Open| matches!(open.state, State::Counting | State::Listing { asked: true, .. });
        self.open.front().is_some_and(waits)
    }

    /// INIT: what was not begun is forgotten. What was begun is framed, and goes on to its end.
    pub(super) fn clear(&mut self) {
        self.open.retain(|open| matches!(open.state, State::Listing { .. }));
    }

    /// A query that came.
    pub(super) fn add(&mut self, token: Token, request_id: u16, form: Form) {
        self.open.push_back(Open { token, request_id, form, state: State::Counting });
    }

    /// Says whether it was awaited.
    pub(super) fn list(&mut self, token: Token, count: u32, link: &mut Link, events: &mut VecDeque<NeEvent>) -> bool {
        let counting = |open: &&mut Open| open.token == token && matches!(open.state, State::Counting);
        let Some(open) = self.open.iter_mut().find(counting) else { return false };
        open.state = State::Counted(count.min(max_units(open.form)));
        self.pump(link, events);
        true
    }

    pub(super) fn more(&mut self, token: Token, entries: &[Listed], link: &mut Link, events: &mut VecDeque<NeEvent>) {
        let open = self.open.front_mut().filter(|open| open.token == token);
        let Some(Open { form, state: State::Listing { left, asked: asked @ true }, .. }) = open else { return };
        for unit in entries.iter().filter_map(|entry| unit(*form, entry)).take(*left as usize) {
            link.stream_unit(&unit);
            *left -= 1;
        }
        *asked = false;
        self.pump(link, events);
    }

    /// Goes on with the answers as far as the peer has read: to be called whenever output was taken.
    pub(super) fn pump(&mut self, link: &mut Link, events: &mut VecDeque<NeEvent>) {
        while link.closed().is_none()
            && let Some(Open { token, request_id, form, state }) = self.open.front_mut()
        {
            let room = link.stream_room() / form.unit_len();
            match state {
                State::Counting => return,
                // There is room for the header, and a unit to be asked for.
                State::Counted(_) if room < 2 => return,
                State::Counted(count) => {
                    link.begin_stream(Opcode::EXCEPTION_RESP, *request_id, *form, *count as usize);
                    *state = State::Listing { left: *count, asked: false };
                }
                State::Listing { left: 0, .. } => {
                    link.end_stream();
                    self.open.pop_front();
                }
                State::Listing { left, asked } => {
                    if !*asked && room > 0 {
                        *asked = true;
                        let max = room.min(*left as usize).min(MAX_BATCH);
                        events.push_back(NeEvent::ListMore { token: *token, max });
                    }
                    return;
                }
            }
        }
    }
}

/// An EXCEPTION_QUERY as it comes in: one unit.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) header: Header,
    pub(super) form: Form,
    pub(super) unit: Option<AnyUnit>,
}

/// An entry in this form; `None` if it has no room for it.
fn unit(form: Form, entry: &Listed) -> Option<AnyUnit> {
    match form {
        Form::Basic => (entry.flows.family() == Family::V4).then(|| AnyUnit::Basic(entry.unit())),
        Form::Wide => Some(AnyUnit::Wide(entry.wide_unit())),
    }
}
