//! IPv6: hops, GRE around it (RFC 7676), other addresses in it, and the checksums that know them (RFC 8200 §8.1).
//!
//! ```text
//!  before                Ethernet (tags) │ IPv6 …
//!  after    Ethernet (tags) │ IPv6 │ GRE │ IPv6 …          44 bytes more
//! ```
//! The header has no checksum, and nothing is fragmented on the way.

use core::mem::offset_of;

use network_types::{ip::Ipv6Hdr, udp::UdpHdr};

use super::{
    checksum::fold,
    l2::{self, Mac},
    l3::End,
};
use crate::{frame::Frame, packet::protocol, six::head::ICMPV6, tables::Address6};

/// Bytes that come before the datagram in GRE.
pub const OVERHEAD: usize = Ipv6Hdr::LEN + GRE_LEN;
/// No checksum, key or sequence number (RFC 2784 §2.1).
const GRE_LEN: usize = 4;
/// Of GRE itself.
const GRE: u8 = 47;
/// Hop limit of what this host sends itself.
const HOPS: u8 = 64;
/// Where the checksums stand in their headers.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = offset_of!(UdpHdr, check);
const ICMP_CHECKSUM: usize = 2;
const ICMP_LEN: usize = 8;

/// A header without extension headers.
#[derive(Clone, Copy)]
pub struct Header {
    /// The first four bytes, as they stand in a header: version, traffic class, flow label.
    pub first: [u8; 4],
    /// Length of what follows, in bytes.
    pub length: u16,
    /// Protocol of what follows.
    pub next: u8,
    /// Source address.
    pub source: Address6,
    /// Destination address.
    pub destination: Address6,
}

/// Writes a header where a datagram begins.
#[inline(always)]
pub fn write(datagram: &Frame, header: &Header) -> bool {
    let [high, low] = header.length.to_be_bytes();
    let second = u32::from_ne_bytes([high, low, header.next, HOPS]);
    datagram.write(0, u32::from_ne_bytes(header.first))
        && datagram.write(4, second)
        && datagram.write(8, header.source)
        && datagram.write(24, header.destination)
}

/// One hop less to live. The header's must be more than 1.
#[inline(always)]
pub fn count_hop(datagram: &Frame) -> bool {
    let at = offset_of!(Ipv6Hdr, hop_limit);
    datagram.read::<u8>(at).is_some_and(|hops| datagram.write(at, hops.wrapping_sub(1)))
}

/// Where a datagram goes in GRE.
#[derive(Clone, Copy)]
pub struct Outer {
    /// Source address.
    pub source: Address6,
    /// Destination address.
    pub destination: Address6,
    /// MAC address of the next hop.
    pub to: Mac,
    /// MAC address of the interface.
    pub from: Mac,
}

/// Wraps the datagram that was at `l3` before the frame grew by [`OVERHEAD`]; it has more than one hop to live. The outer header
/// takes over traffic class and flow label.
#[inline(always)]
pub fn encapsulate(frame: &Frame, l3: usize, outer: &Outer) -> bool {
    let (datagram, outside) = (frame.skip(l3 + OVERHEAD), frame.skip(l3));
    let Some(inner) = datagram.header::<Ipv6Hdr>(0) else { return false };
    let header = Header {
        first: inner.vcf,
        length: u16::from_be_bytes(inner.payload_len).wrapping_add(OVERHEAD as u16),
        next: GRE,
        source: outer.source,
        destination: outer.destination,
    };
    // Flags and version 0, then the EtherType of IPv6.
    let gre = u32::from_ne_bytes([0, 0, 0x86, 0xdd]);
    count_hop(&datagram)
        && l2::take_along(frame, l3, OVERHEAD)
        && l2::rewrite(frame, outer.to, outer.from)
        && write(&outside, &header)
        && outside.write(Ipv6Hdr::LEN, gre)
}

/// Gives a datagram another address; `transport` is where its transport header begins, if this part has it.
#[inline(always)]
pub fn translate(datagram: &Frame, end: End, new: Address6, protocol: u8, transport: Option<usize>) -> bool {
    let place = place_of(end);
    let Some(old) = datagram.read::<Address6>(place) else { return false };
    if !datagram.write(place, new) {
        return false;
    }
    let Some(transport) = transport else { return true };
    let transport = datagram.skip(transport);
    match protocol {
        protocol::TCP => mend_at(&transport, TCP_CHECKSUM, old, new),
        protocol::UDP => mend_udp(&transport, old, new),
        ICMPV6 => mend_at(&transport, ICMP_CHECKSUM, old, new),
        _ => true,
    }
}

/// What an ICMP error quotes, and where.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    /// Where the ICMP header begins, from the datagram's beginning on.
    pub icmp: usize,
    /// Where the quoted transport header begins, from the quoted datagram's beginning on.
    pub transport: usize,
    /// The quoted protocol.
    pub protocol: u8,
}

/// In the datagram that an ICMP error quotes: `end` gets another address, and the checksums that cover it are mended. `total` is the
/// length of the error with its own headers.
#[inline(always)]
pub fn translate_error(datagram: &Frame, total: usize, quote: &Quote, end: End, new: Address6) -> bool {
    let icmp = datagram.skip(quote.icmp);
    let inner = icmp.skip(ICMP_LEN);
    let place = place_of(end);
    let (Some(sum), Some(old)) = (icmp.read::<u16>(ICMP_CHECKSUM), inner.read::<Address6>(place)) else { return false };
    let mut sum = mend(sum, old, new);
    if !inner.write(place, new) {
        return false;
    }
    let transport = inner.skip(quote.transport);
    // What is quoted may end before the checksum; behind the datagram there may be padding.
    let quoted = total.saturating_sub(quote.icmp + ICMP_LEN + quote.transport);
    let place = match quote.protocol {
        protocol::TCP => TCP_CHECKSUM,
        protocol::UDP => UDP_CHECKSUM,
        _ => return icmp.write(ICMP_CHECKSUM, sum),
    };
    if quoted >= place + 2
        && let Some(check) = transport.read::<u16>(place)
        && (check != 0 || quote.protocol == protocol::TCP)
    {
        let mended = mend(check, old, new);
        sum = super::checksum::mend(sum, check as u32, mended as u32);
        if !transport.write(place, mended) {
            return false;
        }
    }
    icmp.write(ICMP_CHECKSUM, sum)
}

/// The sum of an address's 16-bit words, not yet brought back to 16 bits.
#[inline(always)]
pub const fn sum_of([high, low]: Address6) -> u64 {
    (high >> 32) + (high & 0xffff_ffff) + (low >> 32) + (low & 0xffff_ffff)
}

#[inline(always)]
const fn place_of(end: End) -> usize {
    match end {
        End::Source => offset_of!(Ipv6Hdr, src_addr),
        End::Destination => offset_of!(Ipv6Hdr, dst_addr),
    }
}

/// The checksum of something in which `old` became `new` (RFC 1624 §3, equation 3).
#[inline(always)]
const fn mend(checksum: u16, old: Address6, new: Address6) -> u16 {
    !fold(!checksum as u64 + sum_of([!old[0], !old[1]]) + sum_of(new))
}

#[inline(always)]
fn mend_at(frame: &Frame, place: usize, old: Address6, new: Address6) -> bool {
    frame.read::<u16>(place).is_some_and(|check| frame.write(place, mend(check, old, new)))
}

#[inline(always)]
fn mend_udp(frame: &Frame, old: Address6, new: Address6) -> bool {
    let Some(check) = frame.read::<u16>(UDP_CHECKSUM) else { return false };
    // Without a checksum, which only tunnels may do (RFC 6935).
    if check == 0 {
        return true;
    }
    let mended = mend(check, old, new);
    frame.write(UDP_CHECKSUM, if mended == 0 { 0xffff } else { mended })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mended_is_computed_anew() {
        let values = [0, 1, u64::MAX, 0x0123_4567_89ab_cdef, 0xffff_0000_8000_7fff];
        for old in values {
            for new in values {
                for rest in [1, 0xdd2f_0000, 0xffff_fffe] {
                    let of = |address| !fold(rest + sum_of(address));
                    assert_eq!(mend(of([old, new]), [old, new], [new, rest]), of([new, rest]), "{old:x} {new:x}");
                }
            }
        }
    }
}
