//! Room in the flow table: who may take an entry, so that no flood of flows costs others theirs.
//!
//! Anybody can make records: one datagram to a UDP service does, one stray ACK to a slot with a legacy, a SYN and a forged ACK
//! (the sender knows its own sequence number) to a slot in transition or to a service whose flows are all on record. So entries
//! are of three classes, and each has a quota of every bucket:
//! - *UDP* (and others without a visible beginning): [`UDP_PER_BUCKET`].
//! - *Change*: TCP flows that are on record only because their slot has a legacy. Without an entry such a flow goes on, at the
//!   legacy; so of all classes this may be turned away soonest.
//! - *Lasting*: TCP flows that would be misplaced without: of services whose flows are all on record (their replies must find
//!   them), and those that an exception sent elsewhere.
//!
//! One entry of each bucket is reserved: in buckets with an even number for UDP, in odd ones for the lasting. A flow's two
//! buckets are one of each ([`flow_buckets`](crate::hash::flow_buckets)), so whatever comes of the other classes, and at any
//! rate, UDP flows and lasting ones have an eighth of the table each.

use crate::{
    abi::FLOWS_PER_BUCKET,
    flows::{CHANGE_SHIFT, FlowBucketWords, FlowWord, State, count, is_in, lowest, opaque, udp_class},
    tables::Tables,
};

/// Entries of a bucket that flows without a visible beginning (UDP and others) may take.
pub const UDP_PER_BUCKET: u64 = 2;
/// Entries of a bucket that all together may take but the class for which the last one is reserved.
pub const SHARED_PER_BUCKET: u64 = 3;

/// Makes a new entry in one of two buckets, which may be the same one; false if there is no room for it.
#[inline(always)]
pub fn insert_into<T: Tables>(tables: &T, [first, second]: [u32; 2], key: u64, value: FlowWord) -> bool {
    let [Some(a), Some(b)] = [tables.flow_bucket(first), tables.flow_bucket(second)] else { return false };
    let new = New::of(key, value);
    let (bucket, index) = if prefers_first(a, first, b, second, &new) { (a, first) } else { (b, second) };
    // A second attempt for the case that another CPU was faster at the same entry.
    claim(bucket, index, key, value, &new) || claim(bucket, index, key, value, &new)
}

/// A new entry's class: 1 or 0.
struct New {
    udp: u64,
    change: u64,
}

impl New {
    #[inline(always)]
    fn of(key: u64, value: FlowWord) -> Self {
        let udp = udp_class(key);
        Self { udp, change: value.0 >> CHANGE_SHIFT & 1 & (1 ^ udp) }
    }
}

/// Entries of a bucket that can be taken, as masks.
struct Takeable {
    empty: u64,
    candidates: u64,
}

impl Takeable {
    /// How much room there is.
    #[inline(always)]
    fn room(&self) -> u64 {
        count(self.empty) * ROOM + count(self.candidates)
    }
}

/// Weight of a free entry against that of one that can be overwritten.
const ROOM: u64 = 8;

/// Where a new flow belongs. The first bucket is the one that a lookup reads first, so it is preferred while it is nearly
/// empty; then the emptier one, so that the table turns flows away late. If both are full, the one in which a candidate can be
/// overwritten. A bucket whose quota is used up has no room, however empty it is.
#[inline(always)]
fn prefers_first(a: &FlowBucketWords, first: u32, b: &FlowBucketWords, second: u32, new: &New) -> bool {
    let (a, b) = (takeable(a, first, new).room(), takeable(b, second, new).room());
    a >= 3 * ROOM || a >= b
}

#[inline(always)]
fn takeable(bucket: &FlowBucketWords, index: u32, new: &New) -> Takeable {
    let (empty, candidates) = (bucket.in_state(State::Empty), bucket.in_state(State::Candidate));
    let udp = bucket.lanes(|entry| udp_class(entry.key.load())) & !empty;
    let change = bucket.lanes(|entry| entry.word.load() >> CHANGE_SHIFT & 1) & !udp;
    let odd = (index & 1) as u64;
    let lasting = !(empty | udp | change) & 0xf;
    // All but the class that has the last entry; a new one of that class is none of them.
    let shared = change | select(odd, udp, lasting);
    let is_shared = 1 ^ select(odd, 1 ^ (new.udp | new.change), new.udp);
    let shared_up = at_least(count(shared), SHARED_PER_BUCKET) & is_shared;
    let udp_up = at_least(count(udp), UDP_PER_BUCKET) & new.udp;
    // Where the shared entries are used up, a candidate among them can still give way: their number stays the same.
    let gives_way = candidates & (shared | all(1 ^ shared_up));
    Takeable { empty: empty & !all(shared_up | udp_up), candidates: gives_way & !all(udp_up) }
}

/// Takes a free entry, or else one of a candidate.
#[inline(always)]
fn claim(bucket: &FlowBucketWords, index: u32, key: u64, value: FlowWord, new: &New) -> bool {
    let Takeable { empty, candidates } = takeable(bucket, index, new);
    let mask = if empty != 0 { empty } else { candidates };
    if mask == 0 {
        return false;
    }
    // Any of the candidates: were it always the same entry, the youngest would go first.
    let words = &bucket.entries[lowest_from(key ^ key >> 32, mask)];
    let old = words.word.load();
    // A free entry that has just become a candidate is left alone: there may be other free ones.
    let takeable = if empty != 0 { is_in(old, State::Empty) } else { is_in(old, State::Candidate) };
    if takeable == 0 || words.word.compare_exchange(old, FlowWord::BUSY.0) != old {
        return false;
    }
    words.key.store(key);
    words.word.store(value.0);
    true
}

/// Index of the first bit of a mask of four, from this one on (of the index, two bits count).
#[inline(always)]
fn lowest_from(start: u64, mask: u64) -> usize {
    let start = opaque(start) & 3;
    // Twice the mask, so that it goes round.
    let turned = (mask | mask << FLOWS_PER_BUCKET) >> start & 0xf;
    (lowest(turned) + start as usize) % FLOWS_PER_BUCKET
}

/// `yes` if the condition is 1, `no` if it is 0, without a branch.
#[inline(always)]
fn select(condition: u64, yes: u64, no: u64) -> u64 {
    yes & all(condition) | no & all(1 ^ condition)
}

/// All bits if the condition is 1, none if it is 0.
#[inline(always)]
fn all(condition: u64) -> u64 {
    opaque(condition).wrapping_neg()
}

/// 1 if a small number is at least another one, else 0.
#[inline(always)]
fn at_least(number: u64, least: u64) -> u64 {
    1 ^ (opaque(number.wrapping_sub(least)) >> 63)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flows::{Found, UDP_CLASS_BIT, insert},
        host::Owned,
    };

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Class {
        Udp,
        Change,
        Lasting,
    }

    const CLASSES: [Class; 3] = [Class::Udp, Class::Change, Class::Lasting];

    impl Class {
        fn entry(self, number: u64) -> (u64, FlowWord) {
            let key = if self == Self::Udp { 1 << UDP_CLASS_BIT | number } else { number };
            (key, FlowWord::record(2, 0, false).for_change(self == Self::Change))
        }
    }

    /// How many records of a class find room in a bucket, in addition to what is there.
    fn add(tables: &mut Owned, bucket: u32, class: Class, first: u64) -> usize {
        let view = tables.view();
        let add = |number| {
            let (key, word) = class.entry(number);
            insert(&view, [bucket; 2], &Found::default(), key, word)
        };
        (first..first + 9).filter(|&number| add(number)).count()
    }

    #[test]
    fn a_flood_of_one_class_ends_at_its_quota() {
        for (class, bucket, quota) in [
            (Class::Udp, 0, 2),
            (Class::Udp, 1, 2),
            (Class::Change, 0, 3),
            (Class::Change, 1, 3),
            (Class::Lasting, 0, 3),
            (Class::Lasting, 1, 4),
        ] {
            let mut tables = Owned::new(1, 1, 2);
            assert_eq!(add(&mut tables, bucket, class, 1), quota, "{class:?} in bucket {bucket}");
        }
    }

    #[test]
    fn floods_of_all_others_in_any_order_leave_the_reserved_entry() {
        for (mine, bucket) in [(Class::Udp, 0), (Class::Lasting, 1)] {
            for first in CLASSES.into_iter().filter(|&class| class != mine) {
                for second in CLASSES.into_iter().filter(|&class| class != mine) {
                    let mut tables = Owned::new(1, 1, 2);
                    let others = add(&mut tables, bucket, first, 1) + add(&mut tables, bucket, second, 100);
                    assert_eq!(add(&mut tables, bucket, mine, 200), FLOWS_PER_BUCKET - others, "{mine:?} {first:?}");
                    assert!(others < FLOWS_PER_BUCKET, "{first:?} and {second:?} left {mine:?} nothing");
                }
            }
        }
    }

    #[test]
    fn every_entry_is_the_first_of_some_flow() {
        for mask in 1..16u64 {
            for start in 0..4u64 {
                let expected = (start..start + 4).map(|index| index % 4).find(|index| mask >> index & 1 != 0);
                assert_eq!(Some(lowest_from(start, mask) as u64), expected, "{mask:#06b} from {start}");
            }
        }
    }

    #[test]
    fn a_candidate_among_the_shared_entries_gives_way_and_the_reserved_one_stays() {
        let mut tables = Owned::new(1, 1, 2);
        assert_eq!(add(&mut tables, 0, Class::Change, 1), 3);
        let view = tables.view();
        let candidate = FlowWord(FlowWord::record(2, 0, false).0 - 1).for_change(true);
        assert_eq!(candidate.state(), State::Candidate);
        let entries = &view.flows()[0].entries;
        let free = entries.iter().position(|entry| entry.read().is_none());
        let taken = entries.iter().position(|entry| entry.read().is_some()).expect("three are taken");
        entries[taken].word.store(candidate.0);
        let (key, word) = Class::Change.entry(50);
        assert!(insert(&view, [0, 0], &Found::default(), key, word));
        assert_eq!(entries[taken].read(), Some((key, word)));
        assert_eq!(entries.iter().position(|entry| entry.read().is_none()), free);
        assert!(!insert(&view, [0, 0], &Found::default(), 51, word), "no candidate is left");
    }
}
