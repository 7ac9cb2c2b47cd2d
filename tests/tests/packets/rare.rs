//! What comes seldom: tags, fragments, ICMP errors.

use necp_ebpf::{
    packet::protocol::{ICMP, TCP, UDP},
    slot::SlotWord,
    verdict::Reason,
};
use necp_tests::kernel::{OWN_MAC, Verdict};

use crate::{
    case::{Case, Fate, candidate, record},
    frames::{CLIENT_MAC, Flow, Spec, VIP, WEB_FLOW as F, checksum},
    routed::{becomes, gre, gre_bytes, reply_bytes, translated_bytes},
    setup::{
        ALWAYS, DNS, LEGACY, OTHER, OWN_ADDRESS, OWNER, QUIC, Setup, TRANSLATED, TUNNEL, UNREACHABLE, address, mac,
    },
};

/// Tag control information (IEEE 802.1Q) of priority 5, VLAN 100.
pub const VLAN: [u8; 4] = [0x81, 0x00, 0xa0, 100];
/// An outer tag (IEEE 802.1ad) of VLAN 7.
const OUTER: [u8; 4] = [0x88, 0xa8, 0, 7];
/// A router on the way.
const ROUTER: [u8; 4] = [203, 0, 113, 9];

pub fn cases() -> Vec<Case> {
    [tags(), fragments(), fragments_by_route(), errors_to_vips(), errors_that_are_none(), errors_and_layer_3()]
        .into_iter()
        .flatten()
        .collect()
}

pub fn tagged(spec: Spec, tags: &[[u8; 4]]) -> Spec {
    spec.with(|spec| spec.tags = tags.to_vec())
}

fn tags() -> Vec<Case> {
    let why = "IEEE 802.1Q: tags stay where they are";
    let mut cases = Vec::new();
    for (name, tags) in [
        ("one tag", &[VLAN][..]),
        ("an outer tag", &[OUTER]),
        ("two tags", &[OUTER, VLAN]),
        ("QinQ of the old kind", &[VLAN, VLAN]),
    ] {
        let on = |flow: Flow| tagged(flow.data(1), tags);
        cases.extend([
            Case::new(format!("{name}, layer 2"), why, Setup::plain()).frame(on(F), Fate::To(OWNER, Reason::Plain)),
            Case::new(format!("{name}, GRE"), why, Setup::owned_by(TUNNEL))
                .frame(on(F), gre(&on(F), TUNNEL, Reason::Plain)),
            Case::new(format!("{name}, layer 3"), why, Setup::owned_by(TRANSLATED)).frame(
                on(F.on(TCP, ALWAYS)),
                becomes(
                    Verdict::Tx,
                    Reason::Owner,
                    translated_bytes(&on(F.on(TCP, ALWAYS)), address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC),
                ),
            ),
            Case::new(format!("{name}, a SYN that makes a candidate"), why, Setup::changed_from(LEGACY))
                .frame(tagged(F.syn(1000), tags), Fate::To(OWNER, Reason::New))
                .leaves(candidate(OWNER, 1000)),
            Case::new(format!("{name}, not ours"), why, Setup::plain())
                .frame(on(Flow { destination: [192, 0, 2, 11], ..F }), Fate::Pass(Reason::NotOurs)),
            Case::new(format!("{name}, to another host"), why, Setup::plain())
                .frame(on(F).with(|spec| spec.to_mac = [2, 0, 0, 0, 7, 7]), Fate::Pass(Reason::OtherHost)),
            Case::new(format!("{name}, ARP"), why, Setup::plain())
                .frame(on(F).with(|spec| spec.ether_type = 0x0806), Fate::Pass(Reason::NotIp)),
            Case::new(format!("{name}, IPv6"), why, Setup::plain())
                .frame(on(F).with(|spec| spec.ether_type = 0x86dd), Fate::Pass(Reason::Malformed)),
        ]);
        let header = 14 + 4 * tags.len();
        for cut in 15..header + 40 {
            let reason = if cut < header { Reason::NotIp } else { Reason::Malformed };
            cases.push(
                Case::new(format!("{name}, cut to {cut} bytes"), "nothing is read beyond the frame", Setup::plain())
                    .frame(tagged(F.ack(1), tags).with(|spec| spec.cut = Some(cut)), Fate::Pass(reason)),
            );
        }
    }
    cases.push(
        Case::new("three tags", "two at most", Setup::plain())
            .frame(tagged(F.data(1), &[OUTER, VLAN, VLAN]), Fate::Pass(Reason::NotIp)),
    );
    cases
}

/// A part of a datagram: `offset` in eights of bytes, whether more follow.
pub fn part(flow: Flow, id_and_offset: u16, more: bool) -> Spec {
    let bits = id_and_offset | if more { 0x2000 } else { 0 };
    // What stands where ports would be says nothing.
    let spec = if flow.protocol == UDP { flow.udp(&[9; 16]) } else { flow.data(1) };
    spec.with(|spec| (spec.fragment, spec.udp_length) = (bits, Some(4000)))
}

pub fn first(flow: Flow) -> Spec {
    part(flow, 0, true)
}

fn later(flow: Flow) -> Spec {
    part(Flow { source_port: 0xdead, port: 0xbeef, ..flow }, 3, true)
}

pub fn last(flow: Flow) -> Spec {
    part(Flow { source_port: 0x1234, port: 80, ..flow }, 6, false)
}

fn fragments() -> Vec<Case> {
    let why = "RFC 791 §3.2: the first part has the ports, the others follow it";
    let stray = Fate::Drop(Reason::StrayPart);
    let quic = F.on(UDP, QUIC);
    let dns = F.on(UDP, DNS);
    vec![
        Case::new("parts of UDP", why, Setup::plain())
            .frame(first(quic), Fate::To(OWNER, Reason::Plain))
            .frame(later(quic), Fate::To(OWNER, Reason::Part))
            .frame(last(quic), Fate::To(OWNER, Reason::Part)),
        Case::new("parts of UDP, the last before the middle", why, Setup::plain())
            .frame(first(quic), Fate::To(OWNER, Reason::Plain))
            .frame(last(quic), Fate::To(OWNER, Reason::Part))
            .frame(later(quic), Fate::To(OWNER, Reason::Part)),
        Case::new("parts of TCP", why, Setup::plain())
            .frame(first(F), Fate::To(OWNER, Reason::Plain))
            .frame(last(F), Fate::To(OWNER, Reason::Part)),
        Case::new("parts of a flow on record", why, Setup::plain().record(dns, OTHER, 0))
            .frame(first(dns), Fate::To(OTHER, Reason::Record))
            .frame(last(dns), Fate::To(OTHER, Reason::Part)),
        Case::new("parts of a new flow", why, Setup::plain())
            .frame(first(dns), Fate::To(OWNER, Reason::New))
            .leaves(record(OWNER, 0))
            .frame(last(dns), Fate::To(OWNER, Reason::Part)),
        Case::new("parts in tagged frames", why, Setup::plain())
            .frame(tagged(first(quic), &[VLAN]), Fate::To(OWNER, Reason::Plain))
            .frame(tagged(last(quic), &[VLAN]), Fate::To(OWNER, Reason::Part)),
        Case::new("a part before its first", "nobody could put it together", Setup::plain())
            .frame(last(quic), stray)
            .frame(first(quic), Fate::To(OWNER, Reason::Plain)),
        Case::new("a part of another client's", why, Setup::plain())
            .frame(first(quic), Fate::To(OWNER, Reason::Plain))
            .frame(last(Flow { source: [198, 51, 100, 2], ..quic }), stray),
        Case::new("a part of another protocol", why, Setup::plain())
            .frame(first(quic), Fate::To(OWNER, Reason::Plain))
            .frame(last(F), stray),
        Case::new("parts of what no server has", "the host's own stack answers", Setup::slots(SlotWord::plain(0)))
            .frame(first(quic), Fate::Pass(Reason::NoServer))
            .frame(last(quic), Fate::Pass(Reason::Fragment)),
        Case::new("parts of what is cut through", "the host's own stack answers", Setup::direct())
            .frame(first(quic), Fate::Pass(Reason::Direct))
            .frame(last(quic), Fate::Pass(Reason::Fragment)),
        Case::new("parts to a server without a way", why, Setup::owned_by(UNREACHABLE))
            .frame(first(F), Fate::Drop(Reason::NoNextHop)),
        Case::new("parts of what is not ours", "leaves untouched", Setup::plain())
            .frame(first(Flow { destination: [192, 0, 2, 11], ..quic }), Fate::Pass(Reason::Fragment))
            .frame(last(Flow { destination: [192, 0, 2, 11], ..quic }), Fate::Pass(Reason::Fragment)),
        Case::new("parts to a port that is none", "the host's own", Setup::plain())
            .frame(first(F.on(UDP, 9)), Fate::Pass(Reason::Fragment))
            .frame(last(F.on(UDP, 9)), Fate::Pass(Reason::Fragment)),
        Case::new("parts of an echo request", "the host's own", Setup::plain())
            .frame(first(F.on(ICMP, 0)), Fate::Pass(Reason::Icmp))
            .frame(last(F.on(ICMP, 0)), Fate::Pass(Reason::Fragment)),
        Case::new("parts of an echo request to a silent VIP", "as configured", Setup::plain().silent())
            .bytes(first_echo(), Fate::Drop(Reason::Echo)),
        Case::new("parts of an echo request to a VIP", "the host answers", Setup::plain())
            .bytes(first_echo(), Fate::Pass(Reason::Icmp)),
        Case::new("parts to another host", "as whole ones", Setup::plain())
            .frame(first(quic).with(|spec| spec.to_mac = [0xff; 6]), Fate::Pass(Reason::OtherHost))
            .frame(last(quic).with(|spec| spec.to_mac = [0xff; 6]), Fate::Pass(Reason::OtherHost)),
    ]
}

/// The first part of an echo request to the VIP.
fn first_echo() -> Vec<u8> {
    let mut frame = icmp(8, 0, VIP, &[0, 1, 0, 1, b'?', b'!']);
    frame[20] = 0x20;
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn fragments_by_route() -> Vec<Case> {
    let why = "each part is routed as a whole one";
    let (quic, dns) = (F.on(UDP, QUIC), F.on(UDP, DNS));
    let reply = dns.replied_by(address(TRANSLATED));
    // Only the first part has a checksum, which covers the addresses.
    let translated = |spec: &Spec, reason| {
        becomes(
            Verdict::Tx,
            reason,
            by_header(
                spec,
                |header| {
                    header[16..20].copy_from_slice(&address(TRANSLATED));
                    header[8] -= 1;
                },
                Some((mac(TRANSLATED), OWN_MAC)),
            ),
        )
    };
    let left = |spec: &Spec| {
        becomes(
            Verdict::Pass,
            Reason::ReplyRouted,
            by_header(spec, |header| header[12..16].copy_from_slice(&VIP), None),
        )
    };
    vec![
        Case::new("parts in GRE", why, Setup::owned_by(TUNNEL))
            .frame(first(quic), gre(&first(quic), TUNNEL, Reason::Plain))
            .frame(last(quic), gre(&last(quic), TUNNEL, Reason::Part)),
        Case::new("parts by layer 3", why, Setup::owned_by(TRANSLATED).record(dns, TRANSLATED, 0))
            .frame(
                first(dns),
                becomes(
                    Verdict::Tx,
                    Reason::Record,
                    translated_bytes(&first(dns), address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC),
                ),
            )
            .frame(last(dns), translated(&last(dns), Reason::Part)),
        Case::new("parts of a reply", why, Setup::owned_by(TRANSLATED).record(dns, TRANSLATED, 0))
            .frame(first(reply), becomes(Verdict::Pass, Reason::ReplyRouted, reply_bytes(&first(reply))))
            .frame(last(reply), left(&last(reply))),
        Case::new(
            "parts of a reply, then of another datagram of that name",
            "identifications come back",
            Setup::owned_by(TRANSLATED).record(dns, TRANSLATED, 0),
        )
        .frame(first(reply), becomes(Verdict::Pass, Reason::ReplyRouted, reply_bytes(&first(reply))))
        .frame(first(Flow { source_port: 9, ..reply }), Fate::Pass(Reason::Fragment))
        .frame(last(reply), Fate::Pass(Reason::Fragment)),
    ]
}

/// The frame with another IPv4 header, whose checksum is right.
fn by_header(spec: &Spec, edit: impl FnOnce(&mut [u8]), macs: Option<([u8; 6], [u8; 6])>) -> Vec<u8> {
    let mut frame = spec.build();
    edit(&mut frame[14..34]);
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    if let Some((to, from)) = macs {
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
    }
    frame
}

/// An ICMP message from a router, with this behind its first four bytes.
pub fn icmp(kind: u8, code: u8, to: [u8; 4], rest: &[u8]) -> Vec<u8> {
    icmp_from(ROUTER, kind, code, to, 64, rest)
}

fn icmp_from(from: [u8; 4], kind: u8, code: u8, to: [u8; 4], ttl: u8, rest: &[u8]) -> Vec<u8> {
    let mut message = [&[kind, code, 0, 0][..], rest].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut header = vec![0x45, 0];
    header.extend((20 + message.len() as u16).to_be_bytes());
    header.extend([0x77, 0x88, 0, 0, ttl, ICMP, 0, 0]);
    header.extend(from);
    header.extend(to);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&OWN_MAC[..], &CLIENT_MAC, &[0x08, 0x00], &header, &message].concat()
}

/// What an error quotes: the second word of ICMP's header, then the head of a datagram, with so many bytes behind its header.
pub fn quote(spec: &Spec, payload: usize) -> Vec<u8> {
    let datagram = spec.build().split_off(14);
    let header = usize::from(datagram[0] & 0xf) * 4;
    [&[0, 0, 0x05, 0xdc][..], &datagram[..datagram.len().min(header + payload)]].concat()
}

/// What a server sent to the client, as the VIP.
fn sent_by_vip(flow: Flow) -> Spec {
    let spec = flow.replied_by(VIP);
    if flow.protocol == UDP { spec.udp(b"answer") } else { spec.data(1) }
}

fn errors_to_vips() -> Vec<Case> {
    let why = "RFC 792: an error goes to whoever sent what it quotes; eight bytes suffice";
    let to = |server| Fate::To(server, Reason::Quoted);
    let (dns, quic) = (F.on(UDP, DNS), F.on(UDP, QUIC));
    let mut cases = Vec::new();
    for (kind, code) in [(3, 0), (3, 1), (3, 3), (3, 4), (11, 0), (11, 1), (12, 0)] {
        for (flow, name) in [(F, "TCP"), (quic, "UDP")] {
            for payload in [8, 1000] {
                let frame = icmp(kind, code, VIP, &quote(&sent_by_vip(flow), payload));
                let name = format!("ICMP {kind}/{code} that quotes {payload} bytes of {name}");
                cases.push(Case::new(name, why, Setup::plain()).bytes(frame, to(OWNER)));
            }
        }
    }
    let error = |flow| icmp(3, 4, VIP, &quote(&sent_by_vip(flow), 8));
    let with_options = sent_by_vip(F).with(|spec| spec.ip_options = vec![1; 40]);
    cases.extend([
        Case::new("error about a flow on record", why, Setup::tracked().record(F, OTHER, 7)).bytes(error(F), to(OTHER)),
        Case::new(
            "error about a flow with a candidate, where flows need no record",
            why,
            Setup::tracked().candidate(F, OTHER, 7),
        )
        .bytes(error(F), to(OWNER)),
        Case::new(
            "error about a flow with a candidate, where all have records",
            why,
            Setup::plain().candidate(F.on(TCP, ALWAYS), OTHER, 7),
        )
        .bytes(error(F.on(TCP, ALWAYS)), to(OTHER)),
        Case::new("error about a flow from before a change", why, Setup::changed_from(LEGACY))
            .bytes(error(F), to(LEGACY)),
        Case::new("error about a UDP flow on record", why, Setup::plain().record(dns, OTHER, 0))
            .bytes(error(dns), to(OTHER)),
        Case::new("error about a flow of a server without a way", why, Setup::owned_by(UNREACHABLE))
            .bytes(error(F), Fate::Drop(Reason::NoNextHop)),
        Case::new("error about what is cut through", "the host's own", Setup::direct())
            .bytes(error(F), Fate::Pass(Reason::Icmp)),
        Case::new("error that quotes IP options", why, Setup::plain())
            .bytes(icmp(3, 4, VIP, &quote(&with_options, 8)), to(OWNER)),
        Case::new("error to a server in GRE", why, Setup::owned_by(TUNNEL))
            .bytes(error(F), becomes(Verdict::Tx, Reason::Quoted, wrapped(error(F)))),
    ]);
    cases
}

/// A frame inside GRE to [`TUNNEL`].
fn wrapped(frame: Vec<u8>) -> Vec<u8> {
    let mut inner = frame[14..].to_vec();
    inner[8] -= 1;
    inner[10..12].fill(0);
    let sum = checksum(&inner[..20]);
    inner[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut outer = vec![0x45, 0];
    outer.extend((inner.len() as u16 + 24).to_be_bytes());
    outer.extend(&inner[4..8]);
    outer.extend([64, 47, 0, 0]);
    outer.extend(OWN_ADDRESS);
    outer.extend(address(TUNNEL));
    let sum = checksum(&outer);
    outer[10..12].copy_from_slice(&sum.to_be_bytes());
    [&mac(TUNNEL)[..], &OWN_MAC, &[0x08, 0x00], &outer, &[0, 0, 0x08, 0x00], &inner].concat()
}

fn errors_that_are_none() -> Vec<Case> {
    let host = Fate::Pass(Reason::Icmp);
    let why = "what is no error about a flow of ours is the host's own";
    let whole = quote(&sent_by_vip(F), 8);
    let mut cases = Vec::new();
    // Every point at which a quote can end.
    for length in 0..whole.len() {
        let fate = if length < whole.len() - 4 { host } else { Fate::To(OWNER, Reason::Quoted) };
        let frame = icmp(3, 4, VIP, &whole[..length]);
        cases.push(Case::new(format!("error cut to {} bytes", length + 4), why, Setup::plain()).bytes(frame, fate));
    }
    let echo = |to| icmp(8, 0, to, &[0, 1, 0, 1, b'?', b'!']);
    cases.extend([
        Case::new("echo to a VIP", "the host answers", Setup::plain()).bytes(echo(VIP), host),
        Case::new("echo to a silent VIP", "as configured", Setup::plain().silent())
            .bytes(echo(VIP), Fate::Drop(Reason::Echo)),
        Case::new("echo to another address", "the host's own", Setup::plain().silent()).bytes(echo(OWN_ADDRESS), host),
        Case::new(
            "echo to a silent VIP, its type in padding",
            "padding is not part of the datagram",
            Setup::plain().silent(),
        )
        .frame(F.on(ICMP, 80).udp(b"").with(|spec| spec.total = Some(20)), host),
        Case::new("echo reply to a silent VIP", "the host's own", Setup::plain().silent())
            .bytes(icmp(0, 0, VIP, &[0; 4]), host),
    ]);
    for kind in [0, 4, 5, 8, 9, 10, 13, 14, 30, 255] {
        cases.push(Case::new(format!("ICMP type {kind}"), why, Setup::plain()).bytes(icmp(kind, 0, VIP, &whole), host));
    }
    let mut padded = icmp(3, 4, VIP, &whole[..4]);
    padded.extend(&whole[4..]);
    cases.push(
        Case::new("error with a quote in the padding behind it", "no part of the datagram", Setup::plain())
            .bytes(padded, host),
    );
    let edited = |edit: fn(&mut Spec)| icmp(3, 4, VIP, &quote(&sent_by_vip(F).with(edit), 8));
    cases.extend([
        Case::new("quotes version 6", why, Setup::plain()).bytes(edited(|spec| spec.version = 6), host),
        Case::new("quotes a header of 16 bytes", why, Setup::plain()).bytes(edited(|spec| spec.ihl = Some(4)), host),
        Case::new("quotes a later fragment", why, Setup::plain()).bytes(edited(|spec| spec.fragment = 3), host),
        Case::new("quotes a first fragment", why, Setup::plain())
            .bytes(edited(|spec| spec.fragment = 0x2000), Fate::To(OWNER, Reason::Quoted)),
        Case::new("quotes another address than it is sent to", why, Setup::plain())
            .bytes(icmp(3, 4, VIP, &quote(&F.replied_by([192, 0, 2, 11]).data(1), 8)), host),
        Case::new("quotes a port that is no service's", why, Setup::plain())
            .bytes(icmp(3, 4, VIP, &quote(&sent_by_vip(F.on(TCP, 81)), 8)), host),
        Case::new("quotes a client's packet to the VIP", why, Setup::plain())
            .bytes(icmp(3, 4, F.source, &quote(&F.data(1), 8)), host),
        Case::new("quotes GRE of our own", "the kernel keeps path MTUs", Setup::owned_by(TUNNEL)).bytes(
            icmp(
                3,
                4,
                OWN_ADDRESS,
                &[&[0, 0, 5, 0x78][..], &gre_bytes(&F.data(1), TUNNEL, mac(TUNNEL), OWN_MAC)[14..42]].concat(),
            ),
            host,
        ),
    ]);
    cases
}

fn errors_and_layer_3() -> Vec<Case> {
    let why = "layer 3 translates the quoted header too, checksums included";
    let mut cases = Vec::new();
    for (flow, name) in [(F.on(TCP, ALWAYS), "TCP"), (F.on(UDP, DNS), "UDP")] {
        let setup = || Setup::owned_by(TRANSLATED).record(flow, TRANSLATED, 0);
        let server = address(TRANSLATED);
        let by_server = |source| {
            let spec = flow.replied_by(source);
            if flow.protocol == UDP { spec.udp(b"answer") } else { spec.data(1) }
        };
        let by_client = |destination| {
            let spec = Flow { destination, ..flow };
            if flow.protocol == UDP { spec.udp(b"question") } else { spec.data(1) }
        };
        for payload in [8, 1000] {
            // A router on the way to the client: to the server, about what it sent itself.
            let error = icmp(3, 4, VIP, &quote(&by_server(VIP), payload));
            let mut wanted = icmp_from(ROUTER, 3, 4, server, 63, &quote(&by_server(server), payload));
            wanted[..6].copy_from_slice(&mac(TRANSLATED));
            wanted[6..12].copy_from_slice(&OWN_MAC);
            cases.push(
                Case::new(format!("error to a server, {payload} bytes of {name}"), why, setup())
                    .bytes(error, becomes(Verdict::Tx, Reason::Quoted, wanted)),
            );
            // The server, or a router on the way to it: to the client, about what it sent to the VIP.
            for (from, as_from, who) in [(server, VIP, "the server"), (ROUTER, ROUTER, "a router")] {
                let error = icmp_from(from, 3, 3, flow.source, 64, &quote(&by_client(server), payload));
                let wanted = icmp_from(as_from, 3, 3, flow.source, 64, &quote(&by_client(VIP), payload));
                cases.push(
                    Case::new(format!("error by {who} to a client, {payload} bytes of {name}"), why, setup())
                        .bytes(error, becomes(Verdict::Pass, Reason::ReplyRouted, wanted)),
                );
            }
        }
        let stranger = icmp_from(
            server,
            3,
            3,
            [198, 51, 100, 77],
            64,
            &quote(&Flow { source: [198, 51, 100, 77], ..by_client(server).flow }.data(1), 8),
        );
        cases.push(
            Case::new(
                format!("error by the server to a client of its own, {name}"),
                "it belongs to no flow on record",
                setup(),
            )
            .bytes(stranger, Fate::Pass(Reason::Icmp)),
        );
    }
    cases
}
