//! The NE with a key.

use super::*;
use crate::necp::auth::Rejection;

/// §5.8.1, §5.9.2: a session byte for byte; INIT takes effect with the first fresh message after it.
#[test]
fn a_session_byte_for_byte() {
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&hex(INIT));
    assert_eq!(ne.output(), hex(INIT_ACK));
    assert_eq!(ne.events(), [], "it may be a recorded INIT");
    assert!(!ne.session.is_ready());
    ne.input(&hex(START));
    let events = ne.events();
    let [NeEvent::Init { token }] = events[..] else { panic!("{events:?}") };
    assert_eq!(ne.output(), [0; 0]);
    ne.session.respond(token, &[]);
    ne.session.handle_timeout(ne.now);
    let events = ne.events();
    let [NeEvent::Operations { token, .. }] = events[..] else { panic!("{events:?}") };
    ne.session.respond(token, &[]);
    assert_eq!(ne.output(), hex(START_ACK));
    ne.input(&hex(STOP));
    assert_eq!(ne.respond_all(&[]), [Operation::Stop(service("tcp/80"))]);
    assert_eq!(ne.rejected(), Rejections::default());
}

/// §5.8.3, §5.9.2: the answers to what is rejected, with our own credential; the failed units as in any failed answer.
#[test]
fn rejected_requests_are_answered() {
    let mut altered = hex(STOP);
    altered[20 + 11] = 81;
    let mut other_version = hex(STOP);
    (other_version[4], other_version[5], other_version[7]) = (2, 5, 6);
    let table = [
        (
            "START again, bad number",
            hex(START),
            "414a 0027 01 06 0103 2222222233333335 00000034
            00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000
            b6e99f44 c9adce08 60c63b0b 7d1a4aff 07ebf8b7",
        ),
        (
            "STOP without credential",
            message(Opcode::STOP, Flags::NONE, 0x0104, &[Unit([0, 6, 80, 0, 0, 0, 0, 0])]),
            "414a 0017 01 08 0104 2222222233333335 00000034
            00000000 00000006 00000050 00000000 00000000 00000000 00000000 00000000
            92664da1 e5a0f919 e2b59dd5 089d2ee2 81cf82ca",
        ),
        (
            "KEEPALIVE without credential: its queries are not unsupported",
            message(Opcode::KEEPALIVE, Flags::NONE, 0x0105, &[Unit([1, 6, 80, 0, 0, 0, 0, 0])]),
            "414a 0016 01 04 0105 2222222233333335 00000014 13d72a01 1e722e3d cdb5d077 552044e3 c56ce95e",
        ),
        (
            "another version, unverified",
            other_version,
            "414a 000e 01 06 0106 2222222233333335 00000014 68a1d2d3 fd98d3fb 52ed0f1c 16bec574 adc99740",
        ),
        ("an answer: nothing", message(Opcode::KEEPALIVE_ACK, Flags::NONE, 9, &[]), ""),
        ("what flows the other way: nothing", message(Opcode::START_ACK, Flags::NONE, 9, &[]), ""),
    ];
    for (what, request, answer) in table {
        let mut ne = Ne::confirmed();
        ne.input(&request);
        // Request ids in the table are those of the vectors.
        if what.starts_with("another version") {
            let sent = verified(&ne.output());
            assert_eq!((sent[0].0.flags.0, sent[0].0.opcode, sent[0].1.len()), (0x0e, Opcode::START_ACK, 0), "{what}");
        } else {
            assert_eq!(ne.output(), hex(answer), "{what}");
        }
        assert!(ne.events().iter().all(is_harmless), "{what}");
        assert_eq!(ne.closed(), None, "{what}");
        // A failure advances nothing.
        ne.input(&hex(STOP));
        assert_eq!(ne.respond_all(&[]).len(), 1, "{what}");
    }
    let mut ne = Ne::confirmed();
    ne.input(&altered);
    let sent = verified(&ne.output());
    assert_eq!((sent[0].0.flags.0, sent[0].1.as_slice()), (0x17, &[Unit([0, 6, 81, 0, 0, 0, 0, 0])][..]));
}

/// Whatever bit is flipped on the way, the message is not executed.
#[test]
fn every_flipped_bit_is_noticed() {
    let stop = hex(STOP);
    for bit in 0..stop.len() * 8 {
        let mut ne = Ne::confirmed();
        let mut bytes = stop.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        ne.input(&bytes);
        assert!(ne.events().iter().all(is_harmless), "bit {bit}");
        let Rejections { bad_credential, stripped, bad_sequence, too_large, .. } = ne.rejected();
        let counted = bad_credential + stripped + bad_sequence + too_large + ne.session.counters().framing_errors;
        // A longer message is not complete yet.
        let waits = ne.closed().is_none() && ne.session.counters().messages_in == 3 && (16 * 8..20 * 8).contains(&bit);
        assert!(counted >= 1 || waits, "bit {bit}: {:?}", ne.rejected());
        assert_eq!(ne.session.started().count(), 1, "bit {bit}");
    }
    // The same for INIT: bare, and closed.
    let init = hex(INIT);
    for bit in 0..init.len() * 8 {
        let mut ne = Ne::secured(SessionConfig::default(), &key());
        let mut bytes = init.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        ne.input(&bytes);
        assert!(ne.events().iter().all(is_harmless), "bit {bit}");
        let output = ne.output();
        assert!(output.is_empty() || output[3] & 0x02 == 0, "nothing is signed for a stranger: bit {bit}");
        assert!(!ne.session.is_ready());
    }
}

/// However a message is cut, or continued by another one, it is executed whole or not at all.
#[test]
fn what_is_cut_is_not_executed() {
    let stop = hex(STOP);
    for length in 0..stop.len() {
        let mut ne = Ne::confirmed();
        ne.input(&stop[..length]);
        assert!(ne.events().iter().all(is_harmless));
        ne.input(&hex(STOP));
        assert!(length == 0 || ne.events().iter().all(is_harmless), "cut at {length}");
        ne.pass(Duration::from_secs(60));
        assert!(ne.respond_all(&[]).len() <= usize::from(length == 0), "cut at {length}");
        let mut whole = Ne::confirmed();
        whole.input(&stop[..length]);
        whole.input(&stop[length..]);
        assert_eq!(whole.respond_all(&[]).len(), 1, "split at {length}");
    }
}

/// The MAC has no direction, so all that the NE has ever sent verifies when it is sent back.
#[test]
fn reflected_messages_are_rejected() {
    // The worst case: both clocks show the same second.
    for theirs in [TO_NE, TO_NE + 1, TO_NE - 5, TO_SE] {
        let mut ne = Ne::secured(SessionConfig::default(), &key());
        ne.input(&init_of(theirs, 1));
        let sent = ne.output();
        let first = u64::from(verified(&sent)[0].1[0].0[0]) << 32 | u64::from(verified(&sent)[0].1[0].0[1]);
        ne.input(&signed(Opcode::KEEPALIVE, 2, first, &[]));
        ne.respond_all(&[]);
        ne.pass(Duration::from_secs(6));
        let answers = ne.output();
        for (count, (header, units)) in verified(&[sent, answers].concat()).iter().enumerate() {
            let mut back = ne_like(theirs, first);
            back.input(&signed_by(&key(), header.opcode, header.flags, (header.request_id, header.seq_num), units));
            assert!(back.events().iter().all(is_harmless), "message {count}");
            assert_eq!(back.rejected().bad_sequence, 1, "message {count} of {theirs:#x}: {header:?}");
            back.input(&signed(Opcode::START, 3, first + 1, &[offer("tcp/80").unit()]));
            assert_eq!(back.respond_all(&[]).len(), 1, "and the session goes on");
        }
    }
}

fn ne_like(theirs: u64, first: u64) -> Ne {
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&init_of(theirs, 1));
    ne.input(&signed(Opcode::KEEPALIVE, 2, first, &[]));
    ne.respond_all(&[]);
    ne.output();
    ne
}

/// §6.10: a whole recorded session, sent again on a new connection, is no session.
#[test]
fn a_recorded_session_changes_nothing() {
    let config = SessionConfig::default();
    let access = Access::Authenticated(Some(Credentials { key: key(), first_seq_num: TO_NE + (1 << 32) }));
    let replayed = || {
        let now = Instant::now();
        let mut ne = Ne { session: NeSession::with_access(config.clone(), access.clone(), now, 9), now };
        ne.input(&hex(INIT));
        assert_eq!(verified(&ne.output()).len(), 1, "INIT_ACK");
        ne
    };
    let mut ne = replayed();
    for recorded in [START, STOP, INIT, START] {
        ne.input(&hex(recorded));
        assert!(ne.events().iter().all(is_harmless));
    }
    assert_eq!(ne.closed(), Some(CloseReason::Rejected(Rejection::BadSequence)), "three times");
    assert_eq!((ne.rejected().bad_sequence, ne.rejected().unconfirmed), (3, 1));

    // INIT alone: the connection ends at the deadline, however often it is repeated.
    let mut ne = replayed();
    for _ in 0..9 {
        ne.pass(Duration::from_secs(1));
        ne.input(&hex(INIT));
    }
    let again = ne.output();
    assert!(verified(&again).iter().all(|(header, _)| header.opcode == Opcode::KEEPALIVE), "one INIT_ACK is enough");
    ne.pass(Duration::from_secs(1));
    assert_eq!(ne.closed(), Some(CloseReason::Unconfirmed(config.init_deadline)));
    assert!(ne.events().iter().all(is_harmless));
    assert_eq!(ne.rejected().unconfirmed, 1);
}

/// An INIT in a version that is not spoken opens nothing, so it does not show either that the INIT before it was no
/// recording.
#[test]
fn an_init_of_another_version_confirms_nothing() {
    let unit = crate::necp::message::Init { authenticate: Some(TO_SE) }.unit();
    let plain = Header::new(Opcode::INIT, Flags::AUTH_CREDENTIAL_PROVIDED, 7, 1);
    let header = Header { version: 2, payload_len: plain.payload_len + 20, ..plain };
    let mut signer = key().sign(&header);
    signer.update(&unit.encode());
    let of_version_2 = [&header.encode()[..], &unit.encode(), &signer.credential()].concat();
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&hex(INIT));
    ne.output();
    ne.input(&of_version_2);
    assert!(ne.events().iter().all(is_harmless));
    assert_eq!((ne.rejected().bad_sequence, ne.session.is_ready()), (1, false));
    let sent = verified(&ne.output());
    assert_eq!((sent.len(), sent[0].0.flags.0, sent[0].1.len()), (1, 0x0e, 0), "version mismatch, signed");
}

/// Two recorded INITs on one connection, the second of which demands what the NE demands: what the NE then sends would be
/// fresh if it were sent back.
#[test]
fn a_second_recorded_init_cannot_make_reflections_fresh() {
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&hex(INIT));
    ne.input(&init_of(TO_NE, 7));
    let sent = ne.output();
    assert_eq!(verified(&sent).len(), 1, "the first one's INIT_ACK");
    assert_eq!(ne.closed(), Some(CloseReason::NumbersExhausted));
    ne.input(&sent);
    assert!(ne.events().iter().all(is_harmless));

    // The same in an open session, where the answer itself would have the next number.
    let mut ne = Ne::confirmed();
    ne.input(&init_of(TO_NE + 1, 7));
    assert_eq!((ne.output(), ne.closed()), (Vec::new(), Some(CloseReason::NumbersExhausted)));

    // One that is far away is answered, and the demand stands.
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&hex(INIT));
    ne.input(&init_of(TO_SE + (1 << 32), 7));
    let sent = verified(&ne.output());
    assert_eq!((sent[1].0.seq_num, sent[1].1[0]), (TO_SE + (1 << 32), sent[0].1[0]));
}

/// §5.8.3: three rejected messages in a row end the connection; a good one in between begins the count anew.
#[test]
fn three_rejected_in_a_row_end_the_session() {
    let mut ne = Ne::confirmed();
    for number in 0..20 {
        ne.input(&hex(START));
        ne.input(&message(Opcode::NOOP, Flags::NONE, 1, &[]));
        ne.input(&signed(Opcode::NOOP, 1, TO_NE + 5 + number, &[]));
    }
    assert_eq!((ne.closed(), ne.rejected().bad_sequence, ne.rejected().stripped), (None, 20, 20));
    ne.output();
    for _ in 0..5 {
        ne.input(&hex(START));
    }
    assert_eq!(ne.closed(), Some(CloseReason::Rejected(Rejection::BadSequence)));
    assert_eq!((ne.rejected().bad_sequence, verified(&ne.output()).len()), (23, 3));
}

/// §5.4: INIT in place. A recorded one leaves the session as it is; one that is followed by a fresh message starts over.
#[test]
fn init_in_place() {
    let mut ne = Ne::confirmed();
    ne.input(&hex(INIT));
    ne.input(&init_of(TO_SE + (1 << 32), 7));
    let acks = verified(&ne.output());
    let numbers: Vec<u64> = acks.iter().map(|(header, _)| header.seq_num).collect();
    assert_eq!(numbers, [TO_SE, TO_SE + (1 << 32)], "the number that INIT asks for");
    let demanded = u64::from(acks[1].1[0].0[0]) << 32 | u64::from(acks[1].1[0].0[1]);
    assert_eq!(ne.events(), []);
    // The session that lives goes on, in its own numbers.
    ne.input(&hex(STOP));
    assert_eq!(ne.respond_all(&[]).len(), 1);
    assert_eq!(verified(&ne.output())[0].0.seq_num, TO_SE + 2);

    ne.input(&signed(Opcode::START, 9, demanded, &[offer("tcp/81").unit()]));
    let events = ne.events();
    let [NeEvent::Init { token }] = events[..] else { panic!("{events:?}") };
    ne.session.respond(token, &[]);
    ne.session.handle_timeout(ne.now);
    assert_eq!(ne.respond_all(&[]), [Operation::Start(offer("tcp/81"))]);
    let sent = verified(&ne.output());
    assert_eq!((sent[0].0.opcode, sent[0].0.seq_num), (Opcode::START_ACK, TO_SE + (1 << 32) + 1), "after its INIT_ACK");
    // What the session before has sent is stale now.
    ne.input(&signed(Opcode::STOP, 9, TO_NE + 2, &[Operation::stop_unit(service("tcp/81"))]));
    assert!(ne.events().iter().all(is_harmless));
    assert_eq!(ne.rejected().bad_sequence, 1);
}

/// §5.4.2, §5.8.3: an INIT that fails is answered bare, the connection closed, its kind counted.
#[test]
fn failed_inits() {
    let other = Key::new(b"another key, and long enough".to_vec()).unwrap();
    let unit = crate::necp::message::Init { authenticate: Some(1) }.unit();
    let of_other = signed_by(&other, Opcode::INIT, Flags::NONE, (0x0102, 0), &[unit]);
    let unit_of_none = signed(Opcode::INIT, 0x0102, 0, &[Unit::default()]);
    let two_units = signed(Opcode::INIT, 0x0102, 0, &[unit, unit]);
    let table = [
        ("no credential", init(0x0102), CloseReason::AuthRequired),
        ("another key", of_other, CloseReason::BadInit),
        ("two units", two_units, CloseReason::BadInit),
        ("authentic, and asks for none", unit_of_none, CloseReason::AuthRequired),
    ];
    let bare = hex("414a 0014 01 02 0102 0000000000000000 00000000");
    for (what, request, reason) in table {
        let mut ne = Ne::secured(SessionConfig::default(), &key());
        ne.input(&request);
        assert_eq!(ne.output(), bare, "{what}");
        assert_eq!(ne.closed().as_ref(), Some(&reason), "{what}");
        assert!(ne.events().iter().all(is_harmless), "{what}");
        let Rejections { unauthenticated, bad_credential, .. } = ne.rejected();
        let counted = if reason == CloseReason::BadInit { (0, 1) } else { (1, 0) };
        assert_eq!((unauthenticated, bad_credential), counted, "{what}");
    }
    // No key for this address: both kinds are refused.
    for (request, reason) in [(init(0x0102), CloseReason::AuthRequired), (hex(INIT), CloseReason::NoKey)] {
        let now = Instant::now();
        let session = NeSession::with_access(SessionConfig::default(), Access::Authenticated(None), now, 7);
        let mut ne = Ne { session, now };
        ne.input(&request);
        assert_eq!((ne.output(), ne.closed()), (bare.clone(), Some(reason)));
    }
}

/// Nothing is held for a stranger, and no more than the limit for anybody.
#[test]
fn what_is_held_back_is_bounded() {
    let mut ne = Ne::confirmed();
    let header = |payload_len| Header {
        seq_num: TO_NE + 1,
        payload_len,
        ..Header::new(Opcode::START, Flags::AUTH_CREDENTIAL_PROVIDED, 2, 1)
    };
    ne.input(&header(1 << 20).encode());
    assert!(ne.session.held_bytes() < 4096, "nothing is allocated from an announced length");
    ne.input(&vec![0; 1 << 20]);
    assert_eq!((ne.rejected().bad_credential, ne.closed()), (1, None));
    assert_eq!(verified(&ne.output())[0].1, [], "20 bytes do not end a row of units");
    ne.input(&header((1 << 20) + 1).encode());
    assert_eq!(ne.closed(), Some(CloseReason::MessageTooLarge((1 << 20) + 1)));
    assert_eq!((ne.rejected().too_large, verified(&ne.output())[0].0.flags.0), (1, 0x06), "F_Error, with a credential");

    let mut stranger = Ne::secured(SessionConfig::default(), &key());
    stranger.input(&Header::new(Opcode::INIT, Flags::AUTH_CREDENTIAL_PROVIDED, 1, 100_000).encode());
    assert_eq!(stranger.closed(), Some(CloseReason::BadInit));
}

/// An SE that demands the largest number gets INIT_ACK with it, and nothing after it.
#[test]
fn numbers_do_not_wrap() {
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&init_of(u64::MAX, 1));
    assert_eq!(verified(&ne.output())[0].0.seq_num, u64::MAX);
    ne.input(&signed(Opcode::KEEPALIVE, 2, TO_NE, &[]));
    ne.respond_all(&[]);
    assert_eq!((ne.closed(), ne.output()), (Some(CloseReason::NumbersExhausted), Vec::new()));
}

/// §5.7.8: a list that is sent in pieces has one credential, and one number.
#[test]
fn a_streamed_list_is_signed_as_a_whole() {
    let mut ne = Ne::confirmed();
    ne.input(&signed(Opcode::EXCEPTION_QUERY, 3, TO_NE + 1, &[Unit::default()]));
    let events = ne.events();
    let [NeEvent::Query { token, .. }] = events[..] else { panic!("{events:?}") };
    let entry = Listed { scope: Scope::Local, installer: [10, 0, 0, 11].into(), flows: Flows::ALL };
    ne.session.list(token, 5);
    ne.session.list_more(token, &[entry; 2]);
    ne.input(&signed(Opcode::KEEPALIVE, 4, TO_NE + 2, &[]));
    ne.session.list_more(token, &[entry; 3]);
    let mut sent = Vec::new();
    for _ in 0..8 {
        sent.extend(ne.output());
        for event in ne.events() {
            if let NeEvent::ListMore { token, .. } = event {
                ne.session.list_more(token, &[entry; 3]);
            }
        }
    }
    let sent = verified(&sent);
    let seen: Vec<_> = sent.iter().map(|(header, units)| (header.opcode, header.seq_num, units.len())).collect();
    assert_eq!(seen, [(Opcode::EXCEPTION_RESP, TO_SE + 2, 5), (Opcode::KEEPALIVE_ACK, TO_SE + 3, 0)]);
}
