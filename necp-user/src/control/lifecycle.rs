//! What time alone changes: adopted offers and exceptions expire, slow starts rise, hosts die, panics begin and end.

use std::{collections::BTreeSet, net::IpAddr, time::Instant};

use super::{
    cluster::{Change, Cluster, Host, Notice, Offer, OfferState, Session},
    weight,
};

/// Servers that must be lost at once before the network between is suspected.
const PANIC: usize = 3;

/// Hosts with something started in a farm.
#[derive(Debug, Default)]
struct StartedHosts {
    /// How many have a session.
    up: usize,
    /// Which have lost it when, in the order of their addresses.
    lost: Vec<(IpAddr, Instant)>,
}

impl Cluster {
    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> Change {
        let change = self.begin();
        let before = std::mem::replace(&mut self.ticked, now);
        for address in self.exceptions.tick(now, change) {
            self.forget_host(address);
        }
        self.expire_adopted(now, change);
        self.raise_slow_starts(before, now);
        // Time alone makes no panic and ends none: only what comes and goes does.
        if std::mem::take(&mut self.review) {
            self.review_panic(now, change);
        }
        if self.review_deaths(now, change) {
            self.review_panic(now, change);
        }
        change
    }

    /// When [`Cluster::tick`] will next have something to do for servers, if nothing else happens.
    pub fn next_deadline(&self) -> Option<Instant> {
        let adopted = |offer: &Offer| match offer.state {
            OfferState::Adopted { until } => Some(until),
            OfferState::Started | OfferState::Stopped => None,
        };
        let step = |offer: &Offer| {
            offer.joined.and_then(|joined| weight::next_step(joined, self.config.slow_start, self.ticked))
        };
        let of = |offer: &Offer| [adopted(offer), step(offer)];
        let offers = self.offers.values().filter(|offer| offer.alive).flat_map(of).flatten();
        offers.chain(self.deaths().into_iter().map(|(_, at, _)| at)).min()
    }

    /// When [`Cluster::tick`] will next have something to do for exceptions: one ends, or those of a session that is over
    /// are still to go.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.exceptions.next_deadline(self.ticked)
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
            self.review = true;
            self.notice(Notice::AdoptedExpired { id, address });
        }
    }

    /// `before` is when this was done last.
    fn raise_slow_starts(&mut self, before: Instant, now: Instant) {
        let slow_start = self.config.slow_start;
        for offer in self.offers.values_mut() {
            if let Some(joined) = offer.joined {
                self.services[offer.service].dirty |=
                    weight::next_step(joined, slow_start, before).is_some_and(|at| at <= now);
                if weight::next_step(joined, slow_start, now).is_none() {
                    offer.joined = None;
                }
            }
        }
    }

    /// At least three servers of a farm, and more than half of them, lost within one keepalive interval: the network between
    /// is the likelier fault, and they go on serving until enough of them are back. Not so in a farm that intercepts: without
    /// its servers its clients get what they want all the same.
    fn review_panic(&mut self, now: Instant, change: Change) {
        let none_lost = self.lost_hosts().next().is_none();
        if none_lost && self.farms.iter().all(|farm| farm.kept.is_empty()) {
            return;
        }
        for (farm, StartedHosts { up, lost }) in self.started_hosts().into_iter().enumerate() {
            if self.config.farms[farm].intercepts() {
                continue;
            }
            let kept = &self.farms[farm].kept;
            let at_once = |since: Instant| since + self.config.keepalive >= now;
            let suspects: BTreeSet<IpAddr> = lost
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

    /// Gives up the flows of servers whose host is gone or that stayed away for too long; false if there are none.
    fn review_deaths(&mut self, now: Instant, change: Change) -> bool {
        let mut dead = self.deaths();
        dead.retain(|&(_, at, _)| at <= now);
        for &(id, _, host_gone) in &dead {
            let Some(offer) = self.offers.get_mut(id) else { continue };
            (offer.alive, offer.state) = (false, OfferState::Stopped);
            let (service, address) = (offer.service, offer.key.address);
            self.ids.bury(id);
            self.touch_server(id, change);
            self.services[service].touch(change);
            self.notice(Notice::Died { id, address, host_gone });
        }
        !dead.is_empty()
    }

    /// By id, when the offers of lost hosts die, as things are, and whether because their host is gone.
    fn deaths(&self) -> Vec<(u32, Instant, bool)> {
        let mut enough = None;
        let mut deaths = Vec::new();
        for (address, host, since) in self.lost_hosts() {
            for id in self.offers.ids_of(address) {
                let Some(offer) = self.offers.get(&id).filter(|offer| offer.alive) else { continue };
                let (at, host_gone) = self.death_of(offer, host, since, &mut enough);
                deaths.push((id, at, host_gone));
            }
        }
        deaths
    }

    /// `enough` is for [`Self::may_panic`], once it has been asked for.
    fn death_of(&self, offer: &Offer, host: &Host, since: Instant, enough: &mut Option<Vec<bool>>) -> (Instant, bool) {
        let farm = offer.key.farm;
        let orphaned = since + self.config.farms[farm].orphan_time;
        let orphaned = match offer.state {
            OfferState::Adopted { until } => orphaned.max(until),
            OfferState::Started | OfferState::Stopped => orphaned,
        };
        let Some(gone) = host.gone.filter(|_| !self.farms[farm].kept.contains(&offer.key.address)) else {
            return (orphaned, false);
        };
        // Death is for good, so it waits until it is certain that this is not the beginning of a panic.
        let may_panic = enough.get_or_insert_with(|| self.may_panic())[farm];
        let certain = if may_panic { since + self.config.keepalive } else { since };
        let gone = gone.max(certain);
        if gone <= orphaned { (gone, true) } else { (orphaned, false) }
    }

    /// By farm: whether it has enough servers for a panic.
    fn may_panic(&self) -> Vec<bool> {
        let enough = |farm: &StartedHosts| farm.up + farm.lost.len() >= PANIC;
        let farms = self.started_hosts();
        farms.iter().zip(&self.config.farms).map(|(farm, config)| enough(farm) && !config.intercepts()).collect()
    }

    fn lost_hosts(&self) -> impl Iterator<Item = (IpAddr, &Host, Instant)> {
        self.hosts.iter().filter_map(|(address, host)| match host.session {
            Session::Lost { since } => Some((*address, host, since)),
            Session::Up | Session::Absent => None,
        })
    }

    /// By farm.
    fn started_hosts(&self) -> Vec<StartedHosts> {
        let mut farms: Vec<StartedHosts> = self.farms.iter().map(|_| StartedHosts::default()).collect();
        for (address, host) in &self.hosts {
            let offers = self.offers.ids_of(*address).into_iter().filter_map(|id| self.offers.get(&id));
            let serving = offers.filter(|offer| offer.alive && offer.state != OfferState::Stopped);
            // An adopted offer whose SE is still away was not lost: it has not been seen yet.
            let serving = serving.map(|offer| (offer.key.farm, offer.state == OfferState::Started));
            match host.session {
                Session::Up => {
                    let of: BTreeSet<usize> = serving.map(|(farm, _)| farm).collect();
                    of.into_iter().for_each(|farm| farms[farm].up += 1);
                }
                Session::Lost { since } => {
                    let of: BTreeSet<usize> = serving.filter(|(_, started)| *started).map(|(farm, _)| farm).collect();
                    of.into_iter().for_each(|farm| farms[farm].lost.push((*address, since)));
                }
                Session::Absent => {}
            }
        }
        farms
    }
}
