//! What time alone changes: adopted offers and exceptions expire, slow starts rise, hosts die, panics begin and end.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Instant};

use super::{
    cluster::{Change, Cluster, Notice, Offer, OfferState, Session},
    weight,
};

/// Servers that must be lost at once before the network between is suspected.
const PANIC: usize = 3;

impl Cluster {
    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> Change {
        let change = self.begin();
        self.ticked = now;
        self.review = false;
        for address in self.exceptions.tick(now, change) {
            self.forget_host(address);
        }
        self.expire_adopted(now, change);
        self.raise_slow_starts(now);
        self.review_panic(now, change);
        self.review_deaths(now, change);
        change
    }

    /// When [`Cluster::tick`] will next have something to do, if nothing else happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let adopted = |offer: &Offer| match offer.state {
            OfferState::Adopted { until } => Some(until),
            OfferState::Started | OfferState::Stopped => None,
        };
        let step = |offer: &Offer| {
            offer.joined.and_then(|joined| weight::next_step(joined, self.config.slow_start, self.ticked))
        };
        let may_panic = self.may_panic();
        let death = |offer: &Offer| self.death_of(offer, &may_panic).map(|(at, _)| at);
        let of = |offer: &Offer| [adopted(offer), step(offer), death(offer)];
        let offers = self.offers.values().filter(|offer| offer.alive).flat_map(of).flatten();
        offers.chain(self.exceptions.next_deadline(self.ticked)).min()
    }

    fn expire_adopted(&mut self, now: Instant, change: Change) {
        let expired = |offer: &Offer| matches!(offer.state, OfferState::Adopted { until } if until <= now);
        let ids: Vec<u32> = self.offers.iter().filter(|(_, offer)| expired(offer)).map(|(&id, _)| id).collect();
        for id in ids {
            let Some(offer) = self.offers.get_mut(id) else { continue };
            let address = offer.key.address;
            if self.hosts.get(&address).is_some_and(|host| host.session == Session::Up) {
                offer.state = OfferState::Stopped;
                self.ids.retire(id);
            } else {
                // As if it had been started and then lost: its SE may still come back to it.
                offer.state = OfferState::Started;
            }
            self.touch_host(address, change);
            self.notice(Notice::AdoptedExpired { id, address });
        }
    }

    fn raise_slow_starts(&mut self, now: Instant) {
        let slow_start = self.config.slow_start;
        for offer in self.offers.values_mut() {
            if let Some(joined) = offer.joined {
                self.services[offer.service].dirty = true;
                if weight::next_step(joined, slow_start, now).is_none() {
                    offer.joined = None;
                }
            }
        }
    }

    /// At least three servers of a farm, and more than half of them, lost within one keepalive interval: the network between
    /// is the likelier fault, and they go on serving until enough of them are back.
    pub(super) fn review_panic(&mut self, now: Instant, change: Change) {
        for farm in 0..self.farms.len() {
            let (up, lost) = self.started_hosts(farm);
            let kept = &self.farms[farm].kept;
            let at_once = |since: Instant| since + self.config.keepalive >= now;
            let suspects: BTreeSet<Ipv4Addr> = lost
                .into_iter()
                .filter(|(address, since)| kept.contains(address) || at_once(*since))
                .map(|(address, _)| address)
                .collect();
            let most = suspects.len() * 2 > up + suspects.len();
            let panics = most && (!kept.is_empty() || suspects.len() >= PANIC);
            let wanted = if panics { suspects } else { BTreeSet::new() };
            if wanted == self.farms[farm].kept {
                continue;
            }
            let before = std::mem::replace(&mut self.farms[farm].kept, wanted.clone());
            for &address in before.symmetric_difference(&wanted) {
                self.touch_host(address, change);
            }
            match (before.is_empty(), wanted.is_empty()) {
                (true, false) => self.notice(Notice::PanicBegan { farm }),
                (false, true) => self.notice(Notice::PanicEnded { farm }),
                _ => {}
            }
        }
    }

    /// Gives up the flows of servers whose host is gone or that stayed away for too long.
    pub(super) fn review_deaths(&mut self, now: Instant, change: Change) {
        let may_panic = self.may_panic();
        let due = |(&id, offer): (&u32, &Offer)| {
            let (at, host_gone) = self.death_of(offer, &may_panic)?;
            (at <= now).then_some((id, host_gone))
        };
        let dead: Vec<(u32, bool)> = self.offers.iter().filter_map(due).collect();
        for (id, host_gone) in dead {
            let Some(offer) = self.offers.get_mut(id) else { continue };
            (offer.alive, offer.state) = (false, OfferState::Stopped);
            let (service, address) = (offer.service, offer.key.address);
            self.ids.bury(id);
            self.touch_server(id, change);
            self.services[service].touch(change);
            self.notice(Notice::Died { id, address, host_gone });
        }
    }

    /// When an offer dies, as things are, and whether because its host is gone.
    /// `may_panic` is [`Self::may_panic`]'s.
    fn death_of(&self, offer: &Offer, may_panic: &[bool]) -> Option<(Instant, bool)> {
        let host = self.hosts.get(&offer.key.address)?;
        let Session::Lost { since } = host.session else { return None };
        if !offer.alive {
            return None;
        }
        let farm = offer.key.farm;
        let orphaned = since + self.config.farms[farm].orphan_time;
        let orphaned = match offer.state {
            OfferState::Adopted { until } => orphaned.max(until),
            OfferState::Started | OfferState::Stopped => orphaned,
        };
        if self.farms[farm].kept.contains(&offer.key.address) {
            return Some((orphaned, false));
        }
        let Some(gone) = host.gone else { return Some((orphaned, false)) };
        // Death is for good, so it waits until it is certain that this is not the beginning of a panic.
        let certain = if may_panic[farm] { since + self.config.keepalive } else { since };
        let gone = gone.max(certain);
        Some(if gone <= orphaned { (gone, true) } else { (orphaned, false) })
    }

    /// By farm: whether it has enough servers for a panic.
    fn may_panic(&self) -> Vec<bool> {
        let enough = |farm| {
            let (up, lost) = self.started_hosts(farm);
            up + lost.len() >= PANIC
        };
        (0..self.farms.len()).map(enough).collect()
    }

    /// Hosts with something started in a farm: how many have a session, and which have lost it when.
    fn started_hosts(&self, farm: usize) -> (usize, Vec<(Ipv4Addr, Instant)>) {
        let serving = |offer: &&Offer| offer.key.farm == farm && offer.alive && offer.state != OfferState::Stopped;
        let offers = self.offers.values().filter(serving);
        // An adopted offer whose SE is still away was not lost: it has not been seen yet.
        let started: BTreeSet<(Ipv4Addr, bool)> =
            offers.map(|offer| (offer.key.address, offer.state == OfferState::Started)).collect();
        let (mut up, mut lost) = (BTreeSet::new(), BTreeSet::new());
        for (address, started) in started {
            match self.hosts.get(&address).map(|host| host.session) {
                Some(Session::Up) => {
                    up.insert(address);
                }
                Some(Session::Lost { since }) if started => {
                    lost.insert((address, since));
                }
                Some(Session::Lost { .. } | Session::Absent) | None => {}
            }
        }
        (up.len(), lost.into_iter().collect())
    }
}
