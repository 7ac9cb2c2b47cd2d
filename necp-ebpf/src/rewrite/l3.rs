//! Layer 3: another address in the header, and checksums that know it (draft §5.6.1).
//!
//! TCP's and UDP's checksums cover the addresses (RFC 9293 §3.1, RFC 768), so they are mended with the header's own. A UDP
//! checksum of zero means none, and stays. A sum that the sender left to its network card to finish cannot be told from a
//! wrong one: it stays as wrong as it was.

use core::mem::offset_of;

use network_types::{ip::Ipv4Hdr, udp::UdpHdr};

use super::checksum::mend;
use crate::{frame::Frame, packet::protocol};

/// Which address is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A reply's.
    Source,
    /// A request's.
    Destination,
}

/// Where TCP's checksum stands in its header.
const TCP_CHECKSUM: usize = 16;
/// Where UDP's does.
const UDP_CHECKSUM: usize = offset_of!(UdpHdr, check);
const ICMP_LEN: usize = 8;
/// Where ICMP's checksum stands in its header (RFC 792).
const ICMP_CHECKSUM: usize = 2;
/// The fragment offset; only the first fragment has a transport header.
const OFFSET: u16 = 0x1fff;

/// Gives a datagram another address, as it stands in a header.
#[inline(always)]
pub fn translate(datagram: &Frame, end: End, new: u32) -> bool {
    let Some(ip) = datagram.header::<Ipv4Hdr>(0) else { return false };
    let place = match end {
        End::Source => offset_of!(Ipv4Hdr, src_addr),
        End::Destination => offset_of!(Ipv4Hdr, dst_addr),
    };
    let old = u32::from_ne_bytes(if matches!(end, End::Source) { ip.src_addr } else { ip.dst_addr });
    let check = mend(u16::from_ne_bytes(ip.check), old, new);
    let transport = datagram.skip(((ip.vihl & 0xf) << 2) as usize);
    let (protocol, first) = (ip.proto, u16::from_be_bytes(ip.frags) & OFFSET == 0);
    if !datagram.write(place, new) || !datagram.write(offset_of!(Ipv4Hdr, check), check) {
        return false;
    }
    match protocol {
        protocol::TCP if first => mend_at(&transport, TCP_CHECKSUM, old, new),
        protocol::UDP if first => mend_udp(&transport, UDP_CHECKSUM, old, new),
        _ => true,
    }
}

/// In the datagram that an ICMP error quotes: `end` gets another address, and every checksum that covers it is mended, the
/// error's own too. `total` is the length of the error with its IPv4 header.
#[inline(always)]
pub fn translate_error(datagram: &Frame, total: u16, end: End, new: u32) -> bool {
    let Some(outer) = datagram.header::<Ipv4Hdr>(0) else { return false };
    let header = ((outer.vihl & 0xf) << 2) as usize;
    let icmp = datagram.skip(header);
    let inner = icmp.skip(ICMP_LEN);
    let (Some(sum), Some(ip)) = (icmp.read::<u16>(ICMP_CHECKSUM), inner.header::<Ipv4Hdr>(0)) else { return false };
    let (place, old) = match end {
        End::Source => (offset_of!(Ipv4Hdr, src_addr), u32::from_ne_bytes(ip.src_addr)),
        End::Destination => (offset_of!(Ipv4Hdr, dst_addr), u32::from_ne_bytes(ip.dst_addr)),
    };
    let (check, protocol) = (u16::from_ne_bytes(ip.check), ip.proto);
    let inner_header = ((ip.vihl & 0xf) << 2) as usize;
    let mended = mend(check, old, new);
    let mut sum = mend(mend(sum, old, new), check as u32, mended as u32);
    if !inner.write(place, new) || !inner.write(offset_of!(Ipv4Hdr, check), mended) {
        return false;
    }
    let transport = inner.skip(inner_header);
    // What is quoted may end before the checksum; behind the datagram there may be padding.
    let quoted = (total as usize).saturating_sub(header + ICMP_LEN + inner_header);
    let place = if protocol == protocol::TCP { TCP_CHECKSUM } else { UDP_CHECKSUM };
    if matches!(protocol, protocol::TCP | protocol::UDP)
        && quoted >= place + 2
        && let Some(check) = transport.read::<u16>(place)
        && (check != 0 || protocol == protocol::TCP)
    {
        let mended = mend(check, old, new);
        sum = mend(sum, check as u32, mended as u32);
        if !transport.write(place, mended) {
            return false;
        }
    }
    icmp.write(ICMP_CHECKSUM, sum)
}

#[inline(always)]
fn mend_at(frame: &Frame, place: usize, old: u32, new: u32) -> bool {
    frame.read::<u16>(place).is_some_and(|check| frame.write(place, mend(check, old, new)))
}

#[inline(always)]
fn mend_udp(frame: &Frame, place: usize, old: u32, new: u32) -> bool {
    let Some(check) = frame.read::<u16>(place) else { return false };
    if check == 0 {
        return true;
    }
    let mended = mend(check, old, new);
    // Zero would mean that there is none (RFC 768).
    frame.write(place, if mended == 0 { 0xffff } else { mended })
}
