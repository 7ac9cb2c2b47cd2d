//! IPv6: what a frame is, and what frames look like that leave changed. The walk over extension headers is etherparse's, header
//! by header; how many are looked at is the packet path's own rule.

use std::{net::IpAddr, ops::Range};

use etherparse::{
    IpNumber, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, TcpSlice, UdpHeaderSlice, UdpSlice,
    ip_number,
};
use necp_ebpf::abi::Server;

use super::{Class, Difference, Seen, class_of, opens, quote::Message, tuple::Tuple};
use crate::frames::{
    scene::crossing::Rules,
    stack::{fold, sum},
};

/// Places in an IPv6 header.
const HOPS: usize = 7;
/// The source address.
pub(super) const SOURCE: Range<usize> = 8..24;
/// The destination address.
pub(super) const DESTINATION: Range<usize> = 24..40;
const HEADER: usize = 40;
/// An outer IPv6 header and GRE's.
const OUTER: usize = 44;
/// What is looked at.
const EXTENSIONS: usize = 6;
const FURTHEST: usize = HEADER + 256;

/// A datagram's parts, as its headers say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram<'a> {
    /// From the IPv6 header on, as long as it says.
    bytes: &'a [u8],
    protocol: IpNumber,
    transport: usize,
    /// Of a part: whether it is the first, and the identification.
    pub(super) part: Option<(bool, u32)>,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Not {
    Malformed,
    /// A header that is not all there and might have been too many: either is right.
    Either,
    Extended,
}

impl<'a> Datagram<'a> {
    /// Whose header and length are right; what is not looked at is not held against it.
    fn whole(packet: &'a [u8]) -> Option<&'a [u8]> {
        let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
        packet.get(..HEADER + usize::from(header.payload_length()))
    }

    /// Follows the extension headers of what begins here; `cut`: it may be shorter than it says.
    pub(super) fn of(packet: &'a [u8], cut: bool) -> Result<Self, Not> {
        let header = Ipv6HeaderSlice::from_slice(packet).map_err(|_| Not::Malformed)?;
        let bytes = if cut { packet } else { Self::whole(packet).ok_or(Not::Malformed)? };
        let (mut next, mut at, mut part) = (header.next_header(), HEADER, None);
        for round in 0.. {
            let is_extension = matches!(next.0, 0 | 43 | 44 | 60);
            if !is_extension || matches!(part, Some((false, _))) {
                break;
            }
            if round == EXTENSIONS {
                return Err(Not::Extended);
            }
            let extension = bytes.get(at..).unwrap_or_default();
            if extension.len() < 8 {
                return Err(Not::Either);
            }
            if next == ip_number::IPV6_FRAGMENTATION_HEADER {
                let fragment = Ipv6FragmentHeaderSlice::from_slice(extension).map_err(|_| Not::Either)?;
                next = fragment.next_header();
                if fragment.is_fragmenting_payload() {
                    part = Some((fragment.fragment_offset().value() == 0, fragment.identification()));
                }
                at += 8;
            } else if next == ip_number::IPV6_ROUTE_HEADER && extension[3] != 0 {
                return Err(Not::Extended);
            } else {
                let length = usize::from(extension[1]) * 8 + 8;
                next = Ipv6RawExtHeaderSlice::from_slice(extension)
                    .map_or(IpNumber(extension[0]), |all| all.next_header());
                at += length;
            }
            if at > FURTHEST {
                return Err(Not::Extended);
            }
        }
        if at > bytes.len() { Err(Not::Either) } else { Ok(Self { bytes, protocol: next, transport: at, part }) }
    }

    fn is_first(&self) -> bool {
        matches!(self.part, Some((true, _)))
    }

    fn destination(&self) -> &[u8] {
        &self.bytes[DESTINATION]
    }

    /// Source and destination address.
    pub(super) fn addresses(&self) -> [u8; 32] {
        self.bytes[SOURCE.start..DESTINATION.end].try_into().expect("32 bytes")
    }

    /// Who speaks to whom by these ports, if the protocol has any.
    fn tuple(&self, ports: [u16; 2]) -> Tuple {
        let address = |place: Range<usize>| {
            let bytes: [u8; 16] = self.bytes[place].try_into().expect("16 bytes");
            IpAddr::from(bytes)
        };
        let has_ports = matches!(self.protocol, ip_number::TCP | ip_number::UDP);
        let [source_port, destination_port] = if has_ports { ports } else { [0; 2] };
        Tuple {
            source: address(SOURCE),
            destination: address(DESTINATION),
            protocol: self.protocol.0,
            source_port,
            destination_port,
        }
    }

    /// The ports of TCP and UDP; `cut`: of what is quoted.
    fn ports(&self, cut: bool) -> Option<[u16; 2]> {
        let transport = &self.bytes[self.transport..];
        if cut {
            let port = |at: usize| transport.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
            return Some([port(0)?, port(2)?]);
        }
        match self.protocol {
            ip_number::TCP => {
                TcpSlice::from_slice(transport).ok().map(|tcp| [tcp.source_port(), tcp.destination_port()])
            }
            ip_number::UDP => {
                let header = UdpHeaderSlice::from_slice(transport).ok()?;
                let right = header.length() >= 8 && (self.is_first() || UdpSlice::from_slice(transport).is_ok());
                right.then(|| [header.source_port(), header.destination_port()])
            }
            _ => None,
        }
    }
}

/// What an IPv6 datagram is; `ours`: its frame is for this host.
pub(super) fn see(packet: &[u8], ours: bool, rules: &Rules) -> Seen {
    if Datagram::whole(packet).is_none() {
        return Seen::of(Class::Malformed, None);
    }
    if !ours {
        return Seen::of(Class::OtherHost, None);
    }
    let datagram = match Datagram::of(packet, false) {
        Ok(datagram) => datagram,
        Err(Not::Extended) => return Seen::of(Class::Extended, None),
        Err(Not::Either) => return Seen::of(Class::Unread, None),
        Err(Not::Malformed) => return Seen::of(Class::Malformed, None),
    };
    if matches!(datagram.part, Some((false, _))) {
        return Seen::of(Class::LaterPart, None);
    }
    let protocol = datagram.protocol;
    if matches!(protocol, ip_number::IPV6_ICMP | ip_number::ICMP) {
        return Seen::of(Class::Icmp, Some(Difference::OtherProtocol));
    }
    let has_ports = matches!(protocol, ip_number::TCP | ip_number::UDP);
    let ports = datagram.ports(false);
    if has_ports && ports.is_none() {
        return Seen::of(Class::Malformed, None);
    }
    let tuple = datagram.tuple(ports.unwrap_or_default());
    let class = class_of(&tuple, datagram.is_first(), rules);
    let tcp = TcpSlice::from_slice(&datagram.bytes[datagram.transport..]).ok();
    let opens = tcp.is_some_and(|tcp| protocol == ip_number::TCP && opens(&tcp));
    Seen { class, difference: (!has_ports).then_some(Difference::OtherProtocol), tuple: Some((tuple, opens)) }
}

/// What an ICMP error quotes.
struct Quote<'a> {
    /// Where it stands in the error.
    at: usize,
    datagram: Datagram<'a>,
    ports: [u16; 2],
}

impl<'a> Quote<'a> {
    /// What a whole ICMP error of a type that senders heed (RFC 4443) quotes, if its ports are there.
    fn of(error: &Datagram<'a>) -> Option<Self> {
        let message = &error.bytes[error.transport..];
        let heeded = matches!(message.first(), Some(1..=4)) && error.protocol == ip_number::IPV6_ICMP;
        if !heeded || error.part.is_some() {
            return None;
        }
        let datagram = Datagram::of(message.get(8..)?, true).ok()?;
        let later = matches!(datagram.part, Some((false, _)));
        let ports = datagram.ports(true).filter(|_| !later)?;
        Some(Self { at: error.transport + 8, datagram, ports })
    }
}

/// The destination of what an error quotes.
pub(super) fn quoted_destination(packet: &[u8]) -> Option<&[u8]> {
    let error = Datagram::of(packet, false).ok()?;
    let quote = Quote::of(&error)?;
    packet.get(quote.at + DESTINATION.start..quote.at + DESTINATION.end)
}

/// The ICMP message in a datagram.
pub(super) fn message(packet: &[u8]) -> Option<Message> {
    let error = Datagram::of(packet, false).ok()?;
    let asks = error.protocol == ip_number::IPV6_ICMP && error.bytes.get(error.transport) == Some(&128);
    Some(Message {
        to: error.tuple([0; 2]).destination,
        asks,
        quote: Quote::of(&error).map(|quote| quote.datagram.tuple(quote.ports)),
    })
}

/// The packet, one hop older, behind an outer header and GRE's.
pub(super) fn encapsulated(before: &[u8], after: &[u8], server: &Server) -> Result<(), String> {
    let outer = Ipv6HeaderSlice::from_slice(after).map_err(|error| error.to_string())?;
    let inner = Ipv6HeaderSlice::from_slice(before).map_err(|error| error.to_string())?;
    let wanted = (inner.payload_length() + OUTER as u16, IpNumber(47), server.source, server.address);
    let is = (outer.payload_length(), outer.next_header(), outer.source(), outer.destination());
    if is != wanted || outer.hop_limit() < 2 || outer.slice()[..4] != inner.slice()[..4] {
        return Err(format!("outer header {:02x?}", outer.slice()));
    }
    if after.get(HEADER..OUTER) != Some(&[0, 0, 0x86, 0xdd]) {
        return Err("no GRE header of IPv6 without options".into());
    }
    if after[OUTER..] != older(before, 1)? { Err("changed in GRE".into()) } else { Ok(()) }
}

/// To a layer-3 server, or from one: changed in one address, in hops to go, in checksums, and in nothing else; of an ICMP error
/// also in what it quotes, and in its own address only if `of_server` has it.
pub(super) fn translated(
    before: &[u8],
    after: &[u8],
    (place, old, new): (Range<usize>, Option<&[u8]>, &[u8]),
    hops: u8,
) -> Result<(), String> {
    let datagram = Datagram::of(before, false).map_err(|not| format!("translated, but {not:?}"))?;
    let mut wanted = older(before, hops)?;
    let quote = Quote::of(&datagram);
    // Of an error from a router the sender stays.
    let own = quote.is_none() || old.is_none_or(|old| before[place.clone()] == *old);
    if own {
        wanted[place.clone()].copy_from_slice(new);
    }
    let mut sums = Vec::new();
    if let Some(quote) = &quote {
        // What is quoted went the other way.
        let other = if place == SOURCE { DESTINATION } else { SOURCE };
        wanted[quote.at + other.start..quote.at + other.end].copy_from_slice(new);
        let in_quote = sum_place(quote.datagram.protocol).map(|at| quote.at + quote.datagram.transport + at);
        sums.extend(in_quote.filter(|at| at + 2 <= datagram.bytes.len()));
    }
    let first = !matches!(datagram.part, Some((false, _)));
    sums.extend(sum_place(datagram.protocol).filter(|_| first).map(|at| datagram.transport + at));
    for &at in &sums {
        let both = (wanted.get_mut(at..at + 2), after.get(at..at + 2));
        let (Some(old), Some(new)) = both else { return Err("too short for its checksums".into()) };
        old.copy_from_slice(new);
    }
    if wanted != after {
        return Err("changed in what should stay".into());
    }
    let unsummed = datagram.protocol == ip_number::UDP
        && before.get(datagram.transport + 6..datagram.transport + 8) == Some(&[0, 0]);
    let whole = |bytes: &[u8]| {
        fold(sum(&bytes[SOURCE.start..DESTINATION.end]) + sum(&bytes[datagram.transport..datagram.bytes.len()]))
    };
    let summed = sum_place(datagram.protocol).is_some() && first && !unsummed;
    if summed && whole(before) != whole(after) {
        return Err("the checksum does not follow the address".into());
    }
    Ok(())
}

/// An ICMP error about a packet: its type and what is quoted.
pub(super) fn answer(before: &[u8], answer: &[u8], expired: bool) -> Result<(), String> {
    let asked = Ipv6HeaderSlice::from_slice(before).map_err(|error| error.to_string())?;
    if expired && asked.hop_limit() > 1 {
        return Err(format!("expired with {} hops to go", asked.hop_limit()));
    }
    let told = Datagram::of(answer, false).map_err(|not| format!("the answer: {not:?}"))?;
    let message = &told.bytes[told.transport..];
    let pseudo = sum(&told.addresses()) + message.len() as u32 + u32::from(ip_number::IPV6_ICMP.0);
    if fold(pseudo + sum(message)) != 0xffff || told.destination() != asked.source() {
        return Err("the answer's checksum or destination is wrong".into());
    }
    if told.protocol != ip_number::IPV6_ICMP || message.len() < 8 || message[..2] != [if expired { 3 } else { 2 }, 0] {
        return Err(format!("told by {message:02x?}"));
    }
    if message.len() < 8 + HEADER + 8 || !before.starts_with(&message[8..]) {
        return Err("the answer does not quote the packet".into());
    }
    Ok(())
}

/// The same with fewer hops to go.
fn older(before: &[u8], hops: u8) -> Result<Vec<u8>, String> {
    if hops > 0 && before[HOPS] <= hops {
        return Err(format!("sent on with {} hops to go", before[HOPS]));
    }
    let mut wanted = before.to_vec();
    wanted[HOPS] -= hops;
    Ok(wanted)
}

fn sum_place(protocol: IpNumber) -> Option<usize> {
    match protocol {
        ip_number::TCP => Some(16),
        ip_number::UDP => Some(6),
        ip_number::IPV6_ICMP => Some(2),
        _ => None,
    }
}
