//! An IPv6 datagram's headers, extension headers among them (RFC 8200 §4), up to its transport header.

use network_types::ip::Ipv6Hdr;

use crate::{
    device::{Device, Ending, Out},
    exceptions::Rounds,
    flows::opaque,
    frame::Frame,
    packet::Packet,
    parse::{L2_LEN, Part, transport},
    rewrite::l2,
    tables::{Addresses6, Tables, halves},
    verdict::Reason,
};

/// Next headers that are extension headers and say where the next one begins.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const OPTIONS: u8 = 60;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// Extension headers that are looked at; and bytes of them.
const EXTENSIONS: u32 = 6;
const MOST: usize = 256;
/// Where the furthest transport header begins.
pub const FURTHEST: usize = Ipv6Hdr::LEN + MOST;

/// What extension headers say, in one word, so that it can be the answer of a function of the kernel program.
///
/// ```text
///  63              32 31  26 25 24 23        8 7        0
/// +------------------+------+-----+-----------+----------+
/// |  identification  |reason| part|  begins at| protocol |
/// +------------------+------+-----+-----------+----------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk(pub u64);

impl Walk {
    const fn ended(reason: Reason) -> Self {
        Self((reason as u64 + 1) << 26)
    }

    const fn at(protocol: u8, at: usize, part: Part, id: u32) -> Self {
        let part = match part {
            Part::Whole => 0,
            Part::First => 1,
            Part::Later => 2,
        };
        Self((id as u64) << 32 | part << 24 | (at as u64) << 8 | protocol as u64)
    }

    /// The protocol of what follows the extension headers.
    #[inline(always)]
    pub const fn protocol(self) -> u8 {
        self.0 as u8
    }

    /// Where that begins, from the IPv6 header on, in bytes.
    #[inline(always)]
    pub fn transport(self) -> usize {
        // The verifier wants to see a bound.
        (opaque(self.0 >> 8) & 0x1ff) as usize
    }

    /// What there is of the datagram.
    #[inline(always)]
    pub const fn part(self) -> Part {
        match self.0 >> 24 & 3 {
            0 => Part::Whole,
            1 => Part::First,
            _ => Part::Later,
        }
    }

    /// The identification of a part.
    #[inline(always)]
    pub const fn id(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Why the headers could not be read: the number of the reason.
    #[inline(always)]
    pub const fn trouble(self) -> Option<u32> {
        let reason = (self.0 >> 26) as u32 & 0x3f;
        if reason == 0 { None } else { Some(reason - 1) }
    }
}

const _: () = assert!(crate::verdict::REASONS < 63 && FURTHEST <= 0x1ff);

/// Follows the extension headers of the datagram that begins where this frame does.
#[inline(always)]
pub fn walk(datagram: &Frame) -> Walk {
    let Some(ip) = datagram.header::<Ipv6Hdr>(0) else { return Walk::ended(Reason::Malformed) };
    let (mut next, mut at) = (ip.next_hdr, Ipv6Hdr::LEN);
    let (mut part, mut id) = (Part::Whole, 0);
    for _ in Rounds::new(EXTENSIONS) {
        if !is_extension(next) || matches!(part, Part::Later) {
            break;
        }
        let extension = datagram.skip(at);
        let Some(words) = extension.read::<[u32; 2]>(0) else { return Walk::ended(Reason::Malformed) };
        let [following, length, a, b] = words[0].to_ne_bytes();
        if next == FRAGMENT {
            // The fragment offset, in eights of bytes, and whether more follow. Of one that is all (RFC 6946) nothing is kept.
            let field = u16::from_be_bytes([a, b]);
            if field & !6 != 0 {
                part = if field & !7 == 0 { Part::First } else { Part::Later };
                id = words[1];
            }
            at += 8;
        } else if next == ROUTING && b != 0 {
            // Its last destination is another one.
            return Walk::ended(Reason::Extended);
        } else {
            at += (length as usize + 1) * 8;
        }
        next = following;
        if at > FURTHEST {
            return Walk::ended(Reason::Extended);
        }
    }
    if is_extension(next) && !matches!(part, Part::Later) {
        return Walk::ended(Reason::Extended);
    }
    Walk::at(next, at, part, id)
}

const fn is_extension(next: u8) -> bool {
    matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | OPTIONS)
}

/// A datagram or a part of one, as far as its headers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Without ports until [`ports`] has read them; its addresses are the tables'.
    pub packet: Packet,
    /// What follows the extension headers, and where.
    pub walk: Walk,
    /// Length in bytes, the IPv6 header included.
    pub total: usize,
}

/// Where the datagram is, its headers, and the tables for it; or how the frame ends without one.
#[inline(always)]
pub fn head<D: Device, T: Tables>(device: &D, tables: &T) -> Result<(usize, Head, T::Six), Ending> {
    let pass = |reason| Ending::new(reason, Out::Pass);
    let (l3, frame) = (device.datagram6_at(), device.frame());
    if l3 == 0 {
        return Err(pass(if frame.len() < L2_LEN { Reason::Malformed } else { Reason::NotIp }));
    }
    let datagram = frame.skip(l3);
    let Some(ip) = datagram.header::<Ipv6Hdr>(0) else { return Err(pass(Reason::Malformed)) };
    let total = u16::from_be_bytes(ip.payload_len) as usize + Ipv6Hdr::LEN;
    if ip.vcf[0] >> 4 != 6 || total > device.length().wrapping_sub(l3) {
        return Err(pass(Reason::Malformed));
    }
    if !l2::is_for(&frame.skip(0), device.own_mac()) {
        return Err(pass(Reason::OtherHost));
    }
    let six = tables.six(Addresses6 { source: halves(ip.src_addr), destination: halves(ip.dst_addr) });
    let walk = device.walk6(l3);
    if let Some(reason) = walk.trouble() {
        return Err(Ending::numbered(reason, Out::Pass));
    }
    if walk.transport() > total {
        return Err(pass(Reason::Malformed));
    }
    let packet = Packet { protocol: walk.protocol(), ..Packet::default() };
    match six {
        Some(six) => Ok((l3, Head { packet, walk, total }, six)),
        None => Err(Ending::drop(Reason::BadTables)),
    }
}

/// Reads the transport header of a datagram or of its first part, which begins where this frame does.
#[inline(always)]
pub fn ports(datagram: &Frame, head: &mut Head) -> Result<(), Reason> {
    if head.walk.protocol() == ICMPV6 {
        return Err(Reason::Icmp);
    }
    let at = head.walk.transport();
    let length = (head.total - at) as u16;
    // A first part is shorter than what its UDP header announces.
    let announced = if matches!(head.walk.part(), Part::Whole) { length } else { u16::MAX };
    transport(&datagram.skip(at), 0, length, announced, &mut head.packet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_says_the_same_after_its_way_through_a_word() {
        for part in [Part::Whole, Part::First, Part::Later] {
            let walk = Walk::at(0x3a, FURTHEST, part, 0x8000_0001);
            assert_eq!(
                (walk.protocol(), walk.transport(), walk.part(), walk.id()),
                (0x3a, FURTHEST, part, 0x8000_0001)
            );
            assert_eq!(walk.trouble(), None);
        }
        assert_eq!(Walk::ended(Reason::NotIp).trouble(), Some(Reason::NotIp as u32));
        assert_eq!(Walk::ended(Reason::Extended).trouble(), Some(Reason::Extended as u32));
    }
}
