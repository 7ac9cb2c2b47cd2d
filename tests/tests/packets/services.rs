//! Cases about services of other kinds, the service table, next hops and the flow table's room.

use necp_ebpf::{
    abi::{DIRECT, NONE, UDP_CLASS},
    flows::FlowWord,
    packet::{Packet, protocol::TCP, protocol::UDP, tcp},
    slot::SlotWord,
    verdict::Reason,
};

use crate::{
    case::{Case, Fate, candidate, record},
    frames::{Flow, WEB_FLOW},
    setup::{
        ALWAYS, DEAD, DNS, LEGACY, LOST_PORT, OTHER, OWNER, QUIC, REMOTE, STOPPED, Setup, UNREACHABLE, ports_beside_web,
    },
};

const F: Flow = WEB_FLOW;
const D: Flow = WEB_FLOW.on(UDP, DNS);
const Q: Flow = WEB_FLOW.on(UDP, QUIC);
const A: Flow = WEB_FLOW.on(TCP, ALWAYS);

/// Ids of the services as flow records have them.
const WEB_ID: u16 = 1;
const DNS_ID: u16 = 2 | UDP_CLASS;
const ALWAYS_ID: u16 = 4;

const fn to(server: u32, reason: Reason) -> Fate {
    Fate::To(server, reason)
}

pub fn cases() -> Vec<Case> {
    [udp(), untracked(), always_tcp(), service_table(), next_hops(), tcp_room(), udp_room(), flooded()]
        .into_iter()
        .flatten()
        .collect()
}

/// Shows no beginning: every flow is on record.
fn udp() -> Vec<Case> {
    let why = "always tracked: the first packet makes the record";
    let new = to(OWNER, Reason::New);
    let on = |server| to(server, Reason::Record);
    let aged = FlowWord::record(OWNER, 0, false).with_age(7);
    vec![
        Case::new("UDP flow", why, Setup::plain())
            .frame(D.udp(b"query"), new)
            .leaves(record(OWNER, 0))
            .frame(D.udp(b"query"), on(OWNER)),
        Case::new("always tracked UDP without data", why, Setup::plain())
            .frame(D.udp(b""), new)
            .leaves(record(OWNER, 0)),
        Case::new("UDP flow on record elsewhere", "no change moves it", Setup::plain().record(D, LEGACY, 0))
            .frame(D.udp(b"query"), on(LEGACY)),
        Case::new("UDP flow on record at a stopped server", "no change moves it", Setup::plain().record(D, STOPPED, 0))
            .frame(D.udp(b"query"), on(STOPPED)),
        Case::new("UDP flow on record at a dead server", "placed anew", Setup::plain().record(D, DEAD, 0))
            .frame(D.udp(b"query"), new)
            .leaves(record(OWNER, 0)),
        Case::new(
            "UDP flow on record at an unreachable server",
            "its own until it is dead",
            Setup::plain().record(D, UNREACHABLE, 0),
        )
        .frame(D.udp(b"query"), Fate::Drop(Reason::NoNextHop)),
        Case::new("UDP makes an old record young", "touch resets age", Setup::plain().entry(D, aged))
            .frame(D.udp(b"query"), on(OWNER))
            .keeps(record(OWNER, 0)),
        Case::new(
            "a new UDP flow while the slot has a legacy",
            "its old flows are on record",
            Setup::changed_from(LEGACY),
        )
        .frame(D.udp(b"query"), new)
        .leaves(record(OWNER, 0)),
        Case::new(
            "a new UDP flow, the owner has stopped",
            why,
            Setup::owned_by(OTHER).slot_of(D, SlotWord::plain(STOPPED)),
        )
        .frame(D.udp(b"query"), to(OTHER, Reason::New))
        .leaves(record(OTHER, 0)),
        Case::new("UDP where nobody ever was", "the host's stack answers", Setup::owned_by(NONE))
            .frame(D.udp(b"query"), Fate::Pass(Reason::NoServer)),
        Case::new(
            "another UDP flow's record is not this one's",
            why,
            Setup::plain().record(Flow { source_port: 40001, ..D }, LEGACY, 0),
        )
        .frame(D.udp(b"query"), new)
        .leaves(record(OWNER, 0)),
        Case::new(
            "the same client's flow of another service",
            "records belong to a service",
            Setup::plain().record(F, LEGACY, 0),
        )
        .frame(D.udp(b"query"), new)
        .leaves(record(OWNER, 0)),
    ]
}

fn untracked() -> Vec<Case> {
    let why = "opted out of tracking: plain consistent hashing";
    let plain = to(OWNER, Reason::Plain);
    vec![
        Case::new("untracked UDP", why, Setup::plain()).frame(Q.udp(b"x"), plain),
        Case::new("untracked UDP, a slot with a legacy", why, Setup::changed_from(LEGACY)).frame(Q.udp(b"x"), plain),
        Case::new("untracked UDP, a tracked slot and a record", why, Setup::tracked().record(Q, LEGACY, 0))
            .frame(Q.udp(b"x"), plain),
        Case::new(
            "untracked UDP, the owner has stopped",
            why,
            Setup::owned_by(OTHER).slot_of(Q, SlotWord::plain(STOPPED)),
        )
        .frame(Q.udp(b"x"), to(OTHER, Reason::Plain)),
        Case::new("untracked UDP, all have stopped", "the host's own stack answers", Setup::owned_by(STOPPED))
            .frame(Q.udp(b"x"), Fate::Pass(Reason::Direct)),
    ]
}

fn always_tcp() -> Vec<Case> {
    let why = "a TCP service that needs its flows on record (layer 3)";
    let new = to(OWNER, Reason::New);
    vec![
        Case::new("always tracked TCP, from its SYN on", why, Setup::plain())
            .frame(A.syn(1000), new)
            .leaves(candidate(OWNER, 1000))
            .frame(A.syn(1000), to(OWNER, Reason::Repeated))
            .frame(A.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000))
            .frame(A.fin(1001), to(OWNER, Reason::Record))
            .keeps(record(OWNER, 1000).closing()),
        Case::new("always tracked TCP, from its middle on", why, Setup::plain())
            .frame(A.data(5000), to(OWNER, Reason::Owner)),
        Case::new("always tracked TCP, first seen by its RST", why, Setup::plain())
            .frame(A.rst(5000), to(OWNER, Reason::Owner)),
        Case::new("always tracked TCP, from its middle on, begun before a change", why, Setup::changed_from(LEGACY))
            .frame(A.data(5000), to(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0)),
    ]
}

fn service_table() -> Vec<Case> {
    let ports = ports_beside_web(4);
    let owners = [LEGACY, OTHER, STOPPED];
    let shared = |count: usize| {
        ports[..count].iter().zip(owners).fold(Setup::plain(), |setup, (&port, owner)| setup.also(TCP, port, owner))
    };
    let mut cases = Vec::new();
    for count in 1..=3 {
        let why = "a bucket of the service table holds four; a lookup reads one bucket";
        let name = format!("{} services in one bucket", count + 1);
        let mut case = Case::new(name, why, shared(count)).frame(F.data(1), to(OWNER, Reason::Plain));
        for (&port, owner) in ports[..count].iter().zip(owners) {
            case = case.frame(F.on(TCP, port).data(1), to(owner, Reason::Plain));
        }
        cases.push(case.frame(F.on(TCP, ports[3]).data(1), Fate::Pass(Reason::NotOurs)));
    }
    let port = 9999;
    cases.push(
        Case::new(
            "a service that points outside the slot table",
            "an error of ours: ended, counted",
            Setup::plain().broken(port),
        )
        .frame(F.on(TCP, port).data(1), Fate::Drop(Reason::BadTables)),
    );
    cases
}

fn next_hops() -> Vec<Case> {
    let other_host = Fate::Pass(Reason::OtherHost);
    let remote = to(REMOTE, Reason::Plain);
    let lost = Fate::Drop(Reason::NoNextHop);
    vec![
        Case::new("a server behind another interface", "leaves with that interface's MAC", Setup::owned_by(REMOTE))
            .frame(F.syn(1000), remote)
            .frame(F.data(1001), remote)
            .frame(Q.udp(b"x"), remote),
        Case::new(
            "a record behind another interface",
            "leaves with that interface's MAC",
            Setup::tracked().record(F, REMOTE, 1),
        )
        .frame(F.data(5000), to(REMOTE, Reason::Record)),
        Case::new("a server behind an interface that is not there", "ended, counted", Setup::owned_by(LOST_PORT))
            .frame(F.data(1001), lost)
            .frame(Q.udp(b"x"), lost),
        Case::new("to another host, the server behind another interface", "untouched", Setup::owned_by(REMOTE))
            .frame(F.data(1).with(|f| f.to_mac = [0xff; 6]), other_host),
        Case::new("to another host, the server unreachable", "not ours to drop", Setup::owned_by(UNREACHABLE))
            .frame(F.data(1).with(|f| f.to_mac = [0xff; 6]), other_host),
    ]
}

fn a_record() -> FlowWord {
    FlowWord::record(OWNER, 1, false)
}

fn a_candidate() -> FlowWord {
    FlowWord::candidate(OWNER, &Packet { sequence: 77, ..Packet::default() })
}

/// TCP flows when other flows have taken the room.
fn tcp_room() -> Vec<Case> {
    let full = |setup: Setup, word| setup.fill(F, 0, 4, WEB_ID, word).fill(F, 1, 4, WEB_ID, word);
    let changed = || Setup::changed_from(LEGACY);
    let stopped = || Setup::owned_by(OTHER).slot_of(F, SlotWord::plain(STOPPED));
    let why = "no room: a SYN goes where its next packet would go without a record";
    let unrecorded = |server| to(server, Reason::NewUnrecorded);
    vec![
        Case::new("full of records: SYN, a living legacy", why, full(changed(), a_record()))
            .frame(F.syn(1000), unrecorded(LEGACY))
            .frame(F.ack(1001), to(LEGACY, Reason::Legacy)),
        Case::new("full of records: SYN, a dead legacy", why, full(Setup::changed_from(DEAD), a_record()))
            .frame(F.syn(1000), unrecorded(OWNER))
            .frame(F.ack(1001), to(OWNER, Reason::Owner)),
        Case::new("full of records: SYN, the owner has stopped", why, full(stopped(), a_record()))
            .frame(F.syn(1000), unrecorded(STOPPED))
            .frame(F.ack(1001), to(STOPPED, Reason::Plain)),
        Case::new(
            "full of records: a flow older than the change",
            "to the legacy, unrecorded",
            full(changed(), a_record()),
        )
        .frame(F.data(5000), to(LEGACY, Reason::Legacy))
        .frame(F.fin(5005), to(LEGACY, Reason::Legacy)),
        Case::new("full of records, its own among them: SYN", why, full_with_own())
            .frame(F.syn(9000), unrecorded(LEGACY))
            .frame(F.data(5000), to(LEGACY, Reason::Record)),
        Case::new("full of candidates: SYN", "a later candidate may overwrite one", full(changed(), a_candidate()))
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000).evicting())
            .frame(F.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000)),
        Case::new(
            "full of candidates: a flow older than the change",
            "a record overwrites one",
            full(changed(), a_candidate()),
        )
        .frame(F.data(5000), to(LEGACY, Reason::Adopted))
        .leaves(record(LEGACY, 0).evicting()),
        Case::new("first bucket full of records", "the second has room", changed().fill(F, 0, 4, WEB_ID, a_record()))
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000))
            .frame(F.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000)),
        Case::new("second bucket full of records", "the first has room", changed().fill(F, 1, 4, WEB_ID, a_record()))
            .frame(F.data(5000), to(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0)),
        Case::new(
            "first full of records, one candidate in the second",
            "the bucket where one can be overwritten",
            changed().fill(F, 0, 4, WEB_ID, a_record()).fill(F, 1, 3, WEB_ID, a_record()).fill(
                F,
                1,
                1,
                WEB_ID,
                a_candidate(),
            ),
        )
        .frame(F.syn(1000), to(OWNER, Reason::New))
        .leaves(candidate(OWNER, 1000).evicting()),
        Case::new(
            "free entries beside two candidates",
            "a free entry is taken first",
            changed().fill(F, 0, 2, WEB_ID, a_candidate()).fill(F, 1, 4, WEB_ID, a_record()),
        )
        .frame(F.syn(1000), to(OWNER, Reason::New))
        .leaves(candidate(OWNER, 1000)),
        Case::new(
            "full of UDP's records: TCP",
            "the quota is of UDP only",
            changed().fill(F, 0, 2, DNS_ID, a_record()).fill(F, 1, 2, DNS_ID, a_record()),
        )
        .frame(F.tcp(tcp::ACK, 5000, b""), to(LEGACY, Reason::Adopted))
        .leaves(record(LEGACY, 0)),
    ]
}

/// Floods that have taken all that they can of both buckets, and what others still get.
fn flooded() -> Vec<Case> {
    let why = "one entry of two buckets is UDP's, one is for TCP flows that would be misplaced without";
    let changed = || Setup::changed_from(LEGACY);
    let stray = |setup: Setup, flow| {
        let record = a_record().for_change(true);
        setup.fill(flow, 0, 3, WEB_ID, record).fill(flow, 1, 3, WEB_ID, record)
    };
    let both = |flow| {
        let setup = changed().fill(flow, 0, 2, DNS_ID, a_record()).fill(flow, 1, 2, DNS_ID, a_record());
        let record = a_record().for_change(true);
        setup.fill(flow, 0, 1, WEB_ID, record).fill(flow, 1, 1, WEB_ID, record)
    };
    let always = A;
    let legacy = |reason| to(LEGACY, reason);
    vec![
        Case::new("stray ACKs have their quota: one more", "no room, and none is needed", stray(changed(), F))
            .frame(F.ack(5000), legacy(Reason::Legacy)),
        Case::new("stray ACKs have their quota: SYN and forged ACK", "no room, no record", stray(changed(), F))
            .frame(F.syn(1000), legacy(Reason::NewUnrecorded))
            .frame(F.ack(1001), legacy(Reason::Legacy)),
        Case::new(
            "stray ACKs have their quota: a candidate gives way",
            "candidates alone are overwritten",
            stray(changed(), F).instead_of_one(a_candidate().for_change(true)),
        )
        .frame(F.syn(1000), to(OWNER, Reason::New))
        .leaves(candidate(OWNER, 1000).evicting()),
        Case::new("stray ACKs have their quota: a UDP flow", why, stray(changed(), D))
            .frame(D.udp(b"query"), to(OWNER, Reason::New))
            .leaves(record(OWNER, 0))
            .frame(D.udp(b"query"), to(OWNER, Reason::Record)),
        Case::new("stray ACKs have their quota: a flow of a service on record", why, stray(changed(), always))
            .frame(always.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000))
            .frame(always.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000)),
        Case::new("UDP and stray ACKs have their quota: a flow of a service on record", why, both(always))
            .frame(always.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000))
            .frame(always.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000)),
        Case::new(
            "SYNs and forged ACKs have filled a service on record: a UDP flow",
            why,
            changed().fill(D, 0, 3, ALWAYS_ID, a_record()).fill(D, 1, 3, ALWAYS_ID, a_record()),
        )
        .frame(D.udp(b"query"), to(OWNER, Reason::New))
        .leaves(record(OWNER, 0)),
    ]
}

fn full_with_own() -> Setup {
    let setup = Setup::changed_from(LEGACY).record(F, LEGACY, 1);
    setup.fill(F, 0, 3, WEB_ID, a_record()).fill(F, 1, 4, WEB_ID, a_record())
}

/// UDP flows when others have taken the room, or UDP its quota of it.
fn udp_room() -> Vec<Case> {
    let setup = Setup::plain;
    let new = to(OWNER, Reason::New);
    let unrecorded = to(OWNER, Reason::NewUnrecorded);
    let query = || D.udp(b"query");
    let why = "UDP may take two entries of a bucket, the rest is TCP's";
    vec![
        Case::new(
            "UDP, quota used up in both buckets",
            why,
            setup().fill(D, 0, 2, DNS_ID, a_record()).fill(D, 1, 2, DNS_ID, a_record()),
        )
        .frame(query(), unrecorded)
        .frame(query(), unrecorded),
        Case::new(
            "UDP, quota used up in the first bucket",
            "the second has room",
            setup().fill(D, 0, 2, DNS_ID, a_record()),
        )
        .frame(query(), new)
        .leaves(record(OWNER, 0))
        .frame(query(), to(OWNER, Reason::Record)),
        Case::new(
            "UDP, quota used up in the second bucket",
            "the first has room",
            setup().fill(D, 1, 2, DNS_ID, a_record()),
        )
        .frame(query(), new)
        .leaves(record(OWNER, 0)),
        Case::new("UDP, one of two in the first bucket", why, setup().fill(D, 0, 1, DNS_ID, a_record()))
            .frame(query(), new)
            .leaves(record(OWNER, 0)),
        Case::new(
            "UDP, quota used up in the first, second full of TCP's candidates",
            "a record overwrites one",
            setup().fill(D, 0, 2, DNS_ID, a_record()).fill(D, 1, 4, WEB_ID, a_candidate()),
        )
        .frame(query(), new)
        .leaves(record(OWNER, 0).evicting()),
        Case::new(
            "UDP, quota used up in the first, second full of TCP's records",
            why,
            setup().fill(D, 0, 2, DNS_ID, a_record()).fill(D, 1, 4, WEB_ID, a_record()),
        )
        .frame(query(), unrecorded),
        Case::new(
            "UDP, both full of TCP's records",
            why,
            setup().fill(D, 0, 4, WEB_ID, a_record()).fill(D, 1, 4, WEB_ID, a_record()),
        )
        .frame(query(), unrecorded),
        Case::new("UDP, no server and no room", "the host's stack answers", Setup::owned_by(DIRECT))
            .frame(query(), Fate::Pass(Reason::Direct)),
    ]
}
