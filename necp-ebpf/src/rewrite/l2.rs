//! Layer 2: new MAC addresses, nothing else (draft §5.6.1). A bridge in effect, so the time to live stays as it is.

use crate::{frame::Frame, parse::L2_LEN};

/// Where the EtherType, or the first tag, stands.
const TYPE: usize = 12;
/// One VLAN tag (IEEE 802.1Q).
const TAG_LEN: usize = 4;

/// Addresses the frame to the server's MAC; `source` is the MAC of the interface that it leaves by.
#[inline(always)]
pub fn rewrite(frame: &Frame, destination: [u8; 6], source: [u8; 6]) -> bool {
    let [a, b, c, d, e, f] = destination;
    let [g, h, i, j, k, l] = source;
    // Three whole words instead of twelve bytes: this is a cost per packet.
    let words = [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]), u32::from_ne_bytes([i, j, k, l])];
    frame.write(0, words)
}

/// Whether the frame is addressed to this MAC.
#[inline(always)]
pub fn is_for(frame: &Frame, mac: [u8; 6]) -> bool {
    let [a, b, c, d, e, f] = mac;
    frame.read::<u32>(0) == Some(u32::from_ne_bytes([a, b, c, d]))
        && frame.read::<u16>(4) == Some(u16::from_ne_bytes([e, f]))
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
pub fn turn_round_from(frame: &Frame, grown: usize, own: [u8; 6]) -> bool {
    let (Some(high), Some(low)) = (frame.read::<u32>(grown + 6), frame.read::<u16>(grown + 10)) else { return false };
    let ([a, b, c, d], [e, f]) = (high.to_ne_bytes(), low.to_ne_bytes());
    rewrite(frame, [a, b, c, d, e, f], own)
}
