//! ICMP errors that this host owes a sender (RFC 792, RFC 1191).
//!
//! The frame itself becomes the error: it grows by two headers at its front, loses what is not quoted at its end, and goes
//! back by the interface that it came in by. Not answered are errors, fragments but the first, and sources that are no single
//! host (RFC 1122 §3.2.2); and more than [`ICMP_RATE`](crate::abi::ICMP_RATE) a second.

use network_types::ip::Ipv4Hdr;

use crate::{
    device::{Device, Ending, Out},
    flows::opaque,
    frame::Frame,
    packet::protocol,
    rewrite::{
        checksum::fold,
        ipv4::{self, Header},
        l2,
    },
    verdict::Reason,
};

/// What there is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Destination unreachable, fragmentation needed: no packet longer than this gets there (RFC 1191 §4).
    TooBig(u16),
    /// Time to live exceeded in transit.
    Expired,
}

/// Bytes that come before what is quoted: an IPv4 header, and ICMP's.
const GROWTH: usize = Ipv4Hdr::LEN + ICMP_LEN;
const ICMP_LEN: usize = 8;
/// Of the datagram's payload, the least that must be quoted (RFC 792).
const QUOTED: usize = 8;
/// The fragment offset.
const OFFSET: u16 = 0x1fff;
/// ICMP types that are errors: their answer would be an error about an error.
const ERRORS: [u8; 5] = [3, 4, 5, 11, 12];

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
            Self::TooBig(mtu) => {
                let [high, low] = mtu.to_be_bytes();
                [u32::from_ne_bytes([3, 4, 0, 0]), u32::from_ne_bytes([0, 0, high, low])]
            }
            Self::Expired => [u32::from_ne_bytes([11, 0, 0, 0]), 0],
        }
    }
}

/// Turns the frame with a datagram at `l3` into an error about it, from the address `source`.
#[inline(always)]
pub fn tell<D: Device>(device: &D, l3: usize, source: u32, error: Error) -> Ending {
    let untold = Ending::drop(Reason::Untold);
    let frame = device.frame();
    let datagram = frame.skip(l3);
    let Some(ip) = datagram.header::<Ipv4Hdr>(0) else { return untold };
    let (sender, tos) = (u32::from_ne_bytes(ip.src_addr), ip.tos);
    let header = ((ip.vihl & 0xf) << 2) as usize;
    let quoted = header + QUOTED;
    // Opaque, or the compiler leaves out checks of single reads, and the verifier misses them.
    let length = opaque(frame.len() as u64) as usize;
    if length < l3 + quoted || !may_be_told(&datagram.skip(header), ip) || !device.may_tell() {
        return untold;
    }
    if !device.shorten((length - l3 - quoted) as u32) || !device.grow(GROWTH as u32) {
        return untold;
    }
    let frame = device.frame();
    let header = Header {
        // Precedence as the packet's (RFC 1812 §4.3.2.5); nothing of its congestion marks.
        tos: tos & 0xfc,
        length: (GROWTH + quoted) as u16,
        id: 0,
        whole: true,
        protocol: protocol::ICMP,
        source,
        destination: sender,
    };
    let [first, second] = error.words();
    let answer = frame.skip(l3);
    let Some(sum) = sum(&frame.skip(l3 + GROWTH), quoted) else { return untold };
    let checksum = !fold(sum + first as u64 + second as u64);
    let [kind, code, ..] = first.to_ne_bytes();
    let [a, b] = checksum.to_ne_bytes();
    let icmp = [u32::from_ne_bytes([kind, code, a, b]), second];
    let written = l2::take_along(&frame, l3, GROWTH)
        // Where the sender's frame came from, 28 bytes further back now.
        && l2::turn_round_from(&frame.skip(0), GROWTH, device.own_mac())
        && ipv4::write(&answer, &header)
        && answer.write(Ipv4Hdr::LEN, icmp);
    if written { Ending::new(error.reason(), Out::Back) } else { untold }
}

/// RFC 1122 §3.2.2.
#[inline(always)]
fn may_be_told(transport: &Frame, ip: &Ipv4Hdr) -> bool {
    let [first, ..] = ip.src_addr;
    let single = first != 0 && first != 127 && first < 224;
    let first = u16::from_be_bytes(ip.frags) & OFFSET == 0;
    let is_error = ip.proto == protocol::ICMP && transport.read::<u8>(0).is_none_or(|kind| ERRORS.contains(&kind));
    single && first && !is_error
}

/// Sum of a datagram's first `length` bytes; a multiple of four, at most 68.
#[inline(always)]
fn sum(datagram: &Frame, length: usize) -> Option<u64> {
    let mut sum = 0;
    let mut at = 0;
    while at < 60 + QUOTED {
        if at >= length {
            break;
        }
        sum += datagram.read::<u32>(at)? as u64;
        at += 4;
    }
    Some(sum)
}
