//! Services that a network element refused to start.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::necp::{Backoff, ServiceKey};

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

    /// Takes in an answer to a START of `asked`, of which these failed; says whether the refusals are news.
    pub(super) fn answered(&mut self, now: Instant, asked: &[ServiceKey], failed: &[ServiceKey]) -> bool {
        let news = failed.iter().any(|key| !self.services.contains(key));
        self.services.retain(|key| !asked.contains(key));
        self.services.extend(failed);
        if !failed.is_empty() {
            self.due = Some(now + self.backoff.next_delay());
        } else if self.services.is_empty() {
            self.due = None;
        }
        news
    }

    /// These are not wanted any more.
    pub(super) fn forget(&mut self, services: &[ServiceKey]) {
        self.services.retain(|key| !services.contains(key));
        self.due = self.due.filter(|_| !self.services.is_empty());
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

    fn key(port: u16) -> ServiceKey {
        ServiceKey::new(6, port)
    }

    #[test]
    fn refused_services_are_asked_for_again_at_growing_distances() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let [a, b, c] = [80, 81, 82].map(key);
        let mut refused = Refused::new(Duration::from_secs(2));
        assert!(refused.answered(start, &[a, b, c], &[b, c]), "it is news");
        assert_eq!(refused.take_due(start), None);
        assert_eq!(refused.take_due(after(1)), Some(BTreeSet::from([b, c])));
        assert_eq!((refused.take_due(after(9)), refused.due()), (None, None), "not twice without an answer");

        assert!(!refused.answered(after(1), &[b, c], &[b, c]), "known already");
        assert_eq!(refused.due(), Some(after(3)));
        assert!(!refused.answered(after(3), &[b, c], &[c]), "less than before");
        assert_eq!((refused.due(), refused.services()), (Some(after(5)), vec![c]), "the limit holds");
        assert!(!refused.answered(after(5), &[c], &[]));
        assert_eq!((refused.take_due(after(99)), refused.due()), (None, None));
    }

    #[test]
    fn one_that_is_asked_for_alone_leaves_the_others_as_they_are() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let [a, b, c] = [80, 81, 82].map(key);
        let mut refused = Refused::new(Duration::from_secs(2));
        assert!(refused.answered(start, &[a, b], &[b]));
        assert!(!refused.answered(start, &[c], &[]));
        assert_eq!((refused.services(), refused.due()), (vec![b], Some(after(1))));
        assert!(refused.answered(start, &[c], &[c]), "the way it is wanted now is refused");
        assert_eq!((refused.services(), refused.due()), (vec![b, c], Some(after(2))));
        refused.forget(&[b, a]);
        assert_eq!((refused.services(), refused.due()), (vec![c], Some(after(2))));
        refused.forget(&[c]);
        assert_eq!((refused.services(), refused.due()), (vec![], None));
    }
}
