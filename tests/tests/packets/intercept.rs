//! Packets that cross this host: which of them a farm takes that intercepts, and that its flows are told apart.

use necp_ebpf::{
    abi::DIRECT,
    packet::protocol::{TCP, UDP},
    slot::{SlotWord, TRACKED},
    verdict::Reason,
};

use crate::{
    case::{Case, Fate, candidate, record},
    frames::{Flow, VIP, WEB_FLOW},
    rare::{VLAN, first, icmp, last, quote, tagged},
    routed::gre,
    setup::{ANY, DNS, OTHER, OWN_ADDRESS, OWNER, STOPPED, Setup, TUNNEL, UNREACHABLE, address},
};

/// A client's connection to somebody's web server behind this host.
const F: Flow = Flow { destination: [203, 0, 113, 80], port: 8000, ..WEB_FLOW };
/// The same client's, from the same port, to another web server.
const G: Flow = Flow { destination: [203, 0, 113, 81], ..F };
const D: Flow = F.on(UDP, DNS);
const CROSSING: Fate = Fate::Pass(Reason::NotOurs);
const DIRECTLY: Fate = Fate::Pass(Reason::Direct);

pub fn cases() -> Vec<Case> {
    [captured(), let_through(), begun_before(), excepted(), told_apart(), rare()].into_iter().flatten().collect()
}

/// TCP and UDP are intercepted, beside the services of the VIP, which have servers of their own.
fn on(word: SlotWord) -> Setup {
    Setup::owned_by(OTHER).intercepting(TCP, F.port, word).intercepting(UDP, DNS, word)
}

fn owned_by(owner: u32) -> Setup {
    on(SlotWord::plain(owner))
}

fn to_owner(reason: Reason) -> Fate {
    Fate::To(OWNER, reason)
}

fn captured() -> Vec<Case> {
    let why = "protocol, port and destination are the farm's";
    let case = |name: &str, setup: Setup| Case::new(format!("intercepted: {name}"), why, setup);
    vec![
        case("a connection", owned_by(OWNER))
            .frame(F.syn(1000), to_owner(Reason::Plain))
            .frame(F.data(1001), to_owner(Reason::Plain))
            .frame(F.fin(1006), to_owner(Reason::Plain)),
        case("UDP, always on record", owned_by(OWNER))
            .frame(D.udp(b"?"), to_owner(Reason::New))
            .leaves(record(OWNER, 0))
            .frame(D.udp(b"?"), to_owner(Reason::Record)),
        case("by GRE", owned_by(TUNNEL)).frame(F.data(1), gre(&F.data(1), TUNNEL, Reason::Plain)),
        case("in a tagged frame", owned_by(OWNER)).frame(tagged(F.data(1), &[VLAN]), to_owner(Reason::Plain)),
        case("its server's MAC address is not known", owned_by(UNREACHABLE))
            .frame(F.data(1), Fate::Drop(Reason::NoNextHop)),
        case(
            "a server that takes no new flows is passed over",
            on(SlotWord::plain(OWNER)).slot_of(F, SlotWord::plain(STOPPED)),
        )
        .frame(F.syn(1000), to_owner(Reason::New))
        .leaves(candidate(OWNER, 1000))
        .frame(F.ack(1001), to_owner(Reason::Confirmed))
        .leaves(record(OWNER, 1000)),
        case("the broadcast address of a network that is not this host's", owned_by(OWNER))
            .frame(Flow { destination: [203, 0, 113, 255], ..F }.data(1), to_owner(Reason::Plain)),
    ]
}

fn let_through() -> Vec<Case> {
    let case = |name: &str, why, flow: Flow| {
        Case::new(format!("not intercepted: {name}"), why, owned_by(OWNER))
            .frame(if flow.protocol == UDP { flow.udp(b"?") } else { flow.syn(1000) }, CROSSING)
    };
    let vip = Flow { destination: VIP, port: 80, ..F };
    let elsewhere = [198, 51, 100, 9];
    vec![
        case("another port", "only what the farm serves", F.on(TCP, F.port + 1)),
        case("the port of another protocol", "only what the farm serves", F.on(UDP, F.port)),
        case("another destination", "only to the farm's prefixes", Flow { destination: elsewhere, ..F }),
        case("this host's own address", "its own ports are its own", Flow { destination: [203, 0, 113, 1], ..F }),
        case("from a proxy", "its own fetches would come back to it", Flow { source: address(OWNER), ..F }),
        case("from a proxy by UDP", "its own fetches would come back to it", Flow { source: address(OWNER), ..D }),
        case("from an address that may become a proxy", "any that may join", Flow { source: [10, 0, 0, 200], ..F }),
        case("a reply", "ports the other way round", F.replied_by(F.destination)),
        Case::new("not intercepted: to another host's MAC", "it does not cross this host", owned_by(OWNER))
            .frame(F.syn(1000).with(|spec| spec.to_mac = [2, 0, 0, 0, 7, 7]), Fate::Pass(Reason::OtherHost)),
        Case::new("a VIP comes first", "its farm, whatever else intercepts its prefix", {
            Setup::owned_by(OTHER).intercepting(TCP, 80, SlotWord::plain(OWNER))
        })
        .frame(vip.data(1), Fate::To(OTHER, Reason::Plain))
        .frame(Flow { destination: [192, 0, 2, 11], ..vip }.data(1), to_owner(Reason::Plain)),
        Case::new("a VIP without servers comes first", "the host answers for it", {
            Setup::owned_by(0).intercepting(TCP, 80, SlotWord::plain(OWNER))
        })
        .frame(vip.data(1), Fate::Pass(Reason::NoServer)),
        Case::new("a proxy is a client of a VIP", "a server may be one", owned_by(OWNER))
            .frame(Flow { source: address(OWNER), ..vip }.data(1), Fate::To(OTHER, Reason::Plain)),
        Case::new("nobody intercepts", "there is no such service", Setup::owned_by(OTHER)).frame(F.syn(1000), CROSSING),
        Case::new("to the source of GRE", "an address outside the prefixes", owned_by(OWNER))
            .frame(Flow { destination: OWN_ADDRESS, ..F }.syn(1000), CROSSING),
    ]
}

fn begun_before() -> Vec<Case> {
    let why = "flows that began before START stay direct";
    let started = || on(SlotWord::plain(OWNER).with_legacy(DIRECT));
    vec![
        Case::new("nobody has started yet", why, owned_by(DIRECT))
            .frame(F.syn(1000), DIRECTLY)
            .frame(F.data(1001), DIRECTLY)
            .frame(D.udp(b"?"), DIRECTLY)
            .leaves(record(DIRECT, 0)),
        Case::new("a connection from before START", why, started())
            .frame(F.data(5000), DIRECTLY)
            .leaves(record(DIRECT, 0))
            .frame(F.data(5005), DIRECTLY)
            .frame(F.fin(5010), DIRECTLY)
            .keeps(record(DIRECT, 0).closing()),
        Case::new("a connection from after START", why, started())
            .frame(F.syn(1000), to_owner(Reason::New))
            .leaves(candidate(OWNER, 1000))
            .frame(F.ack(1001), to_owner(Reason::Confirmed))
            .leaves(record(OWNER, 1000))
            .frame(F.data(1001), to_owner(Reason::Record)),
        Case::new("a record of what is direct, in a slot that has been collected", why, {
            on(SlotWord::plain(OWNER).with_bits(TRACKED, 0)).record(F, DIRECT, 0)
        })
        .frame(F.data(1), DIRECTLY)
        .frame(G.data(1), to_owner(Reason::Owner)),
        Case::new("all servers are gone again", "cut through", {
            on(SlotWord::plain(DIRECT).with_legacy(OWNER)).record(F, OWNER, 7)
        })
        .frame(F.data(1), to_owner(Reason::Record))
        .frame(G.syn(1000), DIRECTLY)
        .leaves(candidate(DIRECT, 1000)),
        Case::new("no server takes new flows", "cut through", owned_by(STOPPED))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000)),
    ]
}

fn excepted() -> Vec<Case> {
    let why = "draft §5.7: what servers do not want is cut through";
    let (client, origin) = ((F.source, 32), (F.destination, 32));
    vec![
        Case::new("intercepted but for a client", why, owned_by(OWNER).global([client, ANY], 0, 0))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(F.ack(1001), DIRECTLY)
            .leaves(record(DIRECT, 1000)),
        Case::new("intercepted but for a destination", why, owned_by(OWNER).global([ANY, origin], TCP, F.port))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000))
            .frame(G.syn(1000), to_owner(Reason::Plain)),
        Case::new("intercepted by another server", why, {
            owned_by(OTHER).slot_of(F, SlotWord::plain(OWNER)).local([ANY, origin], 0, 0, &[OWNER])
        })
        .frame(F.syn(1000), Fate::To(OTHER, Reason::New))
        .leaves(candidate(OTHER, 1000)),
        Case::new("intercepted by nobody", why, owned_by(OWNER).local([client, origin], 0, 0, &[OWNER]))
            .frame(F.syn(1000), DIRECTLY)
            .leaves(candidate(DIRECT, 1000)),
        Case::new("UDP that is excepted", why, owned_by(OWNER).global([client, ANY], UDP, DNS))
            .frame(D.udp(b"?"), DIRECTLY)
            .leaves(record(DIRECT, 0))
            .frame(D.udp(b"?"), DIRECTLY),
    ]
}

/// One client's port, several destinations.
fn told_apart() -> Vec<Case> {
    let why = "a flow is named by its destination too";
    let both = || on(SlotWord::plain(OWNER).with_bits(TRACKED, 0)).record(F, OTHER, 7).record(G, DIRECT, 9);
    vec![
        Case::new("two connections from one port", why, both())
            .frame(F.data(1), Fate::To(OTHER, Reason::Record))
            .frame(G.data(1), DIRECTLY)
            .frame(Flow { destination: [203, 0, 113, 82], ..F }.data(1), to_owner(Reason::Owner)),
        Case::new("one of two connections ends", why, both())
            .frame(G.rst(1), DIRECTLY)
            .keeps(record(DIRECT, 9).closing())
            .frame(F.data(1), Fate::To(OTHER, Reason::Record)),
        Case::new("two UDP flows from one port", why, owned_by(OWNER))
            .frame(D.udp(b"?"), to_owner(Reason::New))
            .leaves(record(OWNER, 0))
            .frame(Flow { destination: G.destination, ..D }.udp(b"?"), to_owner(Reason::New))
            .leaves(record(OWNER, 0)),
    ]
}

fn rare() -> Vec<Case> {
    let origin = |flow: Flow| flow.replied_by(flow.destination).data(1);
    let about = |flow: Flow| icmp(3, 4, flow.destination, &quote(&origin(flow), 8));
    let on_record = || on(SlotWord::plain(OWNER).with_bits(TRACKED, 0)).record(F, OTHER, 7);
    vec![
        Case::new("parts of what is intercepted", "they follow the first", owned_by(OWNER))
            .frame(first(F), to_owner(Reason::Plain))
            .frame(last(F), to_owner(Reason::Part)),
        Case::new("intercepted, parts of what is cut through", "the kernel routes them", owned_by(DIRECT))
            .frame(first(F), DIRECTLY)
            .frame(last(F), Fate::Pass(Reason::Fragment)),
        Case::new("a part before its first, intercepted", "it may be for its destination", owned_by(OWNER))
            .frame(last(F), Fate::Pass(Reason::Fragment)),
        Case::new("an error about what a proxy sent", "RFC 792: to whoever sent it", on_record())
            .bytes(about(F), Fate::To(OTHER, Reason::Quoted))
            .bytes(about(G), to_owner(Reason::Quoted)),
        Case::new("an error about what is cut through", "to the destination itself", owned_by(DIRECT))
            .bytes(about(F), Fate::Pass(Reason::Icmp)),
        Case::new("an error about what a VIP without servers sent", "the VIP's farm comes first", {
            Setup::owned_by(0).intercepting(TCP, 80, SlotWord::plain(OWNER))
        })
        .bytes(about(Flow { destination: VIP, port: 80, ..F }), Fate::Pass(Reason::Icmp)),
        Case::new("an error about another port", "to the destination itself", owned_by(OWNER))
            .bytes(about(F.on(TCP, F.port + 1)), Fate::Pass(Reason::Icmp)),
    ]
}
