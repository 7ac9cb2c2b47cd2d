//! IPv4 headers: written, and changed with their checksum (RFC 791 §3.1).

use core::mem::offset_of;

use network_types::ip::Ipv4Hdr;

use super::checksum::fold;
use crate::frame::Frame;

/// A header without options.
#[derive(Clone, Copy)]
pub struct Header {
    /// Type of service.
    pub tos: u8,
    /// Total length in bytes.
    pub length: u16,
    /// Identification, as it stands in a header, read as a native integer.
    pub id: u16,
    /// Must not be fragmented.
    pub whole: bool,
    /// IP protocol.
    pub protocol: u8,
    /// Source address, as it stands in a header, read as a native integer.
    pub source: u32,
    /// Destination address, likewise.
    pub destination: u32,
}

/// Time to live of what this host sends itself (RFC 1700).
const TTL: u8 = 64;
/// Don't fragment, in the sixth byte.
pub const DONT_FRAGMENT: u8 = 0x40;

/// Writes a header, with its checksum, where a datagram begins.
#[inline(always)]
pub fn write(datagram: &Frame, header: &Header) -> bool {
    let [high, low] = header.length.to_be_bytes();
    let [a, b] = header.id.to_ne_bytes();
    let flags = if header.whole { DONT_FRAGMENT } else { 0 };
    let mut words = [
        u32::from_ne_bytes([0x45, header.tos, high, low]),
        u32::from_ne_bytes([a, b, flags, 0]),
        u32::from_ne_bytes([TTL, header.protocol, 0, 0]),
        header.source,
        header.destination,
    ];
    let sum = words[0] as u64 + words[1] as u64 + words[2] as u64 + words[3] as u64 + words[4] as u64;
    let [c, d] = (!fold(sum)).to_ne_bytes();
    words[2] = u32::from_ne_bytes([TTL, header.protocol, c, d]);
    datagram.write(0, words)
}

/// One hop less to live: what a router does (RFC 1812 §5.3.1). The header's must be more than 1.
#[inline(always)]
pub fn count_hop(datagram: &Frame) -> bool {
    let (ttl_at, check_at) = (offset_of!(Ipv4Hdr, ttl), offset_of!(Ipv4Hdr, check));
    let (Some(ttl), Some(check)) = (datagram.read::<u8>(ttl_at), datagram.read::<u16>(check_at)) else { return false };
    // Time to live is the first byte of a 16-bit word of the header. One less there is one more here, with its carry.
    let check = check as u32 + u16::from_ne_bytes([1, 0]) as u32;
    let check = (check + (check >= 0xffff) as u32) as u16;
    datagram.write(ttl_at, ttl.wrapping_sub(1)) && datagram.write(check_at, check)
}
