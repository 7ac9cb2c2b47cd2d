//! What the packet path is to know: one record for each farm and set of flows, whoever wants them elsewhere.
//!
//! A record has a number, which is its index in the map. A number is given to other flows only a whole plan after the
//! record has left the map: a packet that has just found a record may read it.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, Ipv4Addr},
};

use hashbrown::HashTable;
use necp_ebpf::{abi, exceptions::name6};

use super::super::{cluster::Change, config::halves};
use super::{INSTALLERS, MASKS};
use crate::necp::message::{Family, Flows, Scope};

/// Why flows cannot have a record, or an SE cannot be in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Masks,
    Installers,
    Records,
}

/// All records.
#[derive(Debug)]
pub(in super::super) struct Keys {
    slab: Vec<Key>,
    by_flows: HashTable<u32>,
    hasher: RandomState,
    /// Records that the map has room for.
    capacity: u32,
    free: VecDeque<u32>,
    /// Numbers that may be given again after the next plan.
    resting: Vec<u32>,
    farms: Vec<[Mask; MASKS]>,
    /// Records that may differ from the map's, and who waits for them. A record may be there several times.
    pub(in super::super) dirty: Vec<(u32, Change)>,
    /// Farms whose masks may differ from the map's, likewise.
    pub(in super::super) dirty_farms: BTreeMap<usize, Vec<Change>>,
}

#[derive(Clone, Copy, Debug)]
struct Key {
    flows: Flows,
    farm: u16,
    mask: u8,
    /// It has a record, or had one that is still in the map.
    used: bool,
    /// SEs that have a global entry.
    global: u32,
    /// Host numbers of SEs that have a local one; 0: none.
    local: [u16; INSTALLERS],
}

/// What records look at.
#[derive(Clone, Copy, Debug, Default)]
struct Mask {
    is_v6: bool,
    source: u8,
    destination: u8,
    protocol: bool,
    port: bool,
    /// Keys that look at this, those included that are about to leave the map.
    keys: u32,
    /// Keys that somebody wants.
    held: u32,
}

/// What a record should say, but for its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    exception: abi::Exception,
    /// Source and destination, host bits cleared.
    addresses: [IpAddr; 2],
}

impl Default for Record {
    fn default() -> Self {
        Self { exception: abi::Exception::default(), addresses: [IpAddr::V4(Ipv4Addr::UNSPECIFIED); 2] }
    }
}

impl Record {
    /// With its addresses; those of IPv6 have no room in it, and go by a name that only tables with this seed know.
    #[must_use]
    pub fn named(&self, seed: u64) -> abi::Exception {
        let [source, destination] = match self.addresses {
            [IpAddr::V4(source), IpAddr::V4(destination)] => [source.octets(), destination.octets()],
            [IpAddr::V6(source), IpAddr::V6(destination)] => {
                let [a, b, c, d, e, f, g, h] = name6(halves(source), halves(destination), seed).to_ne_bytes();
                [[a, b, c, d], [e, f, g, h]]
            }
            // Flows are of one family.
            _ => return abi::Exception::default(),
        };
        abi::Exception { source, destination, ..self.exception }
    }
}

impl Key {
    fn is_held(&self) -> bool {
        self.global > 0 || self.local != [0; INSTALLERS]
    }
}

impl Mask {
    fn of(flows: &Flows) -> Self {
        Self {
            is_v6: flows.family() == Family::V6,
            source: flows.source.prefix_len(),
            destination: flows.destination.prefix_len(),
            protocol: flows.protocol != 0,
            port: flows.port != 0,
            ..Self::default()
        }
    }

    fn looks_at(&self) -> (bool, u8, u8, bool, bool) {
        (self.is_v6, self.source, self.destination, self.protocol, self.port)
    }

    fn record(&self) -> abi::ExceptionMask {
        if self.held == 0 {
            return abi::ExceptionMask::default();
        }
        abi::ExceptionMask {
            source_len: self.source,
            destination_len: self.destination,
            protocol: self.protocol.into(),
            port: self.port.into(),
            used: if self.is_v6 { abi::OF_IPV6 } else { abi::OF_IPV4 },
            reserved: [0; 3],
        }
    }
}

impl Keys {
    pub(super) fn new(farms: usize, capacity: u32) -> Self {
        Self {
            slab: Vec::new(),
            by_flows: HashTable::new(),
            hasher: RandomState::new(),
            capacity,
            free: VecDeque::new(),
            resting: Vec::new(),
            farms: vec![[Mask::default(); MASKS]; farms],
            dirty: Vec::new(),
            dirty_farms: BTreeMap::new(),
        }
    }

    /// Whether [`Keys::hold`] may be called with these.
    pub(super) fn may_hold(&self, farm: usize, flows: &Flows, scope: Scope) -> Result<(), Refusal> {
        let Some(id) = self.find(farm, flows) else {
            self.mask(farm, flows).ok_or(Refusal::Masks)?;
            let room = !self.free.is_empty() || (self.slab.len() as u32) < self.capacity;
            return if room { Ok(()) } else { Err(Refusal::Records) };
        };
        let key = &self.slab[id as usize];
        let room = scope == Scope::Global || key.local.contains(&0);
        if room { Ok(()) } else { Err(Refusal::Installers) }
    }

    /// An SE has an entry for these flows from now on.
    pub(super) fn hold(&mut self, farm: usize, flows: &Flows, scope: Scope, host: u16, change: Change) {
        let Some(id) = self.find(farm, flows).or_else(|| self.insert(farm, flows)) else { return };
        self.update(id, change, |key| match scope {
            Scope::Global => key.global += 1,
            Scope::Local => {
                if let Some(free) = key.local.iter_mut().find(|there| **there == 0) {
                    *free = host;
                }
            }
        });
    }

    /// It has none any more.
    pub(super) fn release(&mut self, farm: usize, flows: &Flows, scope: Scope, host: u16, change: Change) {
        let Some(id) = self.find(farm, flows) else { return };
        self.update(id, change, |key| match scope {
            Scope::Global => key.global = key.global.saturating_sub(1),
            Scope::Local => {
                if let Some(there) = key.local.iter_mut().find(|there| **there == host) {
                    *there = 0;
                }
            }
        });
    }

    /// What the record of this number should say; the default: nothing.
    pub(in super::super) fn record(&self, id: u32) -> Record {
        let Some(key) = self.slab.get(id as usize).filter(|key| key.used && key.is_held()) else {
            return Record::default();
        };
        let exception = abi::Exception {
            source: [0; 4],
            destination: [0; 4],
            farm: key.farm,
            port: key.flows.port.to_be_bytes(),
            protocol: key.flows.protocol,
            mask: key.mask,
            state: if key.global > 0 { abi::EXCEPTION_GLOBAL } else { abi::EXCEPTION_LOCAL },
            reserved: 0,
            installers: key.local,
        };
        Record { exception, addresses: [key.flows.source.addr(), key.flows.destination.addr()] }
    }

    /// What the masks of a farm should be.
    pub(in super::super) fn masks(&self, farm: usize) -> abi::ExceptionMasks {
        let masks = self.farms[farm].map(|mask| mask.record());
        let count = masks.iter().rposition(|mask| mask.used != 0).map_or(0, |last| last as u32 + 1);
        abi::ExceptionMasks { count, reserved: 0, masks }
    }

    /// Masks of a farm that somebody wants.
    pub(super) fn masks_in_use(&self, farm: usize) -> u32 {
        self.farms.get(farm).map_or(0, |masks| masks.iter().filter(|mask| mask.held > 0).count() as u32)
    }

    /// Numbers that rested may be given again.
    pub(in super::super) fn wake(&mut self) {
        self.free.extend(self.resting.drain(..));
    }

    /// A record is in the map as it should be: if nobody wants it, it is there no more.
    pub(in super::super) fn written(&mut self, id: u32) {
        let Some(key) = self.slab.get_mut(id as usize).filter(|key| key.used && !key.is_held()) else { return };
        key.used = false;
        let Key { flows, farm, mask, .. } = *key;
        self.farms[usize::from(farm)][usize::from(mask)].keys -= 1;
        if let Ok(place) = self.by_flows.find_entry(self.hasher.hash_one((farm, flows)), |&other| other == id) {
            place.remove();
        }
        self.resting.push(id);
    }

    /// Bytes that this takes, as far as vectors and tables tell.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.slab.capacity() * size_of::<Key>()
            + self.by_flows.allocation_size()
            + self.free.capacity() * 4
            + self.resting.capacity() * 4
            + self.dirty.capacity() * size_of::<(u32, Change)>()
    }

    fn find(&self, farm: usize, flows: &Flows) -> Option<u32> {
        let hash = self.hasher.hash_one((farm as u16, *flows));
        let is = |&id: &u32| {
            let key = &self.slab[id as usize];
            key.farm == farm as u16 && key.flows == *flows
        };
        self.by_flows.find(hash, is).copied()
    }

    fn insert(&mut self, farm: usize, flows: &Flows) -> Option<u32> {
        let mask = self.mask(farm, flows)?;
        let key =
            Key { flows: *flows, farm: farm as u16, mask: mask as u8, used: true, global: 0, local: [0; INSTALLERS] };
        let id = match self.free.pop_front() {
            Some(id) => {
                self.slab[id as usize] = key;
                id
            }
            None if (self.slab.len() as u32) < self.capacity => {
                self.slab.push(key);
                self.slab.len() as u32 - 1
            }
            None => return None,
        };
        let place = &mut self.farms[farm][mask];
        if place.keys == 0 {
            *place = Mask::of(flows);
        }
        place.keys += 1;
        let Self { slab, hasher, by_flows, .. } = self;
        let hash = |id: &u32| hasher.hash_one((slab[*id as usize].farm, slab[*id as usize].flows));
        by_flows.insert_unique(hash(&id), id, hash);
        Some(id)
    }

    /// Where flows' mask is in its farm, or may be.
    fn mask(&self, farm: usize, flows: &Flows) -> Option<usize> {
        let (masks, wanted) = (&self.farms[farm], Mask::of(flows).looks_at());
        let there = masks.iter().position(|mask| mask.keys > 0 && mask.looks_at() == wanted);
        there.or_else(|| masks.iter().position(|mask| mask.keys == 0))
    }

    /// Changes who wants a record.
    fn update(&mut self, id: u32, change: Change, update: impl FnOnce(&mut Key)) {
        let key = &mut self.slab[id as usize];
        let before = key.is_held();
        update(key);
        let (after, farm) = (key.is_held(), usize::from(key.farm));
        let mask = &mut self.farms[farm][usize::from(key.mask)];
        let held = mask.held;
        mask.held = held + u32::from(after) - u32::from(before);
        if (held == 0) != (mask.held == 0) {
            let changes = self.dirty_farms.entry(farm).or_default();
            if changes.last() != Some(&change) {
                changes.push(change);
            }
        }
        self.dirty.push((id, change));
    }
}
