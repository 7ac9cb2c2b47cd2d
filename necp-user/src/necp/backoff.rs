//! When a server element dials again (§5.4).

use std::time::Duration;

/// The first delay, and the least that the limit may be (§5.4).
pub const FIRST: Duration = Duration::from_secs(1);
/// The draft's default for the longest delay (§5.4).
pub const DEFAULT_MAX: Duration = Duration::from_secs(256);

/// Delays that double from 1 s up to a limit: for connects that failed and INITs that went unanswered (§5.4).
///
/// With a limit of 1 s it means "retry every second".
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    /// Delays of 1 s, 2 s, 4 s … `max`; a `max` below 1 s counts as 1 s.
    #[must_use]
    pub fn new(max: Duration) -> Self {
        Self { next: FIRST, max: max.max(FIRST) }
    }

    /// How long to wait before the next attempt.
    pub fn next_delay(&mut self) -> Duration {
        let delay = self.next.min(self.max);
        self.next = delay.saturating_mul(2).min(self.max);
        delay
    }

    /// As [`Self::next_delay`], less a random part of at most a tenth, so that many SEs do not return in step.
    ///
    /// `random` is any evenly distributed number.
    pub fn next_delay_jittered(&mut self, random: u64) -> Duration {
        let delay = self.next_delay();
        let share = (random >> 32) as u32;
        delay - Duration::from_nanos(((u128::from(share) * (delay.as_nanos() / 10)) >> 32) as u64)
    }

    /// Begins again at 1 s: call it when a session became ready.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(DEFAULT_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(backoff: &mut Backoff, count: usize) -> Vec<u64> {
        (0..count).map(|_| backoff.next_delay().as_secs()).collect()
    }

    /// §5.4: exponential, 1 s to 256 s by default.
    #[test]
    fn doubles_from_one_second_to_the_limit() {
        let mut backoff = Backoff::default();
        assert_eq!(seconds(&mut backoff, 11), [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256]);
        backoff.reset();
        assert_eq!(seconds(&mut backoff, 2), [1, 2]);
    }

    /// §5.4: an upper limit of one second means "retry every second"; one that is no power of two is kept exactly.
    #[test]
    fn honours_its_limit() {
        assert_eq!(seconds(&mut Backoff::new(Duration::ZERO), 3), [1, 1, 1]);
        assert_eq!(seconds(&mut Backoff::new(Duration::from_secs(1)), 3), [1, 1, 1]);
        assert_eq!(seconds(&mut Backoff::new(Duration::from_secs(5)), 5), [1, 2, 4, 5, 5]);
    }

    #[test]
    fn jitter_takes_off_at_most_a_tenth() {
        for random in [0, 1 << 40, u64::MAX / 2, u64::MAX] {
            let delay = Backoff::default().next_delay_jittered(random);
            assert!(delay <= FIRST && delay >= FIRST * 9 / 10, "{delay:?}");
        }
        assert_eq!(Backoff::default().next_delay_jittered(0), FIRST);
        assert!(Backoff::default().next_delay_jittered(u64::MAX) < FIRST * 91 / 100);
    }
}
