//! A network element against any server element, its caller late, slow and forgetful.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::forger::{DEMANDS, Forger, TO_NE, key};
use super::judge::Judge;
use super::may_hold;
use super::peer::{Received, Sent};
use super::script::{Script, limits, message};
use crate::necp::auth::{Access, Credentials};
use crate::necp::message::{Exception, Family, Filter, Flows, Init, Listed, Operation, Scope, extension};
use crate::necp::service::{ServiceKey, TCP, UDP};
use crate::necp::session::{Counters, MAX_BATCH, NeEvent, NeSession, SessionConfig, Token};
use crate::necp::wire::{Direction, Flags, Header, Opcode, Unit, WideUnit};

/// Plays a script to its end; panics when something happens that must not. Returns what the session has counted.
pub fn play(script: &[u8]) -> Counters {
    let mut script = Script::new(script);
    let mut bed = Bed::new(script.byte());
    while !script.is_over() {
        bed.step(&mut script);
        bed.check();
    }
    bed.end();
    *bed.ne.counters()
}

struct Bed {
    ne: NeSession,
    limits: SessionConfig,
    now: Instant,
    sent: Sent,
    received: Received,
    /// Of an authenticated session.
    forger: Option<Forger>,
    /// Asked and not answered by the caller, with the number of operations.
    tokens: Vec<(Token, usize)>,
    /// Tokens that were given out, of which none may come again.
    seen: BTreeSet<Token>,
    /// EXCEPTION_QUERYs that the caller has not counted, and pieces of lists that it has not given.
    queries: Vec<Token>,
    wanted: Vec<(Token, usize)>,
    last: Vec<u8>,
    closed: bool,
    told_closed: bool,
    messages_out: u64,
}

impl Bed {
    fn new(first: u8) -> Self {
        let (now, limits) = (Instant::now(), limits(first & 8 == 8));
        let keyed = (first & 0x10 != 0).then(key);
        let access = keyed
            .clone()
            .map_or(Access::Open, |key| Access::Authenticated(Some(Credentials { key, first_seq_num: TO_NE })));
        let judge = keyed.clone().map(|key| Judge::ne(key, TO_NE, limits.max_message));
        let mut bed = Self {
            ne: NeSession::with_access(limits.clone(), access, now, first.into()),
            limits,
            now,
            sent: Sent::new(judge),
            forger: keyed.is_some().then(|| Forger::new(TO_NE)),
            received: Received::new(Direction::ToSe, keyed),
            tokens: Vec::new(),
            seen: BTreeSet::new(),
            queries: Vec::new(),
            wanted: Vec::new(),
            last: Vec::new(),
            closed: false,
            told_closed: false,
            messages_out: 0,
        };
        if first & 7 != 0 {
            bed.open(DEMANDS[usize::from(first >> 5)]);
        }
        bed
    }

    fn open(&mut self, demand: u64) {
        let header = Header::new(Opcode::INIT, Flags::NONE, 1, 1);
        if let Some(forger) = &mut self.forger {
            let init = forger.sign(&header, &[Init { authenticate: Some(demand) }.unit()]);
            self.input(&init);
            self.read();
            self.take_offer();
            let fresh = Header::new(Opcode::KEEPALIVE, Flags::NONE, 2, 0);
            let fresh = self.forger.as_mut().map(|forger| forger.sign(&fresh, &[]));
            self.input(&fresh.unwrap_or_default());
        } else {
            self.input(&message(&header, &[Unit::default()]));
        }
        self.events();
        self.respond(0);
        assert!(self.ne.is_ready());
    }

    /// The peer goes on with the number that INIT_ACK demands.
    fn take_offer(&mut self) {
        if let (Some(forger), Some(demand)) = (&mut self.forger, self.received.demands.last()) {
            forger.next = *demand;
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() & 15 {
            0 => self.input(script.bytes()),
            1..=6 => {
                let (header, units) = script.message();
                self.last = self.made(script, &header, &units);
                self.send_last(script.byte());
            }
            7 => self.send_last(0),
            8 => self.answer(script),
            9 => self.pass(Duration::from_millis(40 * u64::from(script.byte()))),
            10 => {
                let due = self.ne.poll_timeout().unwrap_or(self.now);
                self.pass(due.saturating_duration_since(self.now));
            }
            11 | 12 => {
                self.events();
                self.respond(script.byte());
            }
            13 => self.events(),
            14 => self.read(),
            _ => match script.byte() {
                0 => self.ne.close(crate::necp::CloseReason::Shutdown),
                which @ 1..=63 if self.forger.is_some() => {
                    self.init(script, which >> 3, DEMANDS[usize::from(which & 7)]);
                }
                id @ 128..=143 if self.forger.is_some() => self.init(script, id, self.received.unused()),
                64..=79 if self.forger.is_some() => self.take_offer(),
                80..=87 => self.ask_extension(script),
                88..=127 if self.forger.is_none() => self.wide(script),
                health => self.ne.set_health(health),
            },
        }
    }

    /// A message's bytes: as they are, or as a peer with a key sends them.
    fn made(&mut self, script: &mut Script<'_>, header: &Header, units: &[Unit]) -> Vec<u8> {
        match &mut self.forger {
            Some(forger) => forger.message(script, header, units, &self.received.recorded),
            None => message(header, units),
        }
    }

    /// INIT of an authenticated session, at any time.
    fn init(&mut self, script: &mut Script<'_>, id: u8, demand: u64) {
        let header = Header::new(Opcode::INIT, Flags::NONE, id.into(), 1);
        let unit = Init { authenticate: Some(demand) }.unit();
        let bytes = self.made(script, &header, &[unit]);
        self.input(&bytes);
    }

    fn ask_extension(&mut self, script: &mut Script<'_>) {
        let header = Header::new(Opcode::KEEPALIVE, Flags::NONE, script.byte().into(), 1);
        let bytes = self.made(script, &header, &[extension::query()]);
        self.input(&bytes);
    }

    /// A request in the extension, asked for or not.
    fn wide(&mut self, script: &mut Script<'_>) {
        let bytes = script.wide();
        self.input(&bytes);
    }

    fn input(&mut self, bytes: &[u8]) {
        self.sent.add(bytes);
        self.ne.handle_input(self.now, bytes);
    }

    /// The message that was made last, in pieces of some size.
    fn send_last(&mut self, piece: u8) {
        let last = std::mem::take(&mut self.last);
        let piece = if piece & 3 == 3 { usize::from(piece) } else { last.len() };
        last.chunks(piece.max(1)).for_each(|piece| self.input(piece));
        self.last = last;
    }

    /// A KEEPALIVE's answer, right or wrong.
    fn answer(&mut self, script: &mut Script<'_>) {
        let (how, health) = (script.byte(), script.byte());
        let Some((header, queries)) = self.received.requests.last().cloned() else { return };
        let flags = if how & 3 == 1 { Flags::ERROR } else { Flags::NONE };
        let mut units: Vec<Unit> = queries.iter().take(usize::from(how >> 4) + 1).copied().collect();
        units.iter_mut().for_each(|unit| unit.0[3] = if how & 3 == 0 { health.into() } else { 0 });
        units.extend(if how & 3 == 2 { script.units() } else { Vec::new() });
        let ack = Header::new(Opcode::KEEPALIVE_ACK, flags, header.request_id, units.len());
        let ack = self.made(script, &ack, &units);
        self.input(&ack);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.ne.handle_timeout(self.now);
    }

    fn events(&mut self) {
        while let Some(event) = self.ne.poll_event() {
            assert!(!self.told_closed, "{event:?} after Closed");
            match event {
                NeEvent::Init { token } => {
                    assert!(self.sent.take_init(), "nothing was sent that opens the session, or starts it over");
                    // Tokens from before are void; that of a list in progress is not.
                    self.tokens.clear();
                    self.ask(token, 0);
                }
                NeEvent::Operations { token, operations } => {
                    assert!((1..=MAX_BATCH).contains(&operations.len()));
                    operations.iter().for_each(|operation| self.was_asked_for(operation));
                    self.ask(token, operations.len());
                }
                NeEvent::Reset { token } => {
                    assert!(self.sent.take_message(Opcode::EXCEPTION_RESET), "EXCEPTION_RESET was not sent");
                    self.ask(token, 0);
                }
                NeEvent::Query { token, filter } => {
                    let like = |unit: &[u32; 8]| Filter::parse(&Unit(*unit)) == Ok(filter);
                    let wide = |unit: &WideUnit| Filter::parse_wide(unit) == Ok(filter);
                    let query = Opcode::EXCEPTION_QUERY;
                    assert!(self.sent.take(query, like) || self.sent.take_wide(query, wide), "{filter:?} was not sent");
                    assert!(self.seen.insert(token), "{token:?} came before");
                    self.queries.push(token);
                }
                NeEvent::ListMore { token, max } => {
                    assert!(max > 0 && self.seen.contains(&token));
                    self.wanted.push((token, max));
                }
                NeEvent::Health(answers) => {
                    for answer in answers {
                        assert!(answer.health <= 100);
                        let like = |unit: &[u32; 8]| is(unit, answer.service) && unit[3] == u32::from(answer.health);
                        assert!(self.sent.take(Opcode::KEEPALIVE_ACK, like), "{answer:?} was not sent");
                    }
                }
                NeEvent::Notice(_) => {}
                NeEvent::Closed(reason) => {
                    assert_eq!(self.ne.closed(), Some(&reason));
                    self.told_closed = true;
                }
            }
        }
    }

    fn ask(&mut self, token: Token, operations: usize) {
        assert!(self.seen.insert(token), "{token:?} came before");
        self.tokens.push((token, operations));
    }

    fn was_asked_for(&mut self, operation: &Operation) {
        let found = match operation {
            Operation::Start(offer) => self
                .sent
                .take(Opcode::START, |unit| unit[0] == u32::from(offer.forwarding.code()) && is(unit, offer.key())),
            Operation::Stop(key) => self.sent.take(Opcode::STOP, |unit| is(unit, *key)),
            Operation::Except(exception) => {
                let wide = |unit: &WideUnit| Exception::parse_wide(unit).as_ref() == Ok(exception);
                self.sent.take(Opcode::EXCEPTION_ADD, |unit| Exception::parse(&Unit(*unit)).as_ref() == Ok(exception))
                    || self.sent.take_wide(Opcode::EXCEPTION_ADD, wide)
            }
            Operation::Unexcept(flows) => {
                let wide = |unit: &WideUnit| Exception::parse_wide_del(unit).as_ref() == Ok(flows);
                self.sent.take(Opcode::EXCEPTION_DEL, |unit| Exception::parse_del(&Unit(*unit)).as_ref() == Ok(flows))
                    || self.sent.take_wide(Opcode::EXCEPTION_DEL, wide)
            }
        };
        assert!(found, "{operation:?} was not sent");
    }

    /// The caller's answers: to all, or to the latest first; some operations fail; and now and then one says it twice.
    fn respond(&mut self, how: u8) {
        let mut tokens = std::mem::take(&mut self.tokens);
        if how & 1 == 1 {
            tokens.reverse();
        }
        let later = if how & 2 == 2 { tokens.split_off(tokens.len() / 2) } else { Vec::new() };
        for (token, operations) in tokens {
            let failed: Vec<usize> = (0..=operations).filter(|index| how >> 4 >> (index & 3) & 1 == 1).collect();
            self.ne.respond(token, &failed);
            if how & 4 == 4 {
                self.ne.respond(token, &[]);
            }
        }
        self.tokens = later;
        self.list(how);
        self.ne.handle_timeout(self.now);
    }

    /// The caller's lists: empty, short, long, and given late.
    fn list(&mut self, how: u8) {
        let flows = Flows::all(if how & 0x20 == 0 { Family::V4 } else { Family::V6 });
        let sample = Listed { scope: Scope::Local, installer: Ipv4Addr::new(10, 0, 0, 11).into(), flows };
        for token in std::mem::take(&mut self.queries) {
            let _begun = match how & 3 {
                0 => self.ne.list(token, 0),
                1 => self.ne.list(token, u32::from(how >> 2)),
                2 => self.ne.list(token, 3_000),
                _ => self.ne.list(token, how.into()),
            };
        }
        for (token, max) in std::mem::take(&mut self.wanted) {
            let count = max.min(1 + usize::from(how));
            self.ne.list_more(token, &vec![sample; if how & 0x40 == 0 { count } else { 0 }]);
        }
    }

    fn read(&mut self) {
        while let Some(bytes) = self.ne.poll_transmit() {
            self.received.add(&bytes, &mut self.sent);
        }
        assert!(self.received.is_whole() || self.received.in_list(), "output ends with a whole message");
    }

    fn check(&mut self) {
        let (held, most) = (self.ne.held_bytes(), may_hold(self.sent.bytes));
        assert!(held <= most, "{held} bytes held after {} bytes of input", self.sent.bytes);
        let counters = *self.ne.counters();
        if self.closed {
            assert_eq!(counters.messages_out, self.messages_out, "no further message is made after the end");
        }
        (self.closed, self.messages_out) = (self.ne.closed().is_some(), counters.messages_out);
        if self.closed {
            assert_eq!((self.ne.is_ready(), self.ne.wants_input(), self.ne.poll_timeout()), (false, false, None));
        } else {
            assert!(self.ne.wants_input() || self.ne.poll_timeout().is_some() || self.waits(), "asleep for good");
            if self.ne.wants_input() {
                self.sent.check(&counters);
            }
        }
        assert!(self.ne.started().count() <= self.limits.max_services);
    }

    /// Whether the caller has to do something: take events, answer them, or take output.
    fn waits(&self) -> bool {
        // What waits is only known to the machine; it is enough that the next step of the caller is possible.
        self.ne.held_bytes() > 0 || !self.tokens.is_empty()
    }

    fn end(&mut self) {
        self.events();
        self.respond(0);
        self.events();
        self.read();
        self.ne.close(crate::necp::CloseReason::Shutdown);
        self.events();
        self.read();
        assert!(self.told_closed && self.ne.poll_event().is_none());
        let made = self.ne.counters().messages_out;
        // What waits behind a list that is cut off is not sent.
        assert!(self.received.messages == made || self.received.in_list() && self.received.messages < made);
        self.check();
    }
}

/// Whether a unit's data1 and data2 name the service: the port means something for TCP and UDP only (§5.6.1).
fn is(unit: &[u32; 8], key: ServiceKey) -> bool {
    let port = if [TCP, UDP].contains(&key.protocol()) { unit[2] } else { 0 };
    (unit[1], port) == (key.protocol().into(), key.port().into())
}
