//! The flow table: flows that the slot table alone would misplace.
//!
//! Buckets of one cache line, four entries each, two choices of bucket a flow. An entry is *empty*, a *candidate* (a SYN
//! that nobody has answered to yet; may be overwritten), a *record* (never overwritten by another flow) or *busy* (being
//! written). All entries of a flow are in one bucket, so a lookup ends at the first bucket that knows it. An entry is
//! claimed by compare-and-swap of its word, its key is written, then its word: who reads a word and then finds his own key
//! has read his own flow's word. User space frees an entry by one compare-and-swap of its word.
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
        Self(CANDIDATE | (server as u64 & SERVER_MASK) << SERVER_SHIFT | bits << SYN_SHIFT | (packet.sequence as u64) << 32)
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
    let [a, b, c, d] = packet.source.to_ne_bytes();
    let [e, f] = packet.source_port.to_ne_bytes();
    let [g, h] = service_id.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Whether an entry with this key counts against the quota of [`UDP_PER_BUCKET`].
#[inline(always)]
pub const fn key_is_udp_class(key: u64) -> bool {
    let [.., g, h] = key.to_ne_bytes();
    u16::from_ne_bytes([g, h]) & UDP_CLASS != 0
}

/// One entry, as it was read.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    word: &'a Word,
    /// What stood in the word.
    pub value: FlowWord,
}

impl Entry<'_> {
    /// Replaces what was read; false if somebody else has been there.
    #[inline(always)]
    pub fn replace(&self, new: FlowWord) -> bool {
        self.word.compare_exchange(self.value.0, new.0) == self.value.0
    }

    /// Notes a packet of the flow.
    #[inline(always)]
    pub fn touch(&self, packet: &Packet) {
        let mut value = self.value;
        // User space ages an entry at most once in a great while: a second attempt succeeds, unless another packet of the flow was first.
        for _ in 0..2 {
            let new = value.touched(packet);
            if new == value {
                return;
            }
            let found = FlowWord(self.word.compare_exchange(value.0, new.0));
            if found == value || found.0 & !(AGE_MASK | CLOSING) != value.0 & !(AGE_MASK | CLOSING) {
                return;
            }
            value = found;
        }
    }
}

/// What the table knows of a flow.
#[derive(Clone, Copy, Default)]
pub struct Found<'a> {
    /// Its candidate.
    pub candidate: Option<Entry<'a>>,
    /// Its record.
    pub record: Option<Entry<'a>>,
    /// The bucket in which any of them was found.
    home: Option<&'a FlowBucketWords>,
}

/// Looks a flow up in its two buckets.
#[inline(always)]
pub fn find<'a, T: Tables>(tables: &'a T, buckets: [u32; 2], key: u64) -> Found<'a> {
    let mut found = Found::default();
    for index in buckets {
        let Some(bucket) = tables.flow_bucket(index) else { continue };
        for entry in &bucket.entries {
            if entry.key.load() != key {
                continue;
            }
            let value = FlowWord(entry.word.load());
            // The entry may have changed hands between the two reads.
            if entry.key.load() != key {
                continue;
            }
            match value.state() {
                State::Candidate => found.candidate = Some(Entry { word: &entry.word, value }),
                State::Record => found.record = Some(Entry { word: &entry.word, value }),
                State::Empty | State::Busy => continue,
            }
            found.home = Some(bucket);
        }
        if found.home.is_some() {
            break;
        }
    }
    found
}

/// Makes a new entry; false if there is no room for it.
#[inline(always)]
pub fn insert<T: Tables>(tables: &T, buckets: [u32; 2], found: &Found<'_>, key: u64, value: FlowWord) -> bool {
    if let Some(home) = found.home {
        return claim(home, key, value, State::Empty) || claim(home, key, value, State::Candidate);
    }
    let [Some(first), Some(second)] = [tables.flow_bucket(buckets[0]), tables.flow_bucket(buckets[1])] else {
        return false;
    };
    // The first bucket is the one that a lookup reads first; the emptier one keeps the table useful for longer.
    let room = free(first);
    let (first, second) = if room >= 2 || room >= free(second) { (first, second) } else { (second, first) };
    claim(first, key, value, State::Empty)
        || claim(second, key, value, State::Empty)
        || claim(first, key, value, State::Candidate)
        || claim(second, key, value, State::Candidate)
}

/// Puts a flow into an entry of the bucket that is in the state `taken`.
#[inline(always)]
fn claim(bucket: &FlowBucketWords, key: u64, value: FlowWord, taken: State) -> bool {
    if key_is_udp_class(key) && udp_entries(bucket) >= UDP_PER_BUCKET {
        return false;
    }
    for entry in &bucket.entries {
        let old = FlowWord(entry.word.load());
        if old.state() == taken && entry.word.compare_exchange(old.0, BUSY) == old.0 {
            entry.key.store(key);
            entry.word.store(value.0);
            return true;
        }
    }
    false
}

#[inline(always)]
fn free(bucket: &FlowBucketWords) -> usize {
    let mut count = 0;
    for entry in &bucket.entries {
        if FlowWord(entry.word.load()).state() == State::Empty {
            count += 1;
        }
    }
    count
}

#[inline(always)]
fn udp_entries(bucket: &FlowBucketWords) -> usize {
    let mut count = 0;
    for entry in &bucket.entries {
        if FlowWord(entry.word.load()).state() != State::Empty && key_is_udp_class(entry.key.load()) {
            count += 1;
        }
    }
    count
}
