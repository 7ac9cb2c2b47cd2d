//! Layer 2: new MAC addresses, nothing else (draft §5.6.1). A bridge in effect, so the time to live stays as it is.

use crate::frame::Frame;

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
