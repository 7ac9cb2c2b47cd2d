//! The other end of GRE: a server's program that takes the outer headers off, for kernels without a GRE device.
//!
//! ```text
//!  before    Ethernet │ IPv4 │ GRE │ IPv4 …      or IPv6 twice
//!  after                Ethernet   │ IPv4 …      on to the kernel, as if it had come so
//! ```
//! Only what a network element may have sent is touched: plain GRE (RFC 2784, no checksum, key or sequence number) around
//! a datagram of the outer header's own family, not a fragment, of IPv6 without extension headers outside, from an address on
//! the list. The rest goes on to the kernel as it is, which may know it.

use core::mem::offset_of;

use network_types::{
    eth::{EthHdr, EtherType},
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{frame::Frame, parse::L2_LEN};

/// `necp-decap`'s program.
pub const PROGRAM: &str = "necp_decap";
/// `HashMap<Source, u64>`: source addresses that are believed; packets of each that were unwrapped.
pub const SOURCES: &str = "sources";
/// Entries of [`SOURCES`].
pub const MAX_SOURCES: u32 = 256;

/// An IPv6 address as it stands in a header; IPv4 in its mapped form.
pub type Source = [u32; 4];

/// An IPv4 address as it stands in a header, as a source.
#[inline(always)]
pub const fn mapped(address: u32) -> Source {
    [0, 0, 0xffff_u32.to_be(), address]
}

/// GRE without options around IPv4, and around IPv6: flags and version 0, EtherType.
const PLAIN: u32 = u32::from_ne_bytes([0, 0, 0x08, 0x00]);
const PLAIN6: u32 = u32::from_ne_bytes([0, 0, 0x86, 0xdd]);
const GRE_LEN: usize = 4;
const PROTOCOL: u8 = 47;
/// More fragments, and the fragment offset.
const FRAGMENT: u16 = 0x3fff;

/// A datagram in GRE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrapped {
    /// Who sent it.
    pub source: Source,
    /// Bytes before it that are not Ethernet's: outer header and GRE, 24 to 64; of IPv6 44.
    pub overhead: usize,
}

/// What the frame carries, if it is a datagram in GRE.
#[inline(always)]
pub fn find(frame: &Frame) -> Option<Wrapped> {
    let ether_type: u16 = frame.read(offset_of!(EthHdr, ether_type))?;
    if ether_type == u16::from(EtherType::Ipv4) {
        find4(frame)
    } else if ether_type == u16::from(EtherType::Ipv6) {
        find6(frame)
    } else {
        None
    }
}

#[inline(always)]
fn find4(frame: &Frame) -> Option<Wrapped> {
    let outer: &Ipv4Hdr = frame.header(L2_LEN)?;
    let header = ((outer.vihl & 0xf) << 2) as usize;
    let total = u16::from_be_bytes(outer.tot_len) as usize;
    if outer.vihl >> 4 != 4
        || header < Ipv4Hdr::LEN
        || outer.proto != PROTOCOL
        || u16::from_be_bytes(outer.frags) & FRAGMENT != 0
        || total > frame.len() - L2_LEN
    {
        return None;
    }
    let source = mapped(u32::from_ne_bytes(outer.src_addr));
    let gre = frame.skip(L2_LEN + header);
    let datagram = gre.skip(GRE_LEN);
    let inner: &Ipv4Hdr = datagram.header(0)?;
    let overhead = header + GRE_LEN;
    let fits = u16::from_be_bytes(inner.tot_len) as usize + overhead <= total;
    (gre.read::<u32>(0)? == PLAIN && inner.vihl >> 4 == 4 && fits).then_some(Wrapped { source, overhead })
}

#[inline(always)]
fn find6(frame: &Frame) -> Option<Wrapped> {
    const OVERHEAD: usize = Ipv6Hdr::LEN + GRE_LEN;
    let outer: &Ipv6Hdr = frame.header(L2_LEN)?;
    let payload = u16::from_be_bytes(outer.payload_len) as usize;
    if outer.vcf[0] >> 4 != 6 || outer.next_hdr != PROTOCOL || payload + Ipv6Hdr::LEN > frame.len() - L2_LEN {
        return None;
    }
    let source = frame.read(L2_LEN + offset_of!(Ipv6Hdr, src_addr))?;
    let inner: &Ipv6Hdr = frame.header(L2_LEN + OVERHEAD)?;
    let fits = u16::from_be_bytes(inner.payload_len) as usize + GRE_LEN + Ipv6Hdr::LEN <= payload;
    let plain = frame.read::<u32>(L2_LEN + Ipv6Hdr::LEN)? == PLAIN6;
    (plain && inner.vcf[0] >> 4 == 6 && fits).then_some(Wrapped { source, overhead: OVERHEAD })
}

/// Moves the Ethernet header to the datagram; the frame's first `overhead` bytes mean nothing then.
#[inline(always)]
pub fn unwrap(frame: &Frame, overhead: usize) -> bool {
    let target = frame.skip(overhead);
    let (Some(addresses), Some(ether_type)) = (frame.read::<[u32; 3]>(0), frame.read::<u16>(12)) else { return false };
    target.write(0, addresses) && target.write(12, ether_type)
}
