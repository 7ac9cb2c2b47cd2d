//! GRE: the datagram inside another one, from this host to the server (draft §5.6.1, RFC 2784).
//!
//! ```text
//!  before                Ethernet (tags) │ IPv4 …
//!  after    Ethernet (tags) │ IPv4 │ GRE │ IPv4 …          24 bytes more
//! ```
//! A router in effect: the datagram has one hop less to live. The outer header takes over its type of service, and whether it
//! may be fragmented; its own identification counts only if it may (RFC 6864 §4).

use network_types::ip::Ipv4Hdr;

use super::{
    ipv4::{self, DONT_FRAGMENT, Header},
    l2::{self, Mac},
};
use crate::frame::Frame;

/// Bytes that come before the datagram.
pub const OVERHEAD: usize = Ipv4Hdr::LEN + GRE_LEN;
/// No checksum, key or sequence number (RFC 2784 §2.1).
const GRE_LEN: usize = 4;
/// Of GRE itself.
const PROTOCOL: u8 = 47;
/// The fragment offset.
const OFFSET: u16 = 0x1fff;
/// Keeps parts of neighbouring identifications apart.
const ODD: u16 = 0x9e37;

/// Where it goes.
#[derive(Clone, Copy)]
pub struct Outer {
    /// Source address, as it stands in a header, read as a native integer.
    pub source: u32,
    /// Destination address, likewise.
    pub destination: u32,
    /// MAC address of the next hop.
    pub to: Mac,
    /// MAC address of the interface.
    pub from: Mac,
}

/// Wraps the datagram that was at `l3` before the frame grew by [`OVERHEAD`]; it has more than one hop to live.
#[inline(always)]
pub fn encapsulate(frame: &Frame, l3: usize, outer: &Outer) -> bool {
    let (datagram, outside) = (frame.skip(l3 + OVERHEAD), frame.skip(l3));
    let Some(inner) = datagram.header::<Ipv4Hdr>(0) else { return false };
    let header = Header {
        tos: inner.tos,
        length: u16::from_be_bytes(inner.tot_len).wrapping_add(OVERHEAD as u16),
        id: identification(inner),
        whole: inner.frags[0] & DONT_FRAGMENT != 0,
        protocol: PROTOCOL,
        source: outer.source,
        destination: outer.destination,
    };
    // Flags and version 0, then the EtherType of IPv4.
    let gre = u32::from_ne_bytes([0, 0, 0x08, 0x00]);
    ipv4::count_hop(&datagram)
        && l2::take_along(frame, l3, OVERHEAD)
        && l2::rewrite(frame, outer.to, outer.from)
        && ipv4::write(&outside, &header)
        && outside.write(Ipv4Hdr::LEN, gre)
}

/// The datagram's own; parts of one get different ones, because each may be fragmented again (RFC 791 §3.2).
#[inline(always)]
fn identification(inner: &Ipv4Hdr) -> u16 {
    let offset = u16::from_be_bytes(inner.frags) & OFFSET;
    u16::from_be_bytes(inner.id).wrapping_add(offset.wrapping_mul(ODD)).to_be()
}
