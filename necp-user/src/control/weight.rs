//! What a server's health and its time in the service make of its weight.

use std::time::{Duration, Instant};

/// Health levels are multiples of this (except for 1, the lowest that takes flows).
const QUANTUM: u8 = 5;
/// How far a health index must be from the level for the level to follow: two observations with ±5 points of noise are
/// at most 10 apart, and a level at most 2 from the one that it was made from.
const DEADBAND: u8 = 12;
/// Capacity 1.0, in the thousandths in which capacities are configured.
pub const CAPACITY_ONE: u32 = 1000;
/// The largest capacity, in thousandths.
pub const CAPACITY_MAX: u32 = 1_000_000;
/// The weight of a server of capacity 1.0 with health 100 that is past its slow start.
pub const ONE: u32 = 100 * CAPACITY_ONE;
/// Steps of a slow start.
const STEPS: u32 = 5;

/// A health index (draft §5.5.1: 0–100), quantised with hysteresis so that ±5 points of noise move nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    level: u8,
    /// The last answer; none before the first.
    index: Option<u8>,
}

impl Default for Health {
    /// Perfect until the server says otherwise.
    fn default() -> Self {
        Self { level: 100, index: None }
    }
}

impl Health {
    /// Notes an answer; above 100 it is ignored. Going to 0 and leaving it act at once. True if the level changed.
    pub fn observe(&mut self, index: u8) -> bool {
        if index > 100 {
            return false;
        }
        self.index = Some(index);
        let stays = (index == 0) == (self.level == 0) && index.abs_diff(self.level) <= DEADBAND;
        if stays || index == self.level {
            return false;
        }
        let rounded = (index + QUANTUM / 2) / QUANTUM * QUANTUM;
        let level = if index == 0 { 0 } else { rounded.max(1) };
        std::mem::replace(&mut self.level, level) != level
    }

    /// The level in force, 0–100.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// The last answer; none before the first.
    pub fn index(&self) -> Option<u8> {
        self.index
    }
}

/// Weight of a server: `level` (0–100) × `capacity` (thousandths) × its slow start; 0 only if one of the first two is.
///
/// `joined` is when a slow start of length `slow_start` began; none: it is past.
pub fn weight(level: u8, capacity: u32, joined: Option<Instant>, slow_start: Duration, now: Instant) -> u32 {
    let full = u64::from(level) * u64::from(capacity.min(CAPACITY_MAX));
    if full == 0 {
        return 0;
    }
    let step = joined.map_or(STEPS, |joined| step(joined, slow_start, now));
    (full * u64::from(step) / u64::from(STEPS)).max(1) as u32
}

/// When a slow start's next step is due; none if it is past.
pub fn next_step(joined: Instant, slow_start: Duration, now: Instant) -> Option<Instant> {
    let step = step(joined, slow_start, now);
    (step < STEPS).then(|| joined + slow_start * step / (STEPS - 1))
}

/// 1 at first, [`STEPS`] when all of `slow_start` has passed.
fn step(joined: Instant, slow_start: Duration, now: Instant) -> u32 {
    let elapsed = now.saturating_duration_since(joined);
    (1..STEPS).rev().find(|&step| elapsed >= slow_start * step / (STEPS - 1)).map_or(1, |step| step + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_points_of_noise_move_nothing() {
        for truth in 6..=95_u8 {
            let band = truth - 5..=truth + 5;
            // Any level that the band's own answers can lead to, from anywhere.
            for before in 0..=100 {
                for first in band.clone() {
                    let mut health = Health::default();
                    health.observe(0);
                    health.observe(before);
                    health.observe(first);
                    // One more answer may show that the truth is elsewhere; from then on there is rest.
                    for second in band.clone() {
                        let mut health = health;
                        if health.observe(second) {
                            for third in band.clone() {
                                assert!(
                                    !health.observe(third),
                                    "truth {truth}, answers {before} {first} {second} {third}"
                                );
                            }
                        }
                    }
                }
            }
            let mut health = Health::default();
            health.observe(0);
            for first in band.clone() {
                health.observe(0);
                assert!(health.observe(first));
                for second in band.clone() {
                    assert!(!health.clone().observe(second), "a level made of {first} moves with {second}");
                }
            }
        }
    }

    #[test]
    fn nothing_and_something_act_at_once() {
        let mut health = Health::default();
        assert_eq!((health.level(), health.index()), (100, None));
        assert!(health.observe(0));
        assert_eq!(health.level(), 0);
        assert!(health.observe(1));
        assert_eq!(health.level(), 1);
        assert!(!health.observe(101), "not a health index");
        assert_eq!((health.level(), health.index()), (1, Some(1)));
        assert!(health.observe(0));
    }

    #[test]
    fn a_large_change_is_followed() {
        let mut health = Health::default();
        assert!(!health.observe(88));
        assert!(health.observe(87));
        assert_eq!(health.level(), 85);
        assert!(health.observe(20));
        assert_eq!(health.level(), 20);
        assert!(health.observe(100));
        assert_eq!(health.level(), 100);
    }

    #[test]
    fn a_slow_start_rises_in_steps_and_ends() {
        let now = Instant::now();
        let length = Duration::from_secs(10);
        let at = |seconds: f64| now + Duration::from_secs_f64(seconds);
        let weight_at = |seconds| weight(100, CAPACITY_ONE, Some(now), length, at(seconds));
        assert_eq!(
            [0.0, 2.4, 2.5, 5.0, 7.5, 9.9, 10.0, 1e6].map(weight_at),
            [20_000, 20_000, 40_000, 60_000, 80_000, 80_000, 100_000, 100_000]
        );
        assert_eq!(next_step(now, length, at(0.0)), Some(at(2.5)));
        assert_eq!(next_step(now, length, at(9.0)), Some(at(10.0)));
        assert_eq!(next_step(now, length, at(10.0)), None);
        assert_eq!(weight(100, CAPACITY_ONE, Some(now), Duration::ZERO, now), 100_000);
    }

    #[test]
    fn weight_is_health_times_capacity() {
        let now = Instant::now();
        let full = |level, capacity| weight(level, capacity, None, Duration::ZERO, now);
        assert_eq!(full(50, 2 * CAPACITY_ONE), full(100, CAPACITY_ONE));
        assert_eq!(full(0, CAPACITY_ONE), 0);
        assert_eq!(full(100, 0), 0);
        assert_eq!(full(1, 1), 1);
        assert_eq!(full(100, u32::MAX), 100_000_000);
    }
}
