//! The network element's side of a session.
//!
//! ```text
//!   AwaitInit ──INIT──► InitPending ──respond(token)──► Ready
//!       │                  ▲  INIT_ACK is sent here ──►   │
//!       │                  └────────────INIT──────────────┘   starts over in place (§5.4)
//!       └─ anything else: refused, closed
//! ```
//!
//! An authentic INIT may be a recorded one. It is answered at once, and changes nothing until a fresh message follows:
//!
//! ```text
//!   AwaitInit ──INIT──► Tentative ──fresh message──► InitPending ──respond(token)──► Ready
//!       │   INIT_ACK is sent ▲ │                          ▲                            │
//!       │                      └─ silence: closed         └──────── fresh message ─────┘  in numbers that the INIT_ACK
//!       └─ INIT that is not authentic: refused bare, closed                               of an INIT in place demands
//! ```

mod event;
mod listing;
mod opening;
mod requests;

use std::collections::VecDeque;
use std::time::Instant;

pub use self::event::NeEvent;
use self::listing::{Listings, Query};
use self::requests::Requests;
use super::health::{Queries, Reply};
use super::keepalive::Tick;
use super::link::{Incoming, Link};
use super::secure::{Rejected, Secure};
use super::units::{AnyUnit, Form, Units};
use super::{Counters, MAX_MISSED, SessionConfig, Token};
use crate::necp::auth::{Access, Rejection};
use crate::necp::error::CloseReason;
use crate::necp::message::{Filter, HEALTH_MAX, Init, InitAck, Listed};
use crate::necp::service::ServiceKey;
use crate::necp::wire::{Flags, Header, Opcode, Preamble, Unit, VERSION};

/// Events that may wait for the caller before no more input is looked at.
const MAX_EVENTS: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    AwaitInit {
        deadline: Instant,
    },
    /// An authentic INIT was answered; it demanded the number `theirs`.
    Tentative {
        deadline: Instant,
        request_id: u16,
        theirs: u64,
    },
    InitPending {
        token: Token,
        /// The INIT that is still to be answered.
        unanswered: Option<u16>,
    },
    Ready,
}

/// What becomes of the units of the message that is coming in.
#[derive(Debug)]
enum Body {
    /// There are none, or they are of no interest.
    Skip,
    Init(Header, Option<Init>),
    /// A request in the extension, whose preamble comes next.
    Wide(Header),
    /// START, STOP, EXCEPTION_ADD or EXCEPTION_DEL; the units are with [`Requests`].
    Operations,
    Query(Query),
    Queries(Queries),
    Reply(Reply),
}

/// The network element's side of one SE's TCP connection.
#[derive(Debug)]
pub struct NeSession {
    link: Link,
    state: State,
    body: Body,
    requests: Requests,
    /// Whether the peer must authenticate.
    required: bool,
    /// Whether the peer has asked for the extension, and was told that it is spoken.
    extended: bool,
    /// The number that an INIT in place demanded, until a fresh message shows that it was none of a recording.
    restart: Option<u64>,
    listings: Listings,
    events: VecDeque<NeEvent>,
    health: u8,
    told_closed: bool,
}

impl NeSession {
    /// A session for a connection that was accepted at `now`; `seed` gives the jitter and the first request id.
    #[must_use]
    pub fn new(config: SessionConfig, now: Instant, seed: u64) -> Self {
        Self::with_access(config, Access::Open, now, seed)
    }

    /// As [`Self::new`], for an address with this access (§5.8).
    #[must_use]
    pub fn with_access(config: SessionConfig, access: Access, now: Instant, seed: u64) -> Self {
        let (required, secure) = match access {
            Access::Open => (false, None),
            Access::Authenticated(credentials) => (true, credentials.map(Secure::ne)),
        };
        Self {
            required,
            extended: false,
            restart: None,
            state: State::AwaitInit { deadline: now + config.init_deadline },
            requests: Requests::new(config.max_services, config.max_failed_units),
            listings: Listings::default(),
            link: Link::new(config, secure, now, seed),
            body: Body::Skip,
            events: VecDeque::new(),
            health: HEALTH_MAX,
            told_closed: false,
        }
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
        let limit = self.link.config.init_deadline;
        match self.state {
            State::AwaitInit { deadline } if self.link.now >= deadline => {
                self.link.close(CloseReason::InitDeadline(limit));
            }
            State::Tentative { deadline, .. } if self.link.now >= deadline => {
                self.link.close(CloseReason::Unconfirmed(limit));
            }
            _ => {}
        }
        self.link.check_progress();
        self.tick();
    }

    /// The next event; ask until there is none.
    pub fn poll_event(&mut self) -> Option<NeEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        if let Some(notice) = self.link.next_notice() {
            return Some(NeEvent::Notice(notice));
        }
        let reason = self.link.closed().filter(|_| !self.told_closed).cloned()?;
        self.told_closed = true;
        if matches!(self.state, State::Tentative { .. }) {
            self.link.counters.rejected.unconfirmed += 1;
        }
        Some(NeEvent::Closed(reason))
    }

    /// The next bytes for the peer. Take them only when those before are written.
    pub fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        let output = self.link.take_output();
        self.listings.pump(&mut self.link, &mut self.events);
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
            State::AwaitInit { deadline } | State::Tentative { deadline, .. } => Some(deadline),
            State::InitPending { .. } | State::Ready => None,
        };
        [init, self.link.progress_deadline(), self.link.keepalive.next()].into_iter().flatten().min()
    }

    /// Whether to read from the peer: not while it does not read itself, nor while answers of the caller are awaited.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.link.closed().is_none() && self.reads() && !self.link.has_backlog()
    }

    /// What the event with this token asked for is done and stands in the maps, except the operations with the indices
    /// `failed`. A token that is not awaited is ignored.
    pub fn respond(&mut self, token: Token, failed: &[usize]) {
        match self.state {
            State::InitPending { token: awaited, unanswered } if token == awaited => {
                self.state = State::Ready;
                if let Some(request_id) = unanswered {
                    self.link.send(Opcode::INIT_ACK, Flags::NONE, request_id, &[InitAck::default().unit()]);
                    self.link.keepalive.start(self.link.now);
                }
            }
            _ => self.requests.respond(token, failed, &mut self.link),
        }
    }

    /// Begins the answer to a [`NeEvent::Query`]: EXCEPTION_RESP with exactly `count` units (§5.7.8), asked for piece by
    /// piece with [`NeEvent::ListMore`], so that a long list takes no more memory than a short one.
    ///
    /// The header announces the number of units before the first is sent, and the draft knows no chaining of messages
    /// (§6.5), so the number holds whatever becomes of the list meanwhile: the caller makes up for entries that are gone
    /// when their turn comes by naming another one of the list again, for an entry named twice is one entry.
    ///
    /// False if the token is not awaited: then the caller forgets the list, of which no more will be asked. When it is
    /// begun, [`NeEvent::ListMore`] follows at once or when the peer has read what is before it.
    pub fn list(&mut self, token: Token, count: u32) -> bool {
        self.listings.list(token, count, &mut self.link, &mut self.events)
    }

    /// More of the list, at most as many as [`NeEvent::ListMore`] asked for; with none it asks again. A token that is not
    /// awaited is ignored.
    pub fn list_more(&mut self, token: Token, entries: &[Listed]) {
        self.listings.more(token, entries, &mut self.link, &mut self.events);
    }

    /// The Health Index that the NE answers to the SE's queries (§5.5.2), 0 to 100; more counts as 100.
    pub fn set_health(&mut self, index: u8) {
        self.health = index.min(HEALTH_MAX);
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

    /// Whether the session is open: INIT_ACK was sent, and INIT was no recording.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == State::Ready && self.link.closed().is_none()
    }

    /// The services that were acknowledged as started.
    pub fn started(&self) -> impl Iterator<Item = ServiceKey> {
        self.requests.services.started()
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.link.counters
    }

    fn work(&mut self) {
        let mut consumed = 0;
        self.link.set_paused(!self.reads());
        while self.reads() {
            let Some(item) = self.link.next_item(&mut consumed) else { break };
            match item {
                Incoming::Header(header) => self.on_header(header),
                Incoming::Verified { header, restarted } => self.on_verified(header, restarted),
                Incoming::Rejected(rejected) => self.on_rejected(&rejected),
                Incoming::Preamble(preamble) => self.on_preamble(&preamble),
                Incoming::Unit(unit) => self.on_unit(&unit),
                Incoming::End => self.on_end(),
            }
        }
        self.link.keep_rest(consumed);
        self.flush();
        if !self.reads() {
            self.link.set_paused(true);
        }
    }

    /// Hands over the operations that came so far.
    fn flush(&mut self) {
        if self.link.closed().is_none()
            && let Some((token, operations)) = self.requests.flush()
        {
            self.events.push_back(NeEvent::Operations { token, operations });
        }
    }

    fn on_header(&mut self, header: Header) {
        self.body = Body::Skip;
        if header.version != VERSION {
            if header.opcode == Opcode::KEEPALIVE_ACK {
                // It is an answer, if a useless one: the peer is not dead.
                self.link.keepalive.answered(header.request_id);
            }
            return self.link.answer_version(&header);
        }
        match self.state {
            _ if header.opcode == Opcode::INIT => self.on_init(header),
            // A fresh message ends the tentative state before its header comes here.
            State::AwaitInit { .. } | State::Tentative { .. } => {
                self.link.refuse(&header, Flags::NONE, &[]);
                self.link.close(CloseReason::OutOfOrder(header.opcode));
            }
            // Nothing may precede INIT_ACK (§5.4): what a hasty SE sent waits until that is out.
            State::InitPending { .. } => self.link.defer(header),
            State::Ready => self.on_ready_header(header),
        }
    }

    /// A message whose credential and number are right.
    fn on_verified(&mut self, header: Header, restarted: bool) {
        self.body = Body::Skip;
        if (header.opcode, header.version) == (Opcode::INIT, VERSION) {
            return self.on_init_unit(header);
        }
        let confirmed = matches!(self.state, State::Tentative { .. }) || restarted;
        if restarted && let (Some(theirs), Some(secure)) = (self.restart.take(), self.link.secure()) {
            secure.restart(theirs);
            self.link.keepalive.start(self.link.now);
        }
        if confirmed {
            self.begin(None);
        }
        self.on_header(header);
    }

    fn on_rejected(&mut self, rejected: &Rejected) {
        self.body = Body::Skip;
        if self.link.is_secured() {
            self.link.reject(rejected);
        } else {
            debug_assert_eq!(rejected.cause, Rejection::BadCredential, "INIT's number is not looked at");
            self.refuse_init(&rejected.header, CloseReason::BadInit);
        }
    }

    fn on_ready_header(&mut self, header: Header) {
        let units = header.units();
        match header.opcode {
            Opcode::NOOP => self.link.skip_payload(),
            Opcode::KEEPALIVE => match units {
                None => self.malformed(&header),
                Some(units) if units as usize > self.link.config.max_failed_units => {
                    self.link.refuse(&header, Flags::NONE, &[]);
                    self.link.close(CloseReason::TooManyUnits(self.link.config.max_failed_units));
                }
                Some(_) => self.body = Body::Queries(Queries { request_id: header.request_id, units: Vec::new() }),
            },
            Opcode::KEEPALIVE_ACK => self.on_keepalive_ack(&header),
            Opcode::EXCEPTION_ADD | Opcode::EXCEPTION_DEL | Opcode::EXCEPTION_QUERY if self.is_wide(&header) => {
                self.link.read_wide(&header);
                self.body = Body::Wide(header);
            }
            Opcode::START | Opcode::STOP | Opcode::EXCEPTION_ADD | Opcode::EXCEPTION_DEL => match units {
                None | Some(0) => self.malformed(&header),
                Some(_) => {
                    self.requests.begin(&header, Form::Basic);
                    self.body = Body::Operations;
                }
            },
            // No payload is required (§5.7.5), so one that is there has no meaning.
            Opcode::EXCEPTION_RESET => match units {
                None => self.malformed(&header),
                Some(_) => {
                    self.link.skip_payload();
                    let token = self.requests.reset(&header);
                    self.events.push_back(NeEvent::Reset { token });
                }
            },
            Opcode::EXCEPTION_QUERY => match units {
                Some(1) => self.body = Body::Query(Query { header, form: Form::Basic, unit: None }),
                _ => self.malformed(&header),
            },
            other => self.link.skip_foreign(other),
        }
    }

    /// Whether a request is in the extension, and the peer may use it.
    fn is_wide(&self, header: &Header) -> bool {
        self.extended && header.wide_units().is_some_and(|units| header.opcode != Opcode::EXCEPTION_QUERY || units == 1)
    }

    fn on_preamble(&mut self, preamble: &Preamble) {
        let Body::Wide(header) = std::mem::replace(&mut self.body, Body::Skip) else { return };
        if *preamble != Preamble::SPOKEN {
            self.malformed(&header);
        } else if header.opcode == Opcode::EXCEPTION_QUERY {
            self.body = Body::Query(Query { header, form: Form::Wide, unit: None });
        } else {
            self.requests.begin(&header, Form::Wide);
            self.body = Body::Operations;
        }
    }

    fn on_keepalive_ack(&mut self, header: &Header) {
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

    /// A request whose payload is not what it must be: F_Error and no units (§5.2.3); the stream stays framed.
    fn malformed(&mut self, header: &Header) {
        self.link.skip_payload();
        self.link.malformed(header.opcode);
        self.link.refuse(header, Flags::NONE, &[]);
    }

    fn on_unit(&mut self, unit: &AnyUnit) {
        match (&mut self.body, unit) {
            (Body::Init(header, init), AnyUnit::Basic(unit)) => match Init::parse(unit) {
                Ok(parsed) => *init = Some(parsed),
                Err(_) => {
                    self.link.counters.failed_units += 1;
                    self.link.refuse(header, Flags::NONE, &[*unit]);
                }
            },
            (Body::Operations, unit) => {
                let full = self.requests.unit(unit, &mut self.link);
                if full {
                    self.flush();
                }
            }
            (Body::Query(query), unit) => query.unit = Some(*unit),
            (Body::Queries(queries), AnyUnit::Basic(unit)) => queries.units.push(*unit),
            (Body::Reply(reply), unit) => reply.unit(unit, &mut self.link),
            // Wide units come of requests only.
            (Body::Skip | Body::Wide(_) | Body::Init(..) | Body::Queries(_), _) => {}
        }
    }

    fn on_end(&mut self) {
        match std::mem::replace(&mut self.body, Body::Skip) {
            Body::Skip | Body::Wide(_) | Body::Init(_, None) => {}
            Body::Init(header, Some(init)) => self.on_init_end(&header, init),
            Body::Operations => {
                self.flush();
                self.requests.end(&mut self.link);
            }
            Body::Query(query) => self.on_query(&query),
            Body::Queries(queries) => {
                let health = self.health;
                self.extended |= queries.answer(&mut self.link, true, |_| Some(health));
                if self.link.keepalive.may_go_along(self.link.now) && !self.link.is_streaming() {
                    self.beat();
                }
            }
            Body::Reply(reply) => self.on_reply(reply),
        }
    }

    fn on_query(&mut self, query: &Query) {
        let Query { header, form, unit: Some(unit) } = query else { return };
        let filter = match unit {
            AnyUnit::Basic(unit) => Filter::parse(unit),
            AnyUnit::Wide(unit) => Filter::parse_wide(unit),
        };
        match filter {
            Ok(filter) => {
                let token = self.requests.next_token();
                self.listings.add(token, header.request_id, *form);
                // Operations that came before it come before it here too.
                self.events.push_back(NeEvent::Query { token, filter });
            }
            Err(_) => {
                let mut failed = Units::new(*form);
                failed.push(unit);
                self.link.counters.failed_units += 1;
                self.link.refuse_units(header, Flags::NONE, &failed);
            }
        }
    }

    fn on_reply(&mut self, reply: Reply) {
        let Reply { open, error, unsupported, answers } = reply;
        let services = &mut self.requests.services;
        for service in &unsupported {
            services.forget_health(*service);
        }
        let answers: Vec<_> = answers.into_iter().filter(|answer| services.is_started(answer.service)).collect();
        if !answers.is_empty() {
            self.events.push_back(NeEvent::Health(answers));
        }
        // Those that the peer did not call unsupported it can answer; ask them again at once (§5.5.2).
        let again: Vec<_> = open.into_iter().filter(|service| services.is_started(*service)).collect();
        if error && !unsupported.is_empty() && !again.is_empty() && self.link.keepalive.has_room() {
            self.link.send_keepalive(again, |_| false);
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
        if moved && self.link.is_streaming() {
            // A KEEPALIVE would come after the list, and count as unanswered before it came: that the peer reads is life enough.
            return self.link.keepalive.postpone(self.link.now);
        }
        let waits_for_caller = self.waits_for_caller() || self.listings.waits_for_caller();
        let excused = moved || waits_for_caller || self.waits_for_init();
        match self.link.keepalive.tick(self.link.now, excused) {
            Tick::Send => {
                let services = self.requests.services.next_queries();
                self.link.send_keepalive(services, |_| false);
            }
            Tick::Dead => {
                self.link.close(CloseReason::DeadPeer(MAX_MISSED));
            }
            Tick::Wait => {}
        }
    }

    /// Whether input is looked at: what the peer has to read, and what the caller has to answer, has its limits.
    fn reads(&self) -> bool {
        self.link.output_has_room() && !self.waits_for_caller() && !self.waits_for_init() && !self.listings.is_full()
    }

    fn waits_for_caller(&self) -> bool {
        self.requests.is_full() || self.events.len() >= MAX_EVENTS
    }

    fn waits_for_init(&self) -> bool {
        self.link.has_deferred() && matches!(self.state, State::InitPending { .. })
    }

    /// Bytes that this session holds of what the peer sent or has not read, besides its fixed size.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let body = match &self.body {
            Body::Queries(queries) => queries.units.capacity() * size_of::<Unit>(),
            _ => 0,
        };
        self.link.held_bytes() + self.requests.held_bytes() + body
    }
}
