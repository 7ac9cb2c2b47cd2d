//! The Health Index (§5.5.3).

use std::fmt;

/// A Health Index: 0–100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthIndex(u8);

impl HealthIndex {
    /// No new work.
    pub const NONE: Self = Self(0);
    /// Perfect.
    pub const FULL: Self = Self(100);

    /// The index `value`, if it is one.
    pub const fn new(value: u8) -> Option<Self> {
        if value <= 100 { Some(Self(value)) } else { None }
    }

    /// Its value, 0–100.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The nearest index to a measure of how well a server is, never 0: a busy server is still a server.
    pub(crate) fn of_measure(measure: f64) -> Self {
        Self(measure.clamp(1.0, 100.0).round() as u8)
    }

    /// Reads a number that somebody wrote, rounding it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let number: f64 = text.parse().ok()?;
        (0.0..=100.0).contains(&number).then(|| Self(number.round() as u8))
    }
}

impl fmt::Display for HealthIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_and_bounded() {
        for (text, value) in [("0", Some(0)), ("99.5", Some(100)), ("0.4", Some(0)), ("100.1", None), ("-1", None)] {
            assert_eq!(HealthIndex::parse(text).map(HealthIndex::get), value, "{text}");
        }
        for text in ["nan", "inf", "", "1 2"] {
            assert_eq!(HealthIndex::parse(text), None, "{text}");
        }
        assert_eq!((HealthIndex::of_measure(-5.0).get(), HealthIndex::of_measure(f64::INFINITY).get()), (1, 100));
        assert_eq!(HealthIndex::new(101), None);
    }
}
