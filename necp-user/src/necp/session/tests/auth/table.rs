//! Every (state, event) of both machines with a key: six ways in which a message may be authentic or not, by every opcode.

use super::*;
use crate::necp::auth::Rejection;
use crate::necp::wire::Direction;

/// How a message comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fresh,
    /// With a number that was used, or belongs to an older session.
    Replayed,
    BadCredential,
    NoCredential,
    TooFarAhead,
    /// With twelve bytes less of a credential.
    Truncated,
}

const KINDS: [Kind; 6] =
    [Kind::Fresh, Kind::Replayed, Kind::BadCredential, Kind::NoCredential, Kind::TooFarAhead, Kind::Truncated];

/// What a machine does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Answers success.
    Ack,
    /// Gives the caller an event.
    Event,
    /// NE: takes the session for no recording, and tells the caller that it begins.
    Confirm,
    /// Leaves it alone until the caller has answered.
    Wait,
    /// Does not execute it, counts it, and refuses it if it is a request.
    Reject(Rejection),
    /// As that, and SE: makes the request again that it would have answered.
    AskAgain(Rejection),
    /// Refuses it, if there is an answer, without a credential and with these flags, and closes.
    Close(Flags),
    /// Nothing.
    Skip,
}

fn unit(opcode: Opcode) -> Unit {
    match opcode {
        Opcode::INIT => crate::necp::message::Init { authenticate: Some(TO_SE) }.unit(),
        Opcode::INIT_ACK => crate::necp::message::InitAck { first_seq_num: TO_NE }.unit(),
        Opcode::KEEPALIVE => Unit([1, 6, 80, 0, 0, 0, 0, 0]),
        Opcode(0x20..=0x27) => Unit([1, 60, 0, 0, 0, 0, 6, 80]),
        _ => offer("tcp/80").unit(),
    }
}

/// A message of one unit; `next` is the number that is awaited.
fn form(opcode: Opcode, kind: Kind, request_id: u16, next: u64) -> Vec<u8> {
    let units = [unit(opcode)];
    let numbered = |number| signed(opcode, request_id, number, &units);
    match kind {
        Kind::Fresh => numbered(next),
        Kind::Replayed => numbered(next.saturating_sub(1)),
        Kind::BadCredential => {
            let mut bytes = numbered(next);
            bytes[20 + 32] ^= 1;
            bytes
        }
        Kind::NoCredential => message(opcode, Flags::NONE, request_id, &units),
        Kind::TooFarAhead => numbered(next + (1 << 30)),
        Kind::Truncated => {
            let mut bytes = numbered(next);
            bytes[19] -= 12;
            bytes.truncate(20 + 32 + 8);
            bytes
        }
    }
}

/// Why it is rejected on an open connection: the credential comes first, and INIT begins a numbering of its own.
fn rejection(kind: Kind, begins_numbers: bool) -> Option<Rejection> {
    match kind {
        Kind::Fresh => None,
        Kind::Replayed | Kind::TooFarAhead => (!begins_numbers).then_some(Rejection::BadSequence),
        Kind::BadCredential | Kind::Truncated => Some(Rejection::BadCredential),
        Kind::NoCredential => Some(Rejection::NoCredential),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NeState {
    AwaitInit,
    Tentative,
    /// The caller has not answered the session's beginning.
    Pending,
    Ready,
    Closed,
}

fn expected_ne(state: NeState, opcode: Opcode, kind: Kind) -> Does {
    let is_init = opcode == Opcode::INIT;
    let rejected = rejection(kind, is_init).map(Does::Reject);
    match state {
        NeState::AwaitInit if is_init => match kind {
            Kind::Fresh | Kind::Replayed | Kind::TooFarAhead => Does::Ack,
            Kind::BadCredential | Kind::NoCredential | Kind::Truncated => Does::Close(Flags::AUTH_REQUIRED),
        },
        NeState::AwaitInit => Does::Close(Flags::NONE),
        NeState::Tentative => rejected.unwrap_or(if is_init { Does::Ack } else { Does::Confirm }),
        NeState::Pending => Does::Wait,
        NeState::Ready => rejected.unwrap_or_else(|| fresh_ne(opcode)),
        NeState::Closed => Does::Skip,
    }
}

/// What an open NE does with what counts.
fn fresh_ne(opcode: Opcode) -> Does {
    match opcode.direction() {
        Direction::Both if opcode == Opcode::KEEPALIVE => Does::Ack,
        Direction::ToNe if opcode == Opcode::INIT => Does::Ack,
        Direction::ToNe => Does::Event,
        // NOOP, KEEPALIVE_ACK to nothing outstanding; what flows the other way; what is reserved.
        Direction::Both | Direction::ToSe | Direction::Reserved => Does::Skip,
    }
}

fn ne_in(state: NeState) -> (Ne, u64) {
    if state == NeState::AwaitInit {
        return (Ne::secured(SessionConfig::default(), &key()), 0);
    }
    if state == NeState::Ready {
        return (Ne::confirmed(), TO_NE + 1);
    }
    let mut ne = Ne::secured(SessionConfig::default(), &key());
    ne.input(&hex(INIT));
    assert_eq!(ne.output(), hex(INIT_ACK));
    match state {
        NeState::AwaitInit | NeState::Tentative | NeState::Ready => return (ne, TO_NE),
        NeState::Pending => {
            ne.input(&signed(Opcode::KEEPALIVE, 2, TO_NE, &[]));
            assert!(!ne.session.wants_input() && ne.session.closed().is_none());
        }
        NeState::Closed => {
            ne.session.close(CloseReason::ClosedByPeer);
            ne.events();
        }
    }
    (ne, TO_NE + 1)
}

/// Holds the output to what was done with the message of this opcode and kind, by a machine that is sent requests of
/// `direction`.
fn check(does: Does, opcode: Opcode, kind: Kind, direction: Direction, output: &[u8], row: &str) {
    let answer = opcode.answer().filter(|_| [Direction::Both, direction].contains(&opcode.direction()));
    match does {
        Does::Ack => {
            let sent = verified(output);
            assert_eq!(sent.len(), 1, "{row}");
            assert_eq!(
                (Some(sent[0].0.opcode), sent[0].0.flags.0 & !1, sent[0].0.request_id),
                (answer, 2, 0x55aa),
                "{row}"
            );
        }
        Does::Event | Does::Confirm | Does::Wait | Does::Skip => assert_eq!(output, [0; 0], "{row}"),
        Does::Reject(cause) => {
            let sent = verified(output);
            let found: Vec<_> = sent
                .iter()
                .map(|(header, units)| (header.opcode, header.flags.0 & !1, header.request_id, units.len()))
                .collect();
            let flag = if cause == Rejection::BadSequence { Flags::BAD_SEQUENCE_NUMBER } else { Flags::AUTH_REQUIRED };
            let flags = Flags::ERROR.with(flag).with(Flags::AUTH_CREDENTIAL_PROVIDED).0;
            // A failed KEEPALIVE would name its queries as unsupported; INIT has none; eight bytes make no unit.
            let repeats = ![Opcode::KEEPALIVE, Opcode::INIT].contains(&opcode) && kind != Kind::Truncated;
            let expected: Vec<_> =
                answer.map(|answer| (answer, flags, 0x55aa, usize::from(repeats))).into_iter().collect();
            assert_eq!(found, expected, "{row}");
        }
        Does::AskAgain(_) => {
            let sent = verified(output);
            assert_eq!((sent.len(), sent[0].0.opcode), (1, Opcode::START), "{row}");
            assert_ne!(sent[0].0.request_id, 0x55aa, "{row}");
        }
        Does::Close(flags) => {
            let sent = messages(output);
            let found: Vec<_> = sent.iter().map(|(header, units)| (header.opcode, header.flags, units.len())).collect();
            let expected: Vec<_> =
                opcode.answer().map(|answer| (answer, Flags::ERROR.with(flags), 0)).into_iter().collect();
            assert_eq!(found, expected, "{row}");
        }
    }
}

fn kinds_of(rejected: &Rejections) -> [u64; 3] {
    [rejected.stripped, rejected.bad_credential, rejected.bad_sequence]
}

fn counted(does: Does) -> [u64; 3] {
    match does {
        Does::Reject(cause) | Does::AskAgain(cause) => match cause {
            Rejection::NoCredential => [1, 0, 0],
            Rejection::BadCredential => [0, 1, 0],
            Rejection::BadSequence => [0, 0, 1],
        },
        Does::Ack | Does::Event | Does::Confirm | Does::Wait | Does::Close(_) | Does::Skip => [0; 3],
    }
}

/// NE: five states × 256 opcodes × six kinds.
#[test]
fn every_message_in_every_state_of_the_ne_with_a_key() {
    use NeState::{AwaitInit, Closed, Pending, Ready, Tentative};
    for state in [AwaitInit, Tentative, Pending, Ready, Closed] {
        for (opcode, kind) in (0..=255).flat_map(|code| KINDS.map(|kind| (Opcode(code), kind))) {
            let row = format!("{state:?} × {opcode} × {kind:?}");
            let (mut ne, mut next) = ne_in(state);
            let before = ne.session.started().count();
            ne.input(&form(opcode, kind, 0x55aa, next));
            let mut does = expected_ne(state, opcode, kind);
            let mut events = ne.events();
            if does == Does::Wait {
                // All that waited comes as in an open session.
                assert!(matches!(events[..], [NeEvent::Init { .. }]), "{row}: {events:?}");
                assert_eq!(ne.output(), [0; 0], "{row}");
                if let NeEvent::Init { token } = events[0] {
                    ne.session.respond(token, &[]);
                    ne.session.handle_timeout(ne.now);
                }
                does = expected_ne(Ready, opcode, kind);
                events = ne.events();
            }
            let mut output = ne.output();
            if state == Pending {
                let answer = verified(&output)[0].0;
                assert_eq!((answer.opcode, answer.request_id), (Opcode::KEEPALIVE_ACK, 2), "{row}");
                output.drain(..40);
            }
            check(does, opcode, kind, Direction::ToNe, &output, &row);
            let told: Vec<_> = events.iter().filter(|event| !is_harmless(event)).collect();
            match does {
                Does::Event => assert!(told.len() == 1 && !matches!(told[0], NeEvent::Init { .. }), "{row}: {told:?}"),
                Does::Confirm => assert!(matches!(told[..], [NeEvent::Init { .. }]), "{row}: {told:?}"),
                Does::Ack | Does::Wait | Does::Reject(_) | Does::AskAgain(_) | Does::Close(_) | Does::Skip => {
                    assert!(told.is_empty(), "{row}: {told:?}");
                }
            }
            let closes = matches!(does, Does::Close(_));
            assert_eq!(ne.closed().is_some(), closes || state == Closed, "{row}");
            assert_eq!(ne.session.is_ready(), [Pending, Ready].contains(&state), "{row}");
            assert_eq!(ne.session.started().count(), before, "{row}");
            if closes {
                continue;
            }
            assert_eq!(kinds_of(&ne.rejected()), counted(does), "{row}");
            // A failure advances nothing, and what counts is used up.
            if ![AwaitInit, Closed].contains(&state) && opcode != Opcode::INIT {
                next += u64::from(kind == Kind::Fresh);
                ne.input(&signed(Opcode::NOOP, 1, next, &[]));
                assert_eq!(kinds_of(&ne.rejected()), counted(does), "{row}, and then what follows");
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SeState {
    Opening,
    Ready,
    /// A START is not answered, and what comes has its request id.
    Asking,
    Closed,
}

fn expected_se(state: SeState, opcode: Opcode, kind: Kind) -> Does {
    let rejected = rejection(kind, false);
    match state {
        SeState::Opening if opcode == Opcode::INIT_ACK => rejected.map_or(Does::Event, Does::Reject),
        SeState::Opening => Does::Close(Flags::NONE),
        SeState::Asking if opcode == Opcode::START_ACK => rejected.map_or(Does::Event, Does::AskAgain),
        SeState::Ready | SeState::Asking => match rejected {
            Some(cause) => Does::Reject(cause),
            None if opcode == Opcode::KEEPALIVE => Does::Event,
            None => Does::Skip,
        },
        SeState::Closed => Does::Skip,
    }
}

/// SE: four states × 256 opcodes × six kinds.
#[test]
fn every_message_in_every_state_of_the_se_with_a_key() {
    use SeState::{Asking, Closed, Opening, Ready};
    for state in [Opening, Ready, Asking, Closed] {
        for (opcode, kind) in (0..=255).flat_map(|code| KINDS.map(|kind| (Opcode(code), kind))) {
            let row = format!("{state:?} × {opcode} × {kind:?}");
            let mut se = if state == Opening { Se::secured() } else { Se::joined() };
            let sent = verified(&se.output());
            let (mut request_id, mut next) = (0x55aa, TO_SE + 2);
            match state {
                Opening => (request_id, next) = (sent[0].0.request_id, TO_SE),
                Ready => {}
                Asking => {
                    se.session.start(&[offer("tcp/80")]);
                    request_id = verified(&se.output())[0].0.request_id;
                }
                Closed => {
                    se.session.close(CloseReason::Shutdown);
                    se.events();
                }
            }
            se.input(&form(opcode, kind, request_id, next));
            let does = expected_se(state, opcode, kind);
            let mut output = se.output();
            // The table's request id, in place of the one that was asked with.
            if output.len() >= 20 && output[6..8] == request_id.to_be_bytes() && !matches!(does, Does::Close(_)) {
                output = with_request_id(&output);
            }
            let events = se.events();
            let told: Vec<_> =
                events.iter().filter(|event| !matches!(event, SeEvent::Notice(_) | SeEvent::Closed(_))).collect();
            let opens = state == Opening && does == Does::Event;
            if opens {
                assert_eq!((told[..].len(), told[0]), (1, &SeEvent::Ready), "{row}");
                assert_eq!(verified(&output)[0].0.opcode, Opcode::KEEPALIVE, "{row}: something fresh at once");
            } else {
                check(does, opcode, kind, Direction::ToSe, &output, &row);
                match (does, state) {
                    (Does::Event, Asking) if opcode == Opcode::START_ACK => {
                        // The message's unit has no meaning in a success.
                        assert!(
                            matches!(told[..], [SeEvent::Acked { failed, .. }] if failed.is_empty()),
                            "{row}: {told:?}"
                        );
                    }
                    (Does::Event, _) => assert!(matches!(told[..], [SeEvent::HealthQuery { .. }]), "{row}: {told:?}"),
                    _ => assert!(told.is_empty(), "{row}: {told:?}"),
                }
            }
            let closes = matches!(does, Does::Close(_));
            assert_eq!(se.closed().is_some(), closes || state == Closed, "{row}");
            assert_eq!(se.session.is_ready(), [Ready, Asking].contains(&state) || opens, "{row}");
            if closes {
                continue;
            }
            assert_eq!(kinds_of(&se.rejected()), counted(does), "{row}");
            if [Ready, Asking].contains(&state) {
                se.input(&signed(Opcode::NOOP, 1, next + u64::from(kind == Kind::Fresh), &[]));
                assert_eq!(kinds_of(&se.rejected()), counted(does), "{row}, and then what follows");
            }
        }
    }
}

/// The same message with the request id of the table, signed anew.
fn with_request_id(bytes: &[u8]) -> Vec<u8> {
    let (header, units) = verified(bytes).swap_remove(0);
    let flags = Flags(header.flags.0 & !Flags::AUTH_CREDENTIAL_PROVIDED.0 & !Flags::BASIC_PAYLOAD.0);
    signed_by(&key(), header.opcode, flags, (0x55aa, header.seq_num), &units)
}
