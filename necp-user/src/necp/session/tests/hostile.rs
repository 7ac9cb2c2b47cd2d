//! Random peers: no panic, framed answers, bounded memory, whatever comes.

use proptest::prelude::*;

use super::*;

/// What a random peer, its clock and the caller do.
#[derive(Debug, Clone)]
enum Step {
    Bytes(Vec<u8>),
    Message {
        header: Header,
        units: Vec<Unit>,
        cut: usize,
    },
    /// The answer to the request that was sent last.
    Answer {
        flags: u16,
        units: Vec<Unit>,
    },
    Time(u64),
    /// The caller takes its events and responds, to some with failures.
    Respond(bool),
    /// The peer reads.
    Read,
    Start(u16),
    Stop(u16),
}

/// Words that mean something, picked by the digits of one number, so that a unit is small to hold and to shrink.
fn unit() -> impl Strategy<Value = Unit> {
    const WORDS: [u32; 16] = [0, 1, 1, 1, 2, 3, 6, 6, 6, 17, 80, 81, 100, 101, 0x0001_0000, u32::MAX];
    any::<u32>().prop_map(|digits| Unit(std::array::from_fn(|index| WORDS[(digits >> (4 * index) & 15) as usize])))
}

fn units() -> BoxedStrategy<Vec<Unit>> {
    let many = (unit(), unit(), 0usize..1_000).prop_map(|(a, b, count)| [a, b].repeat(count));
    prop_oneof![9 => prop::collection::vec(unit(), 0..6), 1 => many].boxed()
}

fn step() -> BoxedStrategy<Step> {
    let opcode = prop_oneof![4 => 0u8..9, 2 => 0x20u8..0x28, 1 => any::<u8>()];
    let flags = prop_oneof![6 => Just(1u16), 1 => any::<u16>()];
    let version = prop_oneof![9 => Just(1u8), 1 => any::<u8>()];
    let length = prop_oneof![8 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0u32..70).prop_map(Some)];
    let cut = prop_oneof![4 => Just(usize::MAX), 1 => 1usize..40];
    let message = (flags, version, opcode, any::<u16>(), length, units(), cut).prop_map(
        |(flags, version, opcode, request_id, length, units, cut)| {
            let payload_len = length.unwrap_or(units.len() as u32 * 32);
            let header =
                Header { flags: Flags(flags), version, opcode: Opcode(opcode), request_id, seq_num: 0, payload_len };
            Step::Message { header, units, cut }
        },
    );
    let message = message.boxed();
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..60).prop_map(Step::Bytes),
        20 => message,
        4 => (any::<u16>(), units()).prop_map(|(flags, units)| Step::Answer { flags, units }),
        3 => (0u64..8_000).prop_map(Step::Time),
        8 => any::<bool>().prop_map(Step::Respond),
        8 => Just(Step::Read),
        1 => (0u16..5).prop_map(Step::Start),
        1 => (0u16..5).prop_map(Step::Stop),
    ]
    .boxed()
}

fn exception(port: u16, ttl: u32) -> Exception {
    Exception { scope: Scope::Local, ttl, flows: Flows { protocol: 6, port, ..Flows::ALL } }
}

fn entry() -> Listed {
    Listed { scope: Scope::Local, installer: [10, 0, 0, 11].into(), flows: exception(80, 0).flows }
}

/// One role of the two, as the steps see it.
trait Role {
    fn input(&mut self, now: Instant, bytes: &[u8]);
    fn timeout(&mut self, now: Instant);
    fn read(&mut self) -> Option<Vec<u8>>;
    fn respond(&mut self, fail: bool);
    fn request(&mut self, start: bool, port: u16);
    fn closed(&self) -> bool;
    fn held(&self) -> usize;
    fn due(&self) -> Option<Instant>;
}

impl Role for NeSession {
    fn input(&mut self, now: Instant, bytes: &[u8]) {
        self.handle_input(now, bytes);
    }
    fn timeout(&mut self, now: Instant) {
        self.handle_timeout(now);
    }
    fn read(&mut self) -> Option<Vec<u8>> {
        self.poll_transmit()
    }
    fn respond(&mut self, fail: bool) {
        while let Some(event) = self.poll_event() {
            match event {
                NeEvent::Init { token } => NeSession::respond(self, token, &[]),
                NeEvent::Operations { token, operations } => {
                    assert!(!operations.is_empty() && operations.len() <= MAX_BATCH);
                    NeSession::respond(self, token, if fail { &[0, 2] } else { &[] });
                }
                NeEvent::Reset { token } => NeSession::respond(self, token, if fail { &[0] } else { &[] }),
                NeEvent::Query { token, .. } => _ = self.list(token, 3_000),
                NeEvent::ListMore { token, max } => {
                    assert!((1..=MAX_BATCH).contains(&max));
                    self.list_more(token, &vec![entry(); if fail { max.div_ceil(2) } else { max }]);
                }
                NeEvent::Health(answers) => assert!(answers.iter().all(|answer| answer.health <= 100)),
                NeEvent::Notice(_) | NeEvent::Closed(_) => {}
            }
        }
    }
    fn request(&mut self, _: bool, port: u16) {
        self.set_health(port as u8);
    }
    fn closed(&self) -> bool {
        NeSession::closed(self).is_some()
    }
    fn held(&self) -> usize {
        self.held_bytes()
    }
    fn due(&self) -> Option<Instant> {
        self.poll_timeout()
    }
}

impl Role for SeSession {
    fn input(&mut self, now: Instant, bytes: &[u8]) {
        self.handle_input(now, bytes);
    }
    fn timeout(&mut self, now: Instant) {
        self.handle_timeout(now);
    }
    fn read(&mut self) -> Option<Vec<u8>> {
        self.poll_transmit()
    }
    fn respond(&mut self, fail: bool) {
        while let Some(event) = self.poll_event() {
            match event {
                SeEvent::HealthQuery { token, queries } => {
                    self.answer_health(token, &vec![(!fail).then_some(50); queries.len()]);
                }
                SeEvent::NeHealth(health) => assert!(health <= 100),
                SeEvent::Listed { entries, .. } => assert!(entries.len() <= MAX_BATCH),
                SeEvent::Ready
                | SeEvent::Acked { .. }
                | SeEvent::Excepted { .. }
                | SeEvent::Reset { .. }
                | SeEvent::ListFailed { .. }
                | SeEvent::Notice(_)
                | SeEvent::Closed(_) => {}
            }
        }
    }
    fn request(&mut self, start: bool, port: u16) {
        match (start, port) {
            (true, 3) => _ = self.except_add(&[exception(80, 1), exception(81, 0)]),
            (false, 3) => _ = self.except_del(&[exception(80, 0).flows]),
            (true, 4) => _ = self.except_query(Filter::default()),
            (false, 4) => _ = self.except_reset(),
            (true, _) => _ = self.start(&[ServiceUnit { forwarding: Forwarding::L2, protocol: 6, port }]),
            (false, _) => _ = self.stop(&[ServiceKey::new(6, port)]),
        }
    }
    fn closed(&self) -> bool {
        SeSession::closed(self).is_some()
    }
    fn held(&self) -> usize {
        self.held_bytes()
    }
    fn due(&self) -> Option<Instant> {
        self.poll_timeout()
    }
}

/// What a session may hold: the units of one answer (2 MiB), as they are and encoded, with room for growth, and the
/// input that its caller forced upon it.
const BOUND: usize = 12 * 1024 * 1024;

fn drive(role: &mut impl Role, mut now: Instant, steps: Vec<Step>) {
    let mut last_request = None;
    let mut decoder = Decoder::default();
    let mut last_sent = None;
    for step in steps {
        let was_closed = role.closed();
        match step {
            Step::Bytes(bytes) => role.input(now, &bytes),
            Step::Message { header, units, cut } => {
                let mut bytes = header.encode().to_vec();
                units.iter().for_each(|unit| bytes.extend(unit.encode()));
                bytes.chunks(cut.min(bytes.len())).for_each(|piece| role.input(now, piece));
            }
            Step::Answer { flags, units } => {
                if let Some((opcode, id)) = last_request {
                    role.input(now, &message(opcode, Flags(flags & !Flags::BASIC_PAYLOAD.0), id, &units));
                }
            }
            Step::Time(millis) => {
                now += Duration::from_millis(millis);
                role.timeout(now);
                let due = role.due();
                assert!(due.is_none_or(|due| due >= now - Duration::from_millis(millis)));
            }
            Step::Respond(fail) => {
                role.respond(fail);
                role.timeout(now);
            }
            Step::Read => {
                for (header, _) in read_messages(&mut decoder, &read(role)) {
                    last_sent = Some(header.opcode);
                    last_request = header.opcode.answer().map(|answer| (answer, header.request_id)).or(last_request);
                }
            }
            Step::Start(port) => role.request(true, port),
            Step::Stop(port) => role.request(false, port),
        }
        assert!(role.held() < BOUND, "{} bytes held", role.held());
        assert!(role.closed() || !was_closed, "closed is for ever");
    }
    for (header, _) in read_messages(&mut decoder, &read(role)) {
        last_sent = Some(header.opcode);
    }
    // A list is cut where the session ends, or waits for its caller.
    assert!(!decoder.in_message() || last_sent == Some(Opcode::EXCEPTION_RESP));
}

/// All that the peer gets to read, until the caller is needed; what waits inside goes on meanwhile.
fn read(role: &mut impl Role) -> Vec<u8> {
    std::iter::from_fn(|| role.read()).flatten().collect()
}

// As many cases as half of PROPTEST_CASES (256).
proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 2, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_random_peer_of_the_ne(steps in prop::collection::vec(step(), 0..60), init_first in prop::bool::weighted(0.9)) {
        let now = Instant::now();
        let mut ne = NeSession::new(SessionConfig::default(), now, 3);
        if init_first {
            ne.handle_input(now, &init(1));
            Role::respond(&mut ne, false);
        }
        drive(&mut ne, now, steps);
    }

    #[test]
    fn a_random_peer_of_the_se(steps in prop::collection::vec(step(), 0..60), init_first in prop::bool::weighted(0.9)) {
        let now = Instant::now();
        let mut se = SeSession::new(SessionConfig::default(), now, 3);
        if init_first {
            let id = messages(&se.poll_transmit().unwrap())[0].0.request_id;
            se.handle_input(now, &message(Opcode::INIT_ACK, Flags::NONE, id, &[Unit::default()]));
        }
        drive(&mut se, now, steps);
    }

    /// Pure noise ends in a closed session as soon as two bytes are wrong, or in one that waits for more.
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 2..4_000)) {
        let mut ne = Ne::new();
        ne.input(&bytes);
        if bytes[..2] == [0x41, 0x4a] {
            messages(&ne.output());
        } else {
            let identifier = u16::from_be_bytes([bytes[0], bytes[1]]);
            prop_assert_eq!(ne.closed(), Some(CloseReason::Framing { identifier }));
            prop_assert_eq!(ne.output(), [0; 0]);
        }
    }
}

/// The worst that a peer can make an NE hold: as many failed units as are repeated, and a caller that is slow.
#[test]
fn the_worst_case_is_bounded() {
    let mut ne = Ne::ready();
    let mut units = vec![Unit([9; 8]); 60_000];
    units.push(offer("tcp/80").unit());
    let mut worst = 0;
    for _ in 0..8 {
        let bytes = message(Opcode::START, Flags::NONE, 2, &units);
        for piece in bytes.chunks(64 * 1024) {
            if ne.session.wants_input() {
                ne.input(piece);
            }
            worst = worst.max(ne.session.held_bytes());
        }
    }
    assert!((2 << 20..BOUND).contains(&worst), "{worst}");
}

/// §5.2.3: 4 GiB less a unit, announced and sent in part, holds nothing and executes what came.
#[test]
fn hostile_lengths() {
    let mut ne = Ne::ready();
    let header = Header { payload_len: u32::MAX - 31, ..Header::new(Opcode::STOP, Flags::NONE, 2, 1) };
    ne.input(&header.encode());
    let unit = Operation::stop_unit(service("tcp/80")).encode();
    let mut done = 0;
    for _ in 0..64 {
        ne.input(&unit.repeat(2_000));
        done += ne.respond_all(&[]).len();
    }
    assert_eq!((done, ne.closed(), ne.output()), (128_000, None, Vec::new()));
    assert!(ne.session.held_bytes() < 256 * 1024);

    // No multiple of 32: answered at once, skipped to its end, which does not come.
    let mut ne = Ne::ready();
    let header = Header { payload_len: u32::MAX, ..Header::new(Opcode::START, Flags::NONE, 2, 1) };
    ne.input(&header.encode());
    assert_eq!(ne.output(), message(Opcode::START_ACK, Flags::ERROR, 2, &[]));
    ne.input(&vec![0; 1 << 20]);
    assert!(ne.session.held_bytes() < 64 * 1024);
    ne.pass(Duration::from_secs(10));
    assert_eq!(ne.closed(), Some(CloseReason::ProgressDeadline(Duration::from_secs(10))));
}
