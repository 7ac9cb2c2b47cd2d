//! The extension for exceptions of IPv6, both roles; single messages stand in `necp/vectors/messages.txt`.

use super::pairs::{Pair, seconds};
use super::*;
use crate::necp::message::{Family, extension};
use crate::necp::wire::{HEADER_LEN, Preamble, WideUnit};

fn six(source: &str) -> Flows {
    Flows { source: source.parse().unwrap(), protocol: 6, port: 80, ..Flows::all(Family::V6) }
}

fn four() -> Flows {
    Flows { source: "203.0.113.0/24".parse().unwrap(), protocol: 6, port: 80, ..Flows::ALL }
}

fn local(flows: Flows) -> Exception {
    Exception { scope: Scope::Local, ttl: 60, flows }
}

/// A message of wide units.
fn wide(opcode: Opcode, flags: Flags, request_id: u16, units: &[WideUnit]) -> Vec<u8> {
    let mut bytes = Header::wide(opcode, flags, request_id, units.len()).encode().to_vec();
    if !units.is_empty() {
        bytes.extend(Preamble::SPOKEN.encode());
    }
    units.iter().for_each(|unit| bytes.extend(unit.0));
    bytes
}

fn add(request_id: u16) -> Vec<u8> {
    wide(Opcode::EXCEPTION_ADD, Flags::NONE, request_id, &[local(six("2001:db8::/32")).wide_unit()])
}

/// The question, with other queries beside it.
fn question(others: &[Unit]) -> Vec<u8> {
    message(Opcode::KEEPALIVE, Flags::NONE, 5, &[&[extension::query()], others].concat())
}

/// Headers and payloads.
fn raw(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let header = Header::decode(header).expect("output is framed");
        let (payload, after) = rest.split_at(header.payload_len as usize);
        found.push((header, payload.to_vec()));
        bytes = after;
    }
    assert!(bytes.is_empty(), "output ends with a whole message");
    found
}

/// An SE may use the extension once it was told that it is spoken, and until INIT.
#[test]
fn who_may_use_it() {
    let unknown = Unit([9, 6, 80, 0, 0, 0, 0, 0]);
    let health = Unit([1, 6, 80, 0, 0, 0, 0, 0]);
    let table: [(&str, Vec<Vec<u8>>, bool); 6] = [
        ("nobody asked", vec![], false),
        ("asked", vec![question(&[])], true),
        ("asked beside health", vec![question(&[health])], true),
        ("asked beside what is unknown, and told of that only", vec![question(&[unknown])], false),
        ("asked, and again", vec![question(&[]), question(&[])], true),
        ("asked, and INIT again (§5.4)", vec![question(&[]), init(9)], false),
    ];
    for (what, before, may) in table {
        let mut ne = Ne::ready();
        for bytes in before {
            ne.input(&bytes);
            ne.respond_all(&[]);
        }
        ne.output();
        ne.input(&add(7));
        let done = ne.respond_all(&[]);
        let expected = [Operation::Except(local(six("2001:db8::/32")))];
        assert_eq!(done, expected[..usize::from(may)], "{what}");
        let flags = if may { Flags::NONE } else { Flags::ERROR };
        assert_eq!(ne.output(), message(Opcode::EXCEPTION_ADD_ACK, flags, 7, &[]), "{what}");
        assert_eq!(ne.session.counters().malformed, u64::from(!may), "{what}");
        assert_eq!(ne.closed(), None, "{what}");
    }
    // What is not about exceptions has no wide units, whoever asked; and an SE knows of no question.
    let mut ne = Ne::ready();
    ne.input(&question(&[]));
    ne.output();
    for opcode in [Opcode::INIT, Opcode::KEEPALIVE, Opcode::START, Opcode::STOP, Opcode::EXCEPTION_RESET] {
        ne.input(&wide(opcode, Flags::NONE, 3, &[WideUnit::default()]));
        assert_eq!(ne.output(), message(opcode.answer().unwrap(), Flags::ERROR, 3, &[]), "{opcode}");
    }
    let mut se = Se::ready_with(SessionConfig { extension: true, ..SessionConfig::default() });
    se.input(&question(&[]));
    assert_eq!(se.output(), message(Opcode::KEEPALIVE_ACK, Flags::ERROR, 5, &[extension::query()]));
}

/// Units that the caller could not carry out are repeated as they came, between those that were done.
#[test]
fn failed_units_are_repeated_as_they_came() {
    let mut ne = Ne::ready();
    ne.input(&question(&[]));
    ne.output();
    // Host bits that are not 0, and one that is none.
    let units: Vec<WideUnit> = ["2001:db8::/32", "2001:db8:7::1/48", "fd00::/8"]
        .map(|source| Exception::wide_del_unit(&six(source)))
        .into_iter()
        .chain([WideUnit([0xff; 64])])
        .collect();
    ne.input(&wide(Opcode::EXCEPTION_DEL, Flags::NONE, 7, &units));
    let Some(NeEvent::Operations { token, operations }) = ne.session.poll_event() else { panic!("operations") };
    assert_eq!(operations.len(), 3);
    assert_eq!(operations[1], Operation::Unexcept(six("2001:db8:7::/48")));
    ne.session.respond(token, &[1]);
    let answer = wide(Opcode::EXCEPTION_DEL_ACK, Flags::ERROR, 7, &[units[1], units[3]]);
    assert_eq!(ne.output(), answer);
    assert_eq!(ne.session.counters().failed_units, 2);
}

/// As many bytes of failed units as of basic ones; then the answer is sent as it is, and the session closed (§5.2.3).
#[test]
fn a_flood_of_units_that_fail_has_its_bound() {
    let mut ne = Ne::ready();
    ne.input(&question(&[]));
    ne.output();
    let header = Header::wide(Opcode::EXCEPTION_ADD, Flags::NONE, 7, 40_000);
    ne.input(&[&header.encode()[..], &Preamble::SPOKEN.encode()].concat());
    let piece = [0xff; 64 * 1000];
    let mut worst = 0;
    while ne.closed().is_none() {
        ne.input(&piece);
        worst = worst.max(ne.session.held_bytes());
    }
    assert_eq!(ne.closed(), Some(CloseReason::TooManyUnits(32_768)));
    assert!((2 << 20..12 << 20).contains(&worst), "{worst}");
    let answer = raw(&ne.output());
    assert_eq!((answer.len(), answer[0].1.len()), (1, 8 + 64 * 32_768));
}

/// A list is of both families in the extension, and of IPv4 without it, whatever the caller gives.
#[test]
fn a_basic_list_leaves_ipv6_out() {
    let entry = |flows| Listed { scope: Scope::Local, installer: [10, 0, 0, 11].into(), flows };
    let entries = [entry(six("2001:db8::/32")), entry(four()), entry(six("fd00::/8")), entry(four())];
    for asked in [false, true] {
        let mut ne = Ne::ready();
        let query = if asked {
            ne.input(&question(&[]));
            wide(Opcode::EXCEPTION_QUERY, Flags::NONE, 7, &[WideUnit::default()])
        } else {
            message(Opcode::EXCEPTION_QUERY, Flags::NONE, 7, &[Unit::default()])
        };
        ne.output();
        ne.input(&query);
        let Some(NeEvent::Query { token, filter }) = ne.session.poll_event() else { panic!("a query") };
        let wanted: Vec<Listed> = entries.iter().filter(|entry| filter.matches(entry)).copied().collect();
        assert_eq!(wanted.len(), if asked { 4 } else { 2 });
        assert!(ne.session.list(token, wanted.len() as u32));
        while let Some(event) = ne.session.poll_event() {
            let NeEvent::ListMore { token, .. } = event else { panic!("{event:?}") };
            ne.session.list_more(token, &entries);
        }
        let wide_units: Vec<WideUnit> = entries.iter().map(Listed::wide_unit).collect();
        let expected = if asked {
            wide(Opcode::EXCEPTION_RESP, Flags::NONE, 7, &wide_units)
        } else {
            message(Opcode::EXCEPTION_RESP, Flags::NONE, 7, &[entry(four()).unit(); 2])
        };
        assert_eq!(ne.output(), expected);
    }
}

/// An SE that may ask, with an exception of each family, a START behind them, and a list; and what it has sent.
struct Asking {
    se: Se,
    ids: [RequestId; 3],
    sent: Vec<(Header, Vec<u8>)>,
}

impl Asking {
    fn new() -> Self {
        let mut se = Se::ready_with(SessionConfig { extension: true, ..SessionConfig::default() });
        let add = se.session.except_add(&[local(six("2001:db8::/32")), local(four())]);
        let start = se.session.start(&[offer("tcp/80")]);
        let query = se.session.except_query(Filter::default());
        let sent = raw(&se.output());
        Self { se, ids: [add, start, query], sent }
    }

    /// Answers the question that was sent last.
    fn answer(&mut self, flags: Flags, units: &[Unit]) {
        let id = self.sent.last().unwrap().0.request_id;
        self.se.input(&message(Opcode::KEEPALIVE_ACK, flags, id, units));
        self.sent = raw(&self.se.output());
    }

    fn opcodes(&self) -> Vec<Opcode> {
        self.sent.iter().map(|(header, _)| header.opcode).collect()
    }
}

/// The question goes out when a request needs the answer, which then waits with all that come behind it.
#[test]
fn the_se_asks_when_it_needs_to_know_and_keeps_the_order() {
    let mut asking = Asking::new();
    // IPv6 came first: nothing may overtake it.
    assert_eq!(asking.opcodes(), [Opcode::KEEPALIVE]);
    assert_eq!(asking.sent[0].1, extension::query().encode());
    asking.answer(Flags::NONE, &[extension::answer(&extension::query())]);
    assert_eq!(
        asking.opcodes(),
        [Opcode::EXCEPTION_ADD, Opcode::EXCEPTION_ADD, Opcode::START, Opcode::EXCEPTION_QUERY]
    );
    let unit = [&Preamble::SPOKEN.encode()[..], &local(six("2001:db8::/32")).wide_unit().0].concat();
    assert_eq!((asking.sent[0].0.flags, &asking.sent[0].1), (Flags::NONE, &unit));
    assert_eq!(
        (asking.sent[1].0.flags, &asking.sent[1].1[..]),
        (Flags::BASIC_PAYLOAD, &local(four()).unit().encode()[..])
    );
    assert_eq!(asking.sent[3].1.len(), 8 + 64);

    // What needs no answer does not wait for one, and nobody asks twice.
    let mut se = Se::ready_with(SessionConfig { extension: true, ..SessionConfig::default() });
    se.session.except_add(&[local(four())]);
    se.session.except_query(Filter { installer: Some([10, 0, 0, 11].into()), ..Filter::default() });
    let sent = messages(&se.output());
    assert_eq!(
        sent.iter().map(|(header, _)| header.opcode).collect::<Vec<_>>(),
        [Opcode::EXCEPTION_ADD, Opcode::EXCEPTION_QUERY]
    );
    // Any flow of the SE's own family has a basic unit.
    se.session.except_add(&[local(Flows::all(Family::V6))]);
    assert_eq!(messages(&se.output())[0].1, [local(Flows::ALL).unit()]);
}

/// Every answer to the question: whether the SE uses the extension then. Without it, exceptions of IPv6 fail, lists are
/// basic, and all else goes on.
#[test]
fn what_the_se_makes_of_answers() {
    let answer = |version: u32| Unit([extension::query().0[0], 0, 0, version, 0, 0, 0, 0]);
    type Answer = (&'static str, Flags, Vec<Unit>, bool);
    let table: [Answer; 8] = [
        ("version 1", Flags::NONE, vec![answer(1)], true),
        ("a later version", Flags::NONE, vec![answer(7)], true),
        ("version 0", Flags::NONE, vec![answer(0)], false),
        ("something else", Flags::NONE, vec![Unit([1, 6, 80, 100, 0, 0, 0, 0])], false),
        ("nothing", Flags::NONE, vec![], false),
        ("unsupported (§5.5.3)", Flags::ERROR, vec![extension::query()], false),
        ("refused as a whole", Flags::ERROR, vec![], false),
        ("an error that says yes", Flags::ERROR, vec![answer(1)], false),
    ];
    for (what, flags, units, spoken) in table {
        let mut asking = Asking::new();
        asking.answer(flags, &units);
        used(&asking, spoken, what);
    }
    // Of another version, and never.
    let mut asking = Asking::new();
    let mut bytes = message(
        Opcode::KEEPALIVE_ACK,
        Flags::ERROR.with(Flags::PROTOCOL_VERSION_MISMATCH),
        asking.sent[0].0.request_id,
        &[],
    );
    bytes[4] = 9;
    asking.se.input(&bytes);
    asking.sent = raw(&asking.se.output());
    used(&asking, false, "version mismatch");
    // An NE that answers KEEPALIVEs, but not this one.
    let mut asking = Asking::new();
    for _ in 0..10 {
        asking.se.pass(seconds(3));
        for (header, _) in raw(&asking.se.output()) {
            if header.opcode == Opcode::KEEPALIVE {
                asking.se.input(&message(Opcode::KEEPALIVE_ACK, Flags::NONE, header.request_id, &[]));
            } else {
                asking.sent.push((header, Vec::new()));
            }
        }
    }
    asking.sent.remove(0);
    assert_eq!(asking.se.closed(), None);
    assert_eq!(asking.opcodes(), [Opcode::EXCEPTION_ADD, Opcode::START, Opcode::EXCEPTION_QUERY]);
}

fn used(asking: &Asking, spoken: bool, what: &str) {
    let basic = [Opcode::EXCEPTION_ADD, Opcode::START, Opcode::EXCEPTION_QUERY];
    let wide: Vec<Opcode> = asking
        .sent
        .iter()
        .filter(|(header, _)| header.wide_units().is_some())
        .map(|(header, _)| header.opcode)
        .collect();
    if spoken {
        assert_eq!(asking.sent.len(), 4, "{what}");
        assert_eq!(wide, [Opcode::EXCEPTION_ADD, Opcode::EXCEPTION_QUERY], "{what}");
    } else {
        assert_eq!((asking.opcodes(), wide), (basic.to_vec(), vec![]), "{what}");
    }
}

/// Failed units of both forms are told together; and of an NE without the extension, IPv6 has failed.
#[test]
fn what_failed_is_told() {
    for spoken in [false, true] {
        let mut asking = Asking::new();
        asking.answer(Flags::NONE, &[Unit([extension::query().0[0], 0, 0, u32::from(spoken), 0, 0, 0, 0])]);
        let unit = local(six("2001:db8::/32")).wide_unit();
        for (header, payload) in asking.sent.clone() {
            let answer = match header.opcode {
                Opcode::EXCEPTION_ADD if payload.len() > 32 => {
                    wide(Opcode::EXCEPTION_ADD_ACK, Flags::ERROR, header.request_id, &[unit, WideUnit::default()])
                }
                Opcode::EXCEPTION_QUERY => message(Opcode::EXCEPTION_RESP, Flags::NONE, header.request_id, &[]),
                opcode => message(opcode.answer().unwrap(), Flags::NONE, header.request_id, &[]),
            };
            asking.se.input(&answer);
        }
        let [add, start, query] = asking.ids;
        let expected = [
            SeEvent::Excepted { id: add, failed: vec![six("2001:db8::/32")] },
            SeEvent::Acked { id: start, failed: vec![] },
            SeEvent::Listed { id: query, entries: vec![], last: true },
        ];
        assert_eq!(asking.se.events(), expected);
        assert_eq!(asking.se.session.counters().unexpected_answers, u64::from(spoken), "a unit that was not asked for");
    }
    // What cannot be said at all fails here.
    let mut se = Se::ready_with(SessionConfig { extension: true, ..SessionConfig::default() });
    let mixed = Flows { destination: four().source, ..six("2001:db8::/32") };
    let id = se.session.except_add(&[local(mixed)]);
    assert_eq!((se.output(), se.events()), (vec![], vec![SeEvent::Excepted { id, failed: vec![mixed] }]));
    // Who does not want the extension asks nobody.
    let mut se = Se::ready();
    let id = se.session.except_add(&[local(six("2001:db8::/32"))]);
    let list = se.session.except_query(Filter { family: Some(Family::V6), ..Filter::default() });
    let expected = vec![SeEvent::Excepted { id, failed: vec![six("2001:db8::/32")] }, SeEvent::ListFailed { id: list }];
    assert_eq!((se.output(), se.events()), (vec![], expected));
}

/// However TCP cuts what the NE says, and with preambles that nobody speaks, the SE tells the same.
#[test]
fn answers_cut_anywhere_are_the_same() {
    let run = |piece: &dyn Fn(&[u8]) -> Vec<Vec<u8>>, version: u8| {
        let mut asking = Asking::new();
        asking.answer(Flags::NONE, &[extension::answer(&extension::query())]);
        let entry = |flows| Listed { scope: Scope::Global, installer: "2001:db8::11".parse().unwrap(), flows };
        let entries = [six("2001:db8::/32"), four(), six("fd00::/8")].map(|flows| entry(flows).wide_unit());
        let mut stream = Vec::new();
        for (header, payload) in &asking.sent {
            let (id, answer) = (header.request_id, header.opcode.answer().unwrap());
            let mut bytes = match header.opcode {
                Opcode::EXCEPTION_ADD if payload.len() > 32 => {
                    let unit = WideUnit(payload[8..].try_into().unwrap());
                    wide(answer, Flags::ERROR, id, &[unit])
                }
                Opcode::EXCEPTION_QUERY => wide(answer, Flags::NONE, id, &entries),
                _ => message(answer, Flags::NONE, id, &[]),
            };
            if bytes.len() > HEADER_LEN {
                bytes[HEADER_LEN + 4] = version;
            }
            stream.extend(bytes);
        }
        let mut events = Vec::new();
        for piece in piece(&stream) {
            asking.se.input(&piece);
            // When a line for the log comes depends on who asks when.
            events.extend(asking.se.events().into_iter().filter(|event| !matches!(event, SeEvent::Notice(_))));
        }
        assert_eq!(asking.se.closed(), None);
        (stream.len(), events)
    };
    let whole = |bytes: &[u8]| vec![bytes.to_vec()];
    for version in [1, 2] {
        let (length, expected) = run(&whole, version);
        let listed =
            expected.iter().filter(|event| matches!(event, SeEvent::Listed { entries, .. } if entries.len() == 3));
        let failed = expected.iter().filter(|event| matches!(event, SeEvent::ListFailed { .. }));
        let refused =
            expected.iter().filter(|event| matches!(event, SeEvent::Excepted { failed, .. } if failed.len() == 1));
        let counts = (listed.count(), failed.count(), refused.count());
        assert_eq!(counts, if version == 1 { (1, 0, 1) } else { (0, 1, 1) }, "{expected:?}");
        for at in 0..=length {
            let cut = |bytes: &[u8]| vec![bytes[..at].to_vec(), bytes[at..].to_vec()];
            assert_eq!(run(&cut, version).1, expected, "cut at {at}");
        }
        let single = |bytes: &[u8]| bytes.chunks(1).map(<[u8]>::to_vec).collect();
        assert_eq!(run(&single, version).1, expected);
    }
}

/// A life of a list of both families between the two machines, with a key and without, whole or byte by byte.
#[test]
fn a_pair_speaks_it() {
    for (secured, piece) in [(false, usize::MAX), (true, usize::MAX), (false, 1), (true, 1)] {
        let mut pair = Pair::with(SessionConfig { extension: true, ..SessionConfig::default() }, secured);
        pair.piece = piece;
        pair.settle();
        let all = [six("2001:db8::/32"), six("fd00::/8"), four()];
        pair.se.except_add(&all.map(local));
        let first = pair.se.except_query(Filter::default());
        let second = pair.se.except_query(Filter { family: Some(Family::V6), ..Filter::default() });
        pair.se.except_del(&all[..1]);
        let third = pair.se.except_query(Filter { family: Some(Family::V6), ..Filter::default() });
        pair.se.except_reset();
        let fourth = pair.se.except_query(Filter::default());
        pair.settle();
        let of = |wanted: RequestId| -> Vec<Flows> {
            let listed = pair.se_log.iter().filter_map(|event| match event {
                SeEvent::Listed { id, entries, .. } if *id == wanted => Some(entries),
                _ => None,
            });
            listed.flatten().map(|entry| entry.flows).collect()
        };
        let counts = [first, second, third, fourth].map(|id| of(id).len());
        assert_eq!(counts, [3, 2, 1, 0], "secured {secured}");
        assert_eq!(of(third), all[1..2]);
        assert!(!pair.se_log.iter().any(|event| matches!(event, SeEvent::Notice(_) | SeEvent::ListFailed { .. })));
    }
}

/// A long list goes out piece by piece in the extension too, with a key and without.
#[test]
fn a_long_list_is_streamed() {
    for secured in [false, true] {
        let mut pair =
            Pair::with(SessionConfig { extension: true, max_message: 4 << 20, ..SessionConfig::default() }, secured);
        pair.list.many = 20_000;
        pair.settle();
        let id = pair.se.except_query(Filter::default());
        pair.settle();
        let listed = pair.se_log.iter().map(|event| match event {
            SeEvent::Listed { id: of, entries, .. } if *of == id => entries.len(),
            _ => 0,
        });
        assert_eq!(listed.sum::<usize>(), 20_000, "secured {secured}");
        assert!(pair.ne.held_bytes() < 1 << 20, "{}", pair.ne.held_bytes());
    }
}
