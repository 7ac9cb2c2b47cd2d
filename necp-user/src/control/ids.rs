//! Server ids: one per farm, SE address, service and forwarding type; none is reused while anything may still name it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use necp_ebpf::abi::FIRST_SERVER;

use super::config::{Forwarding, ServiceKey};

/// What an id stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OfferKey {
    /// Index of the farm.
    pub farm: usize,
    /// The SE.
    pub address: IpAddr,
    /// The service.
    pub service: ServiceKey,
    /// The forwarding type: another one is another id, so that flows in progress keep theirs.
    pub forwarding: Forwarding,
}

/// No id is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all server ids are in use")]
pub struct NoIdLeft;

/// Full collections in a row that must not see a retired id anywhere.
const CLEAN: u8 = 2;

/// All ids.
#[derive(Debug)]
pub struct Ids {
    limit: u32,
    by_key: BTreeMap<OfferKey, u32>,
    /// Ids in use or retired, with their offers while they may have them back.
    taken: BTreeMap<u32, Option<OfferKey>>,
    /// No id below this one is free.
    free_from: u32,
    retired: BTreeMap<u32, Retired>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Retired {
    /// The collection under way began after it was retired.
    counts: bool,
    clean: u8,
}

impl Ids {
    /// Ids below `limit`.
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            by_key: BTreeMap::new(),
            taken: BTreeMap::new(),
            free_from: FIRST_SERVER,
            retired: BTreeMap::new(),
        }
    }

    /// The id of an offer: the one that it has, retired or not, else a free one.
    pub fn assign(&mut self, key: OfferKey) -> Result<u32, NoIdLeft> {
        if let Some(&id) = self.by_key.get(&key) {
            self.retired.remove(&id);
            return Ok(id);
        }
        let id = (self.free_from..self.limit).find(|id| !self.taken.contains_key(id)).ok_or(NoIdLeft)?;
        self.free_from = id + 1;
        self.taken.insert(id, Some(key));
        self.by_key.insert(key, id);
        Ok(id)
    }

    /// The id of an offer.
    pub fn get(&self, key: &OfferKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Takes over an id that the maps know; false if the id, or the offer, is taken or out of range.
    pub fn adopt(&mut self, id: u32, key: OfferKey) -> bool {
        if self.by_key.contains_key(&key) || !self.reserve(id, Some(key)) {
            return false;
        }
        self.by_key.insert(key, id);
        true
    }

    /// Takes over an id that the maps know, as one that is nobody's and may still be named; false as for [`Ids::adopt`].
    pub fn adopt_retired(&mut self, id: u32) -> bool {
        let new = self.reserve(id, None);
        if new {
            self.retired.insert(id, Retired::default());
        }
        new
    }

    /// The offer is no longer made: its id goes once nothing names it. The same offer made again before that has it back.
    pub fn retire(&mut self, id: u32) {
        if self.taken.contains_key(&id) {
            self.retired.entry(id).or_default();
        }
    }

    /// The host is gone: its flows are given up, so nobody may ever have this id back; the same offer gets another.
    pub fn bury(&mut self, id: u32) {
        self.retire(id);
        if let Some(key) = self.taken.get_mut(&id).and_then(Option::take) {
            self.by_key.remove(&key);
        }
    }

    /// A full collection begins.
    pub fn begin_collection(&mut self) {
        for retired in self.retired.values_mut() {
            retired.counts = true;
        }
    }

    /// A full collection has ended; `seen` tells whether it met an id. Returns the ids that are free again.
    pub fn end_collection(&mut self, seen: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut free = Vec::new();
        for (&id, retired) in self.retired.iter_mut().filter(|(_, retired)| retired.counts) {
            retired.clean = if seen(id) { 0 } else { retired.clean + 1 };
            if retired.clean >= CLEAN {
                free.push(id);
            }
        }
        for id in &free {
            self.retired.remove(id);
            self.free_from = self.free_from.min(*id);
            if let Some(key) = self.taken.remove(id).flatten() {
                self.by_key.remove(&key);
            }
        }
        free
    }

    /// Whether the last full collection met a retired id, or none has ended since it was retired.
    pub fn may_be_named(&self, id: u32) -> bool {
        self.retired.get(&id).is_none_or(|retired| retired.clean == 0)
    }

    fn reserve(&mut self, id: u32, key: Option<OfferKey>) -> bool {
        let free = (FIRST_SERVER..self.limit).contains(&id) && !self.taken.contains_key(&id);
        if free {
            self.taken.insert(id, key);
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(host: u8, forwarding: Forwarding) -> OfferKey {
        let service = ServiceKey::new(6, 80);
        OfferKey { farm: 0, address: [10, 0, 0, host].into(), service, forwarding }
    }

    fn collect(ids: &mut Ids, seen: &[u32]) -> Vec<u32> {
        ids.begin_collection();
        ids.end_collection(|id| seen.contains(&id))
    }

    #[test]
    fn the_same_offer_has_the_same_id_and_another_type_another() {
        let mut ids = Ids::new(100);
        let first = ids.assign(key(1, Forwarding::Layer2)).unwrap();
        assert_eq!(first, FIRST_SERVER);
        assert_eq!(ids.assign(key(1, Forwarding::Layer2)), Ok(first));
        let second = ids.assign(key(1, Forwarding::Gre)).unwrap();
        assert_ne!(second, first);
        ids.retire(first);
        assert_eq!(ids.assign(key(1, Forwarding::Layer2)), Ok(first));
        assert_eq!(collect(&mut ids, &[]), [0_u32; 0], "it is in use again");
    }

    #[test]
    fn an_id_is_free_after_two_collections_in_a_row_that_saw_it_nowhere() {
        let mut ids = Ids::new(100);
        let id = ids.assign(key(1, Forwarding::Layer2)).unwrap();
        ids.begin_collection();
        ids.retire(id);
        assert_eq!(ids.end_collection(|_| false), [0_u32; 0], "this one began before");
        assert!(ids.may_be_named(id));
        assert_eq!(collect(&mut ids, &[]), [0_u32; 0]);
        assert!(!ids.may_be_named(id));
        assert_eq!(collect(&mut ids, &[id]), [0_u32; 0], "seen again");
        assert_eq!(collect(&mut ids, &[]), [0_u32; 0]);
        assert_eq!(collect(&mut ids, &[]), [id]);
        assert_eq!(ids.get(&key(1, Forwarding::Layer2)), None);
        assert_eq!(ids.assign(key(2, Forwarding::Layer2)), Ok(id));
    }

    #[test]
    fn a_buried_id_never_comes_back_to_its_offer_but_is_reused_later() {
        let mut ids = Ids::new(4);
        let id = ids.assign(key(1, Forwarding::Layer2)).unwrap();
        ids.bury(id);
        let other = ids.assign(key(1, Forwarding::Layer2)).unwrap();
        assert_ne!(other, id);
        assert_eq!(ids.assign(key(2, Forwarding::Layer2)), Err(NoIdLeft));
        assert_eq!(collect(&mut ids, &[]), [0_u32; 0]);
        assert_eq!(collect(&mut ids, &[]), [id]);
        assert_eq!(ids.assign(key(2, Forwarding::Layer2)), Ok(id));
        assert_eq!(ids.get(&key(1, Forwarding::Layer2)), Some(other), "burying took nothing from the new id");
    }

    #[test]
    fn an_adopted_id_is_taken() {
        let mut ids = Ids::new(100);
        assert!(ids.adopt(3, key(1, Forwarding::Layer2)));
        assert!(!ids.adopt(3, key(2, Forwarding::Layer2)));
        assert!(!ids.adopt(4, key(1, Forwarding::Layer2)));
        assert!(!ids.adopt(1, key(2, Forwarding::Layer2)) && !ids.adopt(100, key(2, Forwarding::Layer2)));
        assert!(ids.adopt_retired(2));
        assert_eq!(ids.assign(key(1, Forwarding::Layer2)), Ok(3));
        assert_eq!(ids.assign(key(2, Forwarding::Layer2)), Ok(4));
    }
}
