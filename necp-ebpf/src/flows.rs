//! The flow table: flows that the slot table alone would misplace.
//!
//! Buckets of one cache line, four entries each, two choices of bucket a flow. An entry is *empty*, a *candidate* (a SYN
//! that nobody has answered to yet; may be overwritten), a *record* (never overwritten by another flow) or *busy* (being
//! written). All entries of a flow are in one bucket, so a lookup ends at the first bucket that knows it. An entry is
//! claimed by compare-and-swap of its word, its key is written, then its word; who finds his key, reads the word and finds
//! his key again has read his own flow's word. It is freed the same way: condemned by compare-and-swap, then the key goes,
//! then the word.
//!
//! An entry carries no time but an *age*: user space counts it up at the pace of the entry's idle time, every packet of the
//! flow sets it to 0. A flow in use is thus written at most once a step.
//!
//! ```text
//!  63                 32 31    28 27        8 7   3    2    1   0
//! +---------------------+--------+-----------+-----+---------+-----+
//! | initial sequence no.| syn    | server id | age | closing |state|
//! +---------------------+--------+-----------+-----+---------+-----+
//! ```

use crate::{
    abi::{FLOWS_PER_BUCKET, Flow, FlowBucket, UDP_CLASS},
    packet::{Packet, tcp},
    tables::Tables,
    word::Word,
};

/// An entry of the flow table as two words: [`Flow`]'s first and last eight bytes.
#[repr(C)]
pub struct FlowWords {
    /// Source address, source port, service id; see [`flow_key`].
    pub key: Word,
    /// See [`FlowWord`].
    pub word: Word,
}

/// [`FlowBucket`], as words.
#[repr(C, align(64))]
pub struct FlowBucketWords {
    /// The entries.
    pub entries: [FlowWords; FLOWS_PER_BUCKET],
}

const _: () = assert!(size_of::<FlowBucketWords>() == size_of::<FlowBucket>());
const _: () = assert!(size_of::<FlowWords>() == size_of::<Flow>());

/// The largest age; a step more and the entry's time is over.
pub const MAX_AGE: u32 = 31;
/// Entries of a bucket that flows without a visible beginning (UDP and others) may take: the rest is TCP's.
pub const UDP_PER_BUCKET: usize = 2;

/// The state of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Free.
    Empty,
    /// A SYN was sent to a server that the flow's next packet might not find without this.
    Candidate,
    /// The flow is on this server.
    Record,
    /// Being written, or being freed.
    Busy,
}

/// The second word of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowWord(pub u64);

const CANDIDATE: u64 = 1;
const RECORD: u64 = 2;
const BUSY: u64 = 3;
const CLOSING: u64 = 1 << 2;
const AGE_SHIFT: u32 = 3;
const AGE_MASK: u64 = 0x1f << AGE_SHIFT;
const SERVER_SHIFT: u32 = 8;
const SERVER_MASK: u64 = 0xf_ffff;
const SYN_SHIFT: u32 = 28;

impl FlowWord {
    /// A free entry.
    pub const EMPTY: Self = Self(0);

    /// A SYN's proposal.
    #[inline(always)]
    pub fn candidate(server: u32, packet: &Packet) -> Self {
        let payload = if packet.payload > 0x7fff { 0x7fff } else { packet.payload };
        let bits = (u16::BITS - payload.leading_zeros()) as u64;
        Self(
            CANDIDATE
                | (server as u64 & SERVER_MASK) << SERVER_SHIFT
                | bits << SYN_SHIFT
                | (packet.sequence as u64) << 32,
        )
    }

    /// A flow's record; `isn` is the sequence number of the SYN it was made from, else 0.
    #[inline(always)]
    pub const fn record(server: u32, isn: u32, closing: bool) -> Self {
        let closing = if closing { CLOSING } else { 0 };
        Self(RECORD | closing | (server as u64 & SERVER_MASK) << SERVER_SHIFT | (isn as u64) << 32)
    }

    /// What the entry is.
    #[inline(always)]
    pub const fn state(self) -> State {
        match self.0 & 3 {
            0 => State::Empty,
            CANDIDATE => State::Candidate,
            RECORD => State::Record,
            _ => State::Busy,
        }
    }

    /// The flow's server id.
    #[inline(always)]
    pub const fn server(self) -> u32 {
        (self.0 >> SERVER_SHIFT & SERVER_MASK) as u32
    }

    /// A FIN or RST was the last that carried anything.
    #[inline(always)]
    pub const fn is_closing(self) -> bool {
        self.0 & CLOSING != 0
    }

    /// Steps of user space since the flow's last packet.
    #[inline(always)]
    pub const fn age(self) -> u32 {
        ((self.0 & AGE_MASK) >> AGE_SHIFT) as u32
    }

    /// The same entry, older or younger; `age` is at most [`MAX_AGE`].
    #[inline(always)]
    pub const fn with_age(self, age: u32) -> Self {
        Self(self.0 & !AGE_MASK | ((age as u64) << AGE_SHIFT & AGE_MASK))
    }

    /// Initial sequence number of the SYN that made it.
    #[inline(always)]
    pub const fn isn(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether a packet with this sequence number can only come from a client that the candidate's server has answered to:
    /// the SYN's own number plus one, or up to the SYN's own data more (rounded up to a power of two).
    #[inline(always)]
    pub const fn confirmed_by(self, sequence: u32) -> bool {
        let syn_data = (1u32 << (self.0 >> SYN_SHIFT & 0xf)) - 1;
        sequence.wrapping_sub(self.isn()).wrapping_sub(1) <= syn_data
    }

    /// The record after one more packet: young again; closing after FIN or RST, until data comes.
    #[inline(always)]
    fn touched(self, packet: &Packet) -> Self {
        let young = self.0 & !AGE_MASK;
        if packet.flags & (tcp::FIN | tcp::RST) != 0 {
            Self(young | CLOSING)
        } else if packet.payload != 0 {
            Self(young & !CLOSING)
        } else {
            Self(young)
        }
    }
}

/// The first word of a flow's entries: the first eight bytes of a [`Flow`].
#[inline(always)]
pub fn flow_key(packet: &Packet, service_id: u16) -> u64 {
    let (address, port, service) = (packet.source as u64, packet.source_port as u64, service_id as u64);
    if cfg!(target_endian = "little") {
        service << 48 | port << 32 | address
    } else {
        address << 32 | port << 16 | service
    }
}

/// Where [`UDP_CLASS`] stands in a key: the service id is its last two bytes, in the host's order.
const UDP_CLASS_BIT: u32 = if cfg!(target_endian = "little") { 63 } else { UDP_CLASS.trailing_zeros() };

/// Whether an entry with this key counts against the quota of [`UDP_PER_BUCKET`].
#[inline(always)]
pub const fn key_is_udp_class(key: u64) -> bool {
    key >> UDP_CLASS_BIT & 1 != 0
}

impl FlowWords {
    /// The entry as it stands, and its key; `None` if it is free or busy.
    pub fn read(&self) -> Option<(u64, FlowWord)> {
        let key = self.key.load();
        let value = FlowWord(self.word.load());
        let settled = matches!(value.state(), State::Candidate | State::Record) && self.key.load() == key;
        settled.then_some((key, value))
    }

    /// Replaces what was read; false if somebody else has been there.
    #[inline(always)]
    pub fn replace(&self, old: FlowWord, new: FlowWord) -> bool {
        self.word.compare_exchange(old.0, new.0) == old.0
    }

    /// Frees the entry, unless somebody else has been there.
    ///
    /// The key goes before the word, so that a free entry has none: a lookup takes whatever has its key.
    #[inline(always)]
    pub fn free(&self, old: FlowWord) -> bool {
        let condemned = self.replace(old, FlowWord(BUSY));
        if condemned {
            self.key.store(0);
            self.word.store(FlowWord::EMPTY.0);
        }
        condemned
    }

    /// Notes a packet of the flow.
    #[inline(always)]
    fn touch(&self, mut value: FlowWord, packet: &Packet) {
        // User space ages an entry once in a great while: a second attempt succeeds, unless another packet of the flow came first.
        for _ in 0..2 {
            let new = value.touched(packet);
            if new == value {
                return;
            }
            let found = FlowWord(self.word.compare_exchange(value.0, new.0));
            if found == value || (found.0 ^ value.0) & !(AGE_MASK | CLOSING) != 0 {
                return;
            }
            value = found;
        }
    }
}

/// What the table knows of a flow.
#[derive(Clone, Copy, Default)]
pub struct Found<'a> {
    /// Its candidate; [`FlowWord::EMPTY`] if it has none.
    pub candidate: Seen,
    /// Its record; [`FlowWord::EMPTY`] if it has none.
    pub record: Seen,
    /// The bucket in which any of them was found.
    home: Option<&'a FlowBucketWords>,
    /// Its index.
    home_index: u32,
}

/// An entry of a bucket, as it was read.
#[derive(Clone, Copy, Default)]
pub struct Seen {
    /// What stood in its word.
    pub value: FlowWord,
    index: usize,
}

impl Seen {
    /// Whether there was such an entry.
    #[inline(always)]
    pub const fn is_some(&self) -> bool {
        self.value.0 != FlowWord::EMPTY.0
    }
}

impl Found<'_> {
    /// Replaces what was seen; false if there was nothing, or somebody else has been there.
    #[inline(always)]
    pub fn replace(&self, seen: Seen, new: FlowWord) -> bool {
        seen.is_some() && self.entry(seen).is_some_and(|entry| entry.replace(seen.value, new))
    }

    /// Notes a packet of the flow in its record.
    #[inline(always)]
    pub fn touch(&self, packet: &Packet) {
        if let Some(entry) = self.entry(self.record) {
            entry.touch(self.record.value, packet);
        }
    }

    /// Frees the flow's candidate, unless somebody else has been there.
    #[inline(always)]
    pub fn forget(&self) {
        if self.candidate.is_some()
            && let Some(entry) = self.entry(self.candidate)
        {
            entry.free(self.candidate.value);
        }
    }

    #[inline(always)]
    fn entry(&self, seen: Seen) -> Option<&FlowWords> {
        self.home.map(|home| &home.entries[seen.index % FLOWS_PER_BUCKET])
    }
}

/// Looks a flow up in its two buckets.
#[inline(always)]
pub fn find<'a, T: Tables>(tables: &'a T, buckets: [u32; 2], key: u64) -> Found<'a> {
    for index in buckets {
        let Some(bucket) = tables.flow_bucket(index) else { break };
        let hits = bucket.lanes(|entry| equal(entry.key.load(), key));
        if hits == 0 {
            continue;
        }
        let candidate = bucket.see(hits, State::Candidate, key);
        let record = bucket.see(hits, State::Record, key);
        return Found { candidate, record, home: Some(bucket), home_index: index };
    }
    Found::default()
}

/// Makes a new entry, beside the flow's others if there are any; false if there is no room for it.
#[inline(always)]
pub fn insert<T: Tables>(tables: &T, buckets: [u32; 2], found: &Found<'_>, key: u64, value: FlowWord) -> bool {
    tables.insert(if found.home.is_some() { [found.home_index; 2] } else { buckets }, key, value)
}

/// Makes a new entry in one of two buckets, which may be the same one; false if there is no room for it.
#[inline(always)]
pub fn insert_into<T: Tables>(tables: &T, [first, second]: [u32; 2], key: u64, value: FlowWord) -> bool {
    let [Some(first), Some(second)] = [tables.flow_bucket(first), tables.flow_bucket(second)] else { return false };
    let bucket = emptier(first, second, key);
    if bucket.is_closed_to(key) != 0 {
        return false;
    }
    // A second attempt for the case that another CPU was faster at the same entry.
    bucket.claim(key, value) || bucket.claim(key, value)
}

/// Where a new flow belongs. The first bucket is the one that a lookup reads first, so it is preferred while it is nearly
/// empty; then the emptier one, so that the table turns flows away late: the benchmark fills it by half and demands that all
/// but one in a thousand find room. If both are full, the one in which a candidate can be overwritten. A bucket whose quota is
/// used up has no room, however empty it is.
#[inline(always)]
fn emptier<'a>(first: &'a FlowBucketWords, second: &'a FlowBucketWords, key: u64) -> &'a FlowBucketWords {
    let (a, b) = (first.room(key), second.room(key));
    if a >= 3 * ROOM || a >= b { first } else { second }
}

/// Weight of a free entry against that of one that can be overwritten.
const ROOM: u64 = 8;

// An entry a bit, so that the verifier has one path to follow instead of one for each entry: a comparison is a branch to BPF.
impl FlowBucketWords {
    /// The entries for which `test` gives 1, as a mask.
    #[inline(always)]
    fn lanes(&self, test: impl Fn(&FlowWords) -> u64) -> u64 {
        let [a, b, c, d] = &self.entries;
        test(a) | test(b) << 1 | test(c) << 2 | test(d) << 3
    }

    #[inline(always)]
    fn in_state(&self, state: State) -> u64 {
        self.lanes(|entry| is_in(entry.word.load(), state))
    }

    /// How much room there is for a flow with this key.
    #[inline(always)]
    fn room(&self, key: u64) -> u64 {
        let room = count(self.in_state(State::Empty)) * ROOM + count(self.in_state(State::Candidate));
        room & self.is_closed_to(key).wrapping_sub(1)
    }

    /// 1 if a flow with this key may have no entry here, because others have used up the quota of [`UDP_PER_BUCKET`]; else 0.
    #[inline(always)]
    fn is_closed_to(&self, key: u64) -> u64 {
        let taken = count(self.lanes(|entry| entry.key.load() >> UDP_CLASS_BIT & 1));
        let used_up = opaque((UDP_PER_BUCKET as u64 - 1).wrapping_sub(taken)) >> 63;
        used_up & key_is_udp_class(key) as u64
    }

    /// The first entry of the flow in this state, if it is there still: with that key, and in that state.
    #[inline(always)]
    fn see(&self, hits: u64, state: State, key: u64) -> Seen {
        let mask = hits & self.in_state(state);
        let index = lowest(mask);
        let words = &self.entries[index];
        let value = words.word.load();
        // It may have changed hands meanwhile, or be about to: who replaced a busy word would be overwritten himself. Nor is
        // there any if the mask is empty.
        let valid = equal(words.key.load(), key) & is_in(value, state) & (1 ^ equal(mask, 0));
        Seen { value: FlowWord(value & valid.wrapping_neg()), index }
    }

    /// Takes a free entry, or else one of a candidate.
    #[inline(always)]
    fn claim(&self, key: u64, value: FlowWord) -> bool {
        let empty = self.in_state(State::Empty);
        let mask = if empty != 0 { empty } else { self.in_state(State::Candidate) };
        if mask == 0 {
            return false;
        }
        let words = &self.entries[lowest(mask)];
        let old = words.word.load();
        // A free entry that has just become a candidate is left alone: there may be other free ones.
        let takeable = if empty != 0 { is_in(old, State::Empty) } else { is_in(old, State::Candidate) };
        if takeable == 0 || words.word.compare_exchange(old, BUSY) != old {
            return false;
        }
        words.key.store(key);
        words.word.store(value.0);
        true
    }
}

/// 1 if an entry's word is in this state, else 0, without a branch.
#[inline(always)]
fn is_in(word: u64, state: State) -> u64 {
    match state {
        State::Empty => !word & !word >> 1 & 1,
        State::Candidate => word & !word >> 1 & 1,
        State::Record => !word & word >> 1 & 1,
        State::Busy => word & word >> 1 & 1,
    }
}

/// 1 if both are the same, else 0, without a branch.
#[inline(always)]
fn equal(a: u64, b: u64) -> u64 {
    let difference = a ^ b;
    1 ^ (opaque(difference | difference.wrapping_neg()) >> 63)
}

/// Index of the lowest bit of a mask of four, 0 if there is none.
#[inline(always)]
fn lowest(mask: u64) -> usize {
    const TABLE: u64 = {
        let (mut table, mut mask) = (0, 1u64);
        while mask < 16 {
            table |= (mask.trailing_zeros() as u64) << (2 * mask);
            mask += 1;
        }
        table
    };
    (opaque(TABLE >> (2 * (mask & 15))) & 3) as usize
}

/// Number of bits of a mask of four.
#[inline(always)]
fn count(mask: u64) -> u64 {
    (mask & 1) + (mask >> 1 & 1) + (mask >> 2 & 1) + (mask >> 3 & 1)
}

/// Keeps the compiler from turning arithmetic back into branches.
#[inline(always)]
pub(crate) fn opaque(value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // An empty statement would leave two debug lines at one instruction, which the kernel refuses.
        // SAFETY: moves a register to itself.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack)) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Owned;

    #[test]
    fn udp_takes_its_quota_of_both_buckets_and_leaves_the_rest() {
        let mut tables = Owned::new(1, 1, 2);
        let view = tables.view();
        let udp = |number: u64| 1 << UDP_CLASS_BIT | number;
        let add = |key| insert(&view, [0, 1], &Found::default(), key, FlowWord::record(2, 0, false));
        let in_bucket = |index: usize| view.flows()[index].entries.iter().filter(|e| e.read().is_some()).count();
        for number in 1..=2 * UDP_PER_BUCKET as u64 {
            assert!(add(udp(number)), "flow {number}");
        }
        assert_eq!([in_bucket(0), in_bucket(1)], [UDP_PER_BUCKET; 2]);
        assert!(!add(udp(9)), "the quota of both buckets is used up");
        for number in 1..=2 * (FLOWS_PER_BUCKET - UDP_PER_BUCKET) as u64 {
            assert!(add(number), "the rest is TCP's");
        }
        assert!(!add(9), "both buckets are full");
    }

    #[test]
    fn a_flow_is_found_in_either_bucket_until_its_entry_is_freed() {
        let mut tables = Owned::new(1, 1, 2);
        let view = tables.view();
        let (key, word) = (5, FlowWord::record(2, 7, false));
        for buckets in [[0, 1], [1, 0], [1, 1]] {
            assert!(!find(&view, buckets, key).record.is_some());
            assert!(insert(&view, buckets, &Found::default(), key, word));
            let found = find(&view, [0, 1], key);
            assert_eq!((found.record.value, found.candidate.is_some()), (word, false));
            let entry = view.flows()[buckets[0] as usize].entries.iter().find(|e| e.read().is_some()).unwrap();
            assert!(!entry.free(FlowWord::record(3, 7, false)), "somebody else has been there");
            assert!(entry.free(word));
        }
    }

    #[test]
    fn a_candidate_is_confirmed_by_the_number_after_its_syn_and_no_other() {
        let syn = |sequence, payload| FlowWord::candidate(2, &Packet { sequence, payload, ..Packet::default() });
        for isn in [0, 1000, u32::MAX - 1, u32::MAX] {
            assert!(syn(isn, 0).confirmed_by(isn.wrapping_add(1)));
            for other in [isn, isn.wrapping_sub(1), isn.wrapping_add(2), isn.wrapping_add(1 << 31)] {
                assert!(!syn(isn, 0).confirmed_by(other), "{isn} by {other}");
            }
        }
        for payload in [1, 2, 3, 4, 1400, 0x7fff, 0x8000, u16::MAX] {
            let covered = u32::from(payload).min(0x7fff);
            assert!(syn(9, payload).confirmed_by(10 + covered), "all of {payload} bytes");
            assert!(!syn(9, payload).confirmed_by(10 + 2 * covered), "twice {payload} bytes");
        }
    }

    #[test]
    fn arithmetic_on_masks_of_four_is_what_it_says() {
        for mask in 0..16u64 {
            assert_eq!(count(mask), u64::from(mask.count_ones()));
            assert_eq!(lowest(mask), if mask == 0 { 0 } else { mask.trailing_zeros() as usize });
        }
        for (a, b) in [(0, 0), (1, 1), (u64::MAX, u64::MAX), (0, 1), (0, 1 << 63), (u64::MAX, 0)] {
            assert_eq!(equal(a, b), u64::from(a == b));
        }
    }
}
