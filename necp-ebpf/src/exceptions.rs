//! Exceptions: flows that servers do not want (draft §5.7), as the packet path finds them.
//!
//! A tuple-space search: a new flow is looked up once for each mask that its farm's exceptions use. The index has buckets of
//! one cache line. An exception is in the first bucket of its sequence that had room and none of the same tag, and each
//! bucket before it counts it as passed: a lookup ends at the first bucket that nobody had to pass, nearly always the first.
//!
//! Only user space writes. A record is written before its place in the index and goes after it; its second word, which
//! makes it valid, comes last and goes first. Who finds the same key before and after reading a record has read all of it.

use crate::{
    abi::{
        EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_MASKS, EXCEPTIONS_PER_BUCKET, Exception, ExceptionBucket,
        ExceptionMasks, OF_IPV4, OF_IPV6,
    },
    digest::{keys_of, siphash},
    flows::opaque,
    tables::{Address6, Addresses6, Tables},
    word::Word,
};

/// [`Exception`], as words.
#[repr(C)]
pub struct ExceptionWords {
    /// Source and destination address; see [`ExceptionKey`].
    pub addresses: Word,
    /// Farm, port, protocol, mask, and the state, which is no part of the key.
    pub rest: Word,
    /// Host numbers, four a word.
    pub installers: [Word; EXCEPTION_INSTALLERS / 4],
}

/// [`ExceptionBucket`], as words.
#[repr(C, align(64))]
pub struct ExceptionBucketWords {
    /// See [`ExceptionPlace`](crate::abi::ExceptionPlace).
    pub entries: [Word; EXCEPTIONS_PER_BUCKET],
    /// [`ExceptionBucket::passed`].
    pub passed: Word,
}

/// [`ExceptionMasks`], as words.
#[repr(C)]
pub struct ExceptionMasksWords {
    /// [`ExceptionMasks::count`].
    pub count: Word,
    /// See [`ExceptionMask`](crate::abi::ExceptionMask).
    pub masks: [Word; EXCEPTION_MASKS],
}

const _: () = {
    assert!(size_of::<ExceptionWords>() == size_of::<Exception>());
    assert!(size_of::<ExceptionBucketWords>() == size_of::<ExceptionBucket>());
    assert!(size_of::<ExceptionMasksWords>() == size_of::<ExceptionMasks>());
};

/// Buckets in which an exception may be: its sequence.
pub const CHOICES: u32 = 3;

/// What an exception is found by: the first 14 bytes of its record, as two words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionKey {
    /// The first word.
    pub addresses: u64,
    /// The second, without its last two bytes.
    pub rest: u64,
}

/// What stands for two IPv6 addresses, each as its two halves are read from a header, where there is room for two of IPv4: their
/// source and destination in an [`Exception`]. `seed` is that of the exceptions' hash, a secret.
#[inline(always)]
pub fn name6(source: Address6, destination: Address6, seed: u64) -> u64 {
    siphash(keys_of(seed), [source[0], source[1], destination[0], destination[1]], 0)
}

/// Where the state stands in a record's second word.
const STATE_SHIFT: u32 = if cfg!(target_endian = "little") { 48 } else { 8 };
/// The second word's last two bytes.
const STATE_MASK: u64 = u64::from_ne_bytes([0, 0, 0, 0, 0, 0, 0xff, 0xff]);

impl ExceptionKey {
    /// The key of a record.
    pub fn of(exception: &Exception) -> Self {
        let [a, b, c, d] = exception.source;
        let [e, f, g, h] = exception.destination;
        let [i, j] = exception.farm.to_ne_bytes();
        let [k, l] = exception.port;
        Self {
            addresses: u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            rest: u64::from_ne_bytes([i, j, k, l, exception.protocol, exception.mask, 0, 0]),
        }
    }

    /// The key under which an exception with this mask would be that a flow matches.
    #[inline(always)]
    fn for_flow(flow: Tuple, index: u32, mask: MaskWord) -> Self {
        let source = (flow.source & mask.source()) as u64;
        let destination = (flow.destination & mask.destination()) as u64;
        let addresses =
            if cfg!(target_endian = "little") { source | destination << 32 } else { source << 32 | destination };
        Self { addresses, rest: rest_of(flow, index, mask) }
    }

    /// The same of IPv6.
    #[inline(always)]
    fn for_flow6<T: Tables>(flow: Tuple, addresses: &Addresses6, index: u32, mask: MaskWord, tables: &T) -> Self {
        let source = prefix6(addresses.source, mask.byte(0));
        let destination = prefix6(addresses.destination, mask.byte(1));
        Self { addresses: tables.name6(source, destination), rest: rest_of(flow, index, mask) }
    }

    /// Its hash: the upper half is the tag, the lower half begins the sequence of buckets.
    #[inline(always)]
    pub fn hash(self, seed: u64) -> u64 {
        let mut h = (self.addresses ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^= h >> 32;
        h = (h ^ self.rest).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h ^= h >> 29;
        h = h.wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^ h >> 32
    }
}

/// [`ExceptionKey::rest`] for a flow.
#[inline(always)]
const fn rest_of(flow: Tuple, index: u32, mask: MaskWord) -> u64 {
    let port = flow.port as u64 & mask.port();
    let protocol = flow.protocol as u64 & mask.protocol();
    if cfg!(target_endian = "little") {
        flow.farm as u64 & 0xffff | port << 16 | protocol << 32 | (index as u64) << 40
    } else {
        (flow.farm as u64 & 0xffff) << 48 | port << 32 | protocol << 24 | (index as u64) << 16
    }
}

/// An IPv6 address, of which so many bits count, at most 128.
///
/// Without a branch: each would be as many paths for the verifier as there are masks.
#[inline(always)]
pub fn prefix6([high, low]: Address6, length: u64) -> Address6 {
    let all = |bit: u64| opaque(bit & 1).wrapping_neg();
    let (half, whole) = (all(length >> 6), all(length >> 7));
    // Of the half that the prefix ends in.
    let ends = !(u64::MAX >> (opaque(length) & 63)).to_be();
    [high & (ends | half | whole), low & (ends & half | whole)]
}

/// The bucket of this number in a sequence; `mask` is the number of all buckets less one.
#[inline(always)]
pub const fn bucket_of(hash: u64, choice: u32, mask: u32) -> u32 {
    // An odd step, so that a sequence has no bucket twice.
    let step = (hash >> 24) as u32 | 1;
    (hash as u32).wrapping_add(step.wrapping_mul(choice)) & mask
}

/// The word of a place: which record, and the tag of this hash.
#[inline(always)]
pub const fn place_word(hash: u64, record: u32) -> u64 {
    let (tag, record) = (hash >> 32, record as u64 + 1);
    if cfg!(target_endian = "little") { tag << 32 | record } else { record << 32 | tag }
}

/// The index of the record that a place names, if it has this hash's tag.
#[inline(always)]
const fn record_of(place: u64) -> u32 {
    let record = if cfg!(target_endian = "little") { place as u32 } else { (place >> 32) as u32 };
    record.wrapping_sub(1)
}

/// All bits set if a place has this hash's tag, else none. One that is free may have it too.
///
/// Arithmetic all the way: seven branches would be as many paths for the verifier as there are sets of entries.
#[inline(always)]
pub(crate) fn has_tag(place: u64, hash: u64) -> u64 {
    let tag = if cfg!(target_endian = "little") { place >> 32 } else { place & 0xffff_ffff };
    let differs = tag ^ hash >> 32;
    // 1 if they differ, else 0; less one, it is the mask.
    opaque(opaque(differs | differs.wrapping_neg()) >> 63).wrapping_sub(1)
}

/// [`ExceptionMask`](crate::abi::ExceptionMask), as it was read.
#[derive(Clone, Copy)]
struct MaskWord(u64);

impl MaskWord {
    #[inline(always)]
    const fn byte(self, index: u32) -> u64 {
        let shift = if cfg!(target_endian = "little") { 8 * index } else { 56 - 8 * index };
        self.0 >> shift & 0xff
    }

    #[inline(always)]
    const fn is_of(self, family: u8) -> bool {
        self.byte(4) == family as u64
    }

    #[inline(always)]
    const fn source(self) -> u32 {
        netmask(self.byte(0))
    }

    #[inline(always)]
    const fn destination(self) -> u32 {
        netmask(self.byte(1))
    }

    #[inline(always)]
    const fn protocol(self) -> u64 {
        (self.byte(2) & 1).wrapping_neg() & 0xff
    }

    #[inline(always)]
    const fn port(self) -> u64 {
        (self.byte(3) & 1).wrapping_neg() & 0xffff
    }
}

/// The mask of a prefix length, for an address as it is read from a header.
#[inline(always)]
const fn netmask(length: u64) -> u32 {
    ((0xffff_ffff_u64 << (32u64.wrapping_sub(length) & 63)) as u32).to_be()
}

/// What exceptions look at in a flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuple {
    /// [`Packet::source`](crate::packet::Packet::source).
    pub source: u32,
    /// [`Packet::destination`](crate::packet::Packet::destination).
    pub destination: u32,
    /// [`Packet::destination_port`](crate::packet::Packet::destination_port).
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Index of the farm.
    pub farm: u32,
}

/// In the answer of [`Tuple::matches`]: a global exception, the flow is to be cut through.
pub const GLOBAL: u64 = 1 << EXCEPTION_MASKS;

/// See [`Tuple::to_words`].
pub const TUPLE_BITS: u32 = 40;

impl Tuple {
    /// As arguments of a function in the kernel; the second one has [`TUPLE_BITS`] bits.
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 2] {
        [
            (self.source as u64) << 32 | self.destination as u64,
            (self.farm as u64 & 0xffff) << 24 | (self.protocol as u64) << 16 | self.port as u64,
        ]
    }

    /// From [`to_words`](Self::to_words).
    #[inline(always)]
    pub const fn from_words([addresses, rest]: [u64; 2]) -> Self {
        Self {
            source: (addresses >> 32) as u32,
            destination: addresses as u32,
            port: rest as u16,
            protocol: (rest >> 16) as u8,
            farm: (rest >> 24) as u16 as u32,
        }
    }

    /// Looks a flow up under each mask of its farm: [`GLOBAL`], or a bit for each mask under which there is a local exception.
    #[inline(always)]
    pub fn matches<T: Tables>(self, tables: &T) -> u64 {
        let Some(masks) = tables.exception_masks(self.farm) else { return 0 };
        let count = count_of(masks.count.load());
        let mut matches = 0;
        for index in Rounds::new(EXCEPTION_MASKS as u32) {
            if index >= count {
                break;
            }
            match self.find(tables, masks, index) {
                Some((_, EXCEPTION_GLOBAL)) => return GLOBAL,
                Some(_) => matches |= 1 << index,
                None => {}
            }
        }
        matches
    }

    /// Whether a local exception under any of these masks names a host among its installers.
    #[inline(always)]
    pub fn excludes<T: Tables>(self, tables: &T, matches: u64, host: u16) -> bool {
        // An empty place in a record is 0.
        if host == 0 {
            return false;
        }
        let Some(masks) = tables.exception_masks(self.farm) else { return false };
        for index in Rounds::new(EXCEPTION_MASKS as u32) {
            if matches >> index & 1 != 0
                && let Some((record, _)) = self.find(tables, masks, index)
                && tables.exception(record).is_some_and(|record| record.names(host))
            {
                return true;
            }
        }
        false
    }

    /// The record of the exception with this mask: its index and state.
    #[inline(always)]
    fn find<T: Tables>(self, tables: &T, masks: &ExceptionMasksWords, index: u32) -> Option<(u32, u8)> {
        let mask = MaskWord(masks.masks[index as usize % EXCEPTION_MASKS].load());
        let key = match tables.addresses6() {
            None if mask.is_of(OF_IPV4) => ExceptionKey::for_flow(self, index, mask),
            Some(addresses) if mask.is_of(OF_IPV6) => ExceptionKey::for_flow6(self, &addresses, index, mask, tables),
            _ => return None,
        };
        find(tables, key)
    }
}

/// [`ExceptionMasks::count`], of its word.
#[inline(always)]
const fn count_of(header: u64) -> u32 {
    if cfg!(target_endian = "little") { header as u32 } else { (header >> 32) as u32 }
}

/// A count of rounds that the compiler leaves as a loop: unrolled, they would need more stack than a BPF program has.
pub struct Rounds {
    next: u32,
    end: u32,
}

impl Rounds {
    /// So many rounds, from 0 on.
    #[inline(always)]
    pub const fn new(end: u32) -> Self {
        Self { next: 0, end }
    }
}

impl Iterator for Rounds {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        let round = self.next;
        self.next = opaque(round as u64 + 1) as u32;
        (round < self.end).then_some(round)
    }
}

/// The record with this key: its index and state.
#[inline(always)]
fn find<T: Tables>(tables: &T, key: ExceptionKey) -> Option<(u32, u8)> {
    let hash = key.hash(tables.exception_seed());
    for choice in Rounds::new(CHOICES) {
        let bucket = tables.exception_bucket(bucket_of(hash, choice, tables.exception_bucket_mask()))?;
        let mut place = 0;
        for entry in &bucket.entries {
            let entry = entry.load();
            place |= entry & has_tag(entry, hash);
        }
        if place != 0
            && let Some(state) = tables.exception(record_of(place)).and_then(|record| record.state_of(key))
        {
            return Some((record_of(place), state));
        }
        if bucket.passed.load() == 0 {
            return None;
        }
    }
    None
}

impl ExceptionWords {
    /// The state, if the record has this key.
    #[inline(always)]
    fn state_of(&self, key: ExceptionKey) -> Option<u8> {
        let rest = self.rest.load();
        let same = rest & !STATE_MASK == key.rest && self.addresses.load() == key.addresses;
        // The addresses change only while the state is 0: if it is not, and all is the same again, they were this key's.
        let state = (rest >> STATE_SHIFT) as u8;
        (same && state != 0 && self.rest.load() & !STATE_MASK == key.rest).then_some(state)
    }

    /// Whether this host is among the installers.
    #[inline(always)]
    fn names(&self, host: u16) -> bool {
        const ONES: u64 = 0x0001_0001_0001_0001;
        let wanted = ONES.wrapping_mul(host as u64);
        let [first, second] = &self.installers;
        let zero = |lanes: u64| lanes.wrapping_sub(ONES) & !lanes & ONES << 15;
        opaque(zero(first.load() ^ wanted) | zero(second.load() ^ wanted)) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::halves;

    #[test]
    fn an_ipv6_prefix_has_the_bits_of_its_length() {
        let address: u128 = 0xfedc_ba98_7654_3210_89ab_cdef_0123_4567;
        for length in 0..=128u32 {
            let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
            let wanted = halves((address & mask).to_be_bytes());
            assert_eq!(prefix6(halves(address.to_be_bytes()), length.into()), wanted, "/{length}");
        }
    }
}
