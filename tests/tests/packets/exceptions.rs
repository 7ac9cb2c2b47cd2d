//! Cases about exceptions (draft §5.7): which new flows they catch, where those go, and that no other flow notices.

use necp_ebpf::{
    abi::DIRECT,
    packet::protocol::{TCP, UDP},
    slot::SlotWord,
    verdict::Reason,
};

use crate::{
    case::{Case, Fate, candidate, record},
    frames::{Flow, VIP, WEB_FLOW},
    setup::{ALWAYS, ANY, DNS, LEGACY, Nets, OTHER, OWNER, QUIC, Setup},
};

const F: Flow = WEB_FLOW;
const CLIENT: ([u8; 4], u8) = (F.source, 32);
const CLIENTS: ([u8; 4], u8) = ([198, 51, 100, 0], 24);
const DIRECTLY: Fate = Fate::Pass(Reason::Direct);

pub fn cases() -> Vec<Case> {
    [global(), keys(), masks(), local(), standing(), udp()].into_iter().flatten().collect()
}

fn global() -> Vec<Case> {
    let why = "a global exception: the flow is cut through (draft §5.7)";
    let setup = || Setup::plain().global([CLIENT, ANY], 0, 0);
    vec![
        Case::new("a new flow under a global exception", why, setup())
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(F.syn(1000), DIRECTLY)
            .frame(F.ack(1001), DIRECTLY)
            .leaves(record(DIRECT, 1000))
            .frame(F.data(1001), DIRECTLY)
            .frame(F.fin(1006), DIRECTLY)
            .keeps(record(DIRECT, 1000).closing()),
        Case::new("global beats local", why, setup().local([CLIENT, ANY], TCP, 80, &[OWNER]))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000)),
        Case::new("on a slot that changed", why, Setup::changed_from(LEGACY).global([CLIENT, ANY], 0, 0))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(F.ack(1001), DIRECTLY)
            .leaves(record(DIRECT, 1000)),
        Case::new("on a slot that is direct", why, Setup::direct().global([CLIENT, ANY], 0, 0))
            .frame(F.syn(1000), DIRECTLY),
    ]
}

/// What an exception matches, and what it does not.
fn keys() -> Vec<Case> {
    let vip = (VIP, 32);
    let yes: [(&str, Nets, u8, u16); 10] = [
        ("source address", [CLIENT, ANY], 0, 0),
        ("source prefix", [CLIENTS, ANY], 0, 0),
        ("a source prefix of one bit", [([128, 0, 0, 0], 1), ANY], 0, 0),
        ("destination address", [ANY, vip], 0, 0),
        ("destination prefix", [ANY, ([192, 0, 2, 0], 27)], 0, 0),
        ("protocol", [ANY, ANY], TCP, 0),
        ("protocol and port", [ANY, ANY], TCP, 80),
        ("all of it", [CLIENT, vip], TCP, 80),
        ("source prefix and port", [CLIENTS, ANY], TCP, 80),
        ("everything", [ANY, ANY], 0, 0),
    ];
    let no: [(&str, Nets, u8, u16); 8] = [
        ("another source address", [([198, 51, 100, 2], 32), ANY], 0, 0),
        ("another source prefix", [([198, 51, 101, 0], 24), ANY], 0, 0),
        ("a source prefix of one other bit", [([0, 0, 0, 0], 1), ANY], TCP, 80),
        ("another destination", [ANY, ([192, 0, 2, 11], 32)], 0, 0),
        ("source and destination the other way round", [vip, CLIENT], 0, 0),
        ("another protocol", [ANY, ANY], UDP, 0),
        ("another port", [ANY, ANY], TCP, 81),
        ("the same port of another protocol", [ANY, ANY], UDP, 80),
    ];
    let mut cases = Vec::new();
    for (name, nets, protocol, port) in yes {
        cases.push(
            Case::new(
                format!("excepted by {name}"),
                "all fields that are not any must match (draft §5.7.1)",
                Setup::plain().global(nets, protocol, port),
            )
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000)),
        );
    }
    for (name, nets, protocol, port) in no {
        cases.push(
            Case::new(
                format!("not excepted by {name}"),
                "all fields that are not any must match (draft §5.7.1)",
                Setup::plain().global(nets, protocol, port),
            )
            .frame(F.syn(1000), Fate::To(OWNER, Reason::Plain)),
        );
    }
    cases.push(
        Case::new(
            "another farm's exception",
            "an exception is the farm's of its SE",
            Setup::plain().global([ANY, ANY], TCP, 0).of_another_farm(),
        )
        .frame(F.syn(1000), Fate::To(OWNER, Reason::Plain)),
    );
    cases
}

/// Many masks, of which any may be the one that matches.
fn masks() -> Vec<Case> {
    let mut cases = Vec::new();
    for hit in [None, Some(0), Some(15), Some(31)] {
        let mut setup = Setup::plain();
        for number in 0..32 {
            let length = number as u8 + 1;
            let bits = u32::from_be_bytes(F.source) >> (32 - u32::from(length)) << (32 - u32::from(length));
            let flipped = bits ^ 1 << (32 - u32::from(length));
            let source = if hit == Some(number) { bits } else { flipped };
            setup = setup.global([(source.to_be_bytes(), length), ANY], TCP, 0);
        }
        let name = format!("32 masks, of which {hit:?} matches");
        let case = Case::new(name, "each mask in use is looked up", setup);
        cases.push(match hit {
            Some(_) => case.frame(F.syn(1000), DIRECTLY).leaves(candidate(DIRECT, 1000)),
            None => case.frame(F.syn(1000), Fate::To(OWNER, Reason::Plain)),
        });
    }
    // Every mask has a record that excludes somebody, one of them the owner.
    for owner in [1, 5, 28, 32] {
        let mut setup = Setup::owned_by(OTHER).slot_of(F, SlotWord::plain(OWNER));
        for length in 1..=32u32 {
            let bits = u32::from_be_bytes(F.source) >> (32 - length) << (32 - length);
            let server = if length == owner { OWNER } else { 100 + length };
            setup = setup.local([(bits.to_be_bytes(), length as u8), ANY], 0, 0, &[server]);
        }
        let name = format!("a local exception under each of 32 masks, number {owner} names the owner");
        cases.push(
            Case::new(name, "all that match count", setup)
                .frame(F.syn(1000), Fate::To(OTHER, Reason::New))
                .leaves(candidate(OTHER, 1000)),
        );
    }
    // All there are: eight installers under each of 32 masks.
    let mut setup = Setup::owned_by(OTHER).slot_of(F, SlotWord::plain(OWNER));
    for length in 1..=32u32 {
        let bits = u32::from_be_bytes(F.source) >> (32 - length) << (32 - length);
        let mut installers: [u32; 8] = core::array::from_fn(|place| 100 + 8 * length + place as u32);
        match length {
            1 => installers[7] = OWNER,
            32 => installers[0] = OTHER,
            _ => {}
        }
        setup = setup.local([(bits.to_be_bytes(), length as u8), ANY], 0, 0, &installers);
    }
    cases.push(
        Case::new("eight installers under each of 32 masks", "none is left: cut through", setup)
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000)),
    );
    cases
}

fn local() -> Vec<Case> {
    let why = "a local exception: chosen among the other servers (draft §5.7)";
    let others = || Setup::owned_by(OTHER).slot_of(F, SlotWord::plain(OWNER));
    let elsewhere = |case: Case| {
        case.frame(F.syn(1000), Fate::To(OTHER, Reason::New))
            .leaves(candidate(OTHER, 1000))
            .frame(F.syn(1000), Fate::To(OTHER, Reason::Repeated))
            .frame(F.ack(1001), Fate::To(OTHER, Reason::Confirmed))
            .leaves(record(OTHER, 1000))
            .frame(F.data(1001), Fate::To(OTHER, Reason::Record))
    };
    let mut cases = vec![
        elsewhere(Case::new("the owner does not want it", why, others().local([CLIENT, ANY], 0, 0, &[OWNER]))),
        Case::new("another server does not want it", why, others().local([CLIENT, ANY], 0, 0, &[OTHER, LEGACY]))
            .frame(F.syn(1000), Fate::To(OWNER, Reason::Plain)),
        Case::new("nobody wants it", "none is left: cut through", others().local([CLIENT, ANY], 0, 0, &[OTHER, OWNER]))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(F.ack(1001), DIRECTLY)
            .leaves(record(DIRECT, 1000)),
        Case::new(
            "nobody wants it, by two exceptions",
            "none is left: cut through",
            others().local([CLIENT, ANY], 0, 0, &[OTHER]).local([CLIENTS, ANY], TCP, 80, &[OWNER]),
        )
        .frame(F.syn(1000), DIRECTLY)
        .leaves(candidate(DIRECT, 1000)),
    ];
    for place in 0..8 {
        let mut installers = [100, 101, 102, 103, 104, 105, 106, 107];
        installers[place] = OWNER;
        let setup = others().local([CLIENT, ANY], TCP, 80, &installers);
        cases.push(elsewhere(Case::new(format!("the owner is installer number {place}"), why, setup)));
    }
    // Numbers of which the bytes are alike.
    let alike = [OWNER << 8, OWNER << 8 | 1, 0x8002, 0x0102, 0x0201, 0x8000, 0x7fff, 0xffff];
    cases.push(
        Case::new("eight that are nearly the owner", why, others().local([CLIENT, ANY], 0, 0, &alike))
            .frame(F.syn(1000), Fate::To(OWNER, Reason::Plain)),
    );
    cases
}

/// Existing flows are not affected by changes of the list (draft §5.7).
fn standing() -> Vec<Case> {
    let why = "existing flows are not affected (draft §5.7)";
    let all = |setup: Setup| setup.global([ANY, ANY], 0, 0);
    vec![
        Case::new("data on a plain slot under an exception", why, all(Setup::plain()))
            .frame(F.data(1001), Fate::To(OWNER, Reason::Plain))
            .frame(F.fin(1006), Fate::To(OWNER, Reason::Plain)),
        Case::new("data of a flow older than a change", why, all(Setup::changed_from(LEGACY)))
            .frame(F.data(5000), Fate::To(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0))
            .frame(F.data(5005), Fate::To(LEGACY, Reason::Record)),
        Case::new("data of a flow on record", why, all(Setup::tracked().record(F, LEGACY, 1000)))
            .frame(F.data(1001), Fate::To(LEGACY, Reason::Record)),
        Case::new(
            "a SYN that came before the exception",
            "the same SYN again",
            all(Setup::tracked().candidate(F, OTHER, 1000)),
        )
        .frame(F.syn(1000), Fate::To(OTHER, Reason::Repeated))
        .frame(F.ack(1001), Fate::To(OTHER, Reason::Confirmed))
        .leaves(record(OTHER, 1000)),
        Case::new("another client beside a flow that is cut through", why, Setup::plain().global([CLIENT, ANY], 0, 0))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(Flow { source: [203, 0, 113, 9], ..F }.data(7), Fate::To(OWNER, Reason::Plain)),
        Case::new(
            "cut through, and the exception is gone",
            "its record says where it is",
            Setup::tracked().record(F, DIRECT, 1000),
        )
        .frame(F.data(1001), DIRECTLY)
        .frame(F.syn(1000), DIRECTLY),
        Case::new("a forged SYN of a flow on record", "moves nothing", all(Setup::tracked().record(F, LEGACY, 1000)))
            .frame(F.syn(9000), DIRECTLY)
            .leaves(record(LEGACY, 1000).and(candidate(DIRECT, 9000)))
            .frame(F.data(1001), Fate::To(LEGACY, Reason::Record)),
        Case::new("the tuple again, under an exception", "a new flow", all(Setup::tracked().record(F, OWNER, 1000)))
            .frame(F.syn(9000), DIRECTLY)
            .leaves(record(OWNER, 1000).and(candidate(DIRECT, 9000)))
            .frame(F.ack(9001), DIRECTLY)
            .leaves(record(DIRECT, 9000)),
    ]
}

fn udp() -> Vec<Case> {
    let why = "the first packet of a flow that shows no beginning is the one without a record";
    let (dns, quic, always) = (F.on(UDP, DNS), F.on(UDP, QUIC), F.on(TCP, ALWAYS));
    let global = || Setup::plain().global([CLIENT, ANY], 0, 0);
    let not_the_owner =
        |flow| Setup::owned_by(OTHER).slot_of(flow, SlotWord::plain(OWNER)).local([CLIENT, ANY], 0, 0, &[OWNER]);
    vec![
        Case::new("a new UDP flow under a global exception", why, global())
            .frame(dns.udp(b"?"), DIRECTLY)
            .leaves(record(DIRECT, 0))
            .frame(dns.udp(b"?"), DIRECTLY),
        Case::new("a UDP flow that is on record under a global exception", why, global().record(dns, OTHER, 0))
            .frame(dns.udp(b"?"), Fate::To(OTHER, Reason::Record)),
        Case::new("a UDP flow that was cut through", why, Setup::plain().record(dns, DIRECT, 0))
            .frame(dns.udp(b"?"), DIRECTLY),
        Case::new("a new UDP flow that the owner does not want", why, not_the_owner(dns))
            .frame(dns.udp(b"?"), Fate::To(OTHER, Reason::New))
            .leaves(record(OTHER, 0))
            .frame(dns.udp(b"?"), Fate::To(OTHER, Reason::Record)),
        Case::new("UDP without tracking, global", "every packet is a new flow", global())
            .frame(quic.udp(b"?"), DIRECTLY)
            .frame(quic.udp(b"?"), DIRECTLY),
        Case::new("UDP without tracking, local", "every packet is a new flow", not_the_owner(quic))
            .frame(quic.udp(b"?"), Fate::To(OTHER, Reason::Plain)),
        Case::new("always tracked TCP under a global exception", why, global())
            .frame(always.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(always.data(1001), DIRECTLY)
            .leaves(record(DIRECT, 1000)),
    ]
}
