//! A server element against any network element.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::may_hold;
use super::peer::{Received, Sent};
use super::script::{Script, limits, message};
use crate::necp::message::{Exception, Filter, Flows, Listed, Scope, ServiceUnit};
use crate::necp::service::{Forwarding, ServiceKey, TCP};
use crate::necp::session::{MAX_BATCH, RequestId, SeEvent, SeSession, Token};
use crate::necp::wire::{Direction, Flags, Header, Opcode, Unit};

/// Plays a script to its end; panics when something happens that must not.
pub fn play(script: &[u8]) {
    let mut script = Script::new(script);
    let mut bed = Bed::new(script.byte());
    while !script.is_over() {
        bed.step(&mut script);
        bed.check();
    }
    bed.end();
}

struct Bed {
    se: SeSession,
    now: Instant,
    sent: Sent,
    received: Received,
    questions: Vec<(Token, usize)>,
    seen: BTreeSet<Token>,
    /// Requests of ours that were not answered.
    asked: BTreeMap<RequestId, Vec<ServiceKey>>,
    /// EXCEPTION_ADDs and EXCEPTION_DELs; EXCEPTION_RESETs and EXCEPTION_QUERYs.
    excepted: BTreeMap<RequestId, BTreeSet<Flows>>,
    lists: BTreeSet<RequestId>,
    own_units: usize,
    last: Vec<u8>,
    ready: bool,
    closed: bool,
    told_closed: bool,
    messages_out: u64,
}

impl Bed {
    fn new(first: u8) -> Self {
        let now = Instant::now();
        let mut bed = Self {
            se: SeSession::new(limits(first & 8 == 8), now, first.into()),
            now,
            sent: Sent::default(),
            received: Received::new(Direction::ToNe),
            questions: Vec::new(),
            seen: BTreeSet::new(),
            asked: BTreeMap::new(),
            excepted: BTreeMap::new(),
            lists: BTreeSet::new(),
            own_units: 0,
            last: Vec::new(),
            ready: false,
            closed: false,
            told_closed: false,
            messages_out: 1,
        };
        if first & 7 != 0 {
            bed.read();
            let id = bed.received.requests[0].0.request_id;
            bed.input(&message(&Header::new(Opcode::INIT_ACK, Flags::NONE, id, 1), &[Unit::default()]));
            bed.events();
            assert!(bed.se.is_ready());
        }
        bed
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() & 15 {
            0 => self.input(script.bytes()),
            1..=3 => {
                self.last = script.message();
                self.send_last(script.byte());
            }
            4 => self.send_last(0),
            5..=7 => self.answer(script),
            8 => self.pass(Duration::from_millis(40 * u64::from(script.byte()))),
            9 => {
                let due = self.se.poll_timeout().unwrap_or(self.now);
                self.pass(due.saturating_duration_since(self.now));
            }
            10 => self.events(),
            11 => {
                self.events();
                self.answer_health(script.byte());
            }
            12 => self.read(),
            13 | 14 => self.request(script.byte()),
            _ => match script.byte() {
                0 => self.se.close(crate::necp::CloseReason::Shutdown),
                _ => self.reflect(),
            },
        }
    }

    fn input(&mut self, bytes: &[u8]) {
        self.sent.add(bytes);
        self.se.handle_input(self.now, bytes);
    }

    fn send_last(&mut self, piece: u8) {
        let last = std::mem::take(&mut self.last);
        let piece = if piece & 3 == 3 { usize::from(piece) } else { last.len() };
        last.chunks(piece.max(1)).for_each(|piece| self.input(piece));
        self.last = last;
    }

    /// An answer to a request of the SE's, right or wrong, early or late or again.
    fn answer(&mut self, script: &mut Script<'_>) {
        let (how, which) = (script.byte(), script.byte());
        let requests = &self.received.requests;
        if requests.is_empty() {
            return;
        }
        let (header, units) = requests[requests.len() - 1 - usize::from(which) % requests.len()].clone();
        let opcode = header.opcode.answer().expect("requests have answers");
        let flags = [Flags::NONE, Flags::NONE, Flags::ERROR, Flags(u16::from(script.byte()))][usize::from(how & 3)];
        let mut answer = match how >> 2 & 3 {
            0 => Vec::new(),
            1 => units.into_iter().take(usize::from(how >> 4) + 1).collect(),
            2 => vec![Unit::default()],
            _ => script.units(),
        };
        if opcode == Opcode::KEEPALIVE_ACK {
            answer.iter_mut().for_each(|unit| unit.0[3] = which.into());
        }
        let flags = Flags(flags.0 & !Flags::BASIC_PAYLOAD.0);
        self.input(&message(&Header::new(opcode, flags, header.request_id, answer.len()), &answer));
    }

    /// The SE's own messages sent back to it.
    fn reflect(&mut self) {
        let Some((header, units)) = self.received.requests.last().cloned() else { return };
        self.input(&message(&header, &units));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.se.handle_timeout(self.now);
    }

    fn request(&mut self, what: u8) {
        if what & 0x80 != 0 {
            return self.except(what);
        }
        let keys: Vec<ServiceKey> = (0..what & 3).map(|at| ServiceKey::new(TCP, 80 + u16::from(at))).collect();
        self.own_units += keys.len();
        let id = if what & 4 == 0 {
            let forwarding = Forwarding::ALL[usize::from(what >> 3) % 3];
            let offers: Vec<ServiceUnit> = keys.iter().map(|key| ServiceUnit::new(forwarding, *key)).collect();
            self.se.start(&offers)
        } else {
            self.se.stop(&keys)
        };
        assert!(self.asked.insert(id, keys).is_none(), "{id:?} was given out before");
    }

    fn except(&mut self, what: u8) {
        let flows = |at: u8| Flows { protocol: TCP, port: 80 + u16::from(at), ..Flows::ALL };
        let several: BTreeSet<Flows> = (0..what & 3).map(flows).collect();
        self.own_units += 4;
        match what >> 2 & 3 {
            0 => drop(self.lists.insert(self.se.except_reset())),
            1 => drop(self.lists.insert(self.se.except_query(Filter::default()))),
            2 => {
                let add: Vec<_> =
                    several.iter().map(|flows| Exception { scope: Scope::Global, ttl: 9, flows: *flows }).collect();
                drop(self.excepted.insert(self.se.except_add(&add), several));
            }
            _ => {
                let delete: Vec<_> = several.iter().copied().collect();
                drop(self.excepted.insert(self.se.except_del(&delete), several));
            }
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.se.poll_event() {
            assert!(!self.told_closed, "{event:?} after Closed");
            match event {
                SeEvent::Ready => {
                    assert!(!self.ready, "Ready twice");
                    assert!(self.sent.has(Opcode::INIT_ACK, |_| true), "INIT_ACK was not sent");
                    self.ready = true;
                }
                SeEvent::HealthQuery { token, queries } => {
                    assert!(self.ready && !queries.is_empty() && self.seen.insert(token));
                    for query in &queries {
                        let asked = |unit: &[u32; 8]| unit[0] == 1 && unit[1] == u32::from(query.service.protocol());
                        assert!(self.sent.has(Opcode::KEEPALIVE, asked), "{query:?} was not sent");
                    }
                    self.questions.push((token, queries.len()));
                }
                SeEvent::Acked { id, failed } => {
                    let services = self.asked.remove(&id).expect("what is acknowledged was asked, and not answered");
                    assert!(failed.iter().all(|failed| services.contains(failed)), "{failed:?} of {services:?}");
                }
                SeEvent::Excepted { id, failed } => {
                    let flows = self.excepted.remove(&id).expect("what is answered was asked, and not answered");
                    assert!(failed.iter().all(|failed| flows.contains(failed)), "{failed:?} of {flows:?}");
                }
                SeEvent::Reset { id, .. } | SeEvent::ListFailed { id } | SeEvent::Listed { id, last: true, .. } => {
                    assert!(self.lists.remove(&id), "{id:?} was not asked, or answered before");
                }
                SeEvent::Listed { id, entries, last: false } => {
                    assert!(self.lists.contains(&id) && entries.len() <= MAX_BATCH);
                    for entry in entries {
                        let sent = |unit: &[u32; 8]| Listed::parse(&Unit(*unit)) == Ok(entry);
                        assert!(self.sent.has(Opcode::EXCEPTION_RESP, sent), "{entry:?} was not sent");
                    }
                }
                SeEvent::NeHealth(health) => {
                    let sent = |unit: &[u32; 8]| unit[3] == u32::from(health);
                    assert!(health <= 100 && self.sent.has(Opcode::KEEPALIVE_ACK, sent), "{health} was not sent");
                }
                SeEvent::Notice(_) => {}
                SeEvent::Closed(reason) => {
                    assert_eq!(self.se.closed(), Some(&reason));
                    self.told_closed = true;
                }
            }
        }
    }

    fn answer_health(&mut self, how: u8) {
        for (token, queries) in std::mem::take(&mut self.questions) {
            let answers = vec![(how & 1 == 0).then_some(how); queries + usize::from(how & 2) - usize::from(how >> 7)];
            self.se.answer_health(token, &answers);
            self.se.answer_health(token, &[]);
        }
        self.se.handle_timeout(self.now);
    }

    fn read(&mut self) {
        while let Some(bytes) = self.se.poll_transmit() {
            self.received.add(&bytes, &mut self.sent);
        }
        assert!(self.received.is_whole(), "output ends with a whole message");
    }

    fn check(&mut self) {
        let (held, input) = (self.se.held_bytes(), self.sent.bytes + 32 * self.own_units + 8_192);
        assert!(held <= may_hold(input), "{held} bytes held after {input} bytes of input");
        let counters = *self.se.counters();
        if self.closed {
            assert_eq!(counters.messages_out, self.messages_out, "no further message is made after the end");
        }
        (self.closed, self.messages_out) = (self.se.closed().is_some(), counters.messages_out);
        if self.closed {
            assert_eq!((self.se.is_ready(), self.se.wants_input(), self.se.poll_timeout()), (false, false, None));
        } else {
            assert!(self.se.poll_timeout().is_some(), "asleep for good");
        }
    }

    fn end(&mut self) {
        self.events();
        self.answer_health(0);
        self.events();
        self.read();
        self.se.close(crate::necp::CloseReason::Shutdown);
        self.events();
        self.read();
        assert!(self.told_closed && self.se.poll_event().is_none());
        assert_eq!(self.received.messages, self.se.counters().messages_out);
        self.check();
    }
}
