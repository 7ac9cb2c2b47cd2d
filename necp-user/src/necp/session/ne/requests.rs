//! Requests that are made of operations, and EXCEPTION_RESETs, between their arrival and their answer; and the services
//! that came of them.

use std::collections::BTreeMap;
use std::mem;
use std::ops::Bound;

use crate::necp::error::CloseReason;
use crate::necp::message::Operation;
use crate::necp::service::ServiceKey;
use crate::necp::session::link::Link;
use crate::necp::session::units::{AnyUnit, Form, Units};
use crate::necp::session::{MAX_BATCH, Token};
use crate::necp::wire::{Flags, Header, Opcode, UNIT_LEN};

/// Units that may wait for the caller, or to be repeated by complete messages, before no more input is looked at.
const MAX_HELD: usize = 4 * MAX_BATCH;
/// Messages and batches that may wait for the caller.
const MAX_WAITING: usize = 256;
/// Queries in one KEEPALIVE; with more services they take turns.
const MAX_QUERIES: usize = 1024;

/// A START, STOP, EXCEPTION_ADD or EXCEPTION_DEL that is not answered yet.
#[derive(Debug)]
struct Request {
    opcode: Opcode,
    request_id: u16,
    complete: bool,
    open_batches: usize,
    failed: Units,
}

/// Units of one message that are handed over together.
#[derive(Debug, Default)]
struct Batch {
    /// Number of the message.
    request: u64,
    units: Units,
    /// Indices of those units that failed here already.
    bad: Vec<usize>,
    operations: Vec<Operation>,
    /// For each operation the index of its unit.
    origin: Vec<usize>,
}

#[derive(Debug)]
pub(super) struct Requests {
    pub(super) services: Services,
    max_failed: usize,
    requests: BTreeMap<u64, Request>,
    /// The message that is coming in.
    current: u64,
    building: Batch,
    batches: BTreeMap<Token, Batch>,
    /// EXCEPTION_RESETs that wait for the caller, with their request ids.
    resets: BTreeMap<Token, u16>,
    /// Units in `batches`, and failed ones of complete messages.
    held: usize,
    last_number: u64,
}

impl Requests {
    pub(super) fn new(max_services: usize, max_failed: usize) -> Self {
        Self {
            services: Services { max: max_services, map: BTreeMap::new(), cursor: None },
            max_failed,
            requests: BTreeMap::new(),
            current: 0,
            building: Batch::default(),
            batches: BTreeMap::new(),
            resets: BTreeMap::new(),
            held: 0,
            last_number: 0,
        }
    }

    /// Forgets everything; tokens given out are void.
    pub(super) fn clear(&mut self) {
        let mut fresh = Self::new(self.services.max, self.max_failed);
        fresh.last_number = self.last_number;
        *self = fresh;
    }

    pub(super) fn next_token(&mut self) -> Token {
        self.last_number += 1;
        Token(self.last_number)
    }

    pub(super) fn is_full(&self) -> bool {
        self.held >= MAX_HELD
            || self.batches.len() + self.resets.len() >= MAX_WAITING
            || self.requests.len() >= MAX_WAITING
    }

    pub(super) fn begin(&mut self, header: &Header, form: Form) {
        self.last_number += 1;
        self.current = self.last_number;
        let Header { opcode, request_id, .. } = *header;
        let failed = Units::new(form);
        self.building.units = Units::new(form);
        self.requests.insert(self.current, Request { opcode, request_id, complete: false, open_batches: 0, failed });
    }

    /// A unit of the message that is coming in; says whether a batch is full.
    pub(super) fn unit(&mut self, unit: &AnyUnit, link: &mut Link) -> bool {
        let Some(request) = self.requests.get(&self.current) else { return false };
        let operation = unit.operation(request.opcode);
        let form = request.failed.form();
        let batch = &mut self.building;
        batch.request = self.current;
        match operation {
            Some(operation) if self.services.reserve(&operation) => {
                batch.origin.push(batch.units.len());
                batch.operations.push(operation);
                batch.units.push(unit);
            }
            // With no operation before it in this batch, it needs no batch to keep the units in order.
            _ if batch.operations.is_empty() => {
                let mut failed = Units::new(form);
                failed.push(unit);
                self.fail(self.current, &failed, link);
            }
            _ => {
                batch.bad.push(batch.units.len());
                batch.units.push(unit);
            }
        }
        self.building.units.len() >= MAX_BATCH
    }

    /// An EXCEPTION_RESET (§5.7.5).
    pub(super) fn reset(&mut self, header: &Header) -> Token {
        let token = self.next_token();
        self.resets.insert(token, header.request_id);
        token
    }

    /// The batch so far, if there is anything in it to carry out.
    pub(super) fn flush(&mut self) -> Option<(Token, Vec<Operation>)> {
        if self.building.units.is_empty() {
            return None;
        }
        let mut batch = mem::take(&mut self.building);
        self.building.units = Units::new(batch.units.form());
        let operations = mem::take(&mut batch.operations);
        let token = self.next_token();
        self.held += batch.units.len();
        if let Some(request) = self.requests.get_mut(&batch.request) {
            request.open_batches += 1;
        }
        // What is to be done with them when the answer comes: kept in the order of the units.
        batch.operations.clone_from(&operations);
        self.batches.insert(token, batch);
        Some((token, operations))
    }

    /// The message is complete; call [`Self::flush`] first.
    pub(super) fn end(&mut self, link: &mut Link) {
        if let Some(request) = self.requests.get_mut(&self.current) {
            request.complete = true;
            self.held += request.failed.len();
            self.answer_if_done(self.current, link);
        }
    }

    pub(super) fn respond(&mut self, token: Token, failed: &[usize], link: &mut Link) {
        if let Some(request_id) = self.resets.remove(&token) {
            let flags = if failed.is_empty() { Flags::NONE } else { Flags::ERROR };
            return link.send(Opcode::EXCEPTION_RESET_ACK, flags, request_id, &[]);
        }
        let Some(batch) = self.batches.remove(&token) else { return };
        self.held -= batch.units.len();
        let mut unit_failed = vec![false; batch.units.len()];
        for index in batch.bad {
            unit_failed[index] = true;
        }
        for index in failed {
            if let Some(origin) = batch.origin.get(*index) {
                unit_failed[*origin] = true;
            }
        }
        for (operation, origin) in batch.operations.iter().zip(batch.origin) {
            self.services.settle(operation, !unit_failed[origin]);
        }
        let failed = batch.units.filtered(&unit_failed);
        if let Some(request) = self.requests.get_mut(&batch.request) {
            request.open_batches -= 1;
        }
        self.fail(batch.request, &failed, link);
        self.answer_if_done(batch.request, link);
    }

    /// Notes failed units; with more than may be repeated, the answer goes out as it is and the session ends.
    fn fail(&mut self, number: u64, units: &Units, link: &mut Link) {
        let Some(request) = self.requests.get_mut(&number) else { return };
        link.counters.failed_units += units.len() as u64;
        // As many bytes of either form.
        let max = self.max_failed * UNIT_LEN / request.failed.form().unit_len();
        let room = max.saturating_sub(request.failed.len());
        let kept = units.len().min(room);
        request.failed.extend(units, kept);
        if request.complete {
            self.held += kept;
        }
        if units.len() > room {
            request.answer(link);
            link.close(CloseReason::TooManyUnits(max));
        }
    }

    fn answer_if_done(&mut self, number: u64, link: &mut Link) {
        if self.requests.get(&number).is_some_and(|request| request.complete && request.open_batches == 0)
            && let Some(request) = self.requests.remove(&number)
        {
            self.held -= request.failed.len();
            request.answer(link);
        }
    }

    pub(super) fn held_bytes(&self) -> usize {
        let failed: usize = self.requests.values().map(|request| request.failed.held_bytes()).sum();
        let batch = |batch: &Batch| {
            batch.units.held_bytes()
                + batch.operations.capacity() * size_of::<Operation>()
                + (batch.origin.capacity() + batch.bad.capacity()) * size_of::<usize>()
        };
        failed + self.batches.values().chain([&self.building]).map(batch).sum::<usize>()
    }
}

impl Request {
    /// No payload and no F_Error if all went well, else exactly the failed units (§5.6.2, §5.6.4, §5.7.2, §5.7.4).
    fn answer(&self, link: &mut Link) {
        let flags = if self.failed.is_empty() { Flags::NONE } else { Flags::ERROR };
        let opcode = self.opcode.answer().expect("what is made of operations has an answer");
        link.send_units(opcode, flags, self.request_id, &self.failed);
    }
}

/// What the SE has started, and whose health is therefore asked for.
#[derive(Debug)]
pub(super) struct Services {
    max: usize,
    map: BTreeMap<ServiceKey, Service>,
    /// The last service that was asked about.
    cursor: Option<ServiceKey>,
}

#[derive(Debug, Default)]
struct Service {
    /// STARTs that the caller has not answered.
    pending: usize,
    started: bool,
    /// The peer calls the query unsupported: never asked again (§5.5.2), unless the service is stopped and started.
    health_unsupported: bool,
}

impl Services {
    pub(super) fn started(&self) -> impl Iterator<Item = ServiceKey> {
        self.map.iter().filter(|(_, service)| service.started).map(|(key, _)| *key)
    }

    pub(super) fn is_started(&self, key: ServiceKey) -> bool {
        self.map.get(&key).is_some_and(|service| service.started)
    }

    pub(super) fn forget_health(&mut self, key: ServiceKey) {
        if let Some(service) = self.map.get_mut(&key) {
            service.health_unsupported = true;
        }
    }

    /// The next services to ask about, in turn.
    pub(super) fn next_queries(&mut self) -> Vec<ServiceKey> {
        let after = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let until = self.cursor.map_or(Bound::Unbounded, Bound::Included);
        let wrapped = self.cursor.is_some().then(|| self.map.range((Bound::Unbounded, until))).into_iter().flatten();
        let asked =
            |(key, service): (&ServiceKey, &Service)| (service.started && !service.health_unsupported).then_some(*key);
        let mut keys: Vec<_> =
            self.map.range((after, Bound::Unbounded)).chain(wrapped).filter_map(asked).take(MAX_QUERIES).collect();
        self.cursor = if keys.len() == MAX_QUERIES { keys.last().copied() } else { None };
        keys.sort_unstable();
        keys
    }

    /// Takes note of an operation before the caller is asked; false if it exceeds the limit of services.
    fn reserve(&mut self, operation: &Operation) -> bool {
        let Operation::Start(unit) = operation else { return true };
        if self.map.len() >= self.max && !self.map.contains_key(&unit.key()) {
            return false;
        }
        self.map.entry(unit.key()).or_default().pending += 1;
        true
    }

    /// The caller has carried out an operation, or could not.
    fn settle(&mut self, operation: &Operation, done: bool) {
        let Some(key) = operation.service() else { return };
        let Some(service) = self.map.get_mut(&key) else { return };
        match operation {
            Operation::Start(_) => {
                service.pending -= 1;
                service.started |= done;
            }
            Operation::Stop(_) if done => {
                service.started = false;
                service.health_unsupported = false;
            }
            Operation::Stop(_) | Operation::Except(_) | Operation::Unexcept(_) => {}
        }
        if !service.started && service.pending == 0 {
            self.map.remove(&key);
        }
    }
}
