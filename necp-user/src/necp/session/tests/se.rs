//! The SE, byte for byte, and its rules one by one.

use super::*;

fn last(se: &mut Se) -> (Header, Vec<Unit>) {
    messages(&se.output()).pop().expect("a message")
}

fn health(text: &str, index: u32) -> Unit {
    let key = service(text);
    Unit([1, key.protocol().into(), key.port().into(), index, 0, 0, 0, 0])
}

/// §5.4.1, §5.6.1, §5.6.3: what an SE says, written out by hand; the request ids are its own.
#[test]
fn what_an_se_says() {
    let mut se = Se::new();
    let check = |se: &mut Se, expected: &str| {
        let mut sent = se.output();
        let id = [sent[6], sent[7]];
        sent[6..8].fill(0);
        assert_eq!(sent, hex(expected));
        u16::from_be_bytes(id)
    };
    let init = check(
        &mut se,
        "414a 0001 01 01 0000 0000000000000000 00000020
         00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000",
    );
    se.input(&message(Opcode::INIT_ACK, Flags::NONE, init, &[Unit::default()]));
    se.session.start(&[ServiceUnit::new(Forwarding::Gre, service("udp/443")), offer("47")]);
    let start = check(
        &mut se,
        "414a 0001 01 05 0000 0000000000000000 00000040
         00000002 00000011 000001bb 00000000 00000000 00000000 00000000 00000000
         00000001 0000002f 00000000 00000000 00000000 00000000 00000000 00000000",
    );
    se.session.stop(&[service("udp/443")]);
    let stop = check(
        &mut se,
        "414a 0001 01 07 0000 0000000000000000 00000020
         00000000 00000011 000001bb 00000000 00000000 00000000 00000000 00000000",
    );
    assert!(init != start && start != stop && init != stop);
    // §5.5.2, the answer to a query.
    se.input(&hex("414a 0001 01 03 0a0b 0000000000000000 00000020
         00000001 00000011 000001bb 00000000 00000000 00000000 00000000 00000000"));
    let events = se.events();
    let Some(SeEvent::HealthQuery { token, queries }) = events.last() else { panic!("{events:?}") };
    assert_eq!(queries.iter().map(|query| query.service).collect::<Vec<_>>(), [service("udp/443")]);
    se.session.answer_health(*token, &[Some(77)]);
    assert_eq!(
        se.output(),
        hex("414a 0001 01 04 0a0b 0000000000000000 00000020
             00000001 00000011 000001bb 0000004d 00000000 00000000 00000000 00000000")
    );
    se.session.answer_health(*token, &[Some(78)]);
    assert_eq!(se.output(), [0; 0], "a token is answered once");
}

/// §5.4: INIT again after 1, 2, 4 … s on the same connection, until the limit.
#[test]
fn init_is_repeated_with_backoff() {
    let mut se = Se::new();
    let begun = se.now;
    let first = se.output();
    let mut times = Vec::new();
    while let Some(due) = se.session.poll_timeout() {
        se.now = due;
        se.session.handle_timeout(due);
        let again = se.output();
        if !again.is_empty() {
            assert_eq!(again, first, "the same request");
            times.push((due - begun).as_secs());
        }
    }
    assert_eq!(times, [1, 3, 7, 15]);
    assert_eq!((se.now - begun).as_secs(), 31);
    assert_eq!(se.closed(), Some(CloseReason::InitUnanswered { attempts: 5 }));
}

/// §5.4: what is asked for before INIT_ACK goes out after it, in its order.
#[test]
fn requests_wait_for_init_ack() {
    let mut se = Se::new();
    let (init, _) = last(&mut se);
    let first = se.session.start(&[offer("tcp/80")]);
    let second = se.session.stop(&[service("tcp/80")]);
    assert_eq!(se.output(), [0; 0]);
    se.input(&message(Opcode::INIT_ACK, Flags::NONE, init.request_id, &[Unit::default()]));
    let sent = messages(&se.output());
    assert_eq!(sent.iter().map(|(header, _)| header.opcode).collect::<Vec<_>>(), [Opcode::START, Opcode::STOP]);
    // Answers may come in any order.
    se.input(&message(Opcode::STOP_ACK, Flags::NONE, sent[1].0.request_id, &[]));
    se.input(&message(Opcode::START_ACK, Flags::NONE, sent[0].0.request_id, &[]));
    let acked = |id| SeEvent::Acked { id, failed: Vec::new() };
    assert_eq!(se.events(), [SeEvent::Ready, acked(second), acked(first)]);
}

/// §5.4, §5.8: how an INIT can fail.
#[test]
fn init_refusals() {
    let error = Flags::ERROR;
    let table = [
        (error.with(Flags::AUTH_REQUIRED), Some(CloseReason::AuthRequired)),
        (error, Some(CloseReason::InitRefused)),
        (error.with(Flags::PROTOCOL_VERSION_MISMATCH), None),
    ];
    for (flags, reason) in table {
        let mut se = Se::new();
        let (init, _) = last(&mut se);
        se.input(&message(Opcode::INIT_ACK, flags, init.request_id, &[]));
        assert_eq!(se.closed(), reason);
        assert!(!se.session.is_ready());
    }
    // §5.2.1: an NE of another version says so in its own; the connection stays, INIT is repeated until the limit.
    let mut se = Se::new();
    let (init, _) = last(&mut se);
    let mut answer = message(Opcode::INIT_ACK, error.with(Flags::PROTOCOL_VERSION_MISMATCH), init.request_id, &[]);
    answer[4] = 3;
    se.input(&answer);
    assert_eq!(se.events(), [SeEvent::Notice(Notice::VersionMismatch { version: 3 })]);
    assert_eq!(se.output(), [0; 0], "it is not answered");
    se.pass(Duration::from_secs(1));
    assert_eq!(last(&mut se).0.opcode, Opcode::INIT);
    // An INIT_ACK with another id, or without its unit, opens nothing.
    let mut se = Se::new();
    let (init, _) = last(&mut se);
    se.input(&message(Opcode::INIT_ACK, Flags::NONE, init.request_id ^ 1, &[Unit::default()]));
    se.input(&message(Opcode::INIT_ACK, Flags::NONE, init.request_id, &[]));
    assert!(!se.session.is_ready() && se.closed().is_none());
    assert_eq!((se.session.counters().unexpected_answers, se.session.counters().malformed), (1, 1));
}

/// §5.6.2: exactly the failed units are repeated; a failure that names none is one of all.
#[test]
fn acks_tell_what_failed() {
    let units = [offer("tcp/80"), offer("tcp/81"), offer("47")].map(|offer| offer.unit());
    let stranger = offer("tcp/99").unit();
    let odd = [1, 2, 3, 4, 5].to_vec();
    let ack = |flags, id, units: &[Unit]| message(Opcode::START_ACK, flags, id, units);
    let unframed = |id| {
        let mut bytes = message(Opcode::START_ACK, Flags::ERROR.with(Flags::BASIC_PAYLOAD), id, &[]);
        bytes[19] = 5;
        [bytes, odd.clone()].concat()
    };
    type Ack<'a> = Box<dyn Fn(u16) -> Vec<u8> + 'a>;
    let table: [(Ack<'_>, &[&str]); 7] = [
        (Box::new(|id| ack(Flags::NONE, id, &[])), &[]),
        (Box::new(|id| ack(Flags::NONE, id, &units)), &[]),
        (Box::new(|id| ack(Flags::ERROR, id, &units[1..])), &["tcp/81", "47"]),
        (Box::new(|id| ack(Flags::ERROR, id, &[units[1], units[1], stranger])), &["tcp/81"]),
        (Box::new(|id| ack(Flags::ERROR, id, &[stranger])), &["tcp/80", "tcp/81", "47"]),
        (Box::new(|id| ack(Flags::ERROR, id, &[])), &["tcp/80", "tcp/81", "47"]),
        (Box::new(unframed), &["tcp/80", "tcp/81", "47"]),
    ];
    for (index, (answer, failed)) in table.iter().enumerate() {
        let mut se = Se::ready();
        let id = se.session.start(&[offer("tcp/80"), offer("tcp/81"), offer("47")]);
        let (sent, _) = last(&mut se);
        se.input(&answer(sent.request_id));
        let mut acked = None;
        for event in se.events() {
            if let SeEvent::Acked { id: named, failed } = event {
                assert_eq!((named, acked.replace(failed)), (id, None));
            }
        }
        let mut expected: Vec<_> = failed.iter().map(|text| service(text)).collect();
        let mut acked = acked.expect("an Acked event");
        acked.sort_unstable();
        expected.sort_unstable();
        assert_eq!(acked, expected, "row {index}");
        assert_eq!(se.session.started().count(), 3 - expected.len(), "row {index}");
        assert_eq!(se.closed(), None);
    }
}

/// §5.8 (reflection) and §5.2.1: an ACK counts only if it is the answer to what is outstanding under its id.
#[test]
fn acks_of_nothing_are_ignored() {
    let mut se = Se::ready();
    se.session.start(&[offer("tcp/80")]);
    let (sent, _) = last(&mut se);
    let id = sent.request_id;
    let none =
        [Opcode::STOP_ACK, Opcode::KEEPALIVE_ACK, Opcode::INIT_ACK, Opcode::EXCEPTION_ADD_ACK, Opcode::EXCEPTION_RESP];
    for opcode in none {
        se.input(&message(opcode, Flags::NONE, id, &[]));
    }
    se.input(&message(Opcode::START_ACK, Flags::NONE, id ^ 0x8000, &[]));
    assert_eq!(se.session.counters().unexpected_answers, 6);
    assert_eq!(se.events(), [SeEvent::Notice(Notice::Unexpected(Opcode::STOP_ACK))]);
    se.input(&message(Opcode::START_ACK, Flags::NONE, id, &[]));
    assert!(matches!(se.events()[..], [SeEvent::Acked { .. }]));
    se.input(&message(Opcode::START_ACK, Flags::NONE, id, &[]));
    assert_eq!(se.session.counters().unexpected_answers, 7);
}

/// §5.2.1: ids distinct from those outstanding, also when there are more requests than go out at a time.
#[test]
fn request_ids_are_distinct() {
    let mut se = Se::ready();
    for _ in 0..300 {
        se.session.start(&[offer("tcp/80")]);
    }
    let sent = messages(&se.output());
    let ids: std::collections::BTreeSet<u16> = sent.iter().map(|(header, _)| header.request_id).collect();
    assert_eq!((sent.len(), ids.len()), (256, 256));
    for id in ids {
        se.input(&message(Opcode::START_ACK, Flags::NONE, id, &[]));
    }
    assert_eq!(messages(&se.output()).len(), 44);
    assert_eq!(se.events().len(), 256);
}

/// §5.5.2: unsupported queries, alone, among others and by the caller's choice.
#[test]
fn unsupported_queries_are_named_alone() {
    let [good, odd] = [health("tcp/80", 0), Unit([9, 6, 80, 0, 0, 0, 0, 0])];
    let mut se = Se::ready();
    se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 1, &[odd]));
    assert_eq!(se.output(), message(Opcode::KEEPALIVE_ACK, Flags::ERROR, 1, &[odd]));
    assert_eq!(se.events(), []);
    for (answers, flags, units) in [
        (&[Some(5), Some(255)][..], Flags::ERROR, vec![odd]),
        (&[None, Some(5)], Flags::ERROR, vec![good, odd]),
        (&[Some(5)], Flags::ERROR, vec![odd, good]),
    ] {
        se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 2, &[good, odd, good]));
        let events = se.events();
        let [SeEvent::HealthQuery { token, queries }] = &events[..] else { panic!("{events:?}") };
        assert_eq!(queries.len(), 2);
        se.session.answer_health(*token, answers);
        assert_eq!(se.output(), message(Opcode::KEEPALIVE_ACK, flags, 2, &units));
    }
    se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 3, &[good]));
    let events = se.events();
    let [SeEvent::HealthQuery { token, .. }] = &events[..] else { panic!("{events:?}") };
    se.session.answer_health(*token, &[Some(255)]);
    assert_eq!(se.output(), message(Opcode::KEEPALIVE_ACK, Flags::NONE, 3, &[health("tcp/80", 100)]));
}

/// §5.5: the NE answers for its health too; if it does not know the query it is not asked again.
#[test]
fn the_nes_health() {
    let mut se = Se::ready();
    se.session.start(&[offer("tcp/80")]);
    let (sent, _) = last(&mut se);
    se.input(&message(Opcode::START_ACK, Flags::NONE, sent.request_id, &[]));
    se.events();
    se.pass(Duration::from_secs(6));
    let (asked, units) = last(&mut se);
    assert_eq!((asked.opcode, &units[..]), (Opcode::KEEPALIVE, &[health("tcp/80", 0)][..]));
    se.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, asked.request_id, &[health("tcp/80", 60)]));
    assert_eq!(se.events(), [SeEvent::NeHealth(60)]);
    se.pass(Duration::from_secs(6));
    let (asked, units) = last(&mut se);
    se.input(&message(Opcode::KEEPALIVE_ACK, Flags::ERROR, asked.request_id, &units));
    se.pass(Duration::from_secs(6));
    assert_eq!(last(&mut se).1, []);
}

/// §5.4: nothing may precede INIT_ACK.
#[test]
fn nothing_may_precede_init_ack() {
    let mut se = Se::new();
    se.output();
    se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 3, &[]));
    assert_eq!(se.output(), message(Opcode::KEEPALIVE_ACK, Flags::ERROR, 3, &[]));
    assert_eq!(se.events(), [SeEvent::Closed(CloseReason::OutOfOrder(Opcode::KEEPALIVE))]);
}

/// An NE that answers keepalives but not a request is given up.
#[test]
fn unanswered_requests_end_the_session() {
    let mut se = Se::ready();
    se.session.start(&[offer("tcp/80")]);
    for _ in 0..100 {
        se.pass(Duration::from_millis(500));
        for (header, _) in messages(&se.output()) {
            if header.opcode == Opcode::KEEPALIVE {
                se.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, &[]));
            }
        }
    }
    assert_eq!(se.closed(), Some(CloseReason::AnswerDeadline(Duration::from_secs(30))));
}

/// An empty request is answered at once, and never sent.
#[test]
fn an_empty_request_is_done() {
    let mut se = Se::ready();
    let id = se.session.start(&[]);
    assert_eq!(se.events(), [SeEvent::Acked { id, failed: Vec::new() }]);
    assert_eq!(se.output(), [0; 0]);
}

/// A caller that does not answer queries stops the input, not the session.
#[test]
fn input_waits_for_the_caller() {
    let mut se = Se::ready();
    se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 3, &[health("tcp/80", 0)]).repeat(20));
    assert!(!se.session.wants_input());
    se.pass(Duration::from_secs(120));
    assert_eq!(se.closed(), None);
    let mut answered = 0;
    loop {
        let events = se.events();
        if events.is_empty() {
            break;
        }
        for event in events {
            if let SeEvent::HealthQuery { token, .. } = event {
                se.session.answer_health(token, &[Some(1)]);
                answered += 1;
            }
        }
        se.session.handle_timeout(se.now);
    }
    assert_eq!(answered, 20);
    assert!(se.session.wants_input());
}
