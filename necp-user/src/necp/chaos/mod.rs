//! Any bytes, read as what a peer, the network, the clock and the caller do; and what must hold after each of their
//! steps. The property tests and the fuzz targets play the same scripts.
//!
//! - [`wire`]: the decoder, fed in pieces.
//! - [`ne`], [`se`]: a session of either role against a peer that may send anything; with a key if the script says so
//!   (bit 0x10 of its first byte), against a peer that has the key and breaks the rules one by one.

mod forger;
mod judge;
mod ne;
mod peer;
mod script;
mod se;
#[cfg(test)]
mod tests;
mod wire;

pub use ne::play as ne;
pub use se::play as se;
pub use wire::play as wire;

/// A session whose role the first byte picks, played by the rest.
pub fn session(script: &[u8]) {
    match script.split_first() {
        Some((role, rest)) if role & 1 == 0 => _ = ne(rest),
        Some((_, rest)) => _ = se(rest),
        None => {}
    }
}

/// Bytes that a session may hold, whatever comes: the units of one answer (2 MiB), as they are and encoded, with room
/// for growth, and the input that its caller forced upon it.
pub const HELD_MAX: usize = 12 * 1024 * 1024;

/// What a session may hold after `bytes` bytes of input: in proportion to them, never to what they announce; and a piece
/// of a list for a peer that is slow to read.
fn may_hold(bytes: usize) -> usize {
    HELD_MAX.min(256 * 1024 + 16 * bytes)
}
