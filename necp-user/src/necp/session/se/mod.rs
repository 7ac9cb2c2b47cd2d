//! The server element's side of a session.
//!
//! ```text
//!   Opening ── INIT_ACK ──► Ready
//!     │  ▲
//!     └──┘ INIT again after 1, 2, 4 … s (§5.4), the same request; closed when that was done often enough
//! ```

mod answers;
mod event;
mod exceptions;
mod extension;
mod opening;
mod requests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

pub use self::event::{RequestId, SeEvent};
use self::exceptions::{Exceptions, Listing};
use self::extension::{Extension, Way};
use self::requests::{Answer, Request};
use super::health::{Queries, Reply};
use super::keepalive::Tick;
use super::link::{Incoming, Link};
use super::secure::Secure;
use super::units::{AnyUnit, Units};
use super::{Counters, MAX_MISSED, SessionConfig, Token};
use crate::necp::auth::Credentials;
use crate::necp::backoff::Backoff;
use crate::necp::error::CloseReason;
use crate::necp::message::{InitAck, Operation, Query, ServiceUnit};
use crate::necp::service::ServiceKey;
use crate::necp::wire::{Flags, Header, Opcode, Unit, VERSION};

/// KEEPALIVEs with queries that may wait for the caller before no more input is looked at.
const MAX_QUESTIONS: usize = 16;
/// Requests on the wire at a time; more wait their turn.
const MAX_OUTSTANDING: usize = 256;
/// Events that may wait for the caller before no more input is looked at.
const MAX_EVENTS: usize = 1024;

#[derive(Debug)]
enum State {
    Opening { request_id: u16, attempts: u32, next: Instant, backoff: Backoff },
    Ready,
}

/// What becomes of the units of the message that is coming in.
#[derive(Debug)]
enum Body {
    Skip,
    InitAck(InitAck),
    Answer(Answer),
    Listing(Listing),
    Queries(Queries),
    Reply(Reply),
    /// Of the NE's answer whether it speaks the extension.
    Extension {
        spoken: bool,
    },
}

/// The server element's side of its TCP connection to one NE.
#[derive(Debug)]
pub struct SeSession {
    link: Link,
    state: State,
    body: Body,
    queue: VecDeque<Request>,
    outstanding: BTreeMap<u16, Request>,
    exceptions: Exceptions,
    questions: BTreeMap<Token, Queries>,
    started: BTreeSet<ServiceKey>,
    ask_health: bool,
    extension: Extension,
    events: VecDeque<SeEvent>,
    last_number: u64,
    told_closed: bool,
}

impl SeSession {
    /// A session for a connection that was made at `now`; INIT is ready to be sent. `seed` gives the jitter and the
    /// first request id.
    #[must_use]
    pub fn new(config: SessionConfig, now: Instant, seed: u64) -> Self {
        Self::with_credentials(config, None, now, seed)
    }

    /// As [`Self::new`]; with credentials the session is authenticated, or it is none (§5.8).
    #[must_use]
    pub fn with_credentials(config: SessionConfig, credentials: Option<Credentials>, now: Instant, seed: u64) -> Self {
        let mut link = Link::new(config, credentials.map(Secure::se), now, seed);
        let request_id = link.fresh_id(|_| false);
        let extension = if link.config.extension { Extension::Unknown } else { Extension::Off };
        let mut session = Self {
            link,
            state: State::Opening { request_id, attempts: 0, next: now, backoff: Backoff::default() },
            body: Body::Skip,
            queue: VecDeque::new(),
            outstanding: BTreeMap::new(),
            exceptions: Exceptions::default(),
            questions: BTreeMap::new(),
            started: BTreeSet::new(),
            ask_health: true,
            extension,
            events: VecDeque::new(),
            last_number: 0,
            told_closed: false,
        };
        session.send_init();
        session
    }

    /// Bytes from the peer.
    pub fn handle_input(&mut self, now: Instant, bytes: &[u8]) {
        self.link.feed(now, bytes);
        self.work();
    }

    /// To be called when [`Self::poll_timeout`] is due; earlier does no harm.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.link.feed(now, &[]);
        self.work();
        if matches!(self.state, State::Opening { next, .. } if self.link.now >= next) {
            self.send_init();
        }
        self.link.check_progress();
        if self.reads() && self.answer_deadline().is_some_and(|deadline| self.link.now >= deadline) {
            self.on_late_answer();
        }
        self.tick();
    }

    /// The next event; ask until there is none.
    pub fn poll_event(&mut self) -> Option<SeEvent> {
        if let Some(event) = self.events.pop_front() {
            self.exceptions.taken(&event);
            return Some(event);
        }
        if let Some(notice) = self.link.next_notice() {
            return Some(SeEvent::Notice(notice));
        }
        let reason = self.link.closed().filter(|_| !self.told_closed).cloned()?;
        self.told_closed = true;
        Some(SeEvent::Closed(reason))
    }

    /// The next bytes for the peer. Take them only when those before are written.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        let output = self.link.take_output();
        self.send_queued();
        output
    }

    /// When to call [`Self::handle_timeout`]; it may be in the past, which means at once.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.link.closed().is_none().then_some(())?;
        if self.reads() && self.link.has_backlog() {
            return Some(self.link.now);
        }
        let init = match self.state {
            State::Opening { next, .. } => Some(next),
            State::Ready => None,
        };
        let answer = self.answer_deadline().filter(|_| self.reads());
        [init, answer, self.link.progress_deadline(), self.link.keepalive.next()].into_iter().flatten().min()
    }

    /// Whether to read from the peer: not while it does not read itself, nor while answers of the caller are awaited.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.link.closed().is_none() && self.reads() && !self.link.has_backlog()
    }

    /// Offers services (§5.6.1), or changes their forwarding type for future flows; before [`SeEvent::Ready`] the
    /// request waits. [`SeEvent::Acked`] follows, unless [`SeEvent::Closed`] does.
    pub fn start(&mut self, services: &[ServiceUnit]) -> RequestId {
        let units: Vec<Unit> = services.iter().map(ServiceUnit::unit).collect();
        self.request(Opcode::START, &units)
    }

    /// Takes services back for future flows (§5.6.3). [`SeEvent::Acked`] follows, unless [`SeEvent::Closed`] does.
    pub fn stop(&mut self, services: &[ServiceKey]) -> RequestId {
        let units: Vec<Unit> = services.iter().map(|service| Operation::stop_unit(*service)).collect();
        self.request(Opcode::STOP, &units)
    }

    /// Answers a [`SeEvent::HealthQuery`], in its order: 0 to 100 (more counts as 100), or `None` for "cannot tell",
    /// upon which the NE asks no more. A token that is not awaited is ignored.
    pub fn answer_health(&mut self, token: Token, answers: &[Option<u8>]) {
        let Some(queries) = self.questions.remove(&token) else { return };
        // The caller was shown the well-formed queries only.
        let mut rest = answers.iter();
        let health: Vec<Option<u8>> = queries
            .units
            .iter()
            .map(|unit| Query::parse(unit).ok().and_then(|_| rest.next().copied().flatten()))
            .collect();
        self.answer(&queries, |index| health[index]);
    }

    /// Ends the session. No further message is made; the first reason stays.
    pub fn close(&mut self, reason: CloseReason) {
        self.link.close(reason);
    }

    /// Why the session ended, if it has.
    #[must_use]
    pub fn closed(&self) -> Option<&CloseReason> {
        self.link.closed()
    }

    /// Whether the session is open: INIT_ACK came.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready) && self.link.closed().is_none()
    }

    /// The services that the NE acknowledged as started.
    pub fn started(&self) -> impl Iterator<Item = ServiceKey> {
        self.started.iter().copied()
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.link.counters
    }

    fn request(&mut self, opcode: Opcode, units: &[Unit]) -> RequestId {
        let id = self.next_id();
        if self.link.closed().is_some() {
            // Nothing follows `Closed`.
        } else if units.is_empty() {
            // A request must have units (§5.6.1); this one asks for nothing, and nothing is done.
            self.events.push_back(SeEvent::Acked { id, failed: Vec::new() });
        } else {
            self.enqueue(Request::new(id, opcode, Units::from(units)));
        }
        id
    }

    fn next_id(&mut self) -> RequestId {
        self.last_number += 1;
        RequestId(self.last_number)
    }

    fn enqueue(&mut self, request: Request) {
        if self.link.closed().is_some() {
            return;
        }
        self.queue.push_back(request);
        self.send_queued();
    }

    fn send_queued(&mut self) {
        while self.is_ready()
            && self.outstanding.len() < MAX_OUTSTANDING
            && self.link.output_has_room()
            && let Some(mut request) = self.queue.pop_front()
        {
            match Extension::of(&request, self.extension) {
                Way::Go => {}
                Way::Ask => {
                    self.queue.push_front(request);
                    self.ask_extension();
                    continue;
                }
                Way::Wait => return self.queue.push_front(request),
                Way::Fail => {
                    self.refused(request);
                    continue;
                }
            }
            self.make_units(&mut request);
            let request_id = self.link.fresh_id(|id| self.outstanding.contains_key(&id));
            self.link.send_units(request.opcode, Flags::NONE, request_id, &request.units);
            request.deadline = Some(self.link.now + self.link.config.answer_deadline);
            self.outstanding.insert(request_id, request);
        }
    }

    fn work(&mut self) {
        let mut consumed = 0;
        if self.link.is_paused() && self.reads() {
            // Answers may have come and were not read.
            self.restart_deadlines();
        }
        self.link.set_paused(!self.reads());
        while self.reads() {
            let Some(item) = self.link.next_item(&mut consumed) else { break };
            match item {
                Incoming::Header(header) => self.on_header(header),
                Incoming::Verified { header, .. } => self.on_verified(header),
                Incoming::Rejected(rejected) => self.on_rejected(&rejected),
                Incoming::Preamble(preamble) => self.on_preamble(&preamble),
                Incoming::Unit(unit) => self.on_unit(&unit),
                Incoming::End => self.on_end(),
            }
        }
        self.link.keep_rest(consumed);
        if !self.reads() {
            self.link.set_paused(true);
        }
    }

    fn on_header(&mut self, header: Header) {
        self.body = Body::Skip;
        if header.version != VERSION {
            return self.on_other_version(&header);
        }
        match self.state {
            State::Opening { .. } if header.opcode == Opcode::INIT_ACK => self.on_init_ack(&header, false),
            State::Opening { .. } => {
                self.link.refuse(&header, Flags::NONE, &[]);
                self.link.close(CloseReason::OutOfOrder(header.opcode));
            }
            State::Ready => self.on_ready_header(&header),
        }
    }

    /// The NE does not speak version 1, or it asks in a version that we do not speak (§5.2.1).
    fn on_other_version(&mut self, header: &Header) {
        if header.flags.has(Flags::PROTOCOL_VERSION_MISMATCH) {
            match header.opcode {
                Opcode::KEEPALIVE_ACK if !self.outstanding.contains_key(&header.request_id) => {
                    self.link.keepalive.answered(header.request_id);
                }
                // INIT is repeated on the same connection until its limit (§5.4).
                Opcode::INIT_ACK => {}
                _ => {
                    if let Some(request) = self.take_outstanding(header) {
                        self.refused(request);
                    }
                }
            }
        }
        self.link.answer_version(header);
    }

    /// A message whose credential and number are right.
    fn on_verified(&mut self, header: Header) {
        self.body = Body::Skip;
        match self.state {
            State::Opening { .. } => self.on_init_ack(&header, true),
            State::Ready => self.on_header(header),
        }
    }

    fn on_ready_header(&mut self, header: &Header) {
        match header.opcode {
            Opcode::NOOP => self.link.skip_payload(),
            Opcode::KEEPALIVE => match header.units() {
                None => {
                    self.link.malformed(header.opcode);
                    self.link.refuse(header, Flags::NONE, &[]);
                }
                Some(units) if units as usize > self.link.config.max_failed_units => {
                    self.link.refuse(header, Flags::NONE, &[]);
                    self.link.close(CloseReason::TooManyUnits(self.link.config.max_failed_units));
                }
                Some(_) => self.body = Body::Queries(Queries { request_id: header.request_id, units: Vec::new() }),
            },
            Opcode::KEEPALIVE_ACK => self.on_keepalive_ack(header),
            Opcode::START_ACK | Opcode::STOP_ACK | Opcode::EXCEPTION_ADD_ACK | Opcode::EXCEPTION_DEL_ACK => {
                self.on_request_ack(header);
            }
            Opcode::EXCEPTION_RESET_ACK => self.on_reset_ack(header),
            Opcode::EXCEPTION_RESP => self.on_resp(header),
            Opcode::INIT_ACK => {
                self.link.skip_payload();
                self.link.unexpected(header.opcode);
            }
            other => self.link.skip_foreign(other),
        }
    }

    fn on_keepalive_ack(&mut self, header: &Header) {
        if self.take_outstanding(header).is_some() {
            return self.on_extension_ack(header);
        }
        let Some(asked) = self.link.keepalive.answered(header.request_id) else {
            self.link.skip_payload();
            return self.link.unexpected(header.opcode);
        };
        self.link.counters.keepalives_answered += 1;
        match header.units() {
            None => self.link.malformed(header.opcode),
            Some(_) => self.body = Body::Reply(Reply::new(asked, header.flags)),
        }
    }

    fn on_unit(&mut self, unit: &AnyUnit) {
        match (&mut self.body, unit) {
            (Body::InitAck(ack), AnyUnit::Basic(unit)) => *ack = InitAck::parse(unit),
            (Body::Answer(answer), unit) => {
                if !answer.unit(unit) {
                    self.link.counters.unexpected_answers += 1;
                }
            }
            (Body::Listing(_), unit) => self.on_listed(unit),
            (Body::Queries(queries), AnyUnit::Basic(unit)) => queries.units.push(*unit),
            (Body::Reply(reply), unit) => reply.unit(unit, &mut self.link),
            (Body::Extension { spoken }, unit) => Self::on_extension_unit(spoken, unit),
            // Wide units come of exceptions only.
            (Body::Skip | Body::InitAck(_) | Body::Queries(_), _) => {}
        }
    }

    fn on_end(&mut self) {
        match std::mem::replace(&mut self.body, Body::Skip) {
            Body::Skip => {}
            Body::InitAck(ack) => self.on_opened(ack),
            Body::Answer(answer) => {
                let all = answer.failed.is_empty();
                self.acked(answer, all);
            }
            Body::Listing(listing) => self.on_listed_all(listing),
            Body::Extension { spoken } => self.on_extension(spoken),
            Body::Queries(queries) => self.on_queries(queries),
            Body::Reply(reply) => {
                if !reply.unsupported.is_empty() {
                    self.ask_health = false;
                }
                if let Some(answer) = reply.answers.last() {
                    self.events.push_back(SeEvent::NeHealth(answer.health));
                }
            }
        }
    }

    fn on_queries(&mut self, queries: Queries) {
        let supported: Vec<Query> = queries.units.iter().filter_map(|unit| Query::parse(unit).ok()).collect();
        if supported.is_empty() {
            self.answer(&queries, |_| None);
            return;
        }
        self.last_number += 1;
        let token = Token(self.last_number);
        self.questions.insert(token, queries);
        self.events.push_back(SeEvent::HealthQuery { token, queries: supported });
    }

    /// Answers that wait behind others, or behind us, are not late.
    fn restart_deadlines(&mut self) {
        let deadline = self.link.now + self.link.config.answer_deadline;
        self.outstanding.values_mut().for_each(|request| request.deadline = Some(deadline));
    }

    /// An answer is late. Without one to the question for the extension, the NE does not speak it, and all else goes on.
    fn on_late_answer(&mut self) {
        let now = self.link.now;
        let late = |request: &Request| request.deadline.is_some_and(|deadline| now >= deadline);
        let mut questions = self.outstanding.extract_if(.., |_, one| one.opcode == Opcode::KEEPALIVE && late(one));
        let question = questions.next().map(|(_, question)| question);
        drop(questions);
        if let Some(question) = question {
            self.refused(question);
        }
        if self.outstanding.values().any(late) {
            self.link.close(CloseReason::AnswerDeadline(self.link.config.answer_deadline));
        }
    }

    fn answer_deadline(&self) -> Option<Instant> {
        if matches!(self.body, Body::Listing(_)) {
            return None;
        }
        self.outstanding.values().filter_map(|request| request.deadline).min()
    }

    fn answer(&mut self, queries: &Queries, health: impl Fn(usize) -> Option<u8>) {
        queries.answer(&mut self.link, false, health);
        if self.link.keepalive.may_go_along(self.link.now) {
            self.beat();
        }
    }

    fn tick(&mut self) {
        if self.link.keepalive.is_due(self.link.now) {
            self.beat();
        }
    }

    fn beat(&mut self) {
        if self.link.closed().is_some() {
            return;
        }
        let moved = self.link.take_moved();
        let excused = moved || self.waits_for_caller();
        match self.link.keepalive.tick(self.link.now, excused) {
            Tick::Send => {
                // The NE has one Health Index; a query names a service, so one of ours stands for all.
                let services: Vec<_> = self.started.first().filter(|_| self.ask_health).copied().into_iter().collect();
                self.link.send_keepalive(services, |id| self.outstanding.contains_key(&id));
            }
            Tick::Dead => {
                self.link.close(CloseReason::DeadPeer(MAX_MISSED));
            }
            Tick::Wait => {}
        }
    }

    /// Whether input is looked at: what the peer has to read, and what the caller has to answer, has its limits.
    fn reads(&self) -> bool {
        self.link.output_has_room() && !self.waits_for_caller()
    }

    fn waits_for_caller(&self) -> bool {
        self.questions.len() >= MAX_QUESTIONS || self.exceptions.is_full() || self.events.len() >= MAX_EVENTS
    }

    /// Bytes held, for tests of the bound.
    #[cfg(any(test, fuzzing))]
    pub(in crate::necp) fn held_bytes(&self) -> usize {
        let body = match &self.body {
            Body::Queries(queries) => queries.units.capacity(),
            _ => 0,
        };
        let asked: usize = self.questions.values().map(|queries| queries.units.capacity()).sum();
        self.link.held_bytes() + (body + asked) * size_of::<Unit>() + self.exceptions.held_bytes()
    }
}
