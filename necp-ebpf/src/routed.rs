//! The forwarding types that route (draft §5.6.1): GRE and layer 3 to servers, and what layer-3 servers reply.
//!
//! A reply must be given the VIP's address again. It belongs to one of the VIPs that have its source port: each of them is
//! asked for the flow, and the flow on record says whether this server has it. If several have one, a record counts for more
//! than a SYN that is on no record yet, that for more than a record that ends, and the younger for more than the older. What a
//! server says to others, or to clients that addressed the server itself, belongs to no flow on record and is none of ours.

use network_types::ip::Ipv4Hdr;

use crate::{
    abi::{GRE, LAYER_3, MAX_SERVERS, REPLY_VIPS},
    device::{Device, Ending, Out, Routed, Way},
    exceptions::Rounds,
    flows::{FlowWord, Found, MAX_AGE, find, flow_key},
    hash::{flow_buckets, flow_hash, service_bucket},
    icmp::{self, Error},
    packet::Packet,
    rewrite::{
        gre::{self, Outer},
        ipv4::{self, DONT_FRAGMENT},
        l2,
        l3::{self, End},
    },
    steer::{find_entry, find_service},
    tables::Tables,
    verdict::Reason,
};

/// Sends the datagram at `l3` to a server that wants its packets routed; `reason` is the number of the decision's.
#[inline(always)]
pub fn send<D: Device, T: Tables>(device: &D, tables: &T, server: u32, reason: u32, l3: usize) -> Ending {
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let (Some(ip), Some(hop), Some(end)) =
        (datagram.header::<Ipv4Hdr>(0), tables.next_hop(server), tables.far_end(server))
    else {
        return Ending::drop(Reason::BadTables);
    };
    let asked = u32::from_ne_bytes(ip.dst_addr);
    if ip.ttl <= 1 {
        return icmp::tell(device, l3, asked, Error::Expired);
    }
    let overhead = if hop.forwarding() == GRE { gre::OVERHEAD } else { 0 };
    let length = u16::from_be_bytes(ip.tot_len) as usize + overhead;
    let fits = end.mtu == 0 || length <= end.mtu as usize;
    if !fits && (ip.frags[0] & DONT_FRAGMENT != 0 || length > u16::MAX as usize) {
        return icmp::tell(device, l3, asked, Error::TooBig(end.mtu.saturating_sub(overhead as u16)));
    }
    // What does not fit goes to the kernel, as a frame for this host that is to be routed.
    let (to, from) = match (fits, device.port_mac(hop.port() as u32)) {
        (false, _) => (device.own_mac(), hop.mac()),
        (true, Some(from)) => (hop.mac(), from),
        (true, None) => return Ending::drop(Reason::NoNextHop),
    };
    let written = if hop.forwarding() == GRE {
        let outer = Outer { source: end.source, destination: end.address, to, from };
        device.grow(gre::OVERHEAD as u32) && gre::encapsulate(&device.frame(), l3, &outer)
    } else {
        // The kernel counts its own hop.
        l3::translate(&datagram, End::Destination, end.address)
            && (!fits || ipv4::count_hop(&datagram))
            && l2::rewrite(&frame.skip(0), to, from)
    };
    match (written, fits) {
        (true, true) => Ending::numbered(reason, Out::Port(hop.port() as u32)),
        (true, false) => Ending::new(Reason::Fragmenting, Out::Pass),
        (false, _) => Ending::drop(Reason::BadTables),
    }
}

/// A server's reply, sent on with the VIP's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// How it leaves.
    pub ending: Ending,
    /// Whose it is.
    pub server: u32,
    /// The VIP; of IPv6 its index.
    pub vip: u32,
}

/// Gives a server's reply the VIP's address and sends it on; `None` if it is none.
#[inline(always)]
pub fn reply<D: Device, T: Tables>(device: &D, tables: &T, packet: &Packet, l3: usize) -> Option<Sent> {
    let (vip, server) = flow_of_reply(Reply::of(packet, true), tables)?;
    Some(Sent { ending: send_reply(device, tables, l3, vip, server), server, vip })
}

/// The VIP and the server of the flow that a packet from a server belongs to.
#[inline(always)]
pub(crate) fn flow_of_reply<T: Tables>(reply: Reply, tables: &T) -> Option<(u32, u32)> {
    let packet = reply.turned_round(0).turned_round();
    let mut best = Claim::NONE;
    for number in Rounds::new(REPLY_VIPS) {
        let key = packet.reply_key(number);
        let Some(entry) = find_entry(key, tables.service_bucket(service_bucket(key))?) else { break };
        best = best.or(tables.claim_of_reply(reply, entry.slots_base), entry.slots_base);
        if best.is_certain() {
            break;
        }
    }
    if best.is_to_be_noted() && reply.counts() {
        tables.claim_of_reply(reply.settled(), best.vip());
    }
    best.whose()
}

/// What a VIP says of a reply: whose it would be, and how certain that is; in one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim(pub u64);

/// The flow is on record, and ends: another of the same client may have begun.
const ENDING: u64 = 1;
/// There is a candidate only: a SYN is answered before it is on record.
const CANDIDATE: u64 = 2;
/// The flow is on record.
const RECORD: u64 = 3;
/// From the top: how certain it is, how young, the server's id, the VIP.
const CERTAINTY_SHIFT: u32 = 56;
const YOUTH_SHIFT: u32 = 48;
const SERVER_SHIFT: u32 = 32;

const _: () = assert!(MAX_SERVERS <= 1 << (YOUTH_SHIFT - SERVER_SHIFT));

impl Claim {
    /// None.
    pub const NONE: Self = Self(0);

    /// What these two entries of a flow say; `ours`: whether an entry is of the server that the reply is from.
    #[inline(always)]
    pub(crate) fn of(record: FlowWord, candidate: FlowWord, ours: impl Fn(FlowWord) -> bool) -> Self {
        let claim = |certainty: u64, word: FlowWord| {
            let youth = (MAX_AGE as u64).wrapping_sub(word.age() as u64) & 0xff;
            Self(certainty << CERTAINTY_SHIFT | youth << YOUTH_SHIFT | (word.server() as u64) << SERVER_SHIFT)
        };
        if ours(record) && !record.is_closing() {
            claim(RECORD, record)
        } else if ours(candidate) {
            claim(CANDIDATE, candidate)
        } else if ours(record) {
            claim(ENDING, record)
        } else {
            Self::NONE
        }
    }

    /// The more certain one of this and of what `vip` claims.
    #[inline(always)]
    pub(crate) fn or(self, other: Self, vip: u32) -> Self {
        let other = if other.0 == 0 { 0 } else { other.0 | vip as u64 };
        if other > self.0 { Self(other) } else { self }
    }

    /// No other can be more so.
    #[inline(always)]
    pub(crate) const fn is_certain(self) -> bool {
        self.0 >> YOUTH_SHIFT == RECORD << (CERTAINTY_SHIFT - YOUTH_SHIFT) | MAX_AGE as u64
    }

    /// The reply is to be noted in the record, now that no other VIP claims it with more right.
    #[inline(always)]
    pub(crate) const fn is_to_be_noted(self) -> bool {
        !self.is_certain() && matches!(self.0 >> CERTAINTY_SHIFT, RECORD | ENDING)
    }

    #[inline(always)]
    pub(crate) const fn vip(self) -> u32 {
        self.0 as u32
    }

    /// The VIP and the server.
    #[inline(always)]
    pub(crate) fn whose(self) -> Option<(u32, u32)> {
        (self.0 != 0).then_some((self.vip(), (self.0 >> SERVER_SHIFT) as u16 as u32))
    }
}

/// A packet from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Source and destination address.
    addresses: u64,
    /// Ports, protocol, TCP flags, whether there is a payload, and [`COUNTS`].
    rest: u64,
}

/// Bit of [`Reply`]: it keeps its flow's record young.
const COUNTS: u32 = 1;
/// Bit of [`Reply`]: it is this VIP's.
const SETTLED: u32 = 2;

impl Reply {
    /// `counts`: it keeps its flow's record young; else it is only quoted.
    #[inline(always)]
    pub(crate) fn of(packet: &Packet, counts: bool) -> Self {
        let data = (packet.payload != 0) as u64 | (counts as u64) << COUNTS;
        Self {
            addresses: (packet.source as u64) << 32 | packet.destination as u64,
            rest: (packet.source_port as u64) << 48
                | (packet.destination_port as u64) << 32
                | (packet.protocol as u64) << 16
                | (packet.flags as u64) << 8
                | data,
        }
    }

    /// As arguments of a function in the kernel.
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 2] {
        [self.addresses, self.rest]
    }

    /// From [`to_words`](Self::to_words).
    #[inline(always)]
    pub const fn from_words([addresses, rest]: [u64; 2]) -> Self {
        Self { addresses, rest }
    }

    /// As the client's packets are.
    #[inline(always)]
    pub(crate) fn turned_round(self, vip: u32) -> Packet {
        Packet {
            source: self.addresses as u32,
            destination: vip,
            source_port: (self.rest >> 32) as u16,
            destination_port: (self.rest >> 48) as u16,
            protocol: (self.rest >> 16) as u8,
            flags: (self.rest >> 8) as u8,
            payload: self.rest as u16 & 1,
            sequence: 0,
        }
    }

    /// It keeps its flow's record young.
    #[inline(always)]
    pub(crate) const fn counts(self) -> bool {
        self.rest >> COUNTS & 1 != 0
    }

    /// Whose it is has been found out.
    #[inline(always)]
    pub(crate) const fn settled(self) -> Self {
        Self { rest: self.rest | 1 << SETTLED, ..self }
    }

    /// Notes the reply in its flow's record, once it is certain that it is of this flow.
    #[inline(always)]
    pub(crate) fn note(self, claim: Claim, found: &Found<'_>, packet: &Packet) {
        let settled = self.rest >> SETTLED & 1 != 0;
        if self.counts() && (claim.is_certain() || settled && claim.is_to_be_noted()) {
            found.touch(packet);
        }
    }

    /// What this VIP claims of it.
    #[inline(always)]
    pub fn claim<T: Tables>(self, tables: &T, vip: u32) -> Claim {
        let packet = self.turned_round(vip);
        let Some(service) = find_service(&packet, tables) else { return Claim::NONE };
        let hash = flow_hash(&packet, service.seed);
        let found = find(tables, flow_buckets(hash, tables.flow_mask()), flow_key(&packet, service.id));
        let source = (self.addresses >> 32) as u32;
        let ours = |word: FlowWord| word != FlowWord::EMPTY && is_layer_3_at(tables, word.server(), source);
        let claim = Claim::of(found.record.value, found.candidate.value, ours);
        self.note(claim, &found, &packet);
        claim
    }
}

#[inline(always)]
fn is_layer_3_at<T: Tables>(tables: &T, server: u32, address: u32) -> bool {
    tables.next_hop(server).is_some_and(|hop| hop.forwarding() == LAYER_3)
        && tables.far_end(server).is_some_and(|end| end.address == address)
}

/// Sends what a server sent, at `l3`, with the VIP in the server's place. Others' (routers') addresses stay.
#[inline(always)]
pub(crate) fn send_reply<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, vip: u32, server: u32) -> Ending {
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let (Some(ip), Some(end)) = (datagram.header::<Ipv4Hdr>(0), tables.far_end(server)) else {
        return Ending::drop(Reason::BadTables);
    };
    let source = u32::from_ne_bytes(ip.src_addr);
    let source = if source == end.address { vip } else { source };
    let routed = Routed {
        source,
        destination: u32::from_ne_bytes(ip.dst_addr),
        protocol: ip.proto,
        tos: ip.tos,
        length: u16::from_be_bytes(ip.tot_len),
    };
    if ip.ttl <= 1 {
        return icmp::tell(device, l3, end.source, Error::Expired);
    }
    let whole = ip.frags[0] & DONT_FRAGMENT != 0;
    let way = match device.way(&routed) {
        Way::TooBig(mtu) if whole => return icmp::tell(device, l3, end.source, Error::TooBig(mtu)),
        way => way,
    };
    device.count_reply(server);
    if !l3::translate(&datagram, End::Source, source) {
        return Ending::drop(Reason::BadTables);
    }
    let Way::Out { link, to, from } = way else { return Ending::new(Reason::ReplyRouted, Out::Pass) };
    if ipv4::count_hop(&datagram) && l2::rewrite(&frame.skip(0), to, from) {
        Ending::new(Reason::Reply, Out::Link(link))
    } else {
        Ending::drop(Reason::BadTables)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_of_the_flow_that_lives_or_was_heard_of_last() {
        let record = |age, closing| FlowWord::record(7, 1, closing).with_age(age);
        let candidate = FlowWord::candidate(7, &Packet::default());
        let (none, ours) = (FlowWord::EMPTY, |word: FlowWord| word != FlowWord::EMPTY);
        let claims = [
            Claim::of(none, none, ours),
            Claim::of(record(0, true).with_age(9), none, ours),
            Claim::of(record(0, true), none, ours),
            Claim::of(record(0, true), candidate, ours),
            Claim::of(record(5, false), candidate, ours),
            Claim::of(record(1, false), none, ours),
            Claim::of(record(0, false), candidate, ours),
        ];
        for (less, more) in claims.iter().zip(&claims[1..]) {
            assert_eq!(Claim::NONE.or(*less, 9).or(*more, 1).whose(), Some((1, 7)), "{less:?} {more:?}");
            assert_eq!(Claim::NONE.or(*more, 1).or(*less, 9).whose(), Some((1, 7)), "{more:?} {less:?}");
        }
        assert_eq!(claims.map(Claim::is_certain), [false, false, false, false, false, false, true]);
        assert_eq!(claims.map(Claim::is_to_be_noted), [false, true, true, false, true, true, false]);
        assert_eq!(Claim::NONE.or(claims[0], 9).whose(), None);
    }
}
