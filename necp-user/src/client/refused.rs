//! Services that a network element refused to start.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::necp::{Backoff, ServiceKey, ServiceUnit};

/// What a network element refused to START, and when to ask again: what is missing there may come, such as a new
/// configuration or a neighbour entry.
#[derive(Debug)]
pub(super) struct Refused {
    services: BTreeSet<ServiceKey>,
    backoff: Backoff,
    due: Option<Instant>,
}

impl Refused {
    pub(super) fn new(retry_max: Duration) -> Self {
        Self { services: BTreeSet::new(), backoff: Backoff::new(retry_max), due: None }
    }

    /// The services that have just been started, given those that failed: of all offers at first, then of those that
    /// had been refused.
    pub(super) fn asked(&self, offers: &[ServiceUnit], failed: &[ServiceKey]) -> Vec<ServiceKey> {
        let asked = offers.iter().map(ServiceUnit::key);
        asked
            .filter(|key| self.services.is_empty() || self.services.contains(key))
            .filter(|key| !failed.contains(key))
            .collect()
    }

    /// Takes in an answer; says whether the refusals are news.
    pub(super) fn answered(&mut self, now: Instant, failed: &[ServiceKey]) -> bool {
        let failed: BTreeSet<_> = failed.iter().copied().collect();
        let news = !failed.is_empty() && failed != self.services;
        self.due = (!failed.is_empty()).then(|| now + self.backoff.next_delay());
        self.services = failed;
        news
    }

    /// The services that are refused.
    pub(super) fn services(&self) -> Vec<ServiceKey> {
        self.services.iter().copied().collect()
    }

    /// When to ask again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// What to ask for again now, if it is time.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<BTreeSet<ServiceKey>> {
        self.due.take_if(|due| *due <= now).map(|_| self.services.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::necp::Forwarding;

    fn key(port: u16) -> ServiceKey {
        ServiceKey::new(6, port)
    }

    #[test]
    fn refused_services_are_asked_for_again_at_growing_distances() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let offers = [80, 81, 82].map(|port| ServiceUnit::new(Forwarding::L2, key(port)));
        let mut refused = Refused::new(Duration::from_secs(2));
        assert_eq!(refused.asked(&offers, &[key(81), key(82)]), [key(80)]);
        assert!(refused.answered(start, &[key(81), key(82)]), "it is news");
        assert_eq!(refused.take_due(start), None);
        assert_eq!(refused.take_due(after(1)), Some(BTreeSet::from([key(81), key(82)])));
        assert_eq!((refused.take_due(after(9)), refused.due()), (None, None), "not twice without an answer");

        assert!(!refused.answered(after(1), &[key(81), key(82)]), "known already");
        assert_eq!(refused.due(), Some(after(3)));
        assert_eq!(refused.asked(&offers, &[key(82)]), [key(81)]);
        assert!(refused.answered(after(3), &[key(82)]));
        assert_eq!(refused.due(), Some(after(5)), "the limit holds");
        assert_eq!(refused.asked(&offers, &[]), [key(82)]);
        assert!(!refused.answered(after(5), &[]));
        assert_eq!((refused.take_due(after(99)), refused.due()), (None, None));
    }
}
