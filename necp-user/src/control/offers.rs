//! The server ids in use, and whose they are: what one server says must not cost a look at all the others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Deref,
};

use super::cluster::Offer;

/// Offers by server id; read as a map.
#[derive(Debug, Default)]
pub(super) struct Offers {
    by_id: BTreeMap<u32, Offer>,
    by_address: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// As [`Layout::services`](super::layout::Layout::services).
    by_service: BTreeMap<usize, BTreeSet<u32>>,
}

impl Offers {
    pub(super) fn insert(&mut self, id: u32, offer: Offer) {
        self.remove(id);
        self.by_address.entry(offer.key.address).or_default().insert(id);
        self.by_service.entry(offer.service).or_default().insert(id);
        self.by_id.insert(id, offer);
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<Offer> {
        let offer = self.by_id.remove(&id)?;
        if let Some(ids) = self.by_service.get_mut(&offer.service) {
            ids.remove(&id);
        }
        if let Some(ids) = self.by_address.get_mut(&offer.key.address) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_address.remove(&offer.key.address);
            }
        }
        Some(offer)
    }

    /// An offer, to be changed; its key and its service stay.
    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Offer> {
        self.by_id.get_mut(&id)
    }

    /// All of them, to be changed; their keys and their services stay.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Offer> {
        self.by_id.values_mut()
    }

    /// Ids of one server, in order.
    pub(super) fn ids_of(&self, address: IpAddr) -> Vec<u32> {
        self.by_address.get(&address).into_iter().flatten().copied().collect()
    }

    /// Offers of one service, in the order of their ids.
    pub(super) fn of_service(&self, service: usize) -> impl Iterator<Item = (u32, &Offer)> {
        let ids = self.by_service.get(&service).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.by_id.get(id)?)))
    }

    /// Servers with an offer that is alive.
    pub(super) fn alive(&self) -> impl Iterator<Item = IpAddr> {
        let is_alive = |id: &u32| self.by_id.get(id).is_some_and(|offer| offer.alive);
        self.by_address.iter().filter(move |(_, ids)| ids.iter().any(is_alive)).map(|(address, _)| *address)
    }

    /// Whether a server has any id.
    pub(super) fn has(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address)
    }
}

impl Deref for Offers {
    type Target = BTreeMap<u32, Offer>;

    fn deref(&self) -> &Self::Target {
        &self.by_id
    }
}
