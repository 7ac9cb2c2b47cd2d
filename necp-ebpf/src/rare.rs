//! What comes seldom: tags, fragments, ICMP errors, frames in several buffers. A program of its own, which the fast path hands
//! its frame to: it has a stack of its own, and costs the fast path nothing.
//!
//! - VLAN tags (IEEE 802.1Q, two at most) stay where they are.
//! - A fragment follows its first one, which has the ports: a bounded cache remembers where that went. One that comes before
//!   its first, or after [`FRAGMENT_TIME`], is dropped and counted: nobody could put it together.
//! - An ICMP error goes to the server that has the flow which it quotes; eight bytes of it suffice (RFC 792). It neither
//!   refreshes nor makes a record. Of layer 3 the quoted header is translated too, in both directions.

use network_types::ip::Ipv4Hdr;

use crate::{
    abi::{GRE, LAYER_3, NO_ECHO, NONE},
    device::{Device, Ending, Out},
    frame::Frame,
    packet::{Packet, protocol},
    parse::{Datagram, L2_LEN, Part, datagram, ports},
    rewrite::{
        l2,
        l3::{End, translate_error},
    },
    routed::{self, Reply},
    steer::{Decision, find_vip, steer, whose},
    tables::Tables,
    verdict::{Action, Reason},
};

/// How long the parts of a datagram may be apart: as long as hosts wait for them (RFC 1122 §3.3.2), in nanoseconds.
pub const FRAGMENT_TIME: u64 = 30_000_000_000;

/// What names a datagram whose parts come one by one (RFC 791 §3.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address, as it stands in the header.
    pub source: u32,
    /// Destination address, likewise.
    pub destination: u32,
    /// Identification, likewise.
    pub id: u16,
    /// IP protocol; of IPv6 0.
    pub protocol: u8,
    /// 0; of IPv6 6, and both addresses are a digest of what names the datagram.
    pub reserved: u8,
}

impl FragmentKey {
    #[inline(always)]
    fn of(head: &Datagram) -> Self {
        let Packet { source, destination, protocol, .. } = head.packet;
        Self { source, destination, id: head.id, protocol, reserved: 0 }
    }
}

/// Where a datagram's first part went.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentPlace {
    /// When, in nanoseconds of the kernel's monotonic clock.
    pub at: u64,
    /// To, or from, this server id.
    pub server: u32,
    /// The VIP that it was given, of IPv6 its index, if it is a reply of that server; else 0.
    pub vip: u32,
}

/// EtherTypes of tags: IEEE 802.1Q, and 802.1ad.
const TAGS: [u16; 2] = [u16::from_ne_bytes([0x81, 0x00]), u16::from_ne_bytes([0x88, 0xa8])];
const TAG_LEN: usize = 4;
/// ICMP types that say something to the sender of what they quote: unreachable, time exceeded, parameter problem. A redirect is
/// for the host itself, and nobody heeds a source quench (RFC 6633).
const STEERED: [u8; 3] = [3, 11, 12];
/// ICMP type of an echo request.
const ECHO: u8 = 8;
const ICMP_LEN: usize = 8;
/// What must be quoted of a datagram's payload: its ports. RFC 792 promises eight bytes.
const QUOTED: usize = 4;

/// Handles a frame that the fast path knows nothing of; `None`: it has ports, and [`with_ports`] is to handle it.
///
/// In the kernel both are programs of their own, each with a stack of its own.
#[inline(always)]
pub fn handle<D: Device, T: Tables>(device: &D, tables: &T) -> Option<Ending> {
    let (l3, head) = match head(device) {
        Ok(found) => found,
        Err(ending) => return Some(ending),
    };
    match head.part {
        Part::Later => Some(later_part(device, tables, l3, &head)),
        Part::Whole if head.packet.protocol == protocol::ICMP => Some(icmp_error(device, tables, l3, &head)),
        Part::Whole | Part::First => None,
    }
}

/// Where the datagram is, and its header; or how the frame ends without one.
#[inline(always)]
pub(crate) fn head<D: Device>(device: &D) -> Result<(usize, Datagram), Ending> {
    let pass = |reason| Ending::new(reason, Out::Pass);
    let (l3, frame) = (device.datagram_at(), device.frame());
    if l3 == 0 {
        return Err(pass(if frame.len() < L2_LEN { Reason::Malformed } else { Reason::NotIp }));
    }
    let head = datagram(&frame.skip(l3), device.length().wrapping_sub(l3)).map_err(pass)?;
    if l2::is_for(&frame.skip(0), device.own_mac()) { Ok((l3, head)) } else { Err(pass(Reason::OtherHost)) }
}

/// EtherType of IPv4, as it stands in a frame.
pub const IPV4: u16 = u16::from_ne_bytes([0x08, 0x00]);
/// EtherType of IPv6, likewise.
pub const IPV6: u16 = u16::from_ne_bytes([0x86, 0xdd]);

/// Where the datagram begins; 0 if the frame is of another EtherType than this, or has three tags.
#[inline(always)]
pub fn skip_tags(frame: &Frame, wanted: u16) -> usize {
    let mut l3 = L2_LEN;
    let Some(mut ether_type) = frame.read::<u16>(L2_LEN - 2) else { return 0 };
    for _ in 0..2 {
        if ether_type != TAGS[0] && ether_type != TAGS[1] {
            break;
        }
        l3 += TAG_LEN;
        let Some(next) = frame.read::<u16>(l3 - 2) else { return 0 };
        ether_type = next;
    }
    if ether_type == wanted { l3 } else { 0 }
}

/// A datagram with ports, or the first part of one.
#[inline(always)]
pub fn with_ports<D: Device, T: Tables>(device: &D, tables: &T) -> Ending {
    let (l3, mut head) = match head(device) {
        Ok(found) => found,
        Err(ending) => return ending,
    };
    if let Err(reason) = ports(&device.frame().skip(l3), &mut head) {
        return if reason == Reason::Icmp && is_unwanted_echo(&device.frame().skip(l3), &head, tables) {
            Ending::drop(Reason::Echo)
        } else if reason == Reason::Icmp {
            leave(device, tables, &head, reason)
        } else {
            Ending::new(reason, Out::Pass)
        };
    }
    let decision = steer(&head.packet, tables);
    if decision.reason == Reason::NotOurs {
        let Some(sent) = routed::reply(device, tables, &head.packet, l3) else {
            let whole = matches!(head.part, Part::Whole);
            return leave(device, tables, &head, if whole { Reason::NotOurs } else { Reason::Fragment });
        };
        remember(device, &head, sent.server, sent.vip);
        return sent.ending;
    }
    remember(device, &head, decision.server, 0);
    send(device, tables, l3, &decision)
}

/// To this host's own stack, which wants the other parts too: at a VIP they would be strays, and behind an older datagram of the
/// same name they would go where that went.
#[inline(always)]
fn leave<D: Device, T: Tables>(device: &D, tables: &T, head: &Datagram, reason: Reason) -> Ending {
    if matches!(head.part, Part::First)
        && (find_vip(head.packet.destination, tables).is_some() || device.recall(&FragmentKey::of(head)).is_some())
    {
        remember(device, head, NONE, 0);
    }
    Ending::new(reason, Out::Pass)
}

#[inline(always)]
pub(crate) fn remember<D: Device>(device: &D, head: &Datagram, server: u32, vip: u32) {
    if matches!(head.part, Part::First) {
        device.remember(&FragmentKey::of(head), FragmentPlace { at: 0, server, vip });
    }
}

/// A part that has no ports of its own.
#[inline(always)]
fn later_part<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, head: &Datagram) -> Ending {
    let Some(place) = device.recall(&FragmentKey::of(head)) else { return stray(tables, head) };
    if place.vip != 0 {
        return routed::send_reply(device, tables, l3, place.vip, place.server);
    }
    match tables.next_hop(place.server) {
        Some(next_hop) if next_hop.is_reachable() => {
            send(device, tables, l3, &Decision { reason: Reason::Part, server: place.server, next_hop, begins: false })
        }
        // The first part went to this host's own stack.
        _ => Ending::new(Reason::Fragment, Out::Pass),
    }
}

/// A part whose first one is not known: to a VIP it is of no use to anybody.
#[inline(always)]
fn stray<T: Tables>(tables: &T, head: &Datagram) -> Ending {
    if find_vip(head.packet.destination, tables).is_some() {
        Ending::drop(Reason::StrayPart)
    } else {
        Ending::new(Reason::Fragment, Out::Pass)
    }
}

/// Sends it as its server wants it.
#[inline(always)]
pub(crate) fn send<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, decision: &Decision) -> Ending {
    match decision.action() {
        Action::Transmit => {}
        Action::Drop => return Ending::drop(decision.reason),
        _ => return Ending::new(decision.reason, Out::Pass),
    }
    let length = device.length() as u64;
    let ending = if matches!(decision.next_hop.forwarding(), GRE | LAYER_3) {
        routed::send(device, tables, decision.server, decision.reason as u32, l3)
    } else {
        bridge(device, decision)
    };
    if matches!(ending.out(), Out::Port(_) | Out::Pass) {
        device.count(decision.server, length, decision.begins);
    }
    ending
}

#[inline(always)]
pub(crate) fn bridge<D: Device>(device: &D, decision: &Decision) -> Ending {
    let port = decision.next_hop.port() as u32;
    let Some(source) = device.port_mac(port) else { return Ending::drop(Reason::NoNextHop) };
    if l2::rewrite(&device.frame(), decision.next_hop.mac(), source) {
        Ending::new(decision.reason, Out::Port(port))
    } else {
        Ending::drop(Reason::BadTables)
    }
}

/// An ICMP message: to the server whose flow it quotes, or from one.
#[inline(always)]
fn icmp_error<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, head: &Datagram) -> Ending {
    let other = Ending::new(Reason::Icmp, Out::Pass);
    let packet = device.frame().skip(l3);
    if is_unwanted_echo(&packet, head, tables) {
        return Ending::drop(Reason::Echo);
    }
    let Some(quoted) = quoted(&packet, head) else { return other };
    // To a VIP: what it quotes was sent as the VIP, so the flow is the other way round.
    if quoted.source == head.packet.destination
        && let Some((server, next_hop)) = whose(&quoted.turned_round(), tables)
    {
        if !next_hop.is_reachable() {
            return Ending::drop(Reason::NoNextHop);
        }
        if next_hop.forwarding() == LAYER_3 && !to_server(device, tables, l3, head.total, server) {
            return Ending::drop(Reason::BadTables);
        }
        return send(device, tables, l3, &Decision { reason: Reason::Quoted, server, next_hop, begins: false });
    }
    // To a client: what it quotes was sent to a server's own address, which the client does not know (layer 3).
    let Some((vip, server)) = routed::flow_of_reply(Reply::of(&quoted.turned_round(), false), tables) else {
        return other;
    };
    if !translate_error(&packet.skip(0), head.total, End::Destination, vip) {
        return Ending::drop(Reason::BadTables);
    }
    routed::send_reply(device, tables, l3, vip, server)
}

/// An echo request to a VIP that answers none; it, or its first part.
#[inline(always)]
fn is_unwanted_echo<T: Tables>(packet: &Frame, head: &Datagram, tables: &T) -> bool {
    // Behind the datagram there may be padding.
    head.total as usize > head.header
        && packet.skip(head.header).read::<u8>(0) == Some(ECHO)
        && find_vip(head.packet.destination, tables).is_some_and(|vip| vip.flags & NO_ECHO != 0)
}

/// The quoted header as the server knows it.
#[inline(always)]
fn to_server<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, total: u16, server: u32) -> bool {
    let datagram = device.frame().skip(l3);
    tables.far_end(server).is_some_and(|end| translate_error(&datagram, total, End::Source, end.address))
}

/// The packet that an ICMP error quotes, as far as its flow goes.
#[inline(always)]
pub(crate) fn quoted(packet: &Frame, head: &Datagram) -> Option<Packet> {
    let icmp = packet.skip(head.header);
    if !STEERED.contains(&icmp.read::<u8>(0)?) {
        return None;
    }
    let inner = icmp.skip(ICMP_LEN);
    let ip: &Ipv4Hdr = inner.header(0)?;
    let header = ((ip.vihl & 0xf) << 2) as usize;
    // Behind the error there may be padding. A later fragment's eight bytes are no ports.
    if ip.vihl >> 4 != 4
        || header < Ipv4Hdr::LEN
        || (head.total as usize) < head.header + ICMP_LEN + header + QUOTED
        || u16::from_be_bytes(ip.frags) & 0x1fff != 0
    {
        return None;
    }
    let mut quoted = Packet {
        source: u32::from_ne_bytes(ip.src_addr),
        destination: u32::from_ne_bytes(ip.dst_addr),
        protocol: ip.proto,
        ..Packet::default()
    };
    if matches!(quoted.protocol, protocol::TCP | protocol::UDP) {
        let ports: [u16; 2] = inner.skip(header).read(0)?;
        [quoted.source_port, quoted.destination_port] = ports;
    }
    Some(quoted)
}
