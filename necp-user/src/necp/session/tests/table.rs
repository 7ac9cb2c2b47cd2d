//! Every (state, event) of both machines: what is answered, and which state follows.

use super::*;

/// What a machine does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Answers success.
    Ack,
    /// Answers F_Error, with all units.
    Fail,
    /// Answers F_Error, without units.
    Refuse,
    /// F_Error without units, if there is an answer, and closes.
    Close,
    /// F_Error | F_Protocol_Version_Mismatch.
    Mismatch,
    /// Gives the caller an event, and answers when the caller does.
    Event,
    /// Puts it back until INIT_ACK is sent.
    Wait,
    /// Nothing.
    Skip,
}

use Does::{Ack, Close, Event, Fail, Mismatch, Refuse, Skip, Wait};

/// The forms of a message: none, one well-formed unit, one unit that fails, five bytes, another version.
const FORMS: [&str; 5] = ["empty", "unit", "bad unit", "odd", "version"];

fn form(opcode: Opcode, form: &str, request_id: u16) -> Vec<u8> {
    let unit = match opcode {
        Opcode::INIT | Opcode::INIT_ACK => Unit::default(),
        Opcode(0x20..=0x27) => Unit([1, 60, 0, 0, 0, 0, 6, 80]),
        _ => offer("tcp/80").unit(),
    };
    match form {
        "empty" => message(opcode, Flags::NONE, request_id, &[]),
        "unit" => message(opcode, Flags::NONE, request_id, &[unit]),
        "bad unit" => message(opcode, Flags::NONE, request_id, &[Unit([0xffff_ffff; 8])]),
        "odd" => {
            let mut bytes = message(opcode, Flags::BASIC_PAYLOAD, request_id, &[]);
            bytes[19] = 5;
            [bytes, vec![0; 5]].concat()
        }
        _ => {
            let mut bytes = message(opcode, Flags::NONE, request_id, &[unit]);
            bytes[4] = 2;
            bytes
        }
    }
}

/// What an NE that is ready does, by opcode, in the order of [`FORMS`]; the draft's section decides.
fn ready_ne(opcode: Opcode) -> [Does; 5] {
    match opcode {
        Opcode::NOOP => [Skip, Skip, Skip, Skip, Mismatch],
        Opcode::INIT => [Refuse, Event, Fail, Refuse, Mismatch],
        Opcode::KEEPALIVE => [Ack, Ack, Fail, Refuse, Mismatch],
        Opcode::START | Opcode::STOP | Opcode::EXCEPTION_ADD | Opcode::EXCEPTION_DEL | Opcode::EXCEPTION_QUERY => {
            [Refuse, Event, Fail, Refuse, Mismatch]
        }
        Opcode::EXCEPTION_RESET => [Event, Event, Event, Refuse, Mismatch],
        // KEEPALIVE_ACK to nothing outstanding, what flows the other way, what is reserved.
        _ => [Skip, Skip, Skip, Skip, Mismatch],
    }
}

fn expected_ne(state: &str, opcode: Opcode, form: usize) -> Does {
    let ready = ready_ne(opcode)[form];
    match state {
        "await" if ready == Mismatch || opcode == Opcode::INIT => ready,
        "await" => Close,
        // The INIT in progress absorbs a repeated one.
        "pending" if opcode == Opcode::INIT && ready == Event => Skip,
        "pending" if ready == Mismatch || opcode == Opcode::INIT => ready,
        "pending" => Wait,
        "ready" => ready,
        _ => Skip,
    }
}

fn ne_in(state: &str) -> Ne {
    let mut ne = match state {
        "await" | "closed" => Ne::new(),
        "pending" => {
            let mut ne = Ne::new();
            ne.input(&init(1));
            assert!(matches!(ne.events()[..], [NeEvent::Init { .. }]));
            ne
        }
        _ => Ne::ready(),
    };
    if state == "closed" {
        ne.session.close(CloseReason::ClosedByPeer);
        ne.events();
    }
    ne
}

/// What was done, from what can be seen of it.
fn seen(opcode: Opcode, output: &[u8], event: bool, closed: bool, waits: bool) -> Does {
    let sent = messages(output);
    let error = Flags::ERROR;
    match &sent[..] {
        _ if closed => {
            assert_eq!(sent.len(), usize::from(opcode.answer().is_some()));
            assert!(sent.iter().all(|(header, units)| header.flags == error && units.is_empty()));
            Close
        }
        [] if event => Event,
        [] if waits => Wait,
        [] => Skip,
        [(header, units)] => {
            assert!(!event);
            assert_eq!(header.request_id, 0x55aa);
            assert_eq!(header.opcode, opcode.answer().unwrap_or(opcode));
            match (header.flags.0 & !1, units.len()) {
                (0, _) => Ack,
                (4, 0) => Refuse,
                (4, _) => Fail,
                (12, 0) => Mismatch,
                other => panic!("{other:?}"),
            }
        }
        more => panic!("{more:?}"),
    }
}

/// NE: four states × 256 opcodes × five forms.
#[test]
fn every_message_in_every_state_of_the_ne() {
    for state in ["await", "pending", "ready", "closed"] {
        for (opcode, index) in (0..=255).flat_map(|code| (0..FORMS.len()).map(move |index| (Opcode(code), index))) {
            let mut ne = ne_in(state);
            ne.input(&form(opcode, FORMS[index], 0x55aa));
            let events = ne.events();
            let event = events.iter().any(|event| !matches!(event, NeEvent::Notice(_) | NeEvent::Closed(_)));
            let closed = events.iter().any(|event| matches!(event, NeEvent::Closed(_)));
            let waits = state != "closed" && !ne.session.wants_input();
            let output = ne.output();
            let does = seen(opcode, &output, event, closed, waits);
            let row = format!("{state} × {opcode} × {}", FORMS[index]);
            assert_eq!(does, expected_ne(state, opcode, index), "{row}");
            let ready = ne.session.is_ready();
            assert_eq!(ready, state == "ready" && !(opcode == Opcode::INIT && does == Event), "{row}");
        }
    }
}

/// What an SE that is ready does with nothing of its own outstanding, in the order of [`FORMS`].
fn ready_se(opcode: Opcode) -> [Does; 5] {
    match opcode {
        Opcode::KEEPALIVE => [Ack, Event, Fail, Refuse, Mismatch],
        _ => [Skip, Skip, Skip, Skip, Mismatch],
    }
}

/// SE: three states × 256 opcodes × five forms.
#[test]
fn every_message_in_every_state_of_the_se() {
    for state in ["opening", "ready", "closed"] {
        for (opcode, index) in (0..=255).flat_map(|code| (0..FORMS.len()).map(move |index| (Opcode(code), index))) {
            let mut se = if state == "ready" { Se::ready() } else { Se::new() };
            se.output();
            if state == "closed" {
                se.session.close(CloseReason::Shutdown);
                se.events();
            }
            se.input(&form(opcode, FORMS[index], 0x55aa));
            let events = se.events();
            let event = events.iter().any(|event| matches!(event, SeEvent::HealthQuery { .. }));
            let closed = events.iter().any(|event| matches!(event, SeEvent::Closed(_)));
            let ready = ready_se(opcode)[index];
            let expected = match state {
                "opening" if ready == Mismatch || opcode == Opcode::INIT_ACK => ready,
                "opening" => Close,
                "ready" => ready,
                _ => Skip,
            };
            let row = format!("{state} × {opcode} × {}", FORMS[index]);
            assert_eq!(seen(opcode, &se.output(), event, closed, false), expected, "{row}");
            assert_eq!(se.session.is_ready(), state == "ready", "{row}");
        }
    }
}

/// The timers of every state: what a year of silence does.
#[test]
fn every_state_ends_in_silence_as_it_must() {
    let year = Duration::from_secs(365 * 86_400);
    let config = SessionConfig::default();
    let table = [
        ("await", Some(CloseReason::InitDeadline(config.init_deadline))),
        // The caller's turn: nobody but the caller can end it.
        ("pending", None),
        ("ready", Some(CloseReason::DeadPeer(3))),
        ("closed", Some(CloseReason::ClosedByPeer)),
    ];
    for (state, reason) in table {
        let mut ne = ne_in(state);
        ne.pass(year);
        assert_eq!(ne.closed(), reason, "{state}");
    }
    let mut opening = Se::new();
    opening.pass(year);
    assert_eq!(opening.closed(), Some(CloseReason::InitUnanswered { attempts: 5 }));
    let mut ready = Se::ready();
    ready.pass(year);
    assert_eq!(ready.closed(), Some(CloseReason::DeadPeer(3)));
}
