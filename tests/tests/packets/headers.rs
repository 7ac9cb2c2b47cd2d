//! Cases about headers: what cannot be parsed safely, or is not for us, goes on to the kernel untouched.

use necp_ebpf::{packet::tcp, verdict::Reason};

use crate::{
    case::{Case, Fate},
    frames::{Flow, Spec, WEB_FLOW},
    setup::{OWNER, QUIC, Setup},
};

const MALFORMED: Fate = Fate::Pass(Reason::Malformed);
const STRAY: Fate = Fate::Drop(Reason::StrayPart);
const PLAIN: Fate = Fate::To(OWNER, Reason::Plain);

fn quic() -> Flow {
    WEB_FLOW.on(17, QUIC)
}

fn one(name: impl Into<String>, why: &'static str, spec: Spec, fate: Fate) -> Case {
    Case::new(name, why, Setup::plain()).frame(spec, fate)
}

pub fn cases() -> Vec<Case> {
    [ethernet(), truncated(), ipv4(), options(), fragments(), tcp_header(), udp_header()]
        .into_iter()
        .flatten()
        .collect()
}

fn ethernet() -> Vec<Case> {
    let ether_types = [
        ("ARP", 0x0806, "RFC 826"),
        ("IPv6", 0x86dd, "RFC 8200 §3: the version is 6"),
        ("VLAN tag around nothing", 0x8100, "IEEE 802.1Q: the type is behind it"),
        ("QinQ tag around nothing", 0x88a8, "IEEE 802.1ad: the type is behind it"),
        ("802.3 length", 46, "IEEE 802.3: a length, no type"),
        ("IPv4's type with its bytes swapped", 0x0008, "RFC 894"),
        ("type 0xffff", 0xffff, "RFC 1701: reserved"),
    ];
    let mut cases: Vec<Case> = ether_types
        .into_iter()
        .map(|(name, kind, why)| {
            one(
                name,
                why,
                WEB_FLOW.data(1).with(|f| f.ether_type = kind),
                Fate::Pass(if kind == 0x86dd { Reason::Malformed } else { Reason::NotIp }),
            )
        })
        .collect();
    let other_host = Fate::Pass(Reason::OtherHost);
    let macs: [(&str, [u8; 6]); 7] = [
        ("broadcast", [0xff; 6]),
        ("multicast", [1, 0, 0x5e, 0, 0, 1]),
        ("another host", [2, 0, 0, 0, 7, 7]),
        ("the other interface's MAC", [2, 0, 0, 0, 0, 2]),
        ("our MAC but for its first byte", [3, 0, 0, 0, 0, 1]),
        ("our MAC but for its fifth byte", [2, 0, 0, 0, 1, 1]),
        ("all zero", [0; 6]),
    ];
    for (name, to) in macs {
        let why = "only what is addressed to this interface is steered; RFC 1122 §3.3.6 for link-layer broadcasts";
        cases.push(one(format!("to {name}"), why, WEB_FLOW.data(1).with(|f| f.to_mac = to), other_host));
    }
    cases.push(one(
        "not ours by address, to another host",
        "the MAC address comes before the service",
        Flow { destination: [192, 0, 2, 11], ..WEB_FLOW }.data(1).with(|f| f.to_mac = [0xff; 6]),
        other_host,
    ));
    cases.push(one("a page's worth", "the longest linear frame of a test run", long(3000), PLAIN));
    cases.push(one("the longest standard frame", "IEEE 802.3: 1,500 bytes of IP", long(1460), PLAIN));
    cases
}

/// An ACK with this much payload.
pub fn long(payload: usize) -> Spec {
    WEB_FLOW.tcp(tcp::ACK, 1, &vec![0x55; payload])
}

/// Every point at which a frame can end, with and without a total length that says so.
fn truncated() -> Vec<Case> {
    let mut cases = Vec::new();
    for (kind, spec, header) in [("TCP", WEB_FLOW.ack(1), 20), ("UDP", quic().udp(b""), 8)] {
        let full = 34 + header;
        for cut in 14..full {
            if kind == "UDP" && cut < 34 {
                continue;
            }
            let name = format!("{kind} frame cut to {cut} bytes");
            cases.push(one(name, "RFC 791 §3.1: total length beyond the frame", short(&spec, cut), MALFORMED));
        }
        for cut in 34..full {
            let total = Some((cut - 14) as u16);
            let honest = short(&spec, cut).with(|f| f.total = total);
            let name = format!("{kind} datagram that ends after {} bytes of transport header", cut - 34);
            cases.push(one(name, "RFC 9293 §3.1, RFC 768: the header does not fit", honest, MALFORMED));
            let padded = spec.clone().with(|f| f.total = total);
            let name =
                format!("{kind} header of which only {} bytes are in the datagram, the rest in padding", cut - 34);
            cases.push(one(name, "padding is not part of the datagram (RFC 894)", padded, MALFORMED));
        }
    }
    cases
}

fn short(spec: &Spec, cut: usize) -> Spec {
    spec.clone().with(|f| f.cut = Some(cut))
}

fn ipv4() -> Vec<Case> {
    let mut cases = Vec::new();
    for version in (0..16).filter(|&version| version != 4) {
        let spec = WEB_FLOW.data(1).with(|f| f.version = version);
        cases.push(one(format!("version {version}"), "RFC 791 §3.1", spec, MALFORMED));
    }
    for (total, fate) in [(0, MALFORMED), (19, MALFORMED), (20, MALFORMED), (39, MALFORMED), (40, PLAIN), (44, PLAIN)] {
        let spec = WEB_FLOW.data(1).with(|f| f.total = Some(total));
        cases.push(one(format!("total length {total} of 45"), "RFC 791 §3.1", spec, fate));
    }
    for total in [46, 0x8000, 0xffff] {
        let spec = WEB_FLOW.data(1).with(|f| f.total = Some(total));
        cases.push(one(format!("total length {total}, longer than the frame"), "RFC 791 §3.1", spec, MALFORMED));
    }
    for padding in [1, 6, 500] {
        let spec = WEB_FLOW.ack(1).with(|f| f.padding = padding);
        cases.push(one(format!("{padding} bytes of Ethernet padding"), "RFC 894", spec, PLAIN));
    }
    let in_padding = WEB_FLOW.ack(1).with(|f| (f.padding, f.total) = (6, Some(46)));
    cases.push(one("padding that the total length claims", "RFC 791 §3.1: then it is payload", in_padding, PLAIN));
    let not_ours = Fate::Pass(Reason::NotOurs);
    let others = [
        ("another address", Flow { destination: [192, 0, 2, 11], ..WEB_FLOW }),
        ("our address as source", Flow { source: [192, 0, 2, 10], destination: [198, 51, 100, 1], ..WEB_FLOW }),
        ("the VIP's bytes backwards", Flow { destination: [10, 2, 0, 192], ..WEB_FLOW }),
        ("another port", WEB_FLOW.on(6, 81)),
        ("the port's bytes swapped", WEB_FLOW.on(6, 80 << 8)),
        ("port 0", WEB_FLOW.on(6, 0)),
        ("UDP to a TCP service", WEB_FLOW.on(17, 80)),
        ("TCP to a UDP service", WEB_FLOW.on(6, QUIC)),
        ("GRE to the VIP", WEB_FLOW.on(47, 80)),
        ("SCTP to the VIP, a service's port in its first bytes", WEB_FLOW.on(132, 80)),
        ("protocol 0", WEB_FLOW.on(0, 80)),
        ("protocol 255", WEB_FLOW.on(255, 80)),
        ("the limited broadcast address", Flow { destination: [255; 4], ..WEB_FLOW }),
    ];
    for (name, flow) in others {
        cases.push(one(
            format!("not ours: {name}"),
            "traffic that is not ours leaves untouched",
            flow.data(1),
            not_ours,
        ));
    }
    let bare = Spec { total: Some(20), cut: Some(34), ..WEB_FLOW.on(1, 80).udp(b"") };
    let icmp = Fate::Pass(Reason::Icmp);
    cases.push(one("ICMP without a byte", "RFC 792: it quotes nothing", bare, icmp));
    cases.push(one("ICMP echo to the VIP", "RFC 792: the host's own to answer", WEB_FLOW.on(1, 80).data(1), icmp));
    cases
}

fn options() -> Vec<Case> {
    let mut cases = Vec::new();
    for ihl in 0..16u8 {
        let fate = if ihl == 5 { PLAIN } else { MALFORMED };
        let spec = WEB_FLOW.ack(1).with(|f| f.ihl = Some(ihl));
        cases.push(one(
            format!("IHL {ihl} on a header of 20 bytes"),
            "RFC 791 §3.1: at least 5, within the total",
            spec,
            fate,
        ));
    }
    for words in 1..=10 {
        let spec = WEB_FLOW.data(1).with(|f| f.ip_options = vec![1; words * 4]);
        cases.push(one(
            format!("{words} words of IP options"),
            "RFC 791 §3.1: options are skipped, not judged",
            spec,
            PLAIN,
        ));
    }
    let udp = quic().udp(b"hello").with(|f| f.ip_options = vec![0x83, 7, 4, 10, 0, 0, 1, 0]);
    cases.push(one("UDP behind a source route", "RFC 791 §3.1", udp, PLAIN));
    let not_ours = Flow { destination: [192, 0, 2, 11], ..WEB_FLOW }.data(1).with(|f| f.ip_options = vec![0xff; 40]);
    cases.push(one("not ours, with options", "leaves untouched", not_ours, Fate::Pass(Reason::NotOurs)));
    cases
}

fn fragments() -> Vec<Case> {
    let table = [
        ("do not fragment", 0x4000, PLAIN),
        ("may be fragmented, is not", 0x0000, PLAIN),
        ("the reserved bit", 0x8000, PLAIN),
        ("first fragment", 0x2000, PLAIN),
        ("first fragment with DF", 0x6000, PLAIN),
        ("middle fragment", 0x2010, STRAY),
        ("last fragment", 0x0010, STRAY),
        ("the largest offset", 0x1fff, STRAY),
    ];
    let mut cases = Vec::new();
    for (name, bits, fate) in table {
        let why = "RFC 791 §3.1: ports are never read from a fragment";
        cases.push(one(format!("TCP: {name}"), why, WEB_FLOW.data(1).with(|f| f.fragment = bits), fate));
        cases.push(one(format!("UDP: {name}"), why, quic().udp(b"hello").with(|f| f.fragment = bits), fate));
    }
    let second = |flow: Flow| flow.data(1).with(|f| f.fragment = 0x0001);
    cases.push(one("TCP: a part that begins in the header", "RFC 1858 §3.2.2", second(WEB_FLOW), MALFORMED));
    cases.push(one("UDP: a part that begins where the header ends", "RFC 768", second(quic()), STRAY));
    for payload in 0..20 {
        let spec = WEB_FLOW.ack(1);
        let tiny = Spec { total: Some(20 + payload), cut: Some(34 + payload as usize), fragment: 0x2000, ..spec };
        let why = "RFC 1858 §3: a first part without the whole header";
        cases.push(one(format!("first fragment with {payload} bytes of TCP"), why, tiny, MALFORMED));
    }
    for payload in 0..8 {
        let spec = quic().udp(b"");
        let tiny = Spec { total: Some(20 + payload), cut: Some(34 + payload as usize), fragment: 0x2000, ..spec };
        let why = "RFC 768: a first part without the whole header";
        cases.push(one(format!("first fragment with {payload} bytes of UDP"), why, tiny, MALFORMED));
    }
    cases
}

fn tcp_header() -> Vec<Case> {
    let mut cases = Vec::new();
    for offset in 0..16u8 {
        let fate = if offset == 5 { PLAIN } else { MALFORMED };
        let spec = WEB_FLOW.ack(1).with(|f| f.data_offset = Some(offset));
        cases.push(one(format!("data offset {offset} on a header of 20 bytes"), "RFC 9293 §3.1", spec, fate));
    }
    for words in 1..=10 {
        let spec = WEB_FLOW.data(1).with(|f| f.tcp_options = vec![1; words * 4]);
        cases.push(one(format!("{words} words of TCP options"), "RFC 9293 §3.1", spec, PLAIN));
    }
    let padded = WEB_FLOW.ack(1).with(|f| (f.data_offset, f.padding) = (Some(6), 6));
    cases.push(one("data offset that reaches into the padding", "RFC 9293 §3.1", padded, MALFORMED));
    for flags in [0, 0x08, 0x20, 0xc0, 0xff] {
        let spec = WEB_FLOW.tcp(flags, 1, b"");
        cases.push(one(
            format!("flags {flags:#04x} on a plain slot"),
            "any packet but a SYN goes to the owner",
            spec,
            PLAIN,
        ));
    }
    cases
}

fn udp_header() -> Vec<Case> {
    let table =
        [(0, MALFORMED), (7, MALFORMED), (8, PLAIN), (12, PLAIN), (13, PLAIN), (14, MALFORMED), (0xffff, MALFORMED)];
    let mut cases: Vec<Case> = table
        .into_iter()
        .map(|(length, fate)| {
            let spec = quic().udp(b"hello").with(|f| f.udp_length = Some(length));
            one(format!("UDP length {length} of 13"), "RFC 768: at least 8, within the datagram", spec, fate)
        })
        .collect();
    let padded = quic().udp(b"hello").with(|f| (f.udp_length, f.padding) = (Some(14), 10));
    cases.push(one("UDP length that reaches into the padding", "RFC 768", padded, MALFORMED));
    cases.push(one("UDP without data", "RFC 768", quic().udp(b""), PLAIN));
    cases
}
