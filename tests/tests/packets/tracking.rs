//! Cases about just-enough tracking: which server, what is remembered, what is not.

use std::collections::BTreeSet;

use necp_ebpf::{
    abi::{DIRECT, NONE},
    flows::FlowWord,
    packet::tcp,
    slot::{COLLECTING, SlotWord, TRACKED},
    verdict::Reason,
};

use crate::{
    case::{Case, Fate, candidate, nothing, record},
    frames::{Flow, WEB_FLOW},
    setup::{DEAD, LEGACY, OTHER, OWNER, STOPPED, Setup, UNREACHABLE},
};

const F: Flow = WEB_FLOW;

const fn to(server: u32, reason: Reason) -> Fate {
    Fate::To(server, reason)
}

pub fn cases() -> Vec<Case> {
    [plain(), choice(), changed(), confirmation(), fast_open(), forged(), reuse(), closing(), tracked(), cut_through()]
        .into_iter()
        .flatten()
        .collect()
}

fn plain() -> Vec<Case> {
    let why = "plain slot: every packet goes to the owner; no record, no write";
    let frames = [
        ("SYN", F.syn(1000)),
        ("SYN with data", F.tcp(tcp::SYN, 1000, b"GET /")),
        ("SYN with ECE and CWR", F.tcp(tcp::SYN | 0xc0, 1000, b"")),
        ("SYN+ACK", F.tcp(tcp::SYN | tcp::ACK, 1000, b"")),
        ("SYN+FIN", F.tcp(tcp::SYN | tcp::FIN, 1000, b"")),
        ("SYN+RST", F.tcp(tcp::SYN | tcp::RST, 1000, b"")),
        ("ACK", F.ack(1001)),
        ("data", F.data(1001)),
        ("FIN", F.fin(1001)),
        ("FIN without ACK", F.tcp(tcp::FIN, 1001, b"")),
        ("RST", F.rst(1001)),
    ];
    let plain = to(OWNER, Reason::Plain);
    let mut cases: Vec<Case> = frames
        .into_iter()
        .map(|(name, frame)| Case::new(format!("{name} on a plain slot"), why, Setup::plain()).frame(frame, plain))
        .collect();
    cases.push(
        Case::new("a whole connection on a plain slot", why, Setup::plain())
            .frame(F.syn(1000), plain)
            .frame(F.ack(1001), plain)
            .frame(F.data(1001), plain)
            .frame(F.fin(1006), plain),
    );
    cases.push(
        Case::new("a plain slot asks no record", why, Setup::plain().record(F, LEGACY, 1000))
            .frame(F.data(1001), plain),
    );
    let none = Setup::owned_by(NONE);
    let no_server = Fate::Pass(Reason::NoServer);
    cases.push(
        Case::new("SYN where nobody ever was", "the host's stack answers", none.clone()).frame(F.syn(1), no_server),
    );
    cases.push(Case::new("data where nobody ever was", "the host's stack answers", none).frame(F.data(1), no_server));
    cases.push(
        Case::new("data to a stopped owner", "STOP ends new flows only (draft §5.6)", Setup::owned_by(STOPPED))
            .frame(F.data(1), to(STOPPED, Reason::Plain)),
    );
    cases
}

/// A new flow whose slot's owner does not take it.
fn choice() -> Vec<Case> {
    let mut cases = Vec::new();
    let others = |owner| Setup::owned_by(OTHER).slot_of(F, SlotWord::plain(owner));
    for (name, owner) in [("stopped", STOPPED), ("dead", DEAD), ("unreachable", UNREACHABLE)] {
        let why = "a server that takes no new flows is skipped; the next packet must find the one chosen";
        cases.push(
            Case::new(format!("SYN to a slot whose owner is {name}"), why, others(owner))
                .frame(F.syn(1000), to(OTHER, Reason::New))
                .leaves(candidate(OTHER, 1000))
                .frame(F.syn(1000), to(OTHER, Reason::Repeated))
                .frame(F.ack(1001), to(OTHER, Reason::Confirmed))
                .leaves(record(OTHER, 1000))
                .frame(F.data(1001), to(OTHER, Reason::Record)),
        );
        let nobody = Setup::owned_by(owner);
        cases.push(
            Case::new(format!("SYN where all owners are {name}"), "VIP: the host's own stack answers", nobody)
                .frame(F.syn(1000), Fate::Pass(Reason::Direct))
                .leaves(candidate(DIRECT, 1000))
                .frame(F.ack(1001), Fate::Pass(Reason::Direct))
                .leaves(record(DIRECT, 1000)),
        );
    }
    let unreachable = Setup::owned_by(UNREACHABLE);
    cases.push(
        Case::new("data to an unreachable owner", "no MAC address, nowhere to send it", unreachable)
            .frame(F.data(1), Fate::Drop(Reason::NoNextHop)),
    );
    cases.push(
        Case::new(
            "SYN between an owner of nothing and one that is direct",
            "DIRECT takes no new flow of a probe",
            others(DIRECT),
        )
        .frame(F.syn(1000), to(OTHER, Reason::New))
        .leaves(candidate(OTHER, 1000)),
    );
    cases
}

/// The slot went from LEGACY to OWNER while flows were on it.
fn changed() -> Vec<Case> {
    let why = "began before the change: goes to the legacy and records itself";
    let adopted = to(LEGACY, Reason::Adopted);
    let setup = || Setup::changed_from(LEGACY);
    let mut cases = vec![
        Case::new("data of a flow older than the change", why, setup())
            .frame(F.data(5000), adopted)
            .leaves(record(LEGACY, 0))
            .frame(F.data(5005), to(LEGACY, Reason::Record)),
        Case::new("FIN of a flow older than the change", why, setup())
            .frame(F.fin(5000), adopted)
            .leaves(record(LEGACY, 0).closing()),
        Case::new("RST of a flow older than the change", why, setup())
            .frame(F.rst(5000), adopted)
            .leaves(record(LEGACY, 0).closing()),
        Case::new("a new flow after the change", "a SYN goes to the owner and proposes", setup())
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000)),
    ];
    for (name, flags) in
        [("SYN+ACK", tcp::SYN | tcp::ACK), ("SYN+FIN", tcp::SYN | tcp::FIN), ("SYN+RST", tcp::SYN | tcp::RST)]
    {
        let trace = if flags & (tcp::FIN | tcp::RST) != 0 { record(LEGACY, 0).closing() } else { record(LEGACY, 0) };
        cases.push(
            Case::new(format!("{name} is no beginning"), "RFC 9293 §3.5: a client begins with SYN alone", setup())
                .frame(F.tcp(flags, 1000, b""), adopted)
                .leaves(trace),
        );
    }
    let dead = Setup::changed_from(DEAD);
    cases.push(
        Case::new("data, the legacy is dead", "only a living legacy gets flows", dead.clone())
            .frame(F.data(5000), to(OWNER, Reason::Owner)),
    );
    cases.push(
        Case::new("SYN, the legacy is dead", "the slot is not plain: propose", dead)
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000)),
    );
    cases.push(
        Case::new("data, the legacy has stopped", "its flows go on (draft §5.6)", Setup::changed_from(STOPPED))
            .frame(F.data(5000), to(STOPPED, Reason::Adopted))
            .leaves(record(STOPPED, 0)),
    );
    cases.push(
        Case::new(
            "data, the legacy's MAC is unknown",
            "recorded, though it cannot be sent",
            Setup::changed_from(UNREACHABLE),
        )
        .frame(F.data(5000), Fate::Drop(Reason::NoNextHop))
        .leaves(record(UNREACHABLE, 0)),
    );
    cases
}

/// Only the packet after the SYN makes a candidate a record.
fn confirmation() -> Vec<Case> {
    let why = "ISN+1 comes only from a client that has heard from that server (RFC 9293 §3.5)";
    let confirmed = to(OWNER, Reason::Confirmed);
    let start = |name: &str, isn| {
        Case::new(name, why, Setup::changed_from(LEGACY))
            .frame(F.syn(isn), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, isn))
    };
    let mut cases = vec![
        start("confirmed by ISN+1", 1000).frame(F.ack(1001), confirmed).leaves(record(OWNER, 1000)),
        start("confirmed by ISN+1 with data", 1000).frame(F.data(1001), confirmed).leaves(record(OWNER, 1000)),
        start("confirmed by a FIN", 1000).frame(F.fin(1001), confirmed).leaves(record(OWNER, 1000).closing()),
        start("confirmed by a RST", 1000).frame(F.rst(1001), confirmed).leaves(record(OWNER, 1000).closing()),
        start("ISN 0xffffffff is confirmed by 0", u32::MAX).frame(F.ack(0), confirmed).leaves(record(OWNER, u32::MAX)),
        start("ISN 0xfffffffe is confirmed by 0xffffffff", u32::MAX - 1)
            .frame(F.ack(u32::MAX), confirmed)
            .leaves(record(OWNER, u32::MAX - 1)),
        start("ISN 0 is confirmed by 1", 0).frame(F.ack(1), confirmed).leaves(record(OWNER, 0)),
        start("the same SYN again", 1000)
            .frame(F.syn(1000), to(OWNER, Reason::Repeated))
            .frame(F.syn(1000), to(OWNER, Reason::Repeated))
            .frame(F.ack(1001), confirmed)
            .leaves(record(OWNER, 1000))
            .frame(F.syn(1000), to(OWNER, Reason::Repeated)),
        start("another SYN takes the candidate's place", 1000)
            .frame(F.syn(2000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 2000))
            .frame(F.ack(1001), to(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0).and(candidate(OWNER, 2000)))
            .frame(F.ack(2001), confirmed)
            .leaves(record(OWNER, 2000)),
    ];
    for (name, isn, sequence) in [
        ("ISN+2", 1000, 1002),
        ("ISN itself", 1000, 1000),
        ("ISN-1", 1000, 999),
        ("ISN+1 plus half the space", 1000, 1001 + (1 << 31)),
        ("1 after ISN 0xffffffff", u32::MAX, 1),
        ("0xffffffff after ISN 0xffffffff", u32::MAX, u32::MAX),
    ] {
        cases.push(
            start(&format!("not confirmed by {name}"), isn)
                .frame(F.ack(sequence), to(LEGACY, Reason::Adopted))
                .leaves(record(LEGACY, 0).and(candidate(OWNER, isn))),
        );
    }
    let dead = Setup::changed_from(LEGACY).candidate(F, DEAD, 1000);
    cases.push(
        Case::new("a dead server's candidate is not confirmed", "only living servers have flows", dead.clone())
            .frame(F.ack(1001), to(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0).and(candidate(DEAD, 1000))),
    );
    cases.push(
        Case::new("a dead server's candidate gives way", "only living servers have flows", dead)
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000)),
    );
    let stopped = Setup::changed_from(LEGACY).candidate(F, STOPPED, 1000);
    cases.push(
        Case::new("a stopped server's candidate is confirmed", "its SYN came before the STOP", stopped)
            .frame(F.syn(1000), to(STOPPED, Reason::Repeated))
            .frame(F.ack(1001), to(STOPPED, Reason::Confirmed))
            .leaves(record(STOPPED, 1000)),
    );
    cases
}

/// SYN with data (RFC 7413): the answer may acknowledge none of it, or all.
fn fast_open() -> Vec<Case> {
    let start = |name: String, data: usize| {
        Case::new(name, "RFC 7413: ISN+1, or up to the SYN's own data more", Setup::changed_from(LEGACY))
            .frame(F.tcp(tcp::SYN, 1000, &vec![0x47; data]), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000))
    };
    let mut cases = Vec::new();
    for (data, last) in [(1, 1), (5, 7), (8, 15), (1400, 2047)] {
        for more in BTreeSet::from([0, data, last]) {
            cases.push(
                start(format!("{data} bytes with the SYN, confirmed by ISN+1+{more}"), data as usize)
                    .frame(F.data(1001 + more), to(OWNER, Reason::Confirmed))
                    .leaves(record(OWNER, 1000)),
            );
        }
        for beyond in [1000, 1001 + last + 1] {
            cases.push(
                start(format!("{data} bytes with the SYN, not confirmed by {beyond}"), data as usize)
                    .frame(F.data(beyond), to(LEGACY, Reason::Adopted))
                    .leaves(record(LEGACY, 0).and(candidate(OWNER, 1000))),
            );
        }
    }
    cases
}

fn forged() -> Vec<Case> {
    let why = "a forged or stray SYN moves nothing";
    let established = || Setup::changed_from(LEGACY).record(F, LEGACY, 0);
    vec![
        Case::new("forged SYN on a flow that is on record", why, established())
            .frame(F.syn(7_000), to(OWNER, Reason::New))
            .leaves(record(LEGACY, 0).and(candidate(OWNER, 7_000)))
            .frame(F.data(5000), to(LEGACY, Reason::Record))
            .leaves(record(LEGACY, 0).and(candidate(OWNER, 7_000)))
            .frame(F.syn(8_000), to(OWNER, Reason::New))
            .leaves(record(LEGACY, 0).and(candidate(OWNER, 8_000)))
            .frame(F.data(5005), to(LEGACY, Reason::Record)),
        Case::new("forged SYN on a flow that is not yet on record", why, Setup::changed_from(LEGACY))
            .frame(F.syn(7_000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 7_000))
            .frame(F.data(5000), to(LEGACY, Reason::Adopted))
            .leaves(record(LEGACY, 0).and(candidate(OWNER, 7_000))),
        Case::new("forged FIN on a flow that is on record", "data clears the mark again", established())
            .frame(F.fin(9), to(LEGACY, Reason::Record))
            .keeps(record(LEGACY, 0).closing())
            .frame(F.data(5000), to(LEGACY, Reason::Record))
            .keeps(record(LEGACY, 0)),
        Case::new(
            "a stray SYN with the record's own number",
            "the same SYN again",
            Setup::changed_from(LEGACY).record(F, LEGACY, 4999),
        )
        .frame(F.syn(4999), to(LEGACY, Reason::Repeated)),
    ]
}

fn reuse() -> Vec<Case> {
    let why = "a tuple is used again (RFC 9293 §3.6.1)";
    let old = |server| Setup::changed_from(LEGACY).entry(F, FlowWord::record(server, 1000, true));
    vec![
        Case::new("again on the same server", why, old(OWNER))
            .frame(F.syn(5000), to(OWNER, Reason::New))
            .leaves(record(OWNER, 5000))
            .frame(F.ack(5001), to(OWNER, Reason::Record)),
        Case::new("again on another server", why, old(LEGACY))
            .frame(F.syn(5000), to(OWNER, Reason::New))
            .leaves(record(LEGACY, 1000).closing().and(candidate(OWNER, 5000)))
            .frame(F.ack(5001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 5000)),
        Case::new("again after the old server died", why, old(DEAD))
            .frame(F.syn(5000), to(OWNER, Reason::New))
            .leaves(record(DEAD, 1000).closing().and(candidate(OWNER, 5000)))
            .frame(F.ack(5001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 5000)),
        Case::new("the candidate goes when the record is made anew", why, old(OWNER).candidate(F, LEGACY, 4000))
            .frame(F.syn(5000), to(OWNER, Reason::New))
            .leaves(record(OWNER, 5000)),
    ]
}

fn closing() -> Vec<Case> {
    let why = "FIN and RST mark a record closing, later data clears the mark";
    let on_record = to(LEGACY, Reason::Record);
    let open = || Setup::changed_from(LEGACY).record(F, LEGACY, 1000);
    let marked = || Setup::changed_from(LEGACY).entry(F, FlowWord::record(LEGACY, 1000, true));
    let aged = |age, closing| {
        let word = FlowWord::record(LEGACY, 1000, closing).with_age(age);
        Setup::changed_from(LEGACY).entry(F, word)
    };
    let young = record(LEGACY, 1000);
    vec![
        Case::new("FIN marks", why, open()).frame(F.fin(2000), on_record).keeps(young.closing()),
        Case::new("RST marks", why, open()).frame(F.rst(2000), on_record).keeps(young.closing()),
        Case::new("FIN with data marks", why, open())
            .frame(F.tcp(tcp::ACK | tcp::FIN, 2000, b"bye"), on_record)
            .keeps(young.closing()),
        Case::new("data clears", why, marked()).frame(F.data(2000), on_record).keeps(young),
        Case::new("a bare ACK does not clear", why, marked()).frame(F.ack(2000), on_record).keeps(young.closing()),
        Case::new("a packet of a young record writes nothing", why, open()).frame(F.data(2000), on_record),
        Case::new("data makes an old record young", "touch resets age", aged(31, false))
            .frame(F.data(2000), on_record)
            .keeps(young),
        Case::new("an ACK makes an old record young", "touch resets age", aged(1, true))
            .frame(F.ack(2000), on_record)
            .keeps(young.closing()),
        Case::new("a repeated SYN leaves the age", "it may be a stray one", aged(9, false))
            .frame(F.syn(1000), to(LEGACY, Reason::Repeated)),
    ]
}

/// No legacy, but flows that may be on record.
fn tracked() -> Vec<Case> {
    let why = "TRACKED or COLLECTING: a record decides, else the owner";
    let mut cases = Vec::new();
    let both = Setup::slots(SlotWord::plain(OWNER).with_bits(TRACKED | COLLECTING, 0));
    for (name, setup) in [("TRACKED", Setup::tracked()), ("COLLECTING", Setup::collecting()), ("both bits", both)] {
        let with = |entry: &str| format!("{name}: {entry}");
        cases.push(
            Case::new(with("data without a record"), why, setup.clone()).frame(F.data(1), to(OWNER, Reason::Owner)),
        );
        cases.push(
            Case::new(with("SYN to the owner"), "its next packet finds it again: no trace", setup.clone())
                .frame(F.syn(1000), to(OWNER, Reason::New))
                .frame(F.ack(1001), to(OWNER, Reason::Owner)),
        );
        cases.push(
            Case::new(with("record elsewhere"), why, setup.clone().record(F, LEGACY, 1))
                .frame(F.data(5000), to(LEGACY, Reason::Record)),
        );
        cases.push(
            Case::new(with("record on a stopped server"), why, setup.clone().record(F, STOPPED, 1))
                .frame(F.data(5000), to(STOPPED, Reason::Record)),
        );
        cases.push(
            Case::new(with("record on a dead server"), why, setup.clone().record(F, DEAD, 1))
                .frame(F.data(5000), to(OWNER, Reason::Owner)),
        );
        cases.push(
            Case::new(with("record on an unreachable server"), why, setup.clone().record(F, UNREACHABLE, 1))
                .frame(F.data(5000), Fate::Drop(Reason::NoNextHop)),
        );
        cases.push(
            Case::new(
                with("SYN while a record is elsewhere"),
                "propose; TRACKED after the insertion, always",
                setup.clone().record(F, LEGACY, 1),
            )
            .frame(F.syn(9000), to(OWNER, Reason::New))
            .leaves(record(LEGACY, 1).and(candidate(OWNER, 9000))),
        );
        cases.push(
            Case::new(
                with("SYN to the owner forgets a candidate"),
                "its next packet finds it without",
                setup.candidate(F, LEGACY, 1),
            )
            .frame(F.syn(9000), to(OWNER, Reason::New))
            .keeps(nothing()),
        );
    }
    cases
}

/// `direct` is a server id like any other.
fn cut_through() -> Vec<Case> {
    let direct = Fate::Pass(Reason::Direct);
    let why = "cut through: as if there were no balancer";
    let started = Setup::changed_from(DIRECT);
    vec![
        Case::new("SYN on a direct slot", why, Setup::direct()).frame(F.syn(1000), direct),
        Case::new("data on a direct slot", why, Setup::direct()).frame(F.data(1001), direct),
        Case::new("a flow that began before the first START", "stays direct, and records itself", started.clone())
            .frame(F.data(5000), direct)
            .leaves(record(DIRECT, 0))
            .frame(F.data(5005), direct),
        Case::new("a new flow after the first START", why, started)
            .frame(F.syn(1000), to(OWNER, Reason::New))
            .leaves(candidate(OWNER, 1000))
            .frame(F.ack(1001), to(OWNER, Reason::Confirmed))
            .leaves(record(OWNER, 1000)),
        Case::new("a direct flow to another host's MAC", "untouched either way", Setup::direct())
            .frame(F.data(1).with(|f| f.to_mac = [0xff; 6]), Fate::Pass(Reason::OtherHost)),
        Case::new(
            "a SYN to another host's MAC",
            "leaves no trace, though it would have made a candidate",
            Setup::changed_from(LEGACY),
        )
        .frame(F.syn(1000).with(|f| f.to_mac = [0xff; 6]), Fate::Pass(Reason::OtherHost)),
        Case::new(
            "data to another host's MAC",
            "leaves no trace, though it would have been adopted",
            Setup::changed_from(LEGACY),
        )
        .frame(F.data(1).with(|f| f.to_mac = [0xff; 6]), Fate::Pass(Reason::OtherHost)),
    ]
}
