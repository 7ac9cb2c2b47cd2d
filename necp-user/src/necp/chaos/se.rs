//! A server element against any network element.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv6Net};

use super::forger::{Forger, TO_NE, TO_SE, key};
use super::judge::Judge;
use super::may_hold;
use super::peer::{Received, Sent};
use super::script::{Script, limits, message};
use crate::necp::auth::Credentials;
use crate::necp::message::{Exception, Family, Filter, Flows, InitAck, Listed, Scope, ServiceUnit};
use crate::necp::service::{Forwarding, ServiceKey, TCP};
use crate::necp::session::{Counters, MAX_BATCH, RequestId, SeEvent, SeSession, SessionConfig, Token};
use crate::necp::wire::{Direction, Flags, Header, Opcode, Preamble, Unit, WideUnit};

/// The number that the NE demands, and such that soon there are no more.
const DEMANDS: [u64; 4] = [TO_NE, TO_NE, TO_NE + (1 << 32), u64::MAX - 2];

/// 2001:db8::/32.
const SIX: IpNet = IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32));

/// Plays a script to its end; panics when something happens that must not. Returns what the session has counted.
pub fn play(script: &[u8]) -> Counters {
    let mut script = Script::new(script);
    let mut bed = Bed::new(script.byte());
    while !script.is_over() {
        bed.step(&mut script);
        bed.check();
    }
    bed.end();
    *bed.se.counters()
}

struct Bed {
    se: SeSession,
    now: Instant,
    sent: Sent,
    received: Received,
    /// Of an authenticated session.
    forger: Option<Forger>,
    questions: Vec<(Token, usize)>,
    seen: BTreeSet<Token>,
    /// Requests of ours that were not answered.
    asked: BTreeMap<RequestId, (Opcode, Vec<ServiceKey>)>,
    /// EXCEPTION_ADDs and EXCEPTION_DELs; EXCEPTION_RESETs and EXCEPTION_QUERYs.
    excepted: BTreeMap<RequestId, (Opcode, BTreeSet<Flows>)>,
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
        let limits = SessionConfig { extension: first & 0x20 != 0, ..limits(first & 8 == 8) };
        let now = Instant::now();
        let keyed = (first & 0x10 != 0).then(key);
        let credentials = keyed.clone().map(|key| Credentials { key, first_seq_num: TO_SE });
        let mut bed = Self {
            se: SeSession::with_credentials(limits.clone(), credentials, now, first.into()),
            now,
            sent: Sent::default(),
            forger: keyed.is_some().then(|| Forger::new(TO_SE)),
            received: Received::new(Direction::ToNe, keyed.clone()),
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
        if keyed.is_some() || first & 7 != 0 {
            bed.read();
        }
        bed.sent.judge = keyed.map(|key| Judge::se(key, bed.init_id(), TO_SE, limits.max_message));
        if first & 7 != 0 {
            let ack = Header::new(Opcode::INIT_ACK, Flags::NONE, bed.init_id(), 1);
            let first_seq_num = DEMANDS[usize::from(first >> 6)];
            let ack = match &mut bed.forger {
                Some(forger) => forger.sign(&ack, &[InitAck { first_seq_num }.unit()]),
                None => message(&ack, &[Unit::default()]),
            };
            bed.input(&ack);
            bed.events();
            assert!(bed.se.is_ready());
        }
        bed
    }

    /// The request id of the SE's INIT, which was read.
    fn init_id(&self) -> u16 {
        self.received.requests[0].0.request_id
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() & 15 {
            0 => self.input(script.bytes()),
            1..=3 => {
                let (header, units) = script.message();
                self.last = self.made(script, &header, &units);
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
                which @ 1..=31 if self.forger.is_some() => self.init_ack(script, which),
                _ => self.reflect(),
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

    /// INIT_ACK of an authenticated session, at any time.
    fn init_ack(&mut self, script: &mut Script<'_>, which: u8) {
        let header = Header::new(Opcode::INIT_ACK, Flags::NONE, self.init_id() ^ u16::from(which == 31), 1);
        let unit = InitAck { first_seq_num: DEMANDS[usize::from(which & 3)] }.unit();
        let bytes = self.made(script, &header, &[unit]);
        self.input(&bytes);
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
        if header.wide_units().is_some() && self.forger.is_none() {
            return self.answer_wide(script, Header { opcode, flags, ..header });
        }
        let answer = self.made(script, &Header::new(opcode, flags, header.request_id, answer.len()), &answer);
        self.input(&answer);
    }

    /// An answer in the extension, which repeats what was asked, or has units of its own.
    fn answer_wide(&mut self, script: &mut Script<'_>, answer: Header) {
        let how = script.byte();
        let mut units: Vec<WideUnit> = self.received.wide.iter().take(usize::from(how & 3)).copied().collect();
        units.extend((0..how >> 2 & 3).map(|_| script.wide_unit()));
        let header = Header::wide(answer.opcode, answer.flags, answer.request_id, units.len());
        let mut bytes = header.encode().to_vec();
        if !units.is_empty() {
            let version = if how & 0xf0 == 0xf0 { script.byte() } else { Preamble::SPOKEN.version };
            bytes.extend(Preamble { version, ..Preamble::SPOKEN }.encode());
        }
        units.iter().for_each(|unit| bytes.extend(unit.0));
        self.input(&bytes);
    }

    /// The SE's own messages sent back to it.
    fn reflect(&mut self) {
        if let Some(own) = self.received.recorded.last().cloned() {
            return self.input(&own);
        }
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
        let opcode = if what & 4 == 0 { Opcode::START } else { Opcode::STOP };
        let id = if opcode == Opcode::START {
            let forwarding = Forwarding::ALL[usize::from(what >> 3) % 3];
            let offers: Vec<ServiceUnit> = keys.iter().map(|key| ServiceUnit::new(forwarding, *key)).collect();
            self.se.start(&offers)
        } else {
            self.se.stop(&keys)
        };
        assert!(self.asked.insert(id, (opcode, keys)).is_none(), "{id:?} was given out before");
    }

    fn except(&mut self, what: u8) {
        let six = if what & 0x10 == 0 { Flows::ALL } else { Flows { source: SIX, ..Flows::all(Family::V6) } };
        let flows = |at: u8| Flows { protocol: TCP, port: 80 + u16::from(at), ..six };
        let several: BTreeSet<Flows> = (0..what & 3).map(flows).collect();
        self.own_units += 4;
        match what >> 2 & 3 {
            0 => drop(self.lists.insert(self.se.except_reset())),
            1 => drop(self.lists.insert(self.se.except_query(Filter::default()))),
            2 => {
                let add: Vec<_> =
                    several.iter().map(|flows| Exception { scope: Scope::Global, ttl: 9, flows: *flows }).collect();
                drop(self.excepted.insert(self.se.except_add(&add), (Opcode::EXCEPTION_ADD, several)));
            }
            _ => {
                let delete: Vec<_> = several.iter().copied().collect();
                drop(self.excepted.insert(self.se.except_del(&delete), (Opcode::EXCEPTION_DEL, several)));
            }
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.se.poll_event() {
            assert!(!self.told_closed, "{event:?} after Closed");
            match event {
                SeEvent::Ready => {
                    assert!(!self.ready, "Ready twice");
                    assert!(self.sent.take(Opcode::INIT_ACK, |_| true), "INIT_ACK was not sent");
                    self.ready = true;
                }
                SeEvent::HealthQuery { token, queries } => {
                    assert!(self.ready && !queries.is_empty() && self.seen.insert(token));
                    for query in &queries {
                        let asked = |unit: &[u32; 8]| unit[0] == 1 && unit[1] == u32::from(query.service.protocol());
                        assert!(self.sent.take(Opcode::KEEPALIVE, asked), "{query:?} was not sent");
                    }
                    self.questions.push((token, queries.len()));
                }
                SeEvent::Acked { id, failed } => {
                    let asked = self.asked.remove(&id);
                    let (opcode, services) = asked.expect("what is acknowledged was asked, and not answered");
                    self.was_answered(opcode, services.is_empty());
                    assert!(failed.iter().all(|failed| services.contains(failed)), "{failed:?} of {services:?}");
                }
                SeEvent::Excepted { id, failed } => {
                    let asked = self.excepted.remove(&id);
                    let (opcode, flows) = asked.expect("what is answered was asked, and not answered");
                    // Without the extension those of IPv6 fail without a message, and so without an answer.
                    let is_six = flows.iter().any(|flows| flows.family() == Family::V6);
                    self.was_answered(opcode, flows.is_empty() || is_six && failed.len() == flows.len());
                    assert!(failed.iter().all(|failed| flows.contains(failed)), "{failed:?} of {flows:?}");
                }
                SeEvent::Reset { id, .. } => {
                    assert!(self.lists.remove(&id), "{id:?} was not asked, or answered before");
                    self.was_answered(Opcode::EXCEPTION_RESET, false);
                }
                SeEvent::ListFailed { id } => {
                    assert!(self.lists.remove(&id), "{id:?} was not asked, or answered before");
                    self.was_answered(Opcode::EXCEPTION_QUERY, false);
                }
                SeEvent::Listed { id, entries, last } => {
                    assert!(self.lists.contains(&id) && entries.len() <= MAX_BATCH);
                    for entry in entries {
                        let sent = |unit: &[u32; 8]| Listed::parse(&Unit(*unit)) == Ok(entry);
                        let wide = |unit: &WideUnit| Listed::parse_wide(unit) == Ok(entry);
                        let resp = Opcode::EXCEPTION_RESP;
                        assert!(
                            self.sent.take(resp, sent) || self.sent.take_wide(resp, wide),
                            "{entry:?} was not sent"
                        );
                    }
                    if last {
                        self.lists.remove(&id);
                        self.was_answered(Opcode::EXCEPTION_QUERY, false);
                    }
                }
                SeEvent::NeHealth(health) => {
                    let sent = |unit: &[u32; 8]| unit[3] == u32::from(health);
                    assert!(health <= 100 && self.sent.take(Opcode::KEEPALIVE_ACK, sent), "{health} was not sent");
                }
                SeEvent::Notice(_) => {}
                SeEvent::Closed(reason) => {
                    assert_eq!(self.se.closed(), Some(&reason));
                    self.told_closed = true;
                }
            }
        }
    }

    /// Every answer is told once; a request that asks for nothing is answered by nobody.
    fn was_answered(&mut self, request: Opcode, asks_for_nothing: bool) {
        let answer = request.answer().expect("requests have answers");
        assert!(asks_for_nothing || self.sent.take_message(answer), "{answer} was not sent");
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
        let (held, input) = (self.se.held_bytes(), self.sent.bytes + 64 * self.own_units + 8_192);
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
            if self.se.wants_input() {
                self.sent.check(&counters);
            }
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
