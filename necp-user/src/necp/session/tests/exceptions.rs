//! Exceptions on the wire (§5.7), both roles.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::pairs::{Pair, seconds};
use super::*;

/// A caller's list, in the place of the control plane's: what the SE has installed, or as many as a test says.
#[derive(Debug, Default)]
pub(super) struct List {
    pub(super) own: BTreeMap<Flows, Exception>,
    pub(super) many: u32,
    listings: BTreeMap<Token, Vec<Listed>>,
    at: u32,
}

const INSTALLER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 11));

impl List {
    pub(super) fn operate(&mut self, operation: &Operation) {
        match operation {
            Operation::Except(exception) => _ = self.own.insert(exception.flows, *exception),
            Operation::Unexcept(flows) => _ = self.own.remove(flows),
            Operation::Start(_) | Operation::Stop(_) => panic!("{operation:?}"),
        }
    }

    pub(super) fn query(&mut self, token: Token, filter: Filter) -> u32 {
        let listed = |one: &Exception| Listed { scope: one.scope, installer: INSTALLER, flows: one.flows };
        self.at = 0;
        let listing: Vec<_> = self.own.values().map(listed).filter(|entry| filter.matches(entry)).collect();
        let count = listing.len() as u32;
        self.listings.insert(token, listing);
        self.many.max(count)
    }

    pub(super) fn more(&mut self, token: Token, max: usize) -> Vec<Listed> {
        if self.many == 0 {
            let listing = self.listings.get_mut(&token).expect("a query of this token");
            return listing.drain(..max.min(listing.len())).collect();
        }
        let from = self.at;
        self.at += max as u32;
        (from..self.at).map(nth).collect()
    }
}

/// One of a long list.
fn nth(index: u32) -> Listed {
    Listed { scope: Scope::Global, installer: INSTALLER, flows: flows(0x0100_0000 + index, 80) }
}

fn flows(source: u32, port: u16) -> Flows {
    Flows { source: IpAddr::V4(source.into()).into(), protocol: 6, port, ..Flows::ALL }
}

fn exception(source: u32, ttl: u32) -> Exception {
    Exception { scope: Scope::Local, ttl, flows: flows(source, 80) }
}

/// Two entries as they stand in every vector below: 203.0.113.0/24 → any, tcp/80, local, 60 s; and any → 198.51.100.7,
/// any, global, static.
const LOCAL: &str = "00000001 0000003c cb007100 00000018 00000000 00000000 00000006 00000050";
const GLOBAL: &str = "00000002 00000000 00000000 00000000 c6336407 00000020 00000000 00000000";
/// Prefix length 33.
const BAD: &str = "00000001 0000003c cb007100 00000021 00000000 00000000 00000006 00000050";

fn local() -> Exception {
    let flows = Flows { source: "203.0.113.0/24".parse().unwrap(), protocol: 6, port: 80, ..Flows::ALL };
    Exception { scope: Scope::Local, ttl: 60, flows }
}

fn global() -> Exception {
    let flows = Flows { destination: "198.51.100.7/32".parse().unwrap(), ..Flows::ALL };
    Exception { scope: Scope::Global, ttl: 0, flows }
}

/// An NE with the first entry, after a request.
fn asked(request: &str) -> (Ne, List) {
    let (mut ne, mut list) = (Ne::ready(), List::default());
    list.operate(&Operation::Except(local()));
    ne.input(&hex(request));
    serve(&mut ne, &mut list, &[]);
    (ne, list)
}

/// Does what the events ask for, except for the flows in `failing`.
fn serve(ne: &mut Ne, list: &mut List, failing: &[Flows]) {
    while let Some(event) = ne.session.poll_event() {
        match event {
            NeEvent::Operations { token, operations } => {
                let mut failed = Vec::new();
                for (index, operation) in operations.iter().enumerate() {
                    match operation {
                        Operation::Except(Exception { flows, .. }) | Operation::Unexcept(flows)
                            if failing.contains(flows) =>
                        {
                            failed.push(index);
                        }
                        Operation::Start(_) | Operation::Stop(_) => {}
                        operation => list.operate(operation),
                    }
                }
                ne.session.respond(token, &failed);
            }
            NeEvent::Init { token } => ne.session.respond(token, &[]),
            NeEvent::Reset { token } => {
                list.own.clear();
                ne.session.respond(token, &[]);
            }
            NeEvent::Query { token, filter } => _ = ne.session.list(token, list.query(token, filter)),
            NeEvent::ListMore { token, max } => ne.session.list_more(token, &list.more(token, max)),
            NeEvent::Notice(_) | NeEvent::Health(_) | NeEvent::Closed(_) => {}
        }
    }
}

/// The NE's side of all eight messages, byte by byte: request, answer, and how many entries there are then.
#[test]
fn what_the_ne_answers() {
    let unit = |opcode: &str, units: &[&str]| {
        let length = 32 * units.len();
        let flags = u8::from(!units.is_empty());
        format!("414a 00{flags:02x} 01 {opcode} 0102 0000000000000000 {length:08x} {}", units.concat())
    };
    let failed = |opcode: &str, units: &[&str]| {
        let (flags, length) = (4 + u8::from(!units.is_empty()), 32 * units.len());
        format!("414a 00{flags:02x} 01 {opcode} 0102 0000000000000000 {length:08x} {}", units.concat())
    };
    let listed_local = "00000001 0a00000b cb007100 00000018 00000000 00000000 00000006 00000050";
    let zero = "00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000";
    let table = [
        ("ADD, one there already (§5.7.1)", unit("20", &[LOCAL, GLOBAL]), unit("21", &[]), 2),
        ("ADD: exactly the failed units (§5.7.2)", unit("20", &[BAD, GLOBAL, BAD]), failed("21", &[BAD, BAD]), 2),
        ("ADD without a unit", unit("20", &[]), failed("21", &[]), 1),
        ("DEL (§5.7.3)", unit("22", &[LOCAL]), unit("23", &[]), 0),
        ("DEL of what is not there succeeds", unit("22", &[GLOBAL]), unit("23", &[]), 1),
        ("DEL: exactly the failed units (§5.7.4)", unit("22", &[LOCAL, BAD]), failed("23", &[BAD]), 0),
        ("DEL without a unit", unit("22", &[]), failed("23", &[]), 1),
        ("RESET (§5.7.5)", unit("24", &[]), unit("25", &[]), 0),
        ("RESET with a payload that nobody needs", unit("24", &[LOCAL]), unit("25", &[]), 0),
        ("QUERY of everything (§5.7.7)", unit("26", &[zero]), unit("27", &[listed_local]), 1),
        (
            "QUERY of nothing that is there",
            unit("26", &[&zero.replace("00000000 00000000 0", "00000002 00000000 0")]),
            unit("27", &[]),
            1,
        ),
        (
            "QUERY of an installer",
            unit("26", &[&zero.replacen("00000000 00000000", "00000000 0a00000b", 1)]),
            unit("27", &[listed_local]),
            1,
        ),
        (
            "QUERY with a filter that is none",
            unit("26", &[&zero.replacen("00000000", "00000003", 1)]),
            failed("27", &[&zero.replacen("00000000", "00000003", 1)]),
            1,
        ),
        ("QUERY without a unit", unit("26", &[]), failed("27", &[]), 1),
        ("QUERY with two", unit("26", &[zero, zero]), failed("27", &[]), 1),
    ];
    for (what, request, answer, left) in table {
        let (mut ne, list) = asked(&request);
        assert_eq!(ne.output(), hex(&answer), "{what}");
        assert_eq!((list.own.len(), ne.closed()), (left, None), "{what}");
    }
    // What an NE receives only from somebody who has mistaken his role: skipped.
    for opcode in ["21", "23", "25", "27"] {
        assert_eq!(asked(&unit(opcode, &[LOCAL])).0.output(), [0; 0]);
    }
}

/// The SE's side of all eight messages, byte by byte.
#[test]
fn what_the_se_asks() {
    let mut se = Se::ready();
    let filter = Filter { scope: Some(Scope::Global), installer: Some(INSTALLER), port: Some(80), ..Filter::default() };
    let ids = [
        se.session.except_add(&[local(), global()]),
        se.session.except_del(&[local().flows]),
        se.session.except_reset(),
        se.session.except_query(filter),
    ];
    let sent = messages(&se.output());
    let wire: Vec<u16> = sent.iter().map(|(header, _)| header.request_id).collect();
    let request = |index: usize, opcode: &str, flags: &str, units: &[&str]| {
        let length = 32 * units.len();
        hex(&format!("414a {flags} 01 {opcode} {:04x} 0000000000000000 {length:08x} {}", wire[index], units.concat()))
    };
    let encoded = |index: usize| message(sent[index].0.opcode, Flags::NONE, wire[index], &sent[index].1);
    assert_eq!(encoded(0), request(0, "20", "0001", &[LOCAL, GLOBAL]));
    let del = "00000000 00000000 cb007100 00000018 00000000 00000000 00000006 00000050";
    assert_eq!(encoded(1), request(1, "22", "0001", &[del]));
    assert_eq!(encoded(2), request(2, "24", "0000", &[]));
    let asks = "00000002 0a00000b 00000000 00000000 00000000 00000000 00000000 00000050";
    assert_eq!(encoded(3), request(3, "26", "0001", &[asks]));

    // The answers, in another order; what is listed and was not asked for is discarded.
    let entry = "00000002 0a00000b 00000000 00000000 c6336407 00000020 00000006 00000050";
    let other = "00000001 0a00000b 00000000 00000000 c6336407 00000020 00000006 00000050";
    se.input(&request(3, "27", "0001", &[entry, other, BAD]));
    se.input(&request(2, "25", "0000", &[]));
    se.input(&request(1, "23", "0000", &[]));
    se.input(&request(0, "21", "0005", &[GLOBAL]));
    let listed =
        Listed { scope: Scope::Global, installer: INSTALLER, flows: Flows { protocol: 6, port: 80, ..global().flows } };
    let expected = [
        SeEvent::Listed { id: ids[3], entries: vec![listed], last: true },
        SeEvent::Reset { id: ids[2], done: true },
        SeEvent::Excepted { id: ids[1], failed: vec![] },
        SeEvent::Excepted { id: ids[0], failed: vec![global().flows] },
        SeEvent::Notice(Notice::BadEntry),
    ];
    assert_eq!(se.events(), expected);
    assert_eq!((se.session.counters().discarded_entries, se.closed()), (2, None));
}

/// Answers that fail, or make no sense, to each of the four requests; and those to something else.
#[test]
fn what_the_se_makes_of_answers() {
    type Ask = fn(&mut SeSession) -> RequestId;
    type Fails = fn(RequestId) -> SeEvent;
    let add: (Ask, Fails) = (
        |se| se.except_add(&[local(), global(), Exception { ttl: 9, ..local() }]),
        |id| SeEvent::Excepted { id, failed: vec![global().flows, local().flows] },
    );
    let del: (Ask, Fails) =
        (|se| se.except_del(&[local().flows]), |id| SeEvent::Excepted { id, failed: vec![local().flows] });
    let reset: (Ask, Fails) = (|se| se.except_reset(), |id| SeEvent::Reset { id, done: false });
    let query: (Ask, Fails) = (|se| se.except_query(Filter::default()), |id| SeEvent::ListFailed { id });
    for (index, (ask, fails)) in [add, del, reset, query].into_iter().enumerate() {
        for version in [1, 9] {
            let mut se = Se::ready();
            let id = ask(&mut se.session);
            let (sent, _) = messages(&se.output()).pop().unwrap();
            let answer = sent.opcode.answer().unwrap();
            for opcode in (0x20..=0x27).map(Opcode).filter(|opcode| *opcode != answer) {
                se.input(&message(opcode, Flags::NONE, sent.request_id, &[]));
            }
            se.input(&message(answer, Flags::ERROR, sent.request_id ^ 1, &[]));
            let seen = se.events();
            assert!(seen.iter().all(|event| matches!(event, SeEvent::Notice(_))), "{seen:?}");
            let flags = if version == 1 { Flags::ERROR } else { Flags::ERROR.with(Flags::PROTOCOL_VERSION_MISMATCH) };
            let mut bytes = message(answer, flags, sent.request_id, &[]);
            bytes[4] = version;
            se.input(&bytes);
            se.input(&bytes);
            let seen: Vec<_> = se.events().into_iter().filter(|event| !matches!(event, SeEvent::Notice(_))).collect();
            assert_eq!(seen, [fails(id)], "request {index}, version {version}");
        }
    }
}

/// Nothing to add or to delete: no message, and done.
#[test]
fn nothing_is_asked_for_nothing() {
    let mut se = Se::ready();
    let ids = [se.session.except_add(&[]), se.session.except_del(&[])];
    assert_eq!(se.output(), [0; 0]);
    assert_eq!(se.events(), ids.map(|id| SeEvent::Excepted { id, failed: vec![] }));
}

/// However TCP cuts the stream, the same is done and answered.
#[test]
fn a_stream_split_anywhere_is_the_same() {
    let unit = |text: &str| Unit::decode(&hex(text).try_into().unwrap());
    let stream = [
        message(Opcode::EXCEPTION_ADD, Flags::NONE, 1, &[unit(LOCAL), unit(BAD), unit(GLOBAL)]),
        message(Opcode::EXCEPTION_QUERY, Flags::NONE, 2, &[Unit::default()]),
        message(Opcode::EXCEPTION_DEL, Flags::NONE, 3, &[unit(LOCAL)]),
        message(Opcode::EXCEPTION_QUERY, Flags::NONE, 4, &[Unit([2, 0, 0, 0, 0, 0, 0, 0])]),
        message(Opcode::EXCEPTION_RESET, Flags::NONE, 5, &[]),
        message(Opcode::EXCEPTION_QUERY, Flags::NONE, 6, &[Unit::default()]),
        message(Opcode::EXCEPTION_QUERY, Flags::NONE, 7, &[Unit([9; 8])]),
    ]
    .concat();
    let run = |pieces: &[&[u8]]| {
        let (mut ne, mut list) = (Ne::ready(), List::default());
        for piece in pieces {
            ne.input(piece);
            serve(&mut ne, &mut list, &[]);
        }
        let mut answers = messages(&ne.output());
        answers.sort_by_key(|(header, _)| header.request_id);
        (answers, *ne.session.counters())
    };
    let whole = run(&[&stream]);
    let counts: Vec<usize> = whole.0.iter().map(|(_, units)| units.len()).collect();
    assert_eq!(counts, [1, 2, 0, 1, 0, 0, 1]);
    for at in 0..=stream.len() {
        assert_eq!(run(&[&stream[..at], &stream[at..]]), whole, "split at {at}");
    }
    assert_eq!(run(&stream.chunks(1).collect::<Vec<_>>()), whole);
}

/// An ACK follows the caller's answer, and names the units that the caller could not carry out, as they came.
#[test]
fn acks_wait_for_the_caller() {
    let (mut ne, mut list) = (Ne::ready(), List::default());
    // Host bits that are not 0 stand for the same prefix, and are repeated as they came.
    let sent = Unit([1, 60, 0xcb00_71ff, 24, 0, 0, 6, 80]);
    ne.input(&message(Opcode::EXCEPTION_ADD, Flags::NONE, 1, &[global().unit(), sent]));
    ne.input(&message(Opcode::EXCEPTION_RESET, Flags::NONE, 2, &[]));
    assert_eq!(ne.output(), [0; 0]);
    serve(&mut ne, &mut list, &[local().flows]);
    let expected = [
        message(Opcode::EXCEPTION_ADD_ACK, Flags::ERROR, 1, &[sent]),
        message(Opcode::EXCEPTION_RESET_ACK, Flags::NONE, 2, &[]),
    ];
    assert_eq!(ne.output(), expected.concat());
    ne.input(&message(Opcode::EXCEPTION_RESET, Flags::NONE, 3, &[]));
    let Some(NeEvent::Reset { token }) = ne.session.poll_event() else { panic!("a reset") };
    ne.session.respond(token, &[0]);
    assert_eq!(ne.output(), message(Opcode::EXCEPTION_RESET_ACK, Flags::ERROR, 3, &[]));
}

/// A life of a list on the virtual clock, whole or byte by byte.
#[test]
fn a_pair_adds_lists_deletes_and_resets() {
    for piece in [usize::MAX, 1, 7] {
        let mut pair = Pair::new(SessionConfig::default());
        pair.piece = piece;
        let add = pair.se.except_add(&[local(), global()]);
        let all = pair.se.except_query(Filter::default());
        let del = pair.se.except_del(&[local().flows]);
        let some = pair.se.except_query(Filter { scope: Some(Scope::Local), ..Filter::default() });
        let again = pair.se.except_query(Filter { protocol: Some(0), ..Filter::default() });
        let reset = pair.se.except_reset();
        let none = pair.se.except_query(Filter::default());
        pair.settle();
        let done = |id| SeEvent::Excepted { id, failed: vec![] };
        let listed = |id, of: &[Exception]| {
            let entries = of.iter().map(|one| Listed { scope: one.scope, installer: INSTALLER, flows: one.flows });
            SeEvent::Listed { id, entries: entries.collect(), last: true }
        };
        let mut log = pair.se_log;
        assert_eq!(log.remove(0), SeEvent::Ready);
        let expected = [
            done(add),
            listed(all, &[global(), local()]),
            done(del),
            listed(some, &[]),
            listed(again, &[global()]),
            SeEvent::Reset { id: reset, done: true },
            listed(none, &[]),
        ];
        assert_eq!(log.len(), expected.len());
        assert!(expected.iter().all(|event| log.contains(event)), "{log:?}");
        assert!(pair.list.own.is_empty());
    }
}

/// Many are sent as several messages and reported once.
#[test]
fn many_are_added() {
    let mut pair = Pair::new(SessionConfig::default());
    let many: Vec<Exception> = (1..=10_000).map(|index| exception(index, 60)).collect();
    let id = pair.se.except_add(&many);
    pair.settle();
    assert_eq!(pair.se_log, [SeEvent::Ready, SeEvent::Excepted { id, failed: vec![] }]);
    assert_eq!((pair.list.own.len(), pair.se.counters().messages_out), (10_000, 1 + 3));
}

/// What a list may make an NE or an SE hold: twice the output that waits for the peer, and what waits for the caller.
const BOUND: usize = 1024 * 1024;

/// A million entries go through, and neither side holds more than a piece of them.
#[test]
fn a_million_entries_are_listed_in_bounded_memory() {
    const MANY: u32 = 1_000_000;
    let mut pair = Pair::new(SessionConfig::default());
    pair.list.many = MANY;
    pair.settle();
    let id = pair.se.except_query(Filter { scope: Some(Scope::Global), ..Filter::default() });
    let (mut seen, mut ended, mut worst) = (0, false, 0);
    while !ended {
        pair.ne_events();
        assert!(pair.carry() || pair.se.wants_input(), "{seen} entries, and nothing moves");
        worst = worst.max(pair.ne.held_bytes()).max(pair.se.held_bytes());
        while let Some(event) = pair.se.poll_event() {
            let SeEvent::Listed { id: of, entries, last } = event else { continue };
            assert_eq!(of, id);
            for entry in entries {
                assert_eq!(entry, nth(seen));
                seen += 1;
            }
            ended = last;
        }
        pair.se.handle_timeout(pair.now);
    }
    assert_eq!(seen, MANY);
    assert!((16 * 1024..BOUND).contains(&worst), "{worst} bytes held");
    assert_eq!(pair.ne.counters().bytes_out, 20 + 32 + 20 + 32 * u64::from(MANY));
    pair.pass(seconds(60));
    assert!(pair.ne.is_ready() && pair.se.is_ready());
}

/// A reader that stops in the middle: nothing piles up, what it asks is done all the same, its answers wait behind the
/// list, and after three keepalives it is dead.
#[test]
fn a_reader_that_stops_holds_up_nobody_but_itself() {
    let mut ne = Ne::ready();
    let mut list = List { many: 1_000_000, ..List::default() };
    ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, 1, &[Unit::default()]));
    let mut decoder = Decoder::default();
    for _ in 0..10 {
        serve(&mut ne, &mut list, &[]);
        let (header, _) = read_messages(&mut decoder, &ne.session.poll_transmit().unwrap()).pop().unzip();
        assert!(header.is_none_or(|header| header.payload_len == 32_000_000));
    }
    serve(&mut ne, &mut list, &[]);
    let listed = list.at;
    ne.input(&message(Opcode::EXCEPTION_ADD, Flags::NONE, 2, &[local().unit()]));
    ne.input(&message(Opcode::STOP, Flags::NONE, 3, &[Operation::stop_unit(service("tcp/80"))]));
    serve(&mut ne, &mut list, &[]);
    assert_eq!((list.at, list.own.len()), (listed, 1), "asked for no more, and done");
    ne.pass(seconds(4));
    assert!(ne.session.held_bytes() < BOUND);
    assert_eq!(ne.closed(), None);

    // It reads on: the list to its end, then everything else, in order.
    let mut answers = Vec::new();
    loop {
        serve(&mut ne, &mut list, &[]);
        let Some(piece) = ne.session.poll_transmit() else { break };
        answers.extend(read_messages(&mut decoder, &piece).into_iter().map(|(header, _)| header.opcode));
    }
    assert!(!decoder.in_message());
    assert_eq!(answers, [Opcode::EXCEPTION_ADD_ACK, Opcode::STOP_ACK]);

    // It stops for good.
    ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, 4, &[Unit::default()]));
    serve(&mut ne, &mut list, &[]);
    ne.session.poll_transmit().unwrap();
    for _ in 0..30 {
        serve(&mut ne, &mut list, &[]);
        ne.pass(seconds(1));
        assert!(ne.session.held_bytes() < BOUND);
    }
    assert_eq!(ne.closed(), Some(CloseReason::DeadPeer(3)));
}

/// Whoever reads slowly lives, though no KEEPALIVE can reach it in the middle of its list; nor does it die of one that
/// it answers only after it.
#[test]
fn a_slow_reader_lives() {
    let mut ne = Ne::ready();
    let mut list = List { many: 100_000, ..List::default() };
    ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, 1, &[Unit::default()]));
    let (mut decoder, mut pieces) = (Decoder::default(), 0);
    loop {
        serve(&mut ne, &mut list, &[]);
        let Some(piece) = ne.session.poll_transmit() else { break };
        pieces += 1;
        for (header, _) in read_messages(&mut decoder, &piece) {
            if header.opcode == Opcode::KEEPALIVE {
                ne.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, &[]));
            }
        }
        if decoder.in_message() {
            ne.pass(seconds(4));
        }
        assert_eq!(ne.closed(), None, "piece {pieces}");
    }
    assert!(pieces >= 48, "{pieces}");
    ne.pass(seconds(4));
    assert_eq!(ne.closed(), None);
}

/// A caller that counts, or looks for more, for a minute is not the peer's fault.
#[test]
fn a_slow_caller_is_no_dead_peer() {
    let mut pair = Pair::new(SessionConfig::default());
    pair.list.many = 5_000;
    pair.settle();
    pair.se.except_query(Filter::default());
    pair.carry();
    let Some(NeEvent::Query { token, .. }) = pair.ne.poll_event() else { panic!("a query") };
    pair.pass(seconds(20));
    assert!(pair.ne.list(token, 5_000));
    let mut got = 0;
    while got < 5_000 {
        pair.carry();
        pair.pass(seconds(9));
        got = pair
            .se_log
            .iter()
            .map(|event| if let SeEvent::Listed { entries, .. } = event { entries.len() } else { 0 })
            .sum();
    }
    assert!(pair.ne.is_ready() && pair.se.is_ready());
}

/// The lists of several queries come one after the other, whichever is counted first; more than sixteen queries wait
/// in the stream.
#[test]
fn lists_are_answered_in_order() {
    let mut ne = Ne::ready();
    for id in 1..=20 {
        ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, id, &[Unit::default()]));
    }
    let mut tokens: Vec<_> = ne
        .events()
        .into_iter()
        .map(|event| if let NeEvent::Query { token, .. } = event { token } else { panic!("{event:?}") })
        .collect();
    assert_eq!((tokens.len(), ne.session.wants_input()), (16, false));
    tokens.reverse();
    for token in tokens {
        assert_eq!(ne.output(), [0; 0]);
        assert!(ne.session.list(token, 1));
        assert!(!ne.session.list(token, 9), "a query is answered once");
    }
    let mut sent = Vec::new();
    for _ in 0..20 {
        while let Some(event) = ne.session.poll_event() {
            match event {
                NeEvent::ListMore { token, max } => {
                    assert_eq!(max, 1);
                    // None at first, then more than there is room for.
                    ne.session.list_more(token, &[]);
                    assert_eq!(ne.session.poll_event(), Some(NeEvent::ListMore { token, max }));
                    ne.session.list_more(token, &[nth(7), nth(8)]);
                    ne.session.list_more(token, &[nth(9)]);
                }
                NeEvent::Query { token, .. } => _ = ne.session.list(token, 1),
                other => panic!("{other:?}"),
            }
        }
        sent.extend(ne.output());
        ne.session.handle_timeout(ne.now);
    }
    let answers: Vec<Vec<u8>> =
        (1..=20).map(|id| message(Opcode::EXCEPTION_RESP, Flags::NONE, id, &[nth(7).unit()])).collect();
    assert_eq!(sent, answers.concat());
}

/// §5.4: INIT in the middle of a list: the list is framed, so it goes on; what was not begun is forgotten.
#[test]
fn init_in_the_middle_of_a_list() {
    let mut ne = Ne::ready();
    let mut list = List { many: 10_000, ..List::default() };
    for id in 1..=2 {
        ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, id, &[Unit::default()]));
    }
    serve(&mut ne, &mut list, &[]);
    let mut stream = ne.session.poll_transmit().unwrap();
    ne.input(&init(9));
    loop {
        serve(&mut ne, &mut list, &[]);
        let Some(piece) = ne.session.poll_transmit() else { break };
        stream.extend(piece);
    }
    let sent: Vec<_> =
        messages(&stream).into_iter().map(|(header, units)| (header.opcode, header.request_id, units.len())).collect();
    assert_eq!(sent, [(Opcode::EXCEPTION_RESP, 1, 10_000), (Opcode::INIT_ACK, 9, 1)]);
}

/// The SE: a list that moves on is never late, nor are the answers behind it; one that stands still is.
#[test]
fn the_se_waits_for_a_list_as_long_as_it_moves() {
    let mut se = Se::ready();
    se.session.except_query(Filter::default());
    let start = se.session.start(&[offer("tcp/80")]);
    let sent = messages(&se.output());
    let header = Header::new(Opcode::EXCEPTION_RESP, Flags::NONE, sent[0].0.request_id, 40 * 2048).encode();
    se.input(&header);
    let mut keepalives = Vec::new();
    for index in 0..40 {
        let units: Vec<u8> = (0..2048).flat_map(|unit| nth(2048 * index + unit).unit().encode()).collect();
        se.input(&units);
        assert!(se.events().iter().all(|event| matches!(event, SeEvent::Listed { .. })));
        se.pass(seconds(4));
        keepalives.extend(messages(&se.output()).into_iter().map(|(header, _)| header.request_id));
        assert_eq!(se.closed(), None, "piece {index}");
    }
    assert_eq!(keepalives.len(), MAX_MISSED);
    for id in keepalives {
        se.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, id, &[]));
    }
    assert_eq!(se.events(), []);
    se.input(&message(Opcode::START_ACK, Flags::NONE, sent[1].0.request_id, &[]));
    assert_eq!(se.events(), [SeEvent::Acked { id: start, failed: vec![] }]);
}

/// A caller of the SE that does not take its list stops the input, and is not mistaken for a dead NE.
#[test]
fn an_se_whose_caller_is_slow() {
    let mut se = Se::ready();
    se.session.except_query(Filter::default());
    let (sent, _) = messages(&se.output()).pop().unwrap();
    se.session.start(&[offer("tcp/80")]);
    se.input(&Header::new(Opcode::EXCEPTION_RESP, Flags::NONE, sent.request_id, 100_000).encode());
    let mut fed = 0;
    while se.session.wants_input() {
        let units: Vec<u8> = (0..512).flat_map(|unit| nth(fed + unit).unit().encode()).collect();
        se.input(&units);
        fed += 512;
        assert!(fed <= 16_384, "{fed}");
    }
    assert!(se.session.held_bytes() < BOUND, "{}", se.session.held_bytes());
    se.pass(seconds(120));
    assert_eq!(se.closed(), None);
    se.events();
    assert!(se.session.wants_input());
    se.session.handle_timeout(se.now);
    assert_eq!(se.closed(), None, "START is late, but nobody looked");
    // Now it is the NE that does not go on, and KEEPALIVEs wait for it.
    se.pass(seconds(10));
    assert_eq!(se.closed(), Some(CloseReason::DeadPeer(3)));
}

/// §5.5: a KEEPALIVE would wait behind the list, so none is sent as long as the list is read; after it, three count as ever.
#[test]
fn no_keepalive_is_sent_into_a_list_that_is_read() {
    const ENTRIES: u32 = 100_000;
    let mut ne = Ne::ready();
    ne.input(&message(Opcode::EXCEPTION_QUERY, Flags::NONE, 7, &[Unit::default()]));
    let events = ne.events();
    let [NeEvent::Query { token, .. }] = events[..] else { panic!("{events:?}") };
    let (entry, sent) = (
        Listed { scope: Scope::Local, installer: [10, 0, 0, 11].into(), flows: Flows::ALL },
        ne.session.counters().keepalives_sent,
    );
    assert!(ne.session.list(token, ENTRIES));
    let (began, mut bytes) = (ne.now, 0);
    while bytes < 20 + 32 * ENTRIES as usize {
        for event in ne.events() {
            if let NeEvent::ListMore { token, max } = event {
                ne.session.list_more(token, &vec![entry; max]);
            }
        }
        // A piece a second is slow, and is reading.
        ne.pass(Duration::from_secs(1));
        bytes += ne.session.poll_transmit().map_or(0, |piece| piece.len());
    }
    assert!(ne.now - began > Duration::from_secs(60), "{:?}", ne.now - began);
    assert_eq!((ne.session.counters().keepalives_sent, ne.closed()), (sent, None));
    ne.pass(Duration::from_secs(12));
    assert_eq!(ne.closed(), None, "it has its full time from the list's end on");
    ne.pass(Duration::from_secs(24));
    assert_eq!((ne.session.counters().keepalives_sent, ne.closed()), (sent + 3, Some(CloseReason::DeadPeer(3))));
}
