//! The messages written by hand (`necp/vectors/messages.txt`) through both machines.

use super::*;
use crate::necp::vectors::{Vector, all, named};
use crate::necp::wire::HEADER_LEN;

/// What came of a stream: operations in their order, however they were cut into events; other events; output. How these
/// two interleave depends on when the caller comes to answer, so they are compared sorted.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    operations: Vec<Operation>,
    events: Vec<String>,
    output: Vec<u8>,
}

impl Seen {
    /// A caller that does everything at once, and has no exceptions to list.
    fn of_ne(&mut self, ne: &mut Ne) {
        while let Some(event) = ne.session.poll_event() {
            match event {
                NeEvent::Init { token } | NeEvent::Reset { token } => {
                    self.events.push(if ne.session.is_ready() { "Reset".into() } else { "Init".into() });
                    ne.session.respond(token, &[]);
                }
                NeEvent::Operations { token, operations } => {
                    self.operations.extend(operations);
                    ne.session.respond(token, &[]);
                }
                NeEvent::Query { token, filter } => {
                    self.events.push(format!("{filter:?}"));
                    let _ = ne.session.list(token, 0);
                }
                other => self.events.push(format!("{other:?}")),
            }
            ne.session.handle_timeout(ne.now);
        }
        self.output.extend(ne.output());
    }

    fn of_se(&mut self, se: &mut Se) {
        while let Some(event) = se.session.poll_event() {
            if let SeEvent::HealthQuery { token, queries } = &event {
                se.session.answer_health(*token, &vec![Some(100); queries.len()]);
            }
            self.events.push(format!("{event:?}").replace(|digit: char| digit.is_ascii_digit(), ""));
        }
        self.output.extend(se.output());
    }
}

fn ne_sees(opened: bool, pieces: &[&[u8]]) -> Seen {
    let mut ne = if opened { Ne::ready() } else { Ne::new() };
    let mut seen = Seen::default();
    for piece in pieces {
        ne.input(piece);
        seen.of_ne(&mut ne);
    }
    seen
}

/// Everything of it, sorted where the order means nothing.
fn sorted(mut seen: Seen) -> (Vec<Operation>, Vec<String>, Vec<Vec<u8>>) {
    let mut answers = Vec::new();
    let mut rest = &seen.output[..];
    while let Some(header) = rest.first_chunk() {
        let length = HEADER_LEN + Header::decode(header).expect("output is framed").payload_len as usize;
        let (message, after) = rest.split_at(length);
        answers.push(message.to_vec());
        rest = after;
    }
    assert!(rest.is_empty(), "output ends with a whole message");
    answers.sort_unstable();
    seen.events.sort_unstable();
    (seen.operations, seen.events, answers)
}

fn se_sees(pieces: &[&[u8]]) -> Seen {
    let mut se = Se::ready();
    let mut seen = Seen::default();
    for piece in pieces {
        se.input(piece);
        seen.of_se(&mut se);
    }
    seen
}

/// Requests written by hand are answered by answers written by hand.
#[test]
fn requests_are_answered_as_written() {
    let mut answered = 0;
    for vector in all() {
        let Some(answer) = vector.answer else { continue };
        let (request, answer) = (vector.bytes(), named(answer).bytes());
        if vector.sender != "NE>SE" {
            let opened = !vector.name.starts_with("init");
            let seen = if vector.is_wide() {
                let asks = named("keepalive-extension").bytes();
                let seen = ne_sees(opened, &[&asks, &request]).output;
                let told = named("keepalive-ack-extension").bytes();
                seen.strip_prefix(&told[..]).expect("the NE speaks the extension").to_vec()
            } else {
                ne_sees(opened, &[&request]).output
            };
            assert_eq!(seen, answer, "{} to the NE", vector.name);
            answered += 1;
        }
        if vector.sender != "SE>NE" {
            assert_eq!(se_sees(&[&request]).output, answer, "{} to the SE", vector.name);
            answered += 1;
        }
    }
    assert!(answered > 40, "{answered}");
}

/// All that an unauthenticated peer of this role sends, as one stream; but INIT, for those that come while one is with
/// the caller are one (§5.4).
fn stream(except: &str) -> Vec<u8> {
    let sent = all()
        .into_iter()
        .filter(|vector| vector.sender != except && !vector.is_authenticated() && !vector.name.starts_with("init"));
    sent.flat_map(|vector: Vector| vector.bytes()).collect()
}

/// TCP may cut anywhere: the same operations in the same order, the same events, the same answers.
#[test]
fn a_stream_cut_at_every_byte_is_the_same_to_the_ne() {
    let stream = stream("NE>SE");
    let whole = sorted(ne_sees(true, &[&stream]));
    assert!(whole.0.len() >= 15 && whole.2.len() >= 20);
    for at in 0..=stream.len() {
        assert!(sorted(ne_sees(true, &[&stream[..at], &stream[at..]])) == whole, "cut at {at}");
    }
    assert_eq!(sorted(ne_sees(true, &stream.chunks(1).collect::<Vec<_>>())), whole);
}

/// The same for the SE.
#[test]
fn a_stream_cut_at_every_byte_is_the_same_to_the_se() {
    let stream = stream("SE>NE");
    let whole = sorted(se_sees(&[&stream]));
    assert!(!whole.1.is_empty() && whole.2.len() >= 5);
    for at in 0..=stream.len() {
        assert!(sorted(se_sees(&[&stream[..at], &stream[at..]])) == whole, "cut at {at}");
    }
    assert_eq!(sorted(se_sees(&stream.chunks(1).collect::<Vec<_>>())), whole);
}
