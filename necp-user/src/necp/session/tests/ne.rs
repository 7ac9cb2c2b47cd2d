//! The NE, byte for byte, and its rules one by one.

use super::*;

const INIT: &str = "414a 0001 01 01 0102 0000000000000000 00000020
    00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000";
const INIT_ACK: &str = "414a 0001 01 02 0102 0000000000000000 00000020
    00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000";

/// Feeds one request to an NE that is ready, carries out what it asks, and gives back what it answers.
fn answer(request: &str) -> Vec<u8> {
    let mut ne = Ne::ready();
    ne.input(&hex(request));
    ne.respond_all(&[service("tcp/81")]);
    assert_eq!(ne.closed(), None);
    ne.output()
}

/// §5.4.1, §5.4.2: INIT_ACK only when the caller says that the state is gone.
#[test]
fn init_is_acknowledged_when_the_caller_says_so() {
    let mut ne = Ne::new();
    ne.input(&hex(INIT));
    let events = ne.events();
    let [NeEvent::Init { token }] = events[..] else { panic!("{events:?}") };
    assert_eq!(ne.output(), [0; 0]);
    ne.session.respond(token, &[]);
    assert_eq!(ne.output(), hex(INIT_ACK));
    assert!(ne.session.is_ready());
}

/// §5.5.1, §5.5.2, §5.6, §5.7, §5.2: requests and their answers, written out by hand.
#[test]
fn requests_and_answers() {
    let table = [
        (
            "KEEPALIVE without queries (§5.5.2: no unit if none was asked)",
            "414a 0000 01 03 0007 0000000000000000 00000000",
            "414a 0000 01 04 0007 0000000000000000 00000000",
        ),
        (
            "KEEPALIVE that asks for the Health Index, data0 to data2 repeated, data3 the answer",
            "414a 0001 01 03 0008 0000000000000000 00000020
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 0001 01 04 0008 0000000000000000 00000020
             00000001 00000006 00000050 00000064 00000000 00000000 00000000 00000000",
        ),
        (
            "KEEPALIVE with an unsupported query among others: F_Error, exactly that one",
            "414a 0001 01 03 0009 0000000000000000 00000040
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000
             00000002 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 0005 01 04 0009 0000000000000000 00000020
             00000002 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
        ),
        (
            "START of tcp/80, layer 2: no payload, no F_Error (§5.6.2)",
            "414a 0001 01 05 beef 0000000000000000 00000020
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 0000 01 06 beef 0000000000000000 00000000",
        ),
        (
            "START of tcp/80, of tcp/81 that the caller fails, of type 9 and of tcp/0: exactly the failed units",
            "414a 0001 01 05 0001 0000000000000000 00000080
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000
             00000002 00000006 00000051 00000000 00000000 00000000 00000000 000000aa
             00000009 00000006 00000052 00000000 00000000 00000000 00000000 00000000
             00000001 00000006 00000000 00000000 00000000 00000000 00000000 00000000",
            "414a 0005 01 06 0001 0000000000000000 00000060
             00000002 00000006 00000051 00000000 00000000 00000000 00000000 000000aa
             00000009 00000006 00000052 00000000 00000000 00000000 00000000 00000000
             00000001 00000006 00000000 00000000 00000000 00000000 00000000 00000000",
        ),
        (
            "STOP, data0 not read (§5.6.3)",
            "414a 0001 01 07 0002 0000000000000000 00000020
             ffffffff 00000011 00000035 00000000 00000000 00000000 00000000 00000000",
            "414a 0000 01 08 0002 0000000000000000 00000000",
        ),
        ("NOOP: nothing (§5.3)", "414a 0000 01 00 0002 0000000000000000 00000000", ""),
        ("NOOP with a payload: skipped", "414a 0000 01 00 0002 0000000000000000 00000003 414a00", ""),
        (
            "START without a unit: F_Error (§5.2.3)",
            "414a 0000 01 05 0003 0000000000000000 00000000",
            "414a 0004 01 06 0003 0000000000000000 00000000",
        ),
        (
            "STOP whose length is no multiple of 32: F_Error, no units, framing kept",
            "414a 0001 01 07 0003 0000000000000000 00000005 0000000000
             414a 0000 01 03 0004 0000000000000000 00000000",
            "414a 0004 01 08 0003 0000000000000000 00000000
             414a 0000 01 04 0004 0000000000000000 00000000",
        ),
        (
            "START without F_Basic_Payload: no extension is negotiated",
            "414a 0000 01 05 0003 0000000000000000 00000020
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 0004 01 06 0003 0000000000000000 00000000",
        ),
        (
            "undefined flags and a seq_num are ignored on an unauthenticated connection (§5.9)",
            "414a ffc1 01 05 0003 ffffffffffffffff 00000020
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 0000 01 06 0003 0000000000000000 00000000",
        ),
        (
            "version 255: F_Error and F_Protocol_Version_Mismatch, version 1, no payload (§5.2.1)",
            "414a 0001 ff 05 0003 0000000000000000 00000020
             00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000",
            "414a 000c 01 06 0003 0000000000000000 00000000",
        ),
        (
            "version 0 and no answering opcode: the opcode itself",
            "414a 0000 00 00 0003 0000000000000000 00000000",
            "414a 000c 01 00 0003 0000000000000000 00000000",
        ),
        ("a version-mismatch answer is never answered", "414a 000c 02 04 0003 0000000000000000 00000000", ""),
    ];
    for (what, request, expected) in table {
        assert_eq!(answer(request), hex(expected), "{what}");
    }
}

/// §5.4.2, §5.8: without a key an authenticated INIT fails as a wrong credential does: bare, then closed.
#[test]
fn an_authenticated_init_is_refused_bare() {
    let asks = "414a 0001 01 01 0102 0000000000000000 00000020
        00000001 00000001 00000000 00000000 00000000 00000000 00000000 00000000";
    let signed = "414a 0003 01 01 0102 0000000000000000 00000034
        00000001 00000001 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000";
    for request in [asks, signed] {
        let mut ne = Ne::new();
        ne.input(&hex(request));
        assert_eq!(ne.output(), hex("414a 0014 01 02 0102 0000000000000000 00000000"));
        assert_eq!(ne.events(), [NeEvent::Closed(CloseReason::NoKey)]);
    }
}

/// §5.4: any other message before INIT is a failed request, if it has an answer, and the connection is closed.
#[test]
fn nothing_may_precede_init() {
    for code in 0..=255u8 {
        let opcode = Opcode(code);
        if opcode == Opcode::INIT {
            continue;
        }
        let mut ne = Ne::new();
        ne.input(&message(opcode, Flags::NONE, 9, &[Unit([1, 6, 80, 0, 0, 0, 0, 0])]));
        let expected = opcode.answer().map(|answer| message(answer, Flags::ERROR, 9, &[])).unwrap_or_default();
        assert_eq!(ne.output(), expected, "{opcode}");
        assert_eq!(ne.events(), [NeEvent::Closed(CloseReason::OutOfOrder(opcode))]);
    }
}

/// §5.2.1: the connection stays open after a version mismatch, even when it was INIT.
#[test]
fn an_init_of_another_version_may_be_followed_by_one_of_ours() {
    let mut ne = Ne::new();
    let mut other = hex(INIT);
    other[4] = 2;
    ne.input(&other);
    assert_eq!(ne.output(), hex("414a 000c 01 02 0102 0000000000000000 00000000"));
    assert_eq!(ne.events(), [NeEvent::Notice(Notice::VersionMismatch { version: 2 })]);
    ne.input(&hex(INIT));
    ne.respond_all(&[]);
    assert_eq!(ne.output(), hex(INIT_ACK));
}

/// §5.4: before INIT_ACK was sent a repeated INIT gets that same INIT_ACK.
#[test]
fn init_repeated_before_its_answer_is_one_init() {
    let mut ne = Ne::new();
    ne.input(&[hex(INIT), hex(INIT), hex(INIT)].concat());
    let events = ne.events();
    let [NeEvent::Init { token }] = events[..] else { panic!("{events:?}") };
    ne.session.respond(token, &[]);
    assert_eq!(ne.output(), hex(INIT_ACK));
}

/// §5.4: a later INIT starts over in place: tokens from before are void, nothing is started.
#[test]
fn init_repeated_later_starts_over() {
    let mut ne = Ne::ready();
    ne.input(&message(Opcode::START, Flags::NONE, 2, &[offer("tcp/80").unit()]));
    ne.respond_all(&[]);
    ne.input(&message(Opcode::START, Flags::NONE, 3, &[offer("tcp/90").unit()]));
    assert_eq!(ne.session.started().collect::<Vec<_>>(), [service("tcp/80")]);
    let stale = ne.events();
    let [NeEvent::Operations { token: stale, .. }] = stale[..] else { panic!("{stale:?}") };
    ne.output();
    ne.input(&hex(INIT));
    ne.session.respond(stale, &[]);
    assert_eq!(ne.output(), [0; 0], "no ACK for what the INIT has undone");
    assert_eq!(ne.session.started().count(), 0);
    ne.respond_all(&[]);
    assert_eq!(ne.output(), hex(INIT_ACK));
    ne.session.respond(stale, &[]);
    assert_eq!((ne.output(), ne.session.started().count()), (Vec::new(), 0));
}

/// §5.4: what a hasty SE sends before INIT_ACK is answered after it.
#[test]
fn a_hasty_se_is_answered_after_init_ack() {
    let mut ne = Ne::new();
    let keepalive = message(Opcode::KEEPALIVE, Flags::NONE, 5, &[]);
    ne.input(&[hex(INIT), keepalive].concat());
    assert!(!ne.session.wants_input());
    assert_eq!(ne.output(), [0; 0]);
    ne.respond_all(&[]);
    assert!(ne.session.wants_input());
    assert_eq!(ne.output(), [hex(INIT_ACK), message(Opcode::KEEPALIVE_ACK, Flags::NONE, 5, &[])].concat());
}

/// §3, §5.6.2: one ACK, and only when every batch of the message was answered; the order of the answers is free.
#[test]
fn a_long_start_is_acknowledged_once_after_all_its_batches() {
    let mut ne = Ne::ready_with(SessionConfig { max_services: 10_000, ..SessionConfig::default() });
    let units: Vec<Unit> = (1..=2_500).map(|port| offer(&format!("tcp/{port}")).unit()).collect();
    ne.input(&message(Opcode::START, Flags::NONE, 2, &units));
    let events = ne.events();
    let mut tokens = Vec::new();
    for event in &events {
        let NeEvent::Operations { token, operations } = event else { panic!("{event:?}") };
        tokens.push((*token, operations.len()));
    }
    assert_eq!(tokens.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [1024, 1024, 452]);
    for (token, _) in tokens.iter().rev() {
        assert_eq!(ne.output(), [0; 0]);
        let failed: &[usize] = if *token == tokens[1].0 { &[3, 0, 3, 9999] } else { &[] };
        ne.session.respond(*token, failed);
    }
    assert_eq!(ne.output(), message(Opcode::START_ACK, Flags::ERROR, 2, &[units[1024], units[1027]]));
    ne.session.respond(tokens[0].0, &[]);
    assert_eq!(ne.output(), [0; 0], "a token is answered once");
    assert_eq!(ne.session.started().count(), 2_498);
}

/// §5.2.3: 65,536 failed units are repeated, no more.
#[test]
fn too_many_failed_units_end_the_session() {
    for opcode in [Opcode::START, Opcode::EXCEPTION_ADD] {
        let bad = Unit([9, 0, 0, 0, 0, 0, 0, 0]);
        let mut ne = Ne::ready();
        ne.input(&message(opcode, Flags::NONE, 2, &vec![bad; 65_536]));
        assert_eq!(ne.closed(), None);
        assert_eq!(ne.output(), message(opcode.answer().unwrap(), Flags::ERROR, 2, &vec![bad; 65_536]));
        ne.input(&message(opcode, Flags::NONE, 3, &vec![bad; 65_537]));
        assert_eq!(ne.closed(), Some(CloseReason::TooManyUnits(65_536)));
        assert_eq!(ne.output(), message(opcode.answer().unwrap(), Flags::ERROR, 3, &vec![bad; 65_536]));
    }
}

/// A limit of services per SE: over it the failed-unit answer, and nothing lost.
#[test]
fn services_beyond_the_limit_fail() {
    let mut ne = Ne::ready_with(SessionConfig { max_services: 2, ..SessionConfig::default() });
    let [a, b, c] = ["tcp/1", "tcp/2", "tcp/3"].map(|text| offer(text).unit());
    ne.input(&message(Opcode::START, Flags::NONE, 2, &[a, b, c, a]));
    assert_eq!(ne.respond_all(&[]).len(), 3);
    assert_eq!(ne.output(), message(Opcode::START_ACK, Flags::ERROR, 2, &[c]));
    ne.input(&message(Opcode::STOP, Flags::NONE, 3, &[a]));
    ne.respond_all(&[]);
    ne.input(&message(Opcode::START, Flags::NONE, 4, &[c]));
    ne.respond_all(&[]);
    assert_eq!(ne.session.started().collect::<Vec<_>>(), [service("tcp/2"), service("tcp/3")]);
}

/// The KEEPALIVE that an NE sends next, as (request id, queries).
fn next_keepalive(ne: &mut Ne) -> (u16, Vec<Unit>) {
    let (header, units) = messages(&ne.output()).pop().expect("a KEEPALIVE");
    assert_eq!(header.opcode, Opcode::KEEPALIVE);
    (header.request_id, units)
}

fn started(services: &[&str]) -> Ne {
    let mut ne = Ne::ready();
    let units: Vec<Unit> = services.iter().map(|text| offer(text).unit()).collect();
    ne.input(&message(Opcode::START, Flags::NONE, 2, &units));
    ne.respond_all(&[]);
    ne.output();
    ne
}

/// §5.5: the NE asks for the health of what is started; answers above 100 or to other questions are discarded.
#[test]
fn health_is_asked_and_checked() {
    let mut ne = started(&["tcp/80", "udp/53", "47"]);
    ne.pass(Duration::from_secs(6));
    let (id, queries) = next_keepalive(&mut ne);
    assert_eq!(
        queries.iter().map(|unit| unit.0[..3].to_vec()).collect::<Vec<_>>(),
        [[1, 6, 80], [1, 17, 53], [1, 47, 0]]
    );
    let answers = [[1, 6, 80, 40], [1, 17, 53, 101], [1, 47, 0, 0], [1, 6, 80, 41], [1, 6, 443, 50]];
    let units = answers.map(|[a, b, c, d]| Unit([a, b, c, d, 0, 0, 0, 0]));
    ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, id, &units));
    let expected = [("tcp/80", 40), ("47", 0)];
    let expected = expected.map(|(text, health)| HealthAnswer { service: service(text), health });
    assert_eq!(ne.events(), [NeEvent::Health(expected.to_vec()), NeEvent::Notice(Notice::BadHealth)]);
    assert_eq!(ne.session.counters().discarded_health, 3);
    ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, id, &units));
    assert_eq!(ne.events(), [NeEvent::Notice(Notice::Unexpected(Opcode::KEEPALIVE_ACK))]);
    assert_eq!(ne.session.counters().unexpected_answers, 1);
}

/// §5.5.2: an unsupported query is not asked again, the others are at once.
#[test]
fn unsupported_queries_are_forgotten_and_the_others_asked_at_once() {
    let mut ne = started(&["tcp/80", "tcp/81"]);
    ne.pass(Duration::from_secs(6));
    let (id, queries) = next_keepalive(&mut ne);
    ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::ERROR, id, &queries[..1]));
    let (id, again) = next_keepalive(&mut ne);
    assert_eq!(again, queries[1..]);
    ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, id, &[Unit([1, 6, 81, 5, 0, 0, 0, 0])]));
    assert_eq!(ne.events(), [NeEvent::Health(vec![HealthAnswer { service: service("tcp/81"), health: 5 }])]);
    ne.pass(Duration::from_secs(6));
    let (id, again) = next_keepalive(&mut ne);
    assert_eq!(again, queries[1..]);
    ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::ERROR, id, &again));
    assert_eq!(ne.output(), [0; 0], "nothing is left to ask");
    ne.input(&message(Opcode::STOP, Flags::NONE, 4, &[Operation::stop_unit(service("tcp/80"))]));
    ne.input(&message(Opcode::START, Flags::NONE, 5, &[offer("tcp/80").unit()]));
    ne.respond_all(&[]);
    ne.output();
    ne.pass(Duration::from_secs(6));
    assert_eq!(next_keepalive(&mut ne).1, queries[..1], "a service begun anew is asked about anew");
}

/// More services than go into one KEEPALIVE take turns.
#[test]
fn many_services_are_asked_in_turn() {
    let mut ne = Ne::ready_with(SessionConfig { max_services: 10_000, ..SessionConfig::default() });
    let units: Vec<Unit> = (1..=1_500).map(|port| offer(&format!("tcp/{port}")).unit()).collect();
    ne.input(&message(Opcode::START, Flags::NONE, 2, &units));
    ne.respond_all(&[]);
    ne.output();
    let mut asked = std::collections::BTreeMap::<u32, usize>::new();
    for _ in 0..3 {
        ne.pass(Duration::from_secs(5));
        for (header, queries) in messages(&ne.output()) {
            assert!(queries.len() <= 1024);
            queries.iter().for_each(|query| *asked.entry(query.0[2]).or_default() += 1);
            ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, &[]));
        }
    }
    assert_eq!(asked.len(), 1_500);
    assert!(asked.values().all(|count| (1..=3).contains(count)));
}

/// §5.3: reserved and foreign opcodes are skipped, counted, told once, and the connection stays.
#[test]
fn reserved_and_foreign_opcodes_are_skipped() {
    let mut ne = Ne::ready();
    let unit = Unit([0x414a_0000; 8]);
    for code in (0x09..=0x1f).chain(0x28..=0xff).chain([0x02, 0x06, 0x08, 0x21, 0x23, 0x25, 0x27]) {
        ne.input(&message(Opcode(code), Flags::NONE, 1, &[unit]));
    }
    let told = [Notice::ReservedOpcode(Opcode(9)), Notice::WrongDirection(Opcode::INIT_ACK)];
    assert_eq!(ne.events(), told.map(NeEvent::Notice));
    assert_eq!((ne.session.counters().reserved_opcodes, ne.session.counters().wrong_direction), (23 + 216, 7));
    assert_eq!(ne.output(), [0; 0]);
    assert!(ne.session.is_ready());
}

/// §5.2.2, §6.4: framing lost, connection closed.
#[test]
fn garbage_ends_the_session() {
    for (mut ne, ready) in [(Ne::new(), false), (Ne::ready(), true)] {
        ne.input(b"GET / HTTP/1.1\r\n");
        assert_eq!(ne.closed(), Some(CloseReason::Framing { identifier: 0x4745 }), "ready: {ready}");
        assert_eq!(ne.session.counters().framing_errors, 1);
        assert_eq!((ne.output(), ne.session.poll_timeout()), (Vec::new(), None));
    }
}

/// A deadline for INIT, and one for completing a message.
#[test]
fn deadlines() {
    let config = SessionConfig::default();
    let mut ne = Ne::new();
    ne.pass(config.init_deadline - Duration::from_millis(1));
    assert_eq!(ne.closed(), None);
    ne.pass(Duration::from_millis(1));
    assert_eq!(ne.closed(), Some(CloseReason::InitDeadline(config.init_deadline)));

    // One byte a second of a message that never ends, keepalives unanswered or not.
    let mut ne = Ne::ready();
    let slow = message(Opcode::START, Flags::NONE, 2, &[offer("tcp/80").unit(); 4]);
    let begun = ne.now;
    for byte in &slow {
        ne.input(&[*byte]);
        ne.pass(Duration::from_secs(1));
    }
    assert_eq!(ne.closed(), Some(CloseReason::ProgressDeadline(config.progress_deadline)));
    assert!(ne.now - begun >= config.progress_deadline);
}

/// A long message that moves on is neither late nor the sign of a dead peer, though its sender cannot answer meanwhile.
#[test]
fn a_long_message_that_moves_is_no_offence() {
    let mut ne = Ne::ready();
    let header = Header::new(Opcode::STOP, Flags::NONE, 2, 1 << 20).encode();
    let units = Operation::stop_unit(service("tcp/80")).encode().repeat(4096);
    ne.input(&header);
    for _ in 0..256 {
        ne.input(&units);
        ne.respond_all(&[]);
        ne.pass(Duration::from_secs(1));
        ne.output();
    }
    ne.respond_all(&[]);
    assert_eq!(ne.closed(), None);
    assert_eq!(ne.session.started().count(), 0);
}

/// §5.5: three in a row unanswered, and not before.
#[test]
fn three_keepalives_unanswered_is_a_dead_peer() {
    let config = SessionConfig { jitter: Duration::ZERO, ..SessionConfig::default() };
    let mut ne = Ne::ready_with(config);
    ne.pass(Duration::from_millis(19_999));
    assert_eq!(messages(&ne.output()).len(), 3);
    assert_eq!(ne.closed(), None);
    ne.pass(Duration::from_millis(1));
    assert_eq!(ne.closed(), Some(CloseReason::DeadPeer(3)));
    assert_eq!(ne.output(), [0; 0]);
}

/// §5.5: "in a row": an answer to any of them begins the count anew, F_Error or not.
#[test]
fn any_answer_shows_life() {
    let mut ne = Ne::ready();
    for _ in 0..20 {
        ne.pass(Duration::from_secs(6) * 2);
        let (id, _) = next_keepalive(&mut ne);
        ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::ERROR, id, &[]));
    }
    assert_eq!(ne.closed(), None);
}

/// Backpressure: a caller that has much to answer, and a peer that does not read, stop the input; it goes on after.
#[test]
fn input_waits_for_the_caller_and_for_the_peer() {
    let mut ne = Ne::ready();
    let start = message(Opcode::START, Flags::NONE, 2, &[offer("tcp/80").unit()]);
    ne.input(&start.repeat(300));
    assert!(!ne.session.wants_input());
    // The caller takes its time; that is neither the peer's delay nor its death.
    ne.pass(Duration::from_secs(60));
    assert_eq!(ne.closed(), None);
    assert_eq!(ne.respond_all(&[]).len(), 300);
    assert!(ne.session.wants_input());
    let acks = messages(&ne.output()).iter().filter(|(header, _)| header.opcode == Opcode::START_ACK).count();
    assert_eq!(acks, 300);

    let mut ne = Ne::ready();
    let keepalive = message(Opcode::KEEPALIVE, Flags::NONE, 2, &[]);
    ne.input(&keepalive.repeat(10_000));
    assert!(!ne.session.wants_input());
    assert!(ne.session.held_bytes() < 512 * 1024);
    let mut answers = Vec::new();
    while let Some(piece) = ne.session.poll_transmit() {
        answers.extend(piece);
        ne.session.handle_timeout(ne.now);
    }
    assert_eq!(messages(&answers).len(), 10_000);
}

/// A peer that never reads is dead after three keepalives; a caller that feeds what is not wanted is stopped.
#[test]
fn a_peer_that_does_not_read_is_closed() {
    let mut ne = Ne::ready();
    let keepalive = message(Opcode::KEEPALIVE, Flags::NONE, 2, &[]);
    ne.input(&keepalive.repeat(4_000));
    assert!(!ne.session.wants_input());
    ne.pass(Duration::from_secs(25));
    assert_eq!(ne.closed(), Some(CloseReason::DeadPeer(3)));

    let mut ne = Ne::ready();
    for _ in 0..1_000 {
        ne.input(&keepalive.repeat(1_000));
    }
    assert!(matches!(ne.closed(), Some(CloseReason::Overflow(_))));
}

/// A closed session does nothing more, and keeps its first reason.
#[test]
fn closed_is_closed() {
    let mut ne = Ne::ready();
    ne.input(&message(Opcode::START, Flags::NONE, 2, &[offer("tcp/80").unit()]));
    let events = ne.events();
    ne.session.close(CloseReason::Superseded);
    ne.session.close(CloseReason::Shutdown);
    ne.input(&init(9));
    if let [NeEvent::Operations { token, .. }] = events[..] {
        ne.session.respond(token, &[]);
    }
    ne.pass(Duration::from_secs(100));
    assert_eq!(ne.events(), [NeEvent::Closed(CloseReason::Superseded)]);
    assert_eq!((ne.output(), ne.session.wants_input(), ne.session.poll_timeout()), (Vec::new(), false, None));
}

/// §5.5.2: the NE answers with the index that it was given.
#[test]
fn the_nes_own_health() {
    let mut ne = Ne::ready();
    let query = Unit([1, 6, 80, 0, 0, 0, 0, 0]);
    for (set, told) in [(0, 0), (55, 55), (100, 100), (255, 100)] {
        ne.session.set_health(set);
        ne.input(&message(Opcode::KEEPALIVE, Flags::NONE, 4, &[query]));
        let expected = Unit([1, 6, 80, told, 0, 0, 0, 0]);
        assert_eq!(ne.output(), message(Opcode::KEEPALIVE_ACK, Flags::NONE, 4, &[expected]));
    }
}

/// However TCP cuts the stream, the operations are the same, and so are the answers.
#[test]
fn a_session_split_anywhere_is_the_same_session() {
    let stream = [
        hex(INIT),
        message(Opcode::START, Flags::NONE, 2, &[offer("tcp/80").unit(), offer("tcp/81").unit(), Unit([7; 8])]),
        message(Opcode::KEEPALIVE, Flags::NONE, 3, &[Unit([1, 6, 80, 0, 0, 0, 0, 0])]),
        message(Opcode(0x77), Flags::NONE, 4, &[Unit([9; 8])]),
        hex("414a 0001 09 03 0005 0000000000000000 00000003 aabbcc"),
        message(Opcode::EXCEPTION_ADD, Flags::NONE, 6, &[Unit([3; 8])]),
        message(Opcode::STOP, Flags::NONE, 7, &[Operation::stop_unit(service("tcp/81"))]),
        message(Opcode::NOOP, Flags::NONE, 8, &[]),
    ]
    .concat();
    let run = |pieces: &[&[u8]]| {
        let mut ne = Ne::new();
        let mut operations = Vec::new();
        for piece in pieces {
            ne.input(piece);
            operations.extend(ne.respond_all(&[service("tcp/81")]));
        }
        let mut answers = messages(&ne.output());
        // An ACK waits for the caller, other answers do not: their order is free.
        answers.sort_by_key(|(header, _)| header.request_id);
        let counters = Counters { failed_units: ne.session.counters().failed_units, ..*ne.session.counters() };
        (operations, answers, counters, ne.closed())
    };
    let whole = run(&[&stream]);
    assert_eq!((whole.0.len(), whole.1.len()), (3, 6));
    for at in 0..=stream.len() {
        assert_eq!(run(&[&stream[..at], &stream[at..]]), whole, "split at {at}");
    }
    assert_eq!(run(&stream.chunks(1).collect::<Vec<_>>()), whole);
}
