//! The SE with a key.

use super::*;
use crate::necp::auth::Rejection;

impl Se {
    pub(super) fn secured() -> Self {
        let now = Instant::now();
        let credentials = Credentials { key: key(), first_seq_num: TO_SE };
        Self { session: SeSession::with_credentials(SessionConfig::default(), Some(credentials), now, 11), now }
    }

    /// One whose INIT was answered; the KEEPALIVE that shows the NE that it is alive was read.
    pub(super) fn joined() -> Self {
        let mut se = Self::secured();
        let sent = verified(&se.output());
        se.input(&init_ack(sent[0].0.request_id, TO_SE));
        assert_eq!(se.events(), [SeEvent::Ready]);
        let sent = verified(&se.output());
        assert_eq!((sent[0].0.opcode, sent[0].0.seq_num, sent[0].1.len()), (Opcode::KEEPALIVE, TO_NE, 0));
        se.input(&signed(Opcode::KEEPALIVE_ACK, sent[0].0.request_id, TO_SE + 1, &[]));
        se
    }

    pub(super) fn rejected(&self) -> Rejections {
        self.session.counters().rejected
    }
}

fn init_ack(request_id: u16, seq_num: u64) -> Vec<u8> {
    let unit = crate::necp::message::InitAck { first_seq_num: TO_NE }.unit();
    signed(Opcode::INIT_ACK, request_id, seq_num, &[unit])
}

/// §5.9.2: INIT has number 0 and asks for a first number; what follows INIT_ACK begins with the NE's.
#[test]
fn init_asks_for_authentication() {
    let mut se = Se::secured();
    let sent = verified(&se.output());
    let [(header, units)] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!((header.opcode, header.seq_num), (Opcode::INIT, 0));
    assert_eq!(units, &[Unit([1, 0x2222_2222, 0x3333_3333, 0, 0, 0, 0, 0])]);
    let id = header.request_id;
    se.session.start(&[offer("tcp/80")]);
    se.input(&init_ack(id, TO_SE));
    assert_eq!(se.events(), [SeEvent::Ready]);
    let sent = verified(&se.output());
    assert_eq!((sent.len(), sent[0].0.opcode, sent[0].0.seq_num), (1, Opcode::START, TO_NE), "something fresh at once");
    // One message may have INIT_ACK's number, as in the draft's example; no second one.
    se.input(&signed(Opcode::START_ACK, sent[0].0.request_id, TO_SE, &[]));
    assert!(matches!(se.events()[..], [SeEvent::Acked { .. }]));
    se.input(&signed(Opcode::KEEPALIVE, 1, TO_SE, &[]));
    assert_eq!(se.rejected().bad_sequence, 1);
}

/// A session is not opened by whoever does not know the key, or only has old messages.
#[test]
fn init_ack_must_be_authentic_and_fresh() {
    let other = Key::new(b"another key, and long enough".to_vec()).unwrap();
    let unit = [Unit([0x4444_4444, 0, 0, 0, 0, 0, 0, 0])];
    for (what, make) in [
        ("stripped", &(|id| message(Opcode::INIT_ACK, Flags::NONE, id, &unit)) as &dyn Fn(u16) -> Vec<u8>),
        ("another key", &|id| signed_by(&other, Opcode::INIT_ACK, Flags::NONE, (id, TO_SE), &unit)),
        ("recorded", &|id| init_ack(id, TO_SE - (1 << 32))),
        ("our INIT, sent back", &|_| hex(INIT)),
    ] {
        let mut se = Se::secured();
        let id = verified(&se.output())[0].0.request_id;
        se.input(&make(id));
        assert!(!se.session.is_ready(), "{what}");
        assert!(!se.events().contains(&SeEvent::Ready), "{what}");
        if se.closed().is_none() {
            assert_eq!(se.output(), [0; 0], "{what}");
            se.input(&init_ack(id, TO_SE));
            assert!(se.session.is_ready(), "{what}: the real one still counts");
        }
    }
}

/// §5.4.2, §5.8.3: why an NE refuses, as far as the SE can tell.
#[test]
fn refusals_are_told_apart() {
    let refusal = |id| message(Opcode::INIT_ACK, Flags::ERROR.with(Flags::AUTH_REQUIRED), id, &[]);
    let mut se = Se::secured();
    let id = verified(&se.output())[0].0.request_id;
    se.input(&refusal(id));
    assert_eq!(se.closed(), Some(CloseReason::KeyRefused));
    let mut se = Se::new();
    let id = messages(&se.output())[0].0.request_id;
    se.input(&refusal(id));
    assert_eq!(se.closed(), Some(CloseReason::AuthRequired));
}

/// §5.8.3: an answer that is not authentic is none; the request is made again, with those after it, and given up after
/// three times.
#[test]
fn doubtful_answers_make_the_se_ask_again() {
    let mut se = Se::joined();
    let start = se.session.start(&[offer("tcp/80")]);
    let stop = se.session.stop(&[service("tcp/80")]);
    let sent = verified(&se.output());
    let ids: Vec<u16> = sent.iter().map(|(header, _)| header.request_id).collect();
    se.input(&message(Opcode::START_ACK, Flags::NONE, ids[0], &[]));
    let again = verified(&se.output());
    let opcodes: Vec<Opcode> = again.iter().map(|(header, _)| header.opcode).collect();
    assert_eq!(opcodes, [Opcode::START, Opcode::STOP], "in their order");
    assert!(again.iter().all(|(header, _)| !ids.contains(&header.request_id)));
    assert_eq!(se.session.started().count(), 0);
    for (count, (header, _)) in again.iter().enumerate() {
        let answer = header.opcode.answer().unwrap();
        se.input(&signed(answer, header.request_id, TO_SE + 2 + count as u64, &[]));
    }
    let acked = |id| SeEvent::Acked { id, failed: Vec::new() };
    let events: Vec<_> = se.events().into_iter().filter(|event| !matches!(event, SeEvent::Notice(_))).collect();
    assert_eq!(events, [acked(start), acked(stop)]);

    se.session.start(&[offer("tcp/81")]);
    for round in 0..3 {
        let sent = verified(&se.output());
        let id = sent.last().unwrap().0.request_id;
        se.input(&message(Opcode::START_ACK, Flags::NONE, id, &[]));
        // Others are authentic, so these are not three in a row.
        se.input(&signed(Opcode::NOOP, 1, TO_SE + 10 + round, &[]));
    }
    assert_eq!(se.closed(), Some(CloseReason::Rejected(Rejection::NoCredential)));
}

/// A forged question is refused, with our credential, and tells nothing.
#[test]
fn forged_and_reflected_questions_are_refused() {
    let mut se = Se::joined();
    se.session.start(&[offer("tcp/80")]);
    let own = se.output();
    let query = Unit([1, 6, 80, 0, 0, 0, 0, 0]);
    se.input(&message(Opcode::KEEPALIVE, Flags::NONE, 5, &[query]));
    let sent = verified(&se.output());
    assert_eq!((sent[0].0.opcode, sent[0].0.flags.0, sent[0].1.len()), (Opcode::KEEPALIVE_ACK, 0x16, 0));
    se.input(&own);
    se.input(&signed(Opcode::NOOP, 1, TO_SE + 2, &[]));
    assert_eq!(se.output(), [0; 0], "START is nothing that an SE answers");
    assert_eq!((se.rejected().stripped, se.rejected().bad_sequence), (1, 1));
    assert!(se.events().iter().all(|event| matches!(event, SeEvent::Notice(_))));
    se.input(&signed(Opcode::KEEPALIVE, 6, TO_SE + 3, &[query]));
    assert!(matches!(se.events()[..], [SeEvent::HealthQuery { .. }]));
}

/// A START that the NE rejects has failed, and is told as such.
#[test]
fn rejected_by_the_ne() {
    let mut se = Se::joined();
    let id = se.session.start(&[offer("tcp/80")]);
    let (header, units) = verified(&se.output()).pop().unwrap();
    let flags = Flags::ERROR.with(Flags::BAD_SEQUENCE_NUMBER);
    se.input(&signed_by(&key(), Opcode::START_ACK, flags, (header.request_id, TO_SE + 2), &units));
    let notice = SeEvent::Notice(Notice::RejectedByPeer(Opcode::START_ACK));
    assert_eq!(se.events(), [SeEvent::Acked { id, failed: vec![service("tcp/80")] }, notice]);
}
