//! GRE and layer 3: what leaves, byte for byte, and the ICMP errors that the sender is owed.

use necp_ebpf::{
    flows::FlowWord,
    packet::protocol::{ICMP, TCP, UDP},
    slot::SlotWord,
    verdict::Reason,
};
use necp_tests::kernel::{OTHER_MAC, OWN_MAC, Verdict};

use crate::{
    case::{Case, Fate, candidate, record},
    frames::{CLIENT_MAC, Flow, Spec, VIP, WEB_FLOW as F, checksum},
    setup::{
        ALWAYS, DNS, MTU, OTHER, OWN_ADDRESS, OWNER, REMOTE_TUNNEL, SECOND_VIP, Setup, TRANSLATED, TUNNEL, address, mac,
    },
};

const DNS_FLOW: Flow = F.on(UDP, DNS);
const ALWAYS_FLOW: Flow = F.on(TCP, ALWAYS);

pub fn cases() -> Vec<Case> {
    [tunnelled(), too_long(), expired(), translated(), replies(), replies_of_two_vips(), mixed()]
        .into_iter()
        .flatten()
        .collect()
}

fn tunnelled() -> Vec<Case> {
    let why = "draft §5.6.1: the datagram inside GRE; RFC 2784";
    let on = || Setup::owned_by(TUNNEL);
    let case =
        |name: &str, spec: Spec| Case::new(name, why, on()).frame(spec.clone(), gre(&spec, TUNNEL, Reason::Plain));
    vec![
        case("GRE, data", F.data(1)),
        case("GRE, SYN", F.syn(1000)),
        case("GRE, IP options", F.data(1).with(|spec| spec.ip_options = vec![1; 8])),
        case("GRE, type of service with congestion marks", F.data(1).with(|spec| spec.tos = 0xbb)),
        case("GRE, may be fragmented", F.data(1).with(|spec| spec.fragment = 0)),
        case("GRE, padded", F.ack(1).with(|spec| spec.padding = 6)),
        case("GRE, two hops left", F.data(1).with(|spec| spec.ttl = 2)),
        case("GRE, as long as fits", F.tcp(0x10, 1, &vec![7; MTU as usize - 24 - 40])),
        case("GRE, opted out UDP", F.on(UDP, 443).udp(b"?")),
        Case::new("GRE by the other interface", why, Setup::owned_by(REMOTE_TUNNEL))
            .frame(F.data(1), gre(&F.data(1), REMOTE_TUNNEL, Reason::Plain)),
        Case::new(
            "GRE, on record",
            why,
            Setup::plain().slot_of(F, SlotWord::plain(OWNER).with_bits(1 << 56, 0)).record(F, TUNNEL, 0),
        )
        .frame(F.data(1), gre(&F.data(1), TUNNEL, Reason::Record)),
        Case::new("GRE, UDP", why, on())
            .frame(DNS_FLOW.udp(b"?"), gre(&DNS_FLOW.udp(b"?"), TUNNEL, Reason::New))
            .leaves(record(TUNNEL, 0)),
    ]
}

fn too_long() -> Vec<Case> {
    let why = "RFC 1191 §4: the sender is told what fits";
    let on = |server| Setup::owned_by(server);
    let long = F.tcp(0x10, 1, &vec![7; MTU as usize - 24 - 40 + 1]);
    let full = ALWAYS_FLOW.tcp(0x10, 1, &vec![7; MTU as usize - 40 + 1]);
    let told = |spec: &Spec, mtu| error(spec, VIP, [3, 4], mtu, Reason::TooBig);
    let fragment = |spec: Spec| spec.with(|spec| spec.fragment = 0);
    vec![
        Case::new("too long for GRE by one byte", why, on(TUNNEL)).frame(long.clone(), told(&long, MTU - 24)),
        Case::new("too long for layer 3 by one byte", why, on(TRANSLATED)).frame(full.clone(), told(&full, MTU)),
        Case::new("too long for GRE, with IP options", why, on(TUNNEL)).frame(
            long.clone().with(|spec| spec.ip_options = vec![1; 40]),
            told(&long.clone().with(|spec| spec.ip_options = vec![1; 40]), MTU - 24),
        ),
        Case::new("too long for GRE, with precedence", why, on(TUNNEL)).frame(
            long.clone().with(|spec| spec.tos = 0xb9),
            told(&long.clone().with(|spec| spec.tos = 0xb9), MTU - 24),
        ),
        Case::new("too long for GRE, may be fragmented", "RFC 2784 §3.1: by the kernel, outside", on(TUNNEL)).frame(
            fragment(long.clone()),
            becomes(
                Verdict::Pass,
                Reason::Fragmenting,
                gre_bytes(&fragment(long.clone()), TUNNEL, OWN_MAC, mac(TUNNEL)),
            ),
        ),
        Case::new("too long for layer 3, may be fragmented", "a router's kernel does it", on(TRANSLATED)).frame(
            fragment(full.clone()),
            becomes(
                Verdict::Pass,
                Reason::Fragmenting,
                translated_bytes(&fragment(full), address(TRANSLATED), 64, OWN_MAC, mac(TRANSLATED)),
            ),
        ),
        untold("too long, from nobody", [0, 0, 0, 1], &long),
        untold("too long, from loopback", [127, 0, 0, 1], &long),
        untold("too long, from many", [224, 0, 0, 1], &long),
        untold("too long, from all", [255, 255, 255, 255], &long),
    ]
}

fn untold(name: &str, source: [u8; 4], spec: &Spec) -> Case {
    let spec = spec.clone().with(|spec| spec.flow.source = source);
    Case::new(name, "RFC 1122 §3.2.2: no error to what is no single host", Setup::owned_by(TUNNEL))
        .frame(spec, Fate::Drop(Reason::Untold))
}

fn expired() -> Vec<Case> {
    let why = "RFC 1812 §5.3.1: a router counts hops; layer 2 is none (draft §5.6.1)";
    let last = |flow: Flow, ttl| flow.data(1).with(|spec| spec.ttl = ttl);
    let told = |spec: &Spec| error(spec, VIP, [11, 0], 0, Reason::Expired);
    let mut cases = Vec::new();
    for ttl in [0, 1] {
        let spec = last(F, ttl);
        cases.push(
            Case::new(format!("time to live {ttl}, GRE"), why, Setup::owned_by(TUNNEL))
                .frame(spec.clone(), told(&spec)),
        );
        let spec = last(ALWAYS_FLOW, ttl);
        cases.push(
            Case::new(format!("time to live {ttl}, layer 3"), why, Setup::owned_by(TRANSLATED))
                .frame(spec.clone(), told(&spec)),
        );
        cases.push(
            Case::new(format!("time to live {ttl}, layer 2"), why, Setup::plain())
                .frame(last(F, ttl), Fate::To(OWNER, Reason::Plain)),
        );
    }
    cases
}

fn translated() -> Vec<Case> {
    let why = "draft §5.6.1: another destination, checksums that know it";
    let on = || Setup::owned_by(TRANSLATED);
    let to = |spec: &Spec, reason| {
        becomes(Verdict::Tx, reason, translated_bytes(spec, address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC))
    };
    let udp = |payload: &[u8]| DNS_FLOW.udp(payload);
    let unchecked = udp(b"no sum").with(|spec| spec.unchecked = true);
    let mut cases = vec![
        Case::new("layer 3, a TCP flow from its SYN on", why, on())
            .frame(ALWAYS_FLOW.syn(1000), to(&ALWAYS_FLOW.syn(1000), Reason::New))
            .leaves(candidate(TRANSLATED, 1000))
            .frame(ALWAYS_FLOW.ack(1001), to(&ALWAYS_FLOW.ack(1001), Reason::Confirmed))
            .leaves(record(TRANSLATED, 1000))
            .frame(ALWAYS_FLOW.data(1001), to(&ALWAYS_FLOW.data(1001), Reason::Record)),
        Case::new("layer 3, no UDP checksum", "RFC 768: zero means none", on())
            .frame(unchecked.clone(), to(&unchecked, Reason::New))
            .leaves(record(TRANSLATED, 0)),
    ];
    // Among so many payloads every kind of carry, and the sum 0, which must be sent as 0xffff.
    for number in 0..=255u8 {
        let spec = udp(&[number, 0x5a, number.wrapping_mul(7), number ^ 0xff]);
        cases.push(
            Case::new(format!("layer 3, UDP payload {number}"), "RFC 1624", on())
                .frame(spec.clone(), to(&spec, Reason::New))
                .leaves(record(TRANSLATED, 0)),
        );
    }
    let zero = sum_of_zero();
    cases.push(
        Case::new("layer 3, a UDP checksum that becomes zero", "RFC 768: it is sent as all ones", on())
            .frame(zero.clone(), to(&zero, Reason::New))
            .leaves(record(TRANSLATED, 0)),
    );
    cases
}

/// A datagram whose checksum would be zero once it is translated.
fn sum_of_zero() -> Spec {
    let spec = |filler: u16| DNS_FLOW.udp(&filler.to_be_bytes());
    let sum = |filler| {
        let bytes = translated_bytes(&spec(filler), address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC);
        u16::from_be_bytes([bytes[14 + 20 + 6], bytes[14 + 20 + 7]])
    };
    let filler = (0..=u16::MAX).find(|&filler| sum(filler) == 0xffff).expect("one of all the fillers");
    spec(filler)
}

fn replies() -> Vec<Case> {
    let why = "a reply of a flow on record leaves with the VIP's address";
    let flow = ALWAYS_FLOW;
    let reply = flow.replied_by(address(TRANSLATED));
    let on = || Setup::owned_by(TRANSLATED);
    let left = |spec: &Spec| becomes(Verdict::Pass, Reason::ReplyRouted, reply_bytes(spec));
    let syn_ack = reply.tcp(0x12, 9, b"");
    let told = |spec: &Spec| error(spec, OWN_ADDRESS, [11, 0], 0, Reason::Expired);
    let dns = DNS_FLOW.replied_by(address(TRANSLATED)).udp(b"!");
    let alone = "it belongs to no flow on record";
    vec![
        Case::new("reply, data", why, on().record(flow, TRANSLATED, 0)).frame(reply.data(1), left(&reply.data(1))),
        Case::new("reply, to a SYN", why, on().candidate(flow, TRANSLATED, 1000))
            .frame(syn_ack.clone(), left(&syn_ack)),
        Case::new("reply, the last", why, on().entry(flow, FlowWord::record(TRANSLATED, 7, true)))
            .frame(reply.fin(1), left(&reply.fin(1)))
            .frame(
                flow.rst(8),
                becomes(
                    Verdict::Tx,
                    Reason::Record,
                    translated_bytes(&flow.rst(8), address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC),
                ),
            ),
        Case::new("reply, UDP", why, on().record(DNS_FLOW, TRANSLATED, 0)).frame(dns.clone(), left(&dns)),
        Case::new("reply at its last hop", "RFC 1812 §5.3.1", on().record(flow, TRANSLATED, 0))
            .frame(reply.data(1).with(|spec| spec.ttl = 1), told(&reply.data(1).with(|spec| spec.ttl = 1))),
        Case::new("to a client of the server itself", alone, on()).frame(reply.data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("from another server", alone, on().record(flow, TRANSLATED, 0))
            .frame(flow.replied_by(address(OTHER)).data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("from a server that has the flow by layer 2", alone, on().record(flow, OTHER, 0))
            .frame(flow.replied_by(address(OTHER)).data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("from a server that has the flow by GRE", alone, on().record(flow, TUNNEL, 0))
            .frame(flow.replied_by(address(TUNNEL)).data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("from another port", alone, on().record(flow, TRANSLATED, 0))
            .frame(Flow { source_port: 81, ..reply }.data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("to another port", alone, on().record(flow, TRANSLATED, 0))
            .frame(Flow { port: 1, ..reply }.data(1), Fate::Pass(Reason::NotOurs)),
        Case::new("by another protocol", alone, on().record(flow, TRANSLATED, 0))
            .frame(Flow { protocol: UDP, ..reply }.udp(b"?"), Fate::Pass(Reason::NotOurs)),
        Case::new("a server's ping", alone, on().record(flow, TRANSLATED, 0))
            .frame(Flow { protocol: ICMP, ..reply }.udp(b"?"), Fate::Pass(Reason::Icmp)),
    ]
}

fn replies_of_two_vips() -> Vec<Case> {
    let why = "one client port, two VIPs, one server: the reply is of the flow that lives, or was heard of last";
    let first = ALWAYS_FLOW;
    let second = Flow { destination: SECOND_VIP, ..first };
    let on = || Setup::owned_by(TRANSLATED).with_second_vip(TRANSLATED);
    let reply = first.replied_by(address(TRANSLATED));
    let ending = FlowWord::record(TRANSLATED, 7, true);
    let (data, syn_ack) = (reply.data(1), reply.tcp(0x12, 9, b""));
    let left = |spec: &Spec, vip| becomes(Verdict::Pass, Reason::ReplyRouted, reply_bytes_as(vip, spec));
    vec![
        Case::new(
            "a SYN-ACK, beside a flow that ends",
            why,
            on().entry(first, ending).candidate(second, TRANSLATED, 8),
        )
        .frame(syn_ack.clone(), left(&syn_ack, SECOND_VIP)),
        Case::new(
            "data, beside somebody's SYN",
            why,
            on().candidate(first, TRANSLATED, 8).record(second, TRANSLATED, 7),
        )
        .frame(data.clone(), left(&data, SECOND_VIP)),
        Case::new("data, beside a flow that ends", why, on().entry(first, ending).record(second, TRANSLATED, 8))
            .frame(data.clone(), left(&data, SECOND_VIP)),
        Case::new(
            "data, beside one at the second that ends",
            why,
            on().record(first, TRANSLATED, 8).entry(second, ending),
        )
        .frame(data.clone(), left(&data, VIP)),
    ]
}

fn mixed() -> Vec<Case> {
    let why = "types are mixed within one VIP: each flow's server decides";
    let other = Flow { source_port: 40001, ..ALWAYS_FLOW };
    vec![
        Case::new(
            "three types, one service",
            why,
            Setup::plain().record(ALWAYS_FLOW, TRANSLATED, 0).record(other, TUNNEL, 0),
        )
        .frame(
            ALWAYS_FLOW.data(1),
            becomes(
                Verdict::Tx,
                Reason::Record,
                translated_bytes(&ALWAYS_FLOW.data(1), address(TRANSLATED), 63, mac(TRANSLATED), OWN_MAC),
            ),
        )
        .frame(other.data(1), gre(&other.data(1), TUNNEL, Reason::Record))
        .frame(Flow { source_port: 40002, ..ALWAYS_FLOW }.data(1), Fate::To(OWNER, Reason::Owner)),
    ]
}

pub fn becomes(verdict: Verdict, reason: Reason, bytes: Vec<u8>) -> Fate {
    Fate::Becomes(verdict, reason, bytes.leak())
}

pub fn gre(spec: &Spec, server: u32, reason: Reason) -> Fate {
    let (verdict, from) = if server == REMOTE_TUNNEL { (Verdict::Redirect, OTHER_MAC) } else { (Verdict::Tx, OWN_MAC) };
    becomes(verdict, reason, gre_bytes(spec, server, mac(server), from))
}

/// The frame inside GRE, from this host's address to the server's, written out from RFC 791 and RFC 2784.
pub fn gre_bytes(spec: &Spec, server: u32, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let inner = spec.clone().with(|spec| spec.ttl -= 1).build().split_off(14 + 4 * spec.tags.len());
    let total = u16::from_be_bytes([inner[2], inner[3]]) + 24;
    let mut outer = vec![0x45, spec.tos];
    outer.extend(total.to_be_bytes());
    // Whether it may be fragmented is the datagram's own; so is the identification, but for later parts, which must not be
    // taken for the same datagram when both are fragmented again. It is whole, whatever is inside.
    let id = u16::from_be_bytes([inner[4], inner[5]]).wrapping_add((spec.fragment & 0x1fff).wrapping_mul(0x9e37));
    outer.extend(id.to_be_bytes());
    outer.extend([inner[6] & 0x40, 0]);
    outer.extend([64, 47, 0, 0]);
    outer.extend(OWN_ADDRESS);
    outer.extend(address(server));
    let sum = checksum(&outer);
    outer[10..12].copy_from_slice(&sum.to_be_bytes());
    [&to[..], &from, &spec.tags.concat(), &[0x08, 0x00], &outer, &[0, 0, 0x08, 0x00], &inner].concat()
}

/// The frame as if it had been sent to this address in the first place.
pub fn translated_bytes(spec: &Spec, to: [u8; 4], ttl: u8, to_mac: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let spec = spec.clone().with(|spec| (spec.flow.destination, spec.ttl) = (to, ttl));
    with_macs(all_ones_for_zero(&spec, spec.build()), to_mac, from)
}

/// The frame as if the VIP had sent it; the kernel counts the hop.
pub fn reply_bytes(spec: &Spec) -> Vec<u8> {
    reply_bytes_as(VIP, spec)
}

fn reply_bytes_as(vip: [u8; 4], spec: &Spec) -> Vec<u8> {
    let spec = spec.clone().with(|spec| spec.flow.source = vip);
    all_ones_for_zero(&spec, spec.build())
}

fn all_ones_for_zero(spec: &Spec, mut frame: Vec<u8>) -> Vec<u8> {
    let sum = 14 + 20 + 6;
    if spec.flow.protocol == UDP && !spec.unchecked && frame[sum..sum + 2] == [0, 0] {
        frame[sum..sum + 2].copy_from_slice(&[0xff, 0xff]);
    }
    frame
}

fn with_macs(mut frame: Vec<u8>, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame
}

/// The ICMP error about a frame, written out from RFC 792 and RFC 1191: back to the sender, quoting header and eight bytes.
fn error(spec: &Spec, source: [u8; 4], [kind, code]: [u8; 2], mtu: u16, reason: Reason) -> Fate {
    let datagram = spec.build().split_off(14);
    let quoted = &datagram[..usize::from(datagram[0] & 0xf) * 4 + 8];
    let mut icmp = vec![kind, code, 0, 0, 0, 0];
    icmp.extend(mtu.to_be_bytes());
    icmp.extend(quoted);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut header = vec![0x45, spec.tos & 0xfc];
    header.extend((20 + icmp.len() as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, ICMP, 0, 0]);
    header.extend(source);
    header.extend(spec.flow.source);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let bytes = [&CLIENT_MAC[..], &OWN_MAC, &[0x08, 0x00], &header, &icmp].concat();
    becomes(Verdict::Tx, reason, bytes)
}
