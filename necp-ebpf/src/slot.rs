//! One slot of a slot table: a single word, so that no packet ever sees half a change.
//!
//! ```text
//!  63  58 57           56        55      32 31   24 23      0
//! +------+------------+---------+---------+-------+---------+
//! |  0   | COLLECTING | TRACKED | legacy  |   0   |  owner  |
//! +------+------------+---------+---------+-------+---------+
//! ```
//! A slot is *plain* while legacy is empty and both bits are clear: every TCP packet then goes to the owner, without a
//! record. Owner and legacy are changed by user space only; the packet path only sets TRACKED.

use crate::abi::{NONE, Slot};

const ID_MASK: u64 = 0xff_ffff;
const LEGACY_SHIFT: u32 = 32;
const FLAGS_SHIFT: u32 = 56;

/// Some flow of this slot may be on record.
pub const TRACKED: u64 = 1 << FLAGS_SHIFT;
/// User space is looking whether any flow of this slot still is; means the same as TRACKED.
pub const COLLECTING: u64 = 2 << FLAGS_SHIFT;

/// The value of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotWord(pub u64);

impl SlotWord {
    /// A plain slot.
    #[inline(always)]
    pub const fn plain(owner: u32) -> Self {
        Self(owner as u64 & ID_MASK)
    }

    /// Where new flows go.
    #[inline(always)]
    pub const fn owner(self) -> u32 {
        (self.0 & ID_MASK) as u32
    }

    /// Where flows go that are not on record, because they began before the owner came; [`NONE`] if nowhere.
    #[inline(always)]
    pub const fn legacy(self) -> u32 {
        (self.0 >> LEGACY_SHIFT & ID_MASK) as u32
    }

    /// The owner alone decides.
    #[inline(always)]
    pub const fn is_plain(self) -> bool {
        self.0 & !ID_MASK == 0
    }

    /// TRACKED or COLLECTING.
    #[inline(always)]
    pub const fn is_tracked(self) -> bool {
        self.0 & (TRACKED | COLLECTING) != 0
    }

    /// The same slot with another legacy.
    pub const fn with_legacy(self, legacy: u32) -> Self {
        Self(self.0 & !(ID_MASK << LEGACY_SHIFT) | (legacy as u64 & ID_MASK) << LEGACY_SHIFT)
    }

    /// The same slot with other bits set and cleared.
    pub const fn with_bits(self, set: u64, clear: u64) -> Self {
        Self(self.0 & !(clear & (TRACKED | COLLECTING)) | set & (TRACKED | COLLECTING))
    }

    /// The slot after a change of owner: the rule "Change" of just-enough tracking.
    ///
    /// The old owner becomes the legacy unless a living one is there already or the old owner's host is gone; a change back
    /// to the legacy empties it and sets TRACKED, because flows of the owner in between may be on record. A slot that
    /// nobody ever served has no flows to remember.
    pub fn moved_to(self, owner: u32, alive: impl Fn(u32) -> bool) -> Self {
        if owner == self.owner() {
            return self;
        }
        let old = self.owner();
        let mut legacy = self.legacy();
        if legacy != NONE && !alive(legacy) {
            legacy = NONE;
        }
        if legacy == NONE && old != NONE && alive(old) {
            legacy = old;
        }
        let moved = Self(self.0 & !ID_MASK | owner as u64 & ID_MASK);
        if legacy == owner { moved.with_legacy(NONE).with_bits(TRACKED, 0) } else { moved.with_legacy(legacy) }
    }
}

impl From<Slot> for SlotWord {
    fn from(slot: Slot) -> Self {
        let [a, b, c] = slot.legacy;
        Self(slot.owner as u64 & ID_MASK)
            .with_legacy(u32::from_le_bytes([a, b, c, 0]))
            .with_bits((slot.flags as u64) << FLAGS_SHIFT, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_remembers_the_first_owner_until_it_comes_back() {
        let all = |_| true;
        let slot = SlotWord::plain(2).moved_to(3, all);
        assert_eq!((slot.owner(), slot.legacy(), slot.is_tracked(), slot.is_plain()), (3, 2, false, false));
        let slot = slot.moved_to(4, all);
        assert_eq!((slot.owner(), slot.legacy()), (4, 2));
        let slot = slot.moved_to(2, all);
        assert_eq!((slot.owner(), slot.legacy(), slot.is_tracked()), (2, NONE, true));
    }

    #[test]
    fn a_dead_legacy_makes_room_and_a_dead_owner_leaves_none() {
        let slot = SlotWord::plain(2).moved_to(3, |_| true).moved_to(4, |id| id != 2);
        assert_eq!((slot.owner(), slot.legacy()), (4, 3));
        let slot = SlotWord::plain(2).moved_to(3, |id| id != 2);
        assert_eq!((slot.owner(), slot.legacy(), slot.is_plain()), (3, NONE, true));
        let slot = SlotWord::plain(NONE).moved_to(3, |_| true);
        assert!(slot.is_plain(), "nobody was there before");
    }

    #[test]
    fn the_record_and_the_word_are_the_same_eight_bytes() {
        let slot = Slot { owner: 0x01_0203, legacy: [6, 5, 4], flags: 3 };
        // SAFETY: both are eight bytes without padding.
        let word: u64 = unsafe { core::mem::transmute(slot) };
        assert_eq!(SlotWord(word), SlotWord::from(slot));
        assert_eq!(SlotWord(word).legacy(), 0x04_0506);
        assert_eq!(SlotWord(word).0 & (TRACKED | COLLECTING), TRACKED | COLLECTING);
    }
}
