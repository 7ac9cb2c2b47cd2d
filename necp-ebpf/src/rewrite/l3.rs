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
