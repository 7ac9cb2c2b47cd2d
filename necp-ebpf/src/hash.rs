//! The flow hash, its two uses and the hash of the service table.

use crate::packet::Packet;

const A: u64 = 0x9e37_79b9_7f4a_7c15;
const B: u64 = 0xbf58_476d_1ce4_e5b9;
const C: u64 = 0x94d0_49bb_1331_11eb;

/// Hash of a flow's 5-tuple under its farm's seed: the upper half picks the slot, the lower half the buckets.
///
/// It depends on nothing that is this NE's own, so that several NEs with the same farm agree on every flow.
#[inline(always)]
pub fn flow_hash(packet: &Packet, seed: u64) -> u64 {
    let addresses = (packet.source as u64) << 32 | packet.destination as u64;
    let rest = (packet.protocol as u64) << 32 | (packet.source_port as u64) << 16 | packet.destination_port as u64;
    let mut h = (addresses ^ seed).wrapping_mul(A);
    h ^= h >> 32;
    h = (h ^ rest).wrapping_mul(B);
    h ^= h >> 29;
    h = h.wrapping_mul(C);
    h ^ h >> 32
}

/// Which of `size` slots: a multiplication instead of a division.
#[inline(always)]
pub fn slot_index(hash: u64, size: u32) -> u32 {
    (((hash >> 32) * size as u64) >> 32) as u32
}

/// The hash for the next slot of the fixed probe sequence.
#[inline(always)]
pub fn next_probe(hash: u64) -> u64 {
    let h = hash.wrapping_mul(A).wrapping_add(B);
    h ^ h >> 29
}

/// The two buckets of the flow table in which a flow may be, one even and one odd; `mask` is their number less one.
#[inline(always)]
pub fn flow_buckets(hash: u64, mask: u32) -> [u32; 2] {
    let first = hash as u32;
    let second = (hash.wrapping_mul(A) >> 32) as u32;
    [first & mask, (second & !1 | !first & 1) & mask]
}

/// What stands for an IPv6 address, as its two halves are read from a header, where there is room for four bytes. Not a secret, and not
/// unique: whoever finds it compares the address too.
#[inline(always)]
pub fn fold6([high, low]: [u64; 2]) -> u32 {
    let h = (high ^ low.wrapping_mul(B)).wrapping_mul(A);
    (h >> 32) as u32 ^ low as u32
}

/// The bucket of the service table; `key` is the first eight bytes of a [`Service`](crate::abi::Service).
#[inline(always)]
pub fn service_bucket(key: u64) -> u32 {
    (key.wrapping_mul(A) >> (64 - crate::abi::SERVICE_BUCKETS.trailing_zeros())) as u32
}
