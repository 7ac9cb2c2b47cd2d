//! Both machines on a virtual clock.

mod auth;
mod exceptions;
mod extension;
mod hostile;
mod ne;
mod pairs;
mod se;
mod table;
mod vectors;

use std::time::{Duration, Instant};

use super::*;
use crate::necp::error::CloseReason;
use crate::necp::message::{Exception, Filter, Flows, HealthAnswer, Listed, Operation, Scope, ServiceUnit};
use crate::necp::service::{Forwarding, ServiceKey};
use crate::necp::wire::{Decoder, Flags, Header, Item, Unit};

/// Bytes from hexadecimal digits; blanks are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn service(text: &str) -> ServiceKey {
    text.parse().unwrap()
}

fn offer(text: &str) -> ServiceUnit {
    ServiceUnit::new(Forwarding::L2, service(text))
}

/// A message of ours, for tests that are about something else than its bytes.
fn message(opcode: Opcode, flags: Flags, request_id: u16, units: &[Unit]) -> Vec<u8> {
    let mut bytes = Header::new(opcode, flags, request_id, units.len()).encode().to_vec();
    units.iter().for_each(|unit| bytes.extend(unit.encode()));
    bytes
}

fn init(request_id: u16) -> Vec<u8> {
    message(Opcode::INIT, Flags::NONE, request_id, &[Unit::default()])
}

/// The messages in a stream; fails unless it is framed to the last byte and every header is one that we may send.
fn messages(bytes: &[u8]) -> Vec<(Header, Vec<Unit>)> {
    let mut decoder = Decoder::default();
    let found = read_messages(&mut decoder, bytes);
    assert!(!decoder.in_message(), "output ends with a whole message");
    found
}

/// As [`messages`], of a stream that may be cut; units of a message that began in an earlier piece are left out.
fn read_messages(decoder: &mut Decoder, bytes: &[u8]) -> Vec<(Header, Vec<Unit>)> {
    let mut rest = bytes;
    let mut found: Vec<(Header, Vec<Unit>)> = Vec::new();
    while let Some(item) = decoder.next(&mut rest).expect("output is framed") {
        match item {
            Item::Header(header) => {
                assert_eq!((header.version, header.seq_num), (1, 0));
                assert_eq!(header.flags.0 & !0x3f, 0, "reserved flags are sent as 0");
                assert_eq!(header.flags.has(Flags::BASIC_PAYLOAD), header.payload_len > 0);
                assert!(header.units().is_some());
                found.push((header, Vec::new()));
            }
            Item::Unit(unit) => {
                if let Some((_, units)) = found.last_mut() {
                    units.push(unit);
                }
            }
            // Only who asked for the extension gets wide units; those tests look at the bytes.
            Item::Preamble(_) | Item::Wide(_) | Item::End | Item::Payload => {}
        }
    }
    found
}

/// An NE with a clock of its own.
struct Ne {
    session: NeSession,
    now: Instant,
}

impl Ne {
    fn new() -> Self {
        Self::with(SessionConfig::default())
    }

    fn with(config: SessionConfig) -> Self {
        let now = Instant::now();
        Self { session: NeSession::new(config, now, 7), now }
    }

    /// One whose INIT was answered.
    fn ready() -> Self {
        Self::ready_with(SessionConfig::default())
    }

    fn ready_with(config: SessionConfig) -> Self {
        let mut ne = Self::with(config);
        ne.input(&init(1));
        ne.respond_all(&[]);
        assert!(ne.session.is_ready());
        ne.output();
        ne
    }

    fn input(&mut self, bytes: &[u8]) {
        self.session.handle_input(self.now, bytes);
    }

    fn output(&mut self) -> Vec<u8> {
        std::iter::from_fn(|| self.session.poll_transmit()).flatten().collect()
    }

    fn events(&mut self) -> Vec<NeEvent> {
        std::iter::from_fn(|| self.session.poll_event()).collect()
    }

    /// Responds to every event, until there is none and nothing waits inside; operations on the services in `failing`
    /// fail. Returns the operations.
    fn respond_all(&mut self, failing: &[ServiceKey]) -> Vec<Operation> {
        let mut done = Vec::new();
        loop {
            let events = self.events();
            for event in &events {
                match event {
                    NeEvent::Init { token } => self.session.respond(*token, &[]),
                    NeEvent::Operations { token, operations } => {
                        let failed: Vec<usize> = (0..operations.len())
                            .filter(|index| {
                                operations[*index].service().is_some_and(|service| failing.contains(&service))
                            })
                            .collect();
                        self.session.respond(*token, &failed);
                        done.extend(operations.iter().copied());
                    }
                    NeEvent::Reset { token } => self.session.respond(*token, &[]),
                    NeEvent::Query { token, .. } => _ = self.session.list(*token, 0),
                    _ => {}
                }
            }
            if self.session.poll_timeout().is_some_and(|due| due <= self.now) {
                self.session.handle_timeout(self.now);
            } else if events.is_empty() {
                return done;
            }
        }
    }

    /// Lets time pass, with every timeout at its moment.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(due) = self.session.poll_timeout().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.session.handle_timeout(self.now);
        }
        self.now = until;
        self.session.handle_timeout(until);
    }

    fn closed(&self) -> Option<CloseReason> {
        self.session.closed().cloned()
    }
}

/// An SE with a clock of its own.
struct Se {
    session: SeSession,
    now: Instant,
}

impl Se {
    fn new() -> Self {
        Self::with(SessionConfig::default())
    }

    fn with(config: SessionConfig) -> Self {
        let now = Instant::now();
        Self { session: SeSession::new(config, now, 11), now }
    }

    /// One whose INIT was answered.
    fn ready() -> Self {
        Self::ready_with(SessionConfig::default())
    }

    fn ready_with(config: SessionConfig) -> Self {
        let mut se = Self::with(config);
        let sent = messages(&se.output());
        se.input(&message(Opcode::INIT_ACK, Flags::NONE, sent[0].0.request_id, &[Unit::default()]));
        assert_eq!(se.events(), [SeEvent::Ready]);
        se
    }

    fn input(&mut self, bytes: &[u8]) {
        self.session.handle_input(self.now, bytes);
    }

    fn output(&mut self) -> Vec<u8> {
        std::iter::from_fn(|| self.session.poll_transmit()).flatten().collect()
    }

    fn events(&mut self) -> Vec<SeEvent> {
        std::iter::from_fn(|| self.session.poll_event()).collect()
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(due) = self.session.poll_timeout().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.session.handle_timeout(self.now);
        }
        self.now = until;
        self.session.handle_timeout(until);
    }

    fn closed(&self) -> Option<CloseReason> {
        self.session.closed().cloned()
    }
}
