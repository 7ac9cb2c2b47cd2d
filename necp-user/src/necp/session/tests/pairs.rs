//! An NE and an SE on one virtual clock, with a wire between them that can be cut.

use std::collections::VecDeque;

use super::exceptions::List;
use super::*;
use crate::necp::auth::{Access, Credentials, Key};

/// A pair of sessions and the state that their callers would hold.
pub(super) struct Pair {
    pub(super) ne: NeSession,
    pub(super) se: SeSession,
    pub(super) now: Instant,
    pub(super) wire_to_ne: VecDeque<u8>,
    pub(super) wire_to_se: VecDeque<u8>,
    pub(super) to_ne: bool,
    pub(super) to_se: bool,
    /// Bytes carried at once, at most.
    pub(super) piece: usize,
    pub(super) health: u8,
    pub(super) failing: Vec<ServiceKey>,
    /// What the NE's maps hold.
    pub(super) maps: Vec<ServiceUnit>,
    pub(super) list: List,
    pub(super) se_log: Vec<SeEvent>,
    pub(super) ne_health: Vec<HealthAnswer>,
}

impl Pair {
    pub(super) fn new(config: SessionConfig) -> Self {
        Self::with(config, false)
    }

    /// With a key on both sides, if `secured`; their clocks show the same second.
    pub(super) fn with(config: SessionConfig, secured: bool) -> Self {
        let now = Instant::now();
        let credentials = secured.then(|| Credentials {
            key: Key::new(b"a key for both of us".to_vec()).unwrap(),
            first_seq_num: 1_700_000_000 << 32,
        });
        let access = credentials.clone().map_or(Access::Open, |credentials| Access::Authenticated(Some(credentials)));
        Self {
            ne: NeSession::with_access(config.clone(), access, now, 1),
            se: SeSession::with_credentials(config, credentials, now, 2),
            now,
            wire_to_ne: VecDeque::new(),
            wire_to_se: VecDeque::new(),
            to_ne: true,
            to_se: true,
            piece: usize::MAX,
            health: 100,
            failing: Vec::new(),
            maps: Vec::new(),
            list: List::default(),
            se_log: Vec::new(),
            ne_health: Vec::new(),
        }
    }

    pub(super) fn ne_events(&mut self) -> bool {
        let mut any = false;
        while let Some(event) = self.ne.poll_event() {
            any = true;
            match event {
                NeEvent::Init { token } => {
                    self.maps.clear();
                    self.list.own.clear();
                    self.ne.respond(token, &[]);
                }
                NeEvent::Operations { token, operations } => {
                    let mut failed = Vec::new();
                    for (index, operation) in operations.iter().enumerate() {
                        let Some(key) = operation.service() else {
                            self.list.operate(operation);
                            continue;
                        };
                        if self.failing.contains(&key) {
                            failed.push(index);
                            continue;
                        }
                        self.maps.retain(|unit| unit.key() != key);
                        if let Operation::Start(unit) = operation {
                            self.maps.push(*unit);
                        }
                    }
                    self.ne.respond(token, &failed);
                }
                NeEvent::Reset { token } => {
                    self.list.own.clear();
                    self.ne.respond(token, &[]);
                }
                NeEvent::Query { token, filter } => _ = self.ne.list(token, self.list.query(token, filter)),
                NeEvent::ListMore { token, max } => {
                    let entries = self.list.more(token, max);
                    self.ne.list_more(token, &entries);
                }
                NeEvent::Health(answers) => self.ne_health.extend(answers),
                NeEvent::Notice(notice) => panic!("{notice}"),
                NeEvent::Closed(_) => {}
            }
        }
        any
    }

    fn se_events(&mut self) -> bool {
        let mut any = false;
        while let Some(event) = self.se.poll_event() {
            any = true;
            if let SeEvent::HealthQuery { token, queries } = &event {
                self.se.answer_health(*token, &vec![Some(self.health); queries.len()]);
            } else {
                self.se_log.push(event);
            }
        }
        any
    }

    /// Carries bytes, at most what the receiver wants; takes more only when the wire is empty.
    pub(super) fn carry(&mut self) -> bool {
        let mut any = false;
        if self.wire_to_ne.is_empty() {
            self.wire_to_ne.extend(self.se.poll_transmit().into_iter().flatten());
        }
        while (self.ne.wants_input() || !self.to_ne) && !self.wire_to_ne.is_empty() {
            any = true;
            let piece: Vec<u8> = self.wire_to_ne.drain(..self.piece.min(self.wire_to_ne.len())).collect();
            if self.to_ne {
                self.ne.handle_input(self.now, &piece);
            }
        }
        if self.wire_to_se.is_empty() {
            self.wire_to_se.extend(self.ne.poll_transmit().into_iter().flatten());
        }
        while (self.se.wants_input() || !self.to_se) && !self.wire_to_se.is_empty() {
            any = true;
            let piece: Vec<u8> = self.wire_to_se.drain(..self.piece.min(self.wire_to_se.len())).collect();
            if self.to_se {
                self.se.handle_input(self.now, &piece);
            }
        }
        any
    }

    /// Carries bytes and events until all is quiet.
    pub(super) fn settle(&mut self) {
        loop {
            let mut any = self.ne_events() | self.se_events();
            any |= self.carry();
            for due in [self.ne.poll_timeout(), self.se.poll_timeout()] {
                if due.is_some_and(|due| due <= self.now) {
                    self.ne.handle_timeout(self.now);
                    self.se.handle_timeout(self.now);
                    any = true;
                }
            }
            if !any {
                return;
            }
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.settle();
        while let Some(due) = [self.ne.poll_timeout(), self.se.poll_timeout()].into_iter().flatten().min()
            && due <= until
        {
            self.now = self.now.max(due);
            self.ne.handle_timeout(self.now);
            self.se.handle_timeout(self.now);
            self.settle();
        }
        self.now = until;
    }
}

pub(super) fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Join, start, change of type, failed unit, stop, leave; whole or byte by byte.
#[test]
fn a_life() {
    for (piece, secured) in [usize::MAX, 1, 7].into_iter().flat_map(|piece| [(piece, false), (piece, true)]) {
        let mut pair = Pair::with(SessionConfig::default(), secured);
        pair.piece = piece;
        pair.failing = vec![service("tcp/81")];
        let start = pair.se.start(&[offer("tcp/80"), offer("tcp/81"), offer("udp/53")]);
        pair.settle();
        assert_eq!(pair.maps, [offer("tcp/80"), offer("udp/53")]);
        let gre = ServiceUnit::new(Forwarding::Gre, service("tcp/80"));
        let change = pair.se.start(&[gre]);
        let stop = pair.se.stop(&[service("udp/53"), service("tcp/9999")]);
        pair.settle();
        assert_eq!(pair.maps, [gre]);
        let acked =
            |id, failed: &[&str]| SeEvent::Acked { id, failed: failed.iter().map(|text| service(text)).collect() };
        assert_eq!(pair.se_log, [SeEvent::Ready, acked(start, &["tcp/81"]), acked(change, &[]), acked(stop, &[])]);
        assert_eq!(pair.ne.started().collect::<Vec<_>>(), [service("tcp/80")]);
        assert_eq!(pair.se.started().collect::<Vec<_>>(), [service("tcp/80")]);
    }
}

/// §5.5: an hour of keepalives in both directions, health both ways, no false death.
#[test]
fn an_hour_of_health() {
    [false, true].into_iter().for_each(hour);
}

fn hour(secured: bool) {
    let mut pair = Pair::with(SessionConfig::default(), secured);
    pair.se.start(&[offer("tcp/80")]);
    pair.health = 40;
    pair.pass(seconds(7));
    pair.ne.set_health(90);
    assert_eq!(pair.ne_health, [HealthAnswer { service: service("tcp/80"), health: 40 }]);
    pair.health = 0;
    pair.pass(seconds(3600));
    assert!(pair.ne.is_ready() && pair.se.is_ready());
    assert_eq!(pair.ne_health.last().unwrap().health, 0);
    assert_eq!(pair.se_log.last(), Some(&SeEvent::NeHealth(90)));
    for counters in [pair.ne.counters(), pair.se.counters()] {
        assert!((600..=900).contains(&counters.keepalives_sent), "{counters:?}");
        assert_eq!(counters.keepalives_sent, counters.keepalives_answered);
        assert_eq!((counters.unexpected_answers, counters.malformed, counters.discarded_health), (0, 0, 0));
        assert_eq!(counters.rejected, Rejections::default());
    }
}

/// §5.5: 5 s ± up to 1 s, and the random part is really there; never more than a fifth of the interval.
#[test]
fn keepalives_are_jittered() {
    for (keepalive, jitter, shortest, longest) in
        [(5_000, 1_000, 4_000, 6_000), (5_000, 0, 5_000, 5_000), (300, 1_000, 240, 360), (0, 1_000, 0, 2)]
    {
        let config = SessionConfig {
            keepalive: Duration::from_millis(keepalive),
            jitter: Duration::from_millis(jitter),
            ..SessionConfig::default()
        };
        let mut ne = Ne::ready_with(config);
        let mut gaps = Vec::new();
        for _ in 0..200 {
            let due = ne.session.poll_timeout().unwrap();
            gaps.push(due - ne.now);
            ne.pass(due - ne.now);
            let (header, _) = messages(&ne.output()).pop().unwrap();
            ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, &[]));
        }
        let (low, high) = (*gaps.iter().min().unwrap(), *gaps.iter().max().unwrap());
        assert!(low >= Duration::from_millis(shortest) && high <= Duration::from_millis(longest), "{low:?} {high:?}");
        let spread = Duration::from_millis(longest - shortest).min(2 * Duration::from_millis(jitter));
        assert!(high - low >= spread * 8 / 10 || keepalive == 0, "{low:?} {high:?}");
    }
}

/// §5.5: a KEEPALIVE that chance might have sent by now goes along with an answer, in one piece; not a moment earlier, not
/// twice, and not to a peer that owes an answer.
#[test]
fn a_keepalive_goes_along_with_an_answer() {
    let keepalive = message(Opcode::KEEPALIVE, Flags::NONE, 9, &[]);
    let opcodes = |bytes: Option<Vec<u8>>| -> Vec<_> {
        messages(&bytes.unwrap_or_default()).iter().map(|(header, _)| header.opcode).collect()
    };
    let both = [Opcode::KEEPALIVE_ACK, Opcode::KEEPALIVE];
    let (mut ne, mut se) = (Ne::ready(), Se::ready());
    let due = [ne.session.poll_timeout().unwrap() - ne.now, se.session.poll_timeout().unwrap() - se.now];
    assert!(due.iter().all(|due| *due > seconds(4)), "chance wants them later than at first: {due:?}");

    ne.pass(Duration::from_millis(3_999));
    se.pass(Duration::from_millis(3_999));
    ne.input(&keepalive);
    se.input(&keepalive);
    assert_eq!(opcodes(ne.session.poll_transmit()), both[..1]);
    assert_eq!(opcodes(se.session.poll_transmit()), both[..1]);

    ne.pass(Duration::from_millis(1));
    se.pass(Duration::from_millis(1));
    ne.input(&keepalive);
    se.input(&keepalive);
    assert_eq!(opcodes(ne.session.poll_transmit()), both);
    assert_eq!(opcodes(se.session.poll_transmit()), both);

    let next = ne.session.poll_timeout().unwrap() - ne.now;
    assert!((seconds(4)..=seconds(6)).contains(&next), "{next:?}");
    ne.input(&keepalive);
    assert_eq!(opcodes(ne.session.poll_transmit()), both[..1], "once is enough");
    ne.pass(next - Duration::from_millis(1));
    ne.input(&keepalive);
    assert_eq!(opcodes(ne.session.poll_transmit()), both[..1], "one is unanswered");
}

/// §5.5, half-open: whichever direction is cut, and both, each side finds the other dead within four intervals.
#[test]
fn half_open_peers_are_found() {
    for (to_ne, to_se) in [(false, true), (true, false), (false, false)] {
        let mut pair = Pair::new(SessionConfig::default());
        pair.se.start(&[offer("tcp/80")]);
        pair.pass(seconds(60));
        (pair.to_ne, pair.to_se) = (to_ne, to_se);
        pair.pass(seconds(11));
        assert!(pair.ne.closed().is_none() && pair.se.closed().is_none());
        pair.pass(seconds(14));
        assert_eq!(pair.ne.closed(), Some(&CloseReason::DeadPeer(3)));
        assert_eq!(pair.se.closed(), Some(&CloseReason::DeadPeer(3)));
    }
}

/// §5.5: a silence of two keepalives is no death.
#[test]
fn two_missed_keepalives_are_forgiven() {
    let mut pair = Pair::new(SessionConfig { jitter: Duration::ZERO, ..SessionConfig::default() });
    for _ in 0..10 {
        pair.pass(seconds(10));
        pair.to_se = false;
        pair.pass(seconds(10));
        pair.to_se = true;
    }
    assert!(pair.ne.is_ready() && pair.se.is_ready());
}

/// Fast failover: a sub-second interval finds a dead peer in about a second.
#[test]
fn sub_second_keepalives() {
    let config = SessionConfig { keepalive: Duration::from_millis(250), ..SessionConfig::default() };
    let mut pair = Pair::new(config);
    pair.pass(seconds(10));
    assert!(pair.ne.is_ready());
    pair.to_ne = false;
    pair.pass(Duration::from_millis(1_200));
    assert_eq!(pair.ne.closed(), Some(&CloseReason::DeadPeer(3)));
}

/// §5.4: INITs that got lost in a full queue and come late are one session, or one that starts over.
#[test]
fn a_slow_ne_is_met_with_repeated_inits() {
    [false, true].into_iter().for_each(repeated_inits);
}

fn repeated_inits(secured: bool) {
    let mut pair = Pair::with(SessionConfig::default(), secured);
    pair.se.start(&[offer("tcp/80")]);
    let mut inits = Vec::new();
    for _ in 0..4 {
        while let Some(bytes) = pair.se.poll_transmit() {
            inits.push(bytes);
        }
        pair.now += seconds(1);
        pair.se.handle_timeout(pair.now);
    }
    assert!(inits.len() >= 2);
    for bytes in inits {
        pair.ne.handle_input(pair.now, &bytes);
        pair.settle();
    }
    pair.pass(seconds(60));
    assert!(pair.ne.is_ready() && pair.se.is_ready());
    assert_eq!(pair.ne.started().count(), pair.maps.len());
}

/// A START of 6,000 units goes through, byte counts and all, and is answered once.
#[test]
fn a_large_start() {
    let mut pair = Pair::new(SessionConfig { max_services: 6_000, ..SessionConfig::default() });
    pair.piece = 1448;
    let offers: Vec<ServiceUnit> = (1..=6_000).map(|port| offer(&format!("tcp/{port}"))).collect();
    let id = pair.se.start(&offers);
    pair.pass(seconds(1));
    assert_eq!(pair.maps.len(), 6_000);
    assert_eq!(pair.se_log, [SeEvent::Ready, SeEvent::Acked { id, failed: Vec::new() }]);
}
