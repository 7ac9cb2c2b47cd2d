//! The forwarding types that route, as [`routed`](crate::routed) has them for IPv4.

use network_types::ip::Ipv6Hdr;

use super::{
    Packet6, find_at,
    head::Walk,
    icmp::{self, Error},
    named_by,
};
use crate::{
    abi::{GRE, LAYER_3, REPLY_VIPS, SERVICE6},
    device::{Device, Ending, Out, Routed6, Way},
    exceptions::Rounds,
    flows::{FlowWord, find, flow_key},
    hash::{flow_buckets, flow_hash, service_bucket},
    packet::Packet,
    parse::Part,
    rewrite::{
        l2,
        l3::End,
        six::{self, OVERHEAD, Outer},
    },
    routed::{Claim, Reply},
    steer::find_entry,
    tables::{Tables, halves},
    verdict::Reason,
};

/// No link may have a smaller MTU (RFC 8200 §5).
const LEAST_MTU: u16 = 1280;

/// Where a datagram's transport header is, if this part has it.
#[inline(always)]
pub(super) fn transport_of(walk: Walk) -> Option<usize> {
    if matches!(walk.part(), Part::Later) { None } else { Some(walk.transport()) }
}

/// Sends the datagram at `l3` to a server that wants its packets routed; `reason` is the number of the decision's.
#[inline(always)]
pub fn send<D: Device, T: Tables>(device: &D, tables: &T, server: u32, reason: u32, l3: usize) -> Ending {
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let (Some(ip), Some(hop), Some(end)) =
        (datagram.header::<Ipv6Hdr>(0), tables.next_hop(server), tables.far_end6(server))
    else {
        return Ending::drop(Reason::BadTables);
    };
    let asked = halves(ip.dst_addr);
    if ip.hop_limit <= 1 {
        return icmp::tell(device, l3, asked, Error::Expired);
    }
    let overhead = if hop.forwarding() == GRE { OVERHEAD } else { 0 };
    let length = u16::from_be_bytes(ip.payload_len) as usize + Ipv6Hdr::LEN + overhead;
    // What every link takes must go through a tunnel too (RFC 2473 §7.1), whatever "packet too big" says of the way.
    let least = LEAST_MTU as usize + overhead;
    let fits = end.mtu == 0 || length <= end.mtu as usize || length <= least;
    if !fits || length > u16::MAX as usize + Ipv6Hdr::LEN {
        let left = end.mtu.saturating_sub(overhead as u16);
        return icmp::tell(device, l3, asked, Error::TooBig(if left < LEAST_MTU { LEAST_MTU } else { left }));
    }
    let Some(from) = device.port_mac(hop.port() as u32) else { return Ending::drop(Reason::NoNextHop) };
    let to = hop.mac();
    let written = if hop.forwarding() == GRE {
        let outer = Outer { source: end.source, destination: end.address, to, from };
        device.grow(OVERHEAD as u32) && six::encapsulate(&device.frame(), l3, &outer)
    } else {
        let walk = device.walk6(l3);
        six::translate(&datagram, End::Destination, end.address, walk.protocol(), transport_of(walk))
            && six::count_hop(&datagram)
            && l2::rewrite(&frame.skip(0), to, from)
    };
    if written { Ending::numbered(reason, Out::Port(hop.port() as u32)) } else { Ending::drop(Reason::BadTables) }
}

/// Whose reply a packet is: the index of the VIP and the server; `None` if it is none.
#[inline(always)]
pub fn whose_reply<T: Tables>(packet: &Packet6, tables: &T) -> Option<(u32, u32)> {
    flow_of_reply(&packet.packet, true, &tables.six(packet.addresses)?)
}

/// The VIP and the server of the flow that a packet from a server belongs to; `counts`: it keeps the flow's record young.
#[inline(always)]
pub(super) fn flow_of_reply<T: Tables>(packet: &Packet, counts: bool, six: &T) -> Option<(u32, u32)> {
    let mut best = Claim::NONE;
    for number in Rounds::new(REPLY_VIPS) {
        let key = packet.reply_key6(number);
        let Some(entry) = find_entry(key, six.service_bucket(service_bucket(key))?) else { break };
        let vip = entry.vip as u32;
        best = best.or(six.claim_of_reply6(Reply::of(packet, counts), vip), vip);
        if best.is_certain() {
            break;
        }
    }
    if best.is_to_be_noted() && counts {
        six.claim_of_reply6(Reply::of(packet, counts).settled(), best.vip());
    }
    best.whose()
}

impl Reply {
    /// [`claim`](Self::claim) of an IPv6 packet, whose addresses the tables have, if the client speaks to the VIP of this index.
    #[inline(always)]
    pub fn claim6<T: Tables>(self, tables: &T, vip: u32) -> Claim {
        let (Some(addresses), Some(address)) = (tables.addresses6(), tables.vip6(vip)) else { return Claim::NONE };
        let request = self.turned_round(0);
        let Some(service) = find_at(address, request.destination_port, request.protocol, SERVICE6, tables) else {
            return Claim::NONE;
        };
        let flow = named_by(addresses.destination, &request, service, tables);
        let hash = flow_hash(&flow, service.seed);
        let found = find(tables, flow_buckets(hash, tables.flow_mask()), flow_key(&flow, service.id));
        let ours = |word: FlowWord| {
            word != FlowWord::EMPTY
                && tables.next_hop(word.server()).is_some_and(|hop| hop.forwarding() == LAYER_3)
                && tables.far_end6(word.server()).is_some_and(|end| end.address == addresses.source)
        };
        let claim = Claim::of(found.record.value, found.candidate.value, ours);
        self.note(claim, &found, &request);
        claim
    }
}

/// Sends what a server sent, at `l3`, with the VIP of this index in the server's place. Others' (routers') addresses stay.
#[inline(always)]
pub fn send_reply<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, vip: u32, server: u32) -> Ending {
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let (Some(ip), Some(end), Some(vip)) = (datagram.header::<Ipv6Hdr>(0), tables.far_end6(server), tables.vip6(vip))
    else {
        return Ending::drop(Reason::BadTables);
    };
    let (source, hops) = (halves(ip.src_addr), ip.hop_limit);
    let ours = source == end.address;
    let walk = device.walk6(l3);
    let routed = Routed6 {
        source: if ours { vip } else { source },
        destination: halves(ip.dst_addr),
        first: u32::from_ne_bytes(ip.vcf),
        protocol: walk.protocol(),
        length: u16::from_be_bytes(ip.payload_len).saturating_add(Ipv6Hdr::LEN as u16),
    };
    if hops <= 1 {
        return icmp::tell(device, l3, end.source, Error::Expired);
    }
    let way = match device.way6(&routed) {
        Way::TooBig(mtu) => return icmp::tell(device, l3, end.source, Error::TooBig(mtu)),
        way => way,
    };
    device.count_reply(server);
    if ours && !six::translate(&datagram, End::Source, vip, walk.protocol(), transport_of(walk)) {
        return Ending::drop(Reason::BadTables);
    }
    let Way::Out { link, to, from } = way else { return Ending::new(Reason::ReplyRouted, Out::Pass) };
    if six::count_hop(&datagram) && l2::rewrite(&frame.skip(0), to, from) {
        Ending::new(Reason::Reply, Out::Link(link))
    } else {
        Ending::drop(Reason::BadTables)
    }
}
