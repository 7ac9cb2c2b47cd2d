//! The flow table: flows that the slot table alone would misplace.
//!
//! Buckets of one cache line, four entries each, two choices of bucket a flow. An entry is *empty*, a *candidate* (a SYN
//! that nobody has answered to yet; may be overwritten), a *record* (never overwritten by another flow) or *busy* (being
//! written). Who may take an entry is said in [`room`](crate::room). All entries of a flow are in one bucket, so a lookup ends at the first bucket that knows it. An entry is
//! claimed by compare-and-swap of its word, its key is written, then its word; who finds his key, reads the word and finds
//! his key again has read his own flow's word. It is freed the same way: condemned by compare-and-swap, then the key goes,
//! then the word.
//!
//! An entry carries no time but an *age*: user space counts it up at the pace of the entry's idle time, every packet of the
//! flow sets it to 0. A flow in use is thus written at most once a step.
//!
//! ```text
//!  63                 32 31    28   27   26        8 7   3    2    1   0
//! +---------------------+--------+------+-----------+-----+---------+-----+
//! | initial sequence no.| syn    |change| server id | age | closing |state|
//! +---------------------+--------+------+-----------+-----+---------+-----+
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
const SERVER_MASK: u64 = 0x7_ffff;
/// See [`FlowWord::for_change`].
pub(crate) const CHANGE_SHIFT: u32 = 27;
const CHANGE: u64 = 1 << CHANGE_SHIFT;
const SYN_SHIFT: u32 = 28;

impl FlowWord {
    /// A free entry.
    pub const EMPTY: Self = Self(0);
    /// One that is being written.
    pub(crate) const BUSY: Self = Self(BUSY);

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

    /// The same entry; `yes`: it is there only because its slot has changed hands, and without it its flow goes on.
    #[inline(always)]
    pub const fn for_change(self, yes: bool) -> Self {
        Self(self.0 & !CHANGE | (yes as u64) << CHANGE_SHIFT)
    }

    /// The same entry, as much [for a change](Self::for_change) as another.
    #[inline(always)]
    pub const fn like(self, other: Self) -> Self {
        Self(self.0 & !CHANGE | other.0 & CHANGE)
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
pub(crate) const UDP_CLASS_BIT: u32 = if cfg!(target_endian = "little") { 63 } else { UDP_CLASS.trailing_zeros() };

/// 1 if an entry with this key is of a flow without a visible beginning (UDP and others), else 0.
#[inline(always)]
pub(crate) const fn udp_class(key: u64) -> u64 {
    key >> UDP_CLASS_BIT & 1
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
        let condemned = self.replace(old, FlowWord::BUSY);
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
    /// Replaces what was seen, by something that counts against the same quota; false if there was nothing, or somebody else
    /// has been there.
    #[inline(always)]
    pub fn replace(&self, seen: Seen, new: FlowWord) -> bool {
        seen.is_some() && self.entry(seen).is_some_and(|entry| entry.replace(seen.value, new.like(seen.value)))
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

// An entry a bit, so that the verifier has one path to follow instead of one for each entry: a comparison is a branch to BPF.
impl FlowBucketWords {
    /// The entries for which `test` gives 1, as a mask.
    #[inline(always)]
    pub(crate) fn lanes(&self, test: impl Fn(&FlowWords) -> u64) -> u64 {
        let [a, b, c, d] = &self.entries;
        test(a) | test(b) << 1 | test(c) << 2 | test(d) << 3
    }

    #[inline(always)]
    pub(crate) fn in_state(&self, state: State) -> u64 {
        self.lanes(|entry| is_in(entry.word.load(), state))
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
}

/// 1 if an entry's word is in this state, else 0, without a branch.
#[inline(always)]
pub(crate) fn is_in(word: u64, state: State) -> u64 {
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
pub(crate) fn lowest(mask: u64) -> usize {
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
pub(crate) fn count(mask: u64) -> u64 {
    (mask & 1) + (mask >> 1 & 1) + (mask >> 2 & 1) + (mask >> 3 & 1)
}

/// Keeps the compiler from turning arithmetic back into branches.
#[inline(always)]
pub fn opaque(value: u64) -> u64 {
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
