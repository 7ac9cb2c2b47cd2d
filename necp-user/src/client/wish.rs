//! What the application wants of every network element, kept for those that forget: state is hard (§5.4), so an element
//! holds nothing for a server element that has just said INIT.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::necp::{Exception, Flows, Scope, ServiceKey, ServiceUnit};

/// What to serve, and which exceptions to install.
#[derive(Debug)]
pub(super) struct Wish {
    /// Whether the services are to be started.
    pub(super) serving: bool,
    /// In the order in which they were offered first.
    offers: Vec<ServiceUnit>,
    exceptions: BTreeMap<Flows, Kept>,
    max_exceptions: usize,
    last_stamp: Stamp,
}

/// Which of several wishes for the same flows an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp(u64);

#[derive(Debug, Clone, Copy)]
struct Kept {
    scope: Scope,
    /// When it expires; `None` is never.
    until: Option<Instant>,
    stamp: Stamp,
}

/// An exception that the application wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Whom it protects, as it was asked for; an NE may have made less of it.
    pub scope: Scope,
    /// Which flows.
    pub flows: Flows,
    /// What is left of its time; `None` if it does not expire.
    pub left: Option<Duration>,
}

impl Wish {
    pub(super) fn new(offers: Vec<ServiceUnit>, max_exceptions: usize) -> Self {
        Self { serving: true, offers, exceptions: BTreeMap::new(), max_exceptions, last_stamp: Stamp(0) }
    }

    /// The services, and how their packets are wanted.
    pub(super) fn offers(&self) -> &[ServiceUnit] {
        &self.offers
    }

    /// Wants to serve these too, or in another way.
    pub(super) fn offer(&mut self, offers: &[ServiceUnit]) {
        for offer in offers {
            match self.offers.iter_mut().find(|other| other.key() == offer.key()) {
                Some(other) => *other = *offer,
                None => self.offers.push(*offer),
            }
        }
    }

    /// Wants to serve these no more.
    pub(super) fn withdraw(&mut self, services: &[ServiceKey]) {
        self.offers.retain(|offer| !services.contains(&offer.key()));
    }

    /// Wants these too, or anew; all or, if they are too many, none (`None`).
    pub(super) fn add(&mut self, now: Instant, exceptions: &[Exception]) -> Option<Stamp> {
        if self.exceptions.len() + exceptions.len() > self.max_exceptions {
            self.purge(now);
            let mut new: Vec<&Flows> = exceptions.iter().map(|exception| &exception.flows).collect();
            new.sort_unstable();
            new.dedup();
            let new = new.into_iter().filter(|flows| !self.exceptions.contains_key(flows)).count();
            if self.exceptions.len() + new > self.max_exceptions {
                return None;
            }
        }
        let stamp = Stamp(self.last_stamp.0 + 1);
        self.last_stamp = stamp;
        for exception in exceptions {
            let until = (exception.ttl > 0).then(|| now + Duration::from_secs(exception.ttl.into()));
            self.exceptions.insert(exception.flows, Kept { scope: exception.scope, until, stamp });
        }
        Some(stamp)
    }

    /// Wants this no more.
    pub(super) fn remove(&mut self, flows: &Flows) {
        self.exceptions.remove(flows);
    }

    /// Wants this no more, unless it was wanted anew since.
    pub(super) fn remove_if(&mut self, flows: &Flows, stamp: Stamp) {
        if self.exceptions.get(flows).is_some_and(|kept| kept.stamp == stamp) {
            self.remove(flows);
        }
    }

    /// Wants no exception at all.
    pub(super) fn clear(&mut self) {
        self.exceptions.clear();
    }

    /// What to install at an NE that holds nothing, with what is left of the times to live.
    pub(super) fn exceptions(&mut self, now: Instant) -> Vec<Exception> {
        self.purge(now);
        self.exceptions.iter().map(|(flows, kept)| kept.exception(*flows, now)).collect()
    }

    /// What is wanted and has not expired, in the order of the flows.
    pub(super) fn wanted(&self, now: Instant) -> Vec<Wanted> {
        let alive = self.exceptions.iter().filter(|(_, kept)| kept.is_alive(now));
        alive
            .map(|(flows, kept)| Wanted {
                scope: kept.scope,
                flows: *flows,
                left: kept.until.map(|until| until.saturating_duration_since(now)),
            })
            .collect()
    }

    fn purge(&mut self, now: Instant) {
        self.exceptions.retain(|_, kept| kept.is_alive(now));
    }
}

impl Kept {
    fn is_alive(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until > now)
    }

    fn exception(&self, flows: Flows, now: Instant) -> Exception {
        // Rounded up: a TTL of 0 would be one without end (§5.7.1).
        let left = |until: Instant| until.saturating_duration_since(now).as_millis().div_ceil(1000).max(1);
        let ttl = self.until.map_or(0, |until| u32::try_from(left(until)).unwrap_or(u32::MAX));
        Exception { scope: self.scope, ttl, flows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(port: u16, ttl: u32) -> Exception {
        Exception { scope: Scope::Global, ttl, flows: Flows { protocol: 6, port, ..Flows::ALL } }
    }

    #[test]
    fn what_is_left_of_the_time_is_installed_and_never_none() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut wish = Wish::new(Vec::new(), 9);
        wish.add(start, &[exception(1, 0), exception(2, 10), exception(3, 3600), exception(4, u32::MAX)])
            .expect("room");
        let ttls = |wish: &mut Wish, now| wish.exceptions(now).iter().map(|wanted| wanted.ttl).collect::<Vec<_>>();
        assert_eq!(ttls(&mut wish, start), [0, 10, 3600, u32::MAX]);
        assert_eq!(ttls(&mut wish, after(2500)), [0, 8, 3598, u32::MAX - 2]);
        assert_eq!(ttls(&mut wish, after(9999)), [0, 1, 3591, u32::MAX - 9], "0 would be without end");
        assert_eq!(wish.wanted(after(4000))[1].left, Some(Duration::from_secs(6)));
        assert_eq!(ttls(&mut wish, after(10_000)), [0, 3590, u32::MAX - 10], "expired");
        wish.add(after(10_000), &[exception(3, 5)]).expect("room");
        assert_eq!(ttls(&mut wish, after(10_000)), [0, 5, u32::MAX - 10], "overwritten: its time starts again");
    }

    #[test]
    fn the_limit_counts_what_is_alive_once() {
        let start = Instant::now();
        let mut wish = Wish::new(Vec::new(), 2);
        wish.add(start, &[exception(1, 1), exception(2, 0)]).expect("room");
        wish.add(start, &[exception(1, 1), exception(2, 0), exception(2, 7)]).expect("nothing new");
        assert_eq!(wish.add(start, &[exception(1, 0), exception(3, 0)]), None, "one too many");
        assert_eq!(wish.wanted(start).len(), 2, "nothing of it was taken");
        assert_eq!(wish.wanted(start)[0].left, Some(Duration::from_secs(1)));
        wish.add(start + Duration::from_secs(2), &[exception(3, 0)]).expect("one has expired");
    }

    #[test]
    fn a_wish_that_was_renewed_is_not_taken_back_by_an_old_refusal() {
        let now = Instant::now();
        let mut wish = Wish::new(Vec::new(), 9);
        let first = wish.add(now, &[exception(1, 0)]).expect("room");
        let second = wish.add(now, &[exception(1, 0)]).expect("room");
        wish.remove_if(&exception(1, 0).flows, first);
        assert_eq!(wish.wanted(now).len(), 1);
        wish.remove_if(&exception(1, 0).flows, second);
        assert_eq!(wish.wanted(now).len(), 0);
    }
}
