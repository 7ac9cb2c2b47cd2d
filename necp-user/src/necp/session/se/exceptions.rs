//! Exceptions, as the server element speaks of them (§5.7).

use std::collections::{BTreeMap, BTreeSet};

use super::requests::{self, Answer, Request};
use super::{Body, RequestId, SeEvent, SeSession};
use crate::necp::message::{Exception, Family, Filter, Flows, Listed};
use crate::necp::session::MAX_BATCH;
use crate::necp::session::units::{AnyUnit, Form, Units};
use crate::necp::wire::{Flags, Header, Opcode};

/// Units in one message: an NE stages, or repeats, no more than so many.
const MAX_UNITS: usize = 4 * MAX_BATCH;
/// Entries of a list that may wait for the caller before no more input is looked at.
const MAX_LISTED: usize = 8 * MAX_BATCH;

/// Requests that were cut into several messages, and lists that wait for the caller.
#[derive(Debug, Default)]
pub(super) struct Exceptions {
    cut: BTreeMap<RequestId, Cut>,
    /// Entries in [`SeEvent::Listed`]s that the caller has not taken.
    listed: usize,
}

#[derive(Debug, Default)]
struct Cut {
    /// Messages that are not answered.
    open: usize,
    failed: BTreeSet<Flows>,
}

/// An EXCEPTION_RESP as it comes in.
#[derive(Debug)]
pub(super) struct Listing {
    id: RequestId,
    filter: Filter,
    piece: Vec<Listed>,
}

impl Exceptions {
    pub(super) fn is_full(&self) -> bool {
        self.listed >= MAX_LISTED
    }

    /// The caller has taken an event.
    pub(super) fn taken(&mut self, event: &SeEvent) {
        if let SeEvent::Listed { entries, .. } = event {
            self.listed -= entries.len();
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn held_bytes(&self) -> usize {
        let failed: usize = self.cut.values().map(|cut| cut.failed.len()).sum();
        (self.listed + MAX_BATCH) * size_of::<Listed>() + failed * size_of::<Flows>()
    }
}

impl SeSession {
    /// Adds exceptions, or overwrites them (§5.7.1): flows that shall not come here. [`SeEvent::Excepted`] follows; those of
    /// flows that are not [normal](Flows::normal) have failed. Many are sent as several messages.
    pub fn except_add(&mut self, exceptions: &[Exception]) -> RequestId {
        let flows = exceptions.iter().map(|exception| exception.flows);
        let unit = |at: usize, flows: Flows, form| {
            let exception = Exception { flows, ..exceptions[at] };
            match form {
                Form::Basic => AnyUnit::Basic(exception.unit()),
                Form::Wide => AnyUnit::Wide(exception.wide_unit()),
            }
        };
        self.except(Opcode::EXCEPTION_ADD, flows, unit)
    }

    /// Deletes exceptions of our own; those that do not exist count as deleted (§5.7.3). [`SeEvent::Excepted`] follows.
    pub fn except_del(&mut self, flows: &[Flows]) -> RequestId {
        let unit = |_, flows: Flows, form| match form {
            Form::Basic => AnyUnit::Basic(Exception::del_unit(&flows)),
            Form::Wide => AnyUnit::Wide(Exception::wide_del_unit(&flows)),
        };
        self.except(Opcode::EXCEPTION_DEL, flows.iter().copied(), unit)
    }

    /// Deletes all exceptions of our own (§5.7.5). [`SeEvent::Reset`] follows.
    pub fn except_reset(&mut self) -> RequestId {
        let id = self.next_id();
        self.enqueue(Request::new(id, Opcode::EXCEPTION_RESET, Units::default()));
        id
    }

    /// Asks for the NE's exceptions of all SEs that match (§5.7.7). [`SeEvent::Listed`] follows, once or more, or
    /// [`SeEvent::ListFailed`]. An NE that does not speak the extension has none of IPv6 to list.
    pub fn except_query(&mut self, filter: Filter) -> RequestId {
        let id = self.next_id();
        let request = Request::new(id, Opcode::EXCEPTION_QUERY, Units::default());
        self.enqueue(Request { filter: Some(filter), ..request });
        id
    }

    fn except(
        &mut self,
        opcode: Opcode,
        flows: impl ExactSizeIterator<Item = Flows>,
        unit: impl Fn(usize, Flows, Form) -> AnyUnit,
    ) -> RequestId {
        let id = self.next_id();
        if self.link.closed().is_some() {
            // Nothing follows `Closed`.
            return id;
        }
        let mut messages = Messages::default();
        let mut failed = BTreeSet::new();
        for (at, flows) in flows.enumerate() {
            match flows.normal() {
                Ok(flows) => messages.add(&unit(at, flows, form(&flows))),
                Err(_) => _ = failed.insert(flows),
            }
        }
        if messages.done.is_empty() {
            // A request must have units (§5.7.1); this one asks for nothing, and nothing is done.
            self.events.push_back(SeEvent::Excepted { id, failed: failed.into_iter().collect() });
            return id;
        }
        self.exceptions.cut.insert(id, Cut { open: messages.done.len(), failed });
        for units in messages.done {
            self.enqueue(Request::new(id, opcode, units));
        }
        id
    }

    /// An EXCEPTION_ADD_ACK or EXCEPTION_DEL_ACK.
    pub(super) fn excepted(&mut self, answer: &Answer, all_failed: bool) {
        let Answer { request, failed, .. } = answer;
        let failed = if all_failed { &request.units } else { failed };
        self.link.counters.failed_units += failed.len() as u64;
        let Some(cut) = self.exceptions.cut.get_mut(&request.id) else { return };
        cut.failed.extend(failed.iter().map(requests::flows));
        cut.open -= 1;
        if cut.open == 0
            && let Some(cut) = self.exceptions.cut.remove(&request.id)
        {
            self.events.push_back(SeEvent::Excepted { id: request.id, failed: cut.failed.into_iter().collect() });
        }
    }

    /// The header of an EXCEPTION_RESET_ACK (§5.7.6).
    pub(super) fn on_reset_ack(&mut self, header: &Header) {
        self.link.skip_payload();
        let Some(request) = self.take_outstanding(header) else { return self.link.unexpected(header.opcode) };
        self.events.push_back(SeEvent::Reset { id: request.id, done: !header.flags.has(Flags::ERROR) });
    }

    /// The header of an EXCEPTION_RESP (§5.7.8).
    pub(super) fn on_resp(&mut self, header: &Header) {
        let Some(request) = self.take_outstanding(header) else {
            self.link.skip_payload();
            return self.link.unexpected(header.opcode);
        };
        let is_wide = request.units.form() == Form::Wide && header.wide_units().is_some();
        let has_units = is_wide || header.units().is_some();
        if !has_units {
            self.link.malformed(header.opcode);
        }
        if !has_units || header.flags.has(Flags::ERROR) {
            self.link.skip_payload();
            return self.events.push_back(SeEvent::ListFailed { id: request.id });
        }
        if is_wide {
            self.link.read_wide(header);
        }
        self.body = Body::Listing(Listing::new(&request));
    }

    pub(super) fn list_failed(&mut self, listing: &Listing) {
        self.events.push_back(SeEvent::ListFailed { id: listing.id });
    }

    /// A unit of an EXCEPTION_RESP.
    pub(super) fn on_listed(&mut self, unit: &AnyUnit) {
        let Body::Listing(listing) = &mut self.body else { return };
        let entry = match unit {
            AnyUnit::Basic(unit) => Listed::parse(unit),
            AnyUnit::Wide(unit) => Listed::parse_wide(unit),
        };
        match entry {
            Ok(entry) if listing.filter.matches(&entry) => listing.piece.push(entry),
            _ => self.link.bad_entry(),
        }
        if listing.piece.len() >= MAX_BATCH {
            let (id, entries) = (listing.id, std::mem::take(&mut listing.piece));
            self.hand_over(id, entries, false);
        }
    }

    /// The end of an EXCEPTION_RESP.
    pub(super) fn on_listed_all(&mut self, listing: Listing) {
        self.hand_over(listing.id, listing.piece, true);
        // All others waited behind it.
        self.link.excuse();
        self.restart_deadlines();
    }

    fn hand_over(&mut self, id: RequestId, entries: Vec<Listed>, last: bool) {
        self.exceptions.listed += entries.len();
        self.events.push_back(SeEvent::Listed { id, entries, last });
    }
}

impl Listing {
    fn new(request: &Request) -> Self {
        Self { id: request.id, filter: request.filter.unwrap_or_default(), piece: Vec::new() }
    }
}

/// Units on their way into messages: of IPv4 and of IPv6, as few messages as may be.
#[derive(Debug, Default)]
struct Messages {
    done: Vec<Units>,
}

impl Messages {
    fn add(&mut self, unit: &AnyUnit) {
        let form = if matches!(unit, AnyUnit::Wide(_)) { Form::Wide } else { Form::Basic };
        let open =
            self.done.iter_mut().rev().find(|units| units.form() == form).filter(|units| units.len() < MAX_UNITS);
        let open = match open {
            Some(open) => open,
            None => self.done.push_mut(Units::new(form)),
        };
        open.push(unit);
    }
}

/// How normal flows are written.
fn form(flows: &Flows) -> Form {
    if flows.family() == Family::V6 { Form::Wide } else { Form::Basic }
}
