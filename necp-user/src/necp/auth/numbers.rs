//! Sequence numbers (§5.9.2): which ones to ask for, and which ones to accept.

/// A number may skip this many, less one. What is farther away belongs to another connection, or to the other direction.
const MAX_GAP: u64 = 1 << 30;
/// In-place restarts are this far apart: more than a peer can have sent before it has our answer.
const RESTART: u64 = 1 << 24;
/// The low half of an initial number is 0 (§5.9.2); a connection's numbers stay below the next high half.
const LOW: u64 = 0xffff_ffff;

/// The initial numbers of one side, strictly increasing over all its connections and restarts: the high 32 bits are the
/// clock in seconds (§5.9.2), or one more than the last one if the clock does not suffice; the low ones are 0.
///
/// Numbers are reserved before they are used: whoever has a disk writes [`Self::reserved`] down first, and begins with
/// what was written there the next time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InitialNumbers {
    /// High half of the least number that was not handed out.
    next: u64,
    /// High half of the least number that is not reserved.
    reserved: u64,
}

impl InitialNumbers {
    /// Continues behind everything that was reserved before; 0 if nothing was.
    #[must_use]
    pub fn continued(reserved: u32) -> Self {
        Self { next: reserved.into(), reserved: reserved.into() }
    }

    /// Reserves the next `count` numbers at `clock` (seconds since 1970) if the next one is not reserved already; says
    /// whether [`Self::reserved`] has to be written down before [`Self::take`].
    pub fn reserve(&mut self, clock: u32, count: u32) -> bool {
        self.next = self.next.max(clock.into());
        if self.next < self.reserved {
            return false;
        }
        self.reserved = self.next + u64::from(count.max(1));
        true
    }

    /// What to write down: the least high half that is still free. `None` once 32 bits do not suffice.
    #[must_use]
    pub fn reserved(&self) -> Option<u32> {
        self.reserved.try_into().ok()
    }

    /// The next number, if one is reserved.
    pub fn take(&mut self) -> Option<u64> {
        let high = Some(self.next).filter(|next| *next < self.reserved).and_then(|next| u32::try_from(next).ok())?;
        self.next += 1;
        Some(u64::from(high) << 32)
    }
}

/// The number to demand of a peer that demands `theirs`: `first`, or one of the same high half that is so far from it
/// that the two directions' numbers do not mix, and a message that is sent back to its sender is not taken for a new one.
#[must_use]
pub fn apart_from(first: u64, theirs: u64) -> u64 {
    if is_apart(first, theirs) { first } else { first | (3 * MAX_GAP) }
}

/// Whether the numbers that follow `first` and those that follow `theirs` do not mix.
#[must_use]
pub fn is_apart(first: u64, theirs: u64) -> bool {
    first.abs_diff(theirs) >= 2 * MAX_GAP
}

/// What a number says about its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// It is new.
    Fresh,
    /// It is the first one that follows an offer to start over: see [`Inbound::offer_restart`].
    Restarted,
    /// It was used before, or never belonged here.
    Stale,
}

/// Which numbers are accepted from the peer: larger ones than the last, gaps allowed. Nothing but a verified message may
/// be shown to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inbound {
    /// The least number that is accepted; none is left behind the largest of all.
    least: Option<u64>,
    offered: Option<u64>,
}

impl Inbound {
    /// Accepts `first` and what follows it.
    #[must_use]
    pub fn starting_at(first: u64) -> Self {
        Self { least: Some(first), offered: None }
    }

    /// Takes in the number of a verified message.
    pub fn accept(&mut self, number: u64) -> Freshness {
        let follows = |least: u64| number >= least && number - least < MAX_GAP;
        if self.offered.is_some_and(follows) {
            *self = Self { least: number.checked_add(1), offered: None };
            return Freshness::Restarted;
        }
        if !self.least.is_some_and(follows) {
            return Freshness::Stale;
        }
        self.least = number.checked_add(1);
        // A peer that goes on counting has not started over; it must not reach the offer by counting.
        self.offered = self.offered.filter(|offered| number.saturating_add(RESTART / 2) < *offered);
        Freshness::Fresh
    }

    /// The number to demand of a peer that asks to start over on the same connection, demanding `theirs`. Both numbers,
    /// the offered one and those of the session as it is, are accepted until one of the offered ones has come: an INIT
    /// may be a replay. `None` if the connection has no numbers left for it, or if our answer, which has the number `theirs`,
    /// would be fresh here when it is sent back.
    pub fn offer_restart(&mut self, theirs: u64) -> Option<u64> {
        let least = self.least?;
        if theirs >= least && theirs - least < MAX_GAP {
            return None;
        }
        let near = self.offered.or(least.checked_add(RESTART))?;
        let offer = if near.abs_diff(theirs) < MAX_GAP { near.checked_add(2 * MAX_GAP)? } else { near };
        if offer.abs_diff(theirs) < MAX_GAP || offer > (least | LOW) - RESTART {
            return None;
        }
        self.offered = Some(offer);
        Some(offer)
    }
}
