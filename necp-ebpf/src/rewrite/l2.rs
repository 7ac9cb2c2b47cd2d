//! Layer 2: new MAC addresses, nothing else (draft §5.6.1). A bridge in effect, so the time to live stays as it is.

use crate::{frame::Frame, parse::L2_LEN};

/// A MAC address in one register, its first byte in the lowest eight bits: as six bytes, the compiler would take it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(u64);

impl Mac {
    /// The first six bytes of a word as it stands in memory.
    #[inline(always)]
    pub const fn of(word: u64) -> Self {
        Self(u64::from_le(word) & 0xffff_ffff_ffff)
    }
}

impl From<[u8; 6]> for Mac {
    #[inline(always)]
    fn from([a, b, c, d, e, f]: [u8; 6]) -> Self {
        Self(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]))
    }
}

/// Where the EtherType, or the first tag, stands.
const TYPE: usize = 12;
/// One VLAN tag (IEEE 802.1Q).
const TAG_LEN: usize = 4;

/// Both addresses of a frame.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Addresses {
    first: u64,
    rest: u32,
}

/// Addresses the frame to the server's MAC; `source` is the MAC of the interface that it leaves by.
#[inline(always)]
pub fn rewrite(frame: &Frame, Mac(destination): Mac, Mac(source): Mac) -> bool {
    // A word and a half instead of twelve bytes: this is a cost per packet.
    let (first, rest) = ((destination | source << 48).to_le(), ((source >> 16) as u32).to_le());
    frame.write(0, Addresses { first, rest })
}

/// Whether the frame is addressed to this MAC.
#[inline(always)]
pub fn is_for(frame: &Frame, Mac(mac): Mac) -> bool {
    frame.read::<u32>(0) == Some((mac as u32).to_le()) && frame.read::<u16>(4) == Some(((mac >> 32) as u16).to_le())
}

/// Copies what follows the MAC addresses, tags and EtherType, from where it stood before the frame grew by `grown` bytes;
/// `l3` is where the datagram stood.
#[inline(always)]
pub fn take_along(frame: &Frame, l3: usize, grown: usize) -> bool {
    let frame = frame.skip(0);
    let copy = |at: usize| frame.read::<u32>(at + grown).is_some_and(|word| frame.write(at, word));
    let Some(first) = frame.read::<u16>(TYPE + grown) else { return false };
    frame.write(TYPE, first)
        && (l3 < L2_LEN + TAG_LEN || copy(L2_LEN))
        && (l3 < L2_LEN + 2 * TAG_LEN || copy(L2_LEN + TAG_LEN))
}

/// Addresses the frame to where it came from before it grew by `grown` bytes; `own` is this interface's MAC.
#[inline(always)]
pub fn turn_round_from(frame: &Frame, grown: usize, own: Mac) -> bool {
    let (Some(first), Some(rest)) = (frame.read::<u32>(grown + 6), frame.read::<u16>(grown + 10)) else { return false };
    rewrite(frame, Mac((u16::from_le(rest) as u64) << 32 | u32::from_le(first) as u64), own)
}
