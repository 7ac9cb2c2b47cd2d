//! ICMP for IPv6 (RFC 4443): errors that this host owes a sender, and those that others send about flows of ours.
//!
//! Of the packet that an error of ours is about, its headers and eight bytes more are quoted: less than there would be room for
//! (RFC 4443 §2.4 c), and all that a sender needs to find its connection.

use network_types::ip::Ipv6Hdr;

use super::{
    Packet6, find_vip,
    head::{FURTHEST, Head, ICMPV6},
    rare::send,
    routed, whose,
};
use crate::{
    abi::{LAYER_3, NO_ECHO},
    device::{Device, Ending, Out},
    flows::opaque,
    frame::Frame,
    packet::{Packet, protocol},
    parse::Part,
    rewrite::{
        checksum::fold,
        l2,
        l3::End,
        six::{self, Header, Quote, sum_of, translate_error},
    },
    steer::Decision,
    tables::{Address6, Addresses6, Tables, halves},
    verdict::Reason,
};

/// What there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Packet too big: no longer packet than this gets there (§3.2).
    TooBig(u16),
    /// Hop limit exceeded in transit (§3.3).
    Expired,
}

const ICMP_LEN: usize = 8;
/// Bytes that come before what is quoted.
const GROWTH: usize = Ipv6Hdr::LEN + ICMP_LEN;
/// Of what follows the headers, so much is quoted.
const QUOTED: usize = 8;
/// What must be quoted by others: the ports.
const PORTS: usize = 4;
/// Types up to this one are errors (§2.1); from 1 to 4 they are known.
const ERRORS: u8 = 127;
const KNOWN: u8 = 4;
/// Type of an echo request (§4.1).
const ECHO: u8 = 128;
/// Says the sender of what it quotes: unreachable, too big, time exceeded, parameter problem.
pub(super) const STEERED: core::ops::RangeInclusive<u8> = 1..=KNOWN;

impl Error {
    const fn reason(self) -> Reason {
        match self {
            Self::TooBig(_) => Reason::TooBig,
            Self::Expired => Reason::Expired,
        }
    }

    /// The first and the second word of its header, without checksum.
    const fn words(self) -> [u32; 2] {
        match self {
            Self::TooBig(mtu) => [u32::from_ne_bytes([2, 0, 0, 0]), (mtu as u32).to_be()],
            Self::Expired => [u32::from_ne_bytes([3, 0, 0, 0]), 0],
        }
    }
}

/// Turns the frame with a datagram at `l3` into an error about it, from the address `source`.
#[inline(always)]
pub fn tell<D: Device>(device: &D, l3: usize, source: Address6, error: Error) -> Ending {
    let untold = Ending::drop(Reason::Untold);
    let walk = device.walk6(l3);
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let Some(ip) = datagram.header::<Ipv6Hdr>(0) else { return untold };
    let sender = halves(ip.src_addr);
    let is_single = may_be_told(ip.src_addr);
    // A later part's is where its bytes begin.
    let quoted = walk.transport() + QUOTED;
    let is_error =
        walk.protocol() == ICMPV6 && datagram.skip(walk.transport()).read::<u8>(0).is_none_or(|kind| kind <= ERRORS);
    // Opaque, or the compiler leaves out checks of single reads, and the verifier misses them.
    let length = opaque(device.length() as u64) as usize;
    let untellable = walk.trouble().is_some() || matches!(walk.part(), Part::Later) || is_error || !is_single;
    if untellable || length < l3 + quoted || !device.may_tell() {
        return untold;
    }
    if !device.shorten((length - l3 - quoted) as u32) || !device.grow(GROWTH as u32) {
        return untold;
    }
    let frame = device.frame();
    let length = (ICMP_LEN + quoted) as u16;
    let header = Header { first: [0x60, 0, 0, 0], length, next: ICMPV6, source, destination: sender };
    let [first, second] = error.words();
    let answer = frame.skip(l3);
    let Some(sum) = sum(&frame.skip(l3 + GROWTH), quoted) else { return untold };
    // The pseudo-header: addresses, length, protocol (RFC 8200 §8.1).
    let pseudo = sum_of(source) + sum_of(sender) + length.to_be() as u64 + (ICMPV6 as u16).to_be() as u64;
    let checksum = !fold(sum + pseudo + first as u64 + second as u64);
    let [kind, code, ..] = first.to_ne_bytes();
    let [a, b] = checksum.to_ne_bytes();
    let icmp = [u32::from_ne_bytes([kind, code, a, b]), second];
    let written = l2::take_along(&frame, l3, GROWTH)
        && l2::turn_round_from(&frame.skip(0), GROWTH, device.own_mac())
        && six::write(&answer, &header)
        && answer.write(Ipv6Hdr::LEN, icmp);
    if written { Ending::new(error.reason(), Out::Back) } else { untold }
}

/// A single host's address: not unspecified, not the loopback's, not a group's (RFC 4443 §2.4 e).
#[inline(always)]
fn may_be_told(source: [u8; 16]) -> bool {
    let [high, low] = halves(source);
    let nobody = high == 0 && (low == 0 || low == 1u64.to_be());
    source[0] != 0xff && !nobody
}

/// Sum of a datagram's first `length` bytes, a multiple of four.
#[inline(always)]
fn sum(datagram: &Frame, length: usize) -> Option<u64> {
    let mut sum = 0;
    let mut at = 0;
    while at < FURTHEST + QUOTED {
        if at >= length {
            break;
        }
        sum += datagram.read::<u32>(at)? as u64;
        at += 4;
    }
    Some(sum)
}

/// An ICMP message: to the server whose flow it quotes, or from one.
#[inline(always)]
pub fn message<D: Device, T: Tables>(device: &D, six: &T, l3: usize, head: &Head) -> Ending {
    let other = Ending::new(Reason::Icmp, Out::Pass);
    let datagram = device.frame().skip(l3);
    let to = six.addresses6().unwrap_or_default().destination;
    if is_unwanted_echo(&datagram, head, six) {
        return Ending::drop(Reason::Echo);
    }
    if !kind(&datagram, head).is_some_and(|kind| STEERED.contains(&kind)) {
        return other;
    }
    let Some((quoted, quote)) = quoted(device, l3, head) else { return other };
    let to_vip = quoted.addresses.source == to;
    // What it quotes was sent the other way.
    let Some(six) = six.six(quoted.addresses.turned_round()) else { return other };
    let packet = quoted.packet.turned_round();
    // To a VIP: what it quotes was sent as the VIP.
    if to_vip && let Some((server, next_hop)) = whose(&packet, &six) {
        if !next_hop.is_reachable() {
            return Ending::drop(Reason::NoNextHop);
        }
        if next_hop.forwarding() == LAYER_3 && !to_server(device, &six, l3, head, &quote, server) {
            return Ending::drop(Reason::BadTables);
        }
        return send(device, &six, l3, &Decision { reason: Reason::Quoted, server, next_hop, begins: false });
    }
    // To a client: what it quotes was sent to a server's own address, which the client does not know (layer 3).
    let Some((vip, server)) = routed::flow_of_reply(&packet, false, &six) else { return other };
    let translated = six.vip6(vip).is_some_and(|address| {
        translate_error(&device.frame().skip(l3), head.total, &quote, End::Destination, address)
    });
    if translated { device.send_reply6(&six, l3, vip, server) } else { Ending::drop(Reason::BadTables) }
}

/// The quoted header as the server knows it.
#[inline(always)]
fn to_server<D: Device, T: Tables>(device: &D, tables: &T, l3: usize, head: &Head, quote: &Quote, server: u32) -> bool {
    let datagram = device.frame().skip(l3);
    tables.far_end6(server).is_some_and(|end| translate_error(&datagram, head.total, quote, End::Source, end.address))
}

/// The type of a message.
#[inline(always)]
fn kind(datagram: &Frame, head: &Head) -> Option<u8> {
    // Behind the datagram there may be padding.
    let at = head.walk.transport();
    if head.total > at { datagram.skip(at).read::<u8>(0) } else { None }
}

/// An echo request to a VIP that answers none; it, or its first part.
#[inline(always)]
pub(super) fn is_unwanted_echo<T: Tables>(datagram: &Frame, head: &Head, six: &T) -> bool {
    let to = six.addresses6().unwrap_or_default().destination;
    kind(datagram, head) == Some(ECHO) && find_vip(to, six).is_some_and(|vip| vip.flags & NO_ECHO != 0)
}

/// The packet that an ICMP error quotes, as far as its flow goes, and where it stands.
#[inline(always)]
pub(super) fn quoted<D: Device>(device: &D, l3: usize, head: &Head) -> Option<(Packet6, Quote)> {
    let icmp = head.walk.transport();
    let inner_at = l3 + icmp + ICMP_LEN;
    let walk = device.walk6(inner_at);
    let inner = device.frame().skip(inner_at);
    let ip: &Ipv6Hdr = inner.header(0)?;
    let transport = walk.transport();
    // Behind the error there may be padding. A later fragment's bytes are no ports.
    if ip.vcf[0] >> 4 != 6
        || walk.trouble().is_some()
        || matches!(walk.part(), Part::Later)
        || head.total < icmp + ICMP_LEN + transport + PORTS
    {
        return None;
    }
    let addresses = Addresses6 { source: halves(ip.src_addr), destination: halves(ip.dst_addr) };
    let mut packet = Packet { protocol: walk.protocol(), ..Packet::default() };
    if matches!(packet.protocol, protocol::TCP | protocol::UDP) {
        let ports: [u16; 2] = inner.skip(transport).read(0)?;
        [packet.source_port, packet.destination_port] = ports;
    }
    Some((Packet6 { addresses, packet }, Quote { icmp, transport, protocol: walk.protocol() }))
}
