//! Exceptions: flows that servers do not want (draft §5.7), as the packet path finds them.
//!
//! A tuple-space search: a new flow is looked up once for each mask that its farm's exceptions use. The index has buckets of
//! one cache line. An exception is in the first bucket of its sequence that had room and none of the same tag, and each
//! bucket before it counts it as passed: a lookup ends at the first bucket that nobody had to pass, nearly always the first.
//!
//! Only user space writes. A record is written before its place in the index and goes after it; its second word, which
//! makes it valid, comes last and goes first. Who finds the same key before and after reading a record has read all of it.

use crate::{
    abi::{EXCEPTION_GLOBAL, EXCEPTION_INSTALLERS, EXCEPTION_MASKS, EXCEPTIONS_PER_BUCKET, Exception, ExceptionBucket, ExceptionMasks},
    flows::opaque,
    packet::Packet,
    tables::Tables,
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
pub const CHOICES: u32 = 6;

/// What an exception is found by: the first 14 bytes of its record, as two words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExceptionKey {
    /// The first word.
    pub addresses: u64,
    /// The second, without its last two bytes.
    pub rest: u64,
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

    /// The key under which an exception with this mask would be that a packet matches.
    #[inline(always)]
    fn for_packet(packet: &Packet, farm: u32, index: u32, mask: MaskWord) -> Self {
        let source = (packet.source & mask.source()) as u64;
        let destination = (packet.destination & mask.destination()) as u64;
        let port = packet.destination_port as u64 & mask.port();
        let protocol = packet.protocol as u64 & mask.protocol();
        if cfg!(target_endian = "little") {
            let rest = farm as u64 & 0xffff | port << 16 | protocol << 32 | (index as u64) << 40;
            Self { addresses: source | destination << 32, rest }
        } else {
            let rest = (farm as u64 & 0xffff) << 48 | port << 32 | protocol << 24 | (index as u64) << 16;
            Self { addresses: source << 32 | destination, rest }
        }
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

/// All bits set if a place has this hash's tag and is not free, else none.
#[inline(always)]
pub(crate) fn has_tag(place: u64, hash: u64) -> u64 {
    let (tag, record) = if cfg!(target_endian = "little") {
        (place >> 32, place & 0xffff_ffff)
    } else {
        (place & 0xffff_ffff, place >> 32)
    };
    // The subtraction borrows exactly if the difference is 0; so for the record, the other way round.
    let same = (tag ^ hash >> 32).wrapping_sub(1) >> 63;
    let used = 1 ^ record.wrapping_sub(1) >> 63;
    opaque(same & used).wrapping_neg()
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
    const fn is_used(self) -> bool {
        self.byte(4) != 0
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

/// What the exceptions of a farm say of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Excepted {
    /// Nothing.
    No,
    /// There are records that name installers.
    Local,
    /// It is to be cut through.
    Global,
}

/// By mask: one more than the number of the record that a flow matches; 0: none.
pub type Records = [u32; EXCEPTION_MASKS];

/// Looks a new flow up. `records` is filled in if it says [`Excepted::Local`].
#[inline(always)]
pub fn look_up<T: Tables>(tables: &T, packet: &Packet, farm: u32, records: &mut Records) -> Excepted {
    let Some(masks) = tables.exception_masks(farm) else { return Excepted::No };
    let count = masks.count.load() as u32;
    let mut excepted = Excepted::No;
    for index in Rounds::new(EXCEPTION_MASKS as u32) {
        if index >= count {
            break;
        }
        let mask = MaskWord(masks.masks[index as usize % EXCEPTION_MASKS].load());
        if !mask.is_used() {
            continue;
        }
        let key = ExceptionKey::for_packet(packet, farm, index, mask);
        let Some((record, state)) = find(tables, key) else { continue };
        if state == EXCEPTION_GLOBAL {
            return Excepted::Global;
        }
        excepted = Excepted::Local;
        records[index as usize % EXCEPTION_MASKS] = record + 1;
    }
    excepted
}

/// Whether one of the records names a host.
#[inline(always)]
pub fn exclude<T: Tables>(tables: &T, records: &Records, host: u16) -> bool {
    // An empty place in a record is 0.
    if host == 0 {
        return false;
    }
    for index in Rounds::new(EXCEPTION_MASKS as u32) {
        let record = records[index as usize % EXCEPTION_MASKS];
        if record != 0
            && let Some(record) = tables.exception(record - 1)
            && record.names(host)
        {
            return true;
        }
    }
    false
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
