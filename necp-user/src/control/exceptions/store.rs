//! All entries, by the SE that installed them, by their flows, by the time of their end.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    time::{Duration, Instant},
};

use hashbrown::HashTable;
use necp_ebpf::abi;

use super::super::{cluster::Change, config::ClusterConfig};
use super::keys::{Keys, Refusal};
use super::{ExceptError, ExceptionCounts, FarmExceptions};
use crate::necp::message::{Exception, Filter, Flows, Listed, Scope};

/// How exactly the end of an entry is kept, in milliseconds: it goes at most so much after its time.
const TICK: u64 = 250;
/// The end of an entry that has none.
const NEVER: u64 = u64::MAX;
/// No entry.
const NIL: u32 = u32::MAX;
/// Entries that go in one plan: some milliseconds of work.
const BATCH: usize = 8192;

/// The entries of all SEs.
#[derive(Debug)]
pub(in super::super) struct Store {
    limit: u32,
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Entries in the vector.
    used: u32,
    /// Those of them that are in force: not of a session that is over.
    in_force: u32,
    by_flows: HashTable<u32>,
    hasher: RandomState,
    installers: Vec<Option<Installer>>,
    current: BTreeMap<IpAddr, u32>,
    /// Installers whose entries are all to go.
    sweeps: VecDeque<u32>,
    timers: BTreeSet<(u64, u32)>,
    farms: Vec<FarmExceptions>,
    births: u64,
    epoch: Instant,
    /// When [`Store::tick`] was last called, in ticks.
    ticked: u64,
    pub(in super::super) keys: Keys,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    flows: Flows,
    /// As it was asked for.
    scope: Scope,
    used: bool,
    installer: u32,
    /// Neighbours in the list of the installer's entries.
    before: u32,
    after: u32,
    birth: u64,
    /// In ticks.
    expires: u64,
}

/// One session of an SE.
#[derive(Debug)]
struct Installer {
    address: IpAddr,
    host: u16,
    /// Farms that admit it, and whether they trust it with global entries.
    farms: Vec<(usize, bool)>,
    limit: u32,
    first: u32,
    count: u32,
    /// How many of them asked to be global.
    global: u32,
    /// All of its entries are to go, and this waits for it.
    doomed: Option<Change>,
}

impl Installer {
    /// The scope in force in a farm.
    fn scope(scope: Scope, trusted: bool) -> Scope {
        if trusted { scope } else { Scope::Local }
    }

    /// The scope that is listed.
    fn listed(&self, scope: Scope) -> Scope {
        Self::scope(scope, self.farms.iter().any(|&(_, trusted)| trusted))
    }
}

impl Store {
    pub(in super::super) fn new(config: &ClusterConfig, now: Instant) -> Self {
        Self {
            limit: config.max_exceptions,
            entries: Vec::new(),
            free: Vec::new(),
            used: 0,
            in_force: 0,
            by_flows: HashTable::new(),
            hasher: RandomState::new(),
            installers: Vec::new(),
            current: BTreeMap::new(),
            sweeps: VecDeque::new(),
            timers: BTreeSet::new(),
            farms: vec![FarmExceptions::default(); config.farms.len()],
            births: 0,
            epoch: now,
            ticked: 0,
            keys: Keys::new(config.farms.len(), abi::exception_records(config.max_exceptions)),
        }
    }

    /// A unit of EXCEPTION_ADD of an SE with a session. `host` is its number in server records.
    pub(super) fn add(
        &mut self,
        config: &ClusterConfig,
        (address, host): (IpAddr, u16),
        exception: &Exception,
        change: Change,
        now: Instant,
    ) -> Result<(), ExceptError> {
        let Exception { scope, flows, .. } = Exception::new(exception.scope, exception.ttl, exception.flows);
        let expires = self.expiry(exception.ttl, now);
        let installer = self.installer(config, address, host);
        self.outlive(address, &flows, change);
        match self.find(installer, &flows) {
            Some(id) => self.overwrite(config, id, scope, expires, change),
            None => self.insert(config, installer, Exception { scope, ttl: 0, flows }, expires, change),
        }
    }

    /// A unit of EXCEPTION_DEL.
    pub(super) fn delete(&mut self, address: IpAddr, flows: &Flows, change: Change) {
        if let Some(id) = self.current.get(&address).and_then(|&installer| self.find(installer, flows)) {
            self.remove(id, change);
        }
    }

    /// All entries of an SE are to go: from now on they do not count, and they go as [`Store::tick`] gets to them.
    pub(in super::super) fn doom(&mut self, address: IpAddr, change: Change) {
        let Some(number) = self.current.remove(&address) else { return };
        let Some(installer) = self.installers[number as usize].as_mut() else { return };
        if installer.count == 0 {
            self.installers[number as usize] = None;
            return;
        }
        installer.doomed = Some(change);
        self.in_force -= installer.count;
        for &(farm, trusted) in &installer.farms {
            let global = if trusted { installer.global } else { 0 };
            self.farms[farm].global -= global;
            self.farms[farm].local -= installer.count - global;
        }
        self.sweeps.push_back(number);
    }

    /// Lets entries go whose time is over, and those of sessions that are over: a batch of them. Returns SEs that have none
    /// left of an old session.
    pub(in super::super) fn tick(&mut self, now: Instant, change: Change) -> Vec<IpAddr> {
        self.ticked = now.saturating_duration_since(self.epoch).as_millis() as u64 / TICK;
        let mut left = BATCH;
        while left > 0
            && let Some(&(at, id)) = self.timers.first()
            && at <= self.ticked
        {
            self.remove(id, change);
            left -= 1;
        }
        let mut swept = Vec::new();
        while let Some(&number) = self.sweeps.front() {
            let Some(installer) = &self.installers[number as usize] else { break };
            let (first, address, doomed) = (installer.first, installer.address, installer.doomed.unwrap_or(change));
            if first == NIL {
                self.installers[number as usize] = None;
                self.sweeps.pop_front();
                swept.push(address);
            } else if left > 0 {
                self.remove(first, doomed);
                left -= 1;
            } else {
                break;
            }
        }
        swept
    }

    /// When [`Store::tick`] has something to do; `ticked` is when it was last called.
    pub(in super::super) fn next_deadline(&self, ticked: Instant) -> Option<Instant> {
        if !self.sweeps.is_empty() {
            return Some(ticked);
        }
        self.timers.first().map(|&(at, _)| self.epoch + Duration::from_millis(at.saturating_mul(TICK)))
    }

    /// Changes that wait for entries that have not gone yet.
    pub(in super::super) fn waiting(&self) -> impl Iterator<Item = Change> + '_ {
        self.sweeps.iter().filter_map(|&number| self.installers[number as usize].as_ref()?.doomed)
    }

    /// Whether entries of this SE are there, or leave just now.
    pub(in super::super) fn knows(&self, address: IpAddr) -> bool {
        let of_old =
            |&number: &u32| self.installers[number as usize].as_ref().is_some_and(|one| one.address == address);
        self.current.contains_key(&address) || self.sweeps.iter().any(of_old)
    }

    pub(super) fn counts(&self) -> ExceptionCounts {
        ExceptionCounts { entries: self.in_force, limit: self.limit }
    }

    pub(super) fn farm(&self, farm: usize) -> FarmExceptions {
        let counts = self.farms.get(farm).copied().unwrap_or_default();
        FarmExceptions { masks: self.keys.masks_in_use(farm), ..counts }
    }

    pub(super) fn count_of(&self, address: IpAddr) -> u32 {
        let current = self.current.get(&address).and_then(|&number| self.installers[number as usize].as_ref());
        current.map_or(0, |installer| installer.count)
    }

    /// The number of the youngest entry so far.
    pub(super) fn youngest(&self) -> u64 {
        self.births
    }

    /// The entry at an index, if it is in force, not younger than `cut`, and asked for; none beyond the last one.
    pub(super) fn listed(&self, index: u32, cut: u64, filter: &Filter) -> Option<Option<Listed>> {
        let entry = self.entries.get(index as usize)?;
        let in_force = || {
            let installer = self.installers[entry.installer as usize].as_ref().filter(|one| one.doomed.is_none())?;
            let scope = installer.listed(entry.scope);
            Some(Listed { scope, installer: installer.address, flows: entry.flows })
        };
        let there = entry.used && entry.birth <= cut && entry.expires > self.ticked;
        Some(if there { in_force().filter(|listed| filter.matches(listed)) } else { None })
    }

    /// Bytes that this takes, as far as vectors and tables tell; sets count with what their nodes take when half full.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
            + self.free.capacity() * 4
            + self.by_flows.allocation_size()
            + self.timers.len() * 2 * size_of::<(u64, u32)>()
            + self.keys.bytes()
    }

    fn expiry(&self, ttl: u32, now: Instant) -> u64 {
        match ttl {
            0 => NEVER,
            seconds => {
                let now = now.saturating_duration_since(self.epoch).as_millis() as u64;
                (now + u64::from(seconds) * 1000).div_ceil(TICK)
            }
        }
    }

    fn installer(&mut self, config: &ClusterConfig, address: IpAddr, host: u16) -> u32 {
        if let Some(&number) = self.current.get(&address) {
            return number;
        }
        let farms = config.farms.iter().enumerate().filter(|(_, farm)| farm.admits(address));
        let limit = farms.clone().map(|(_, farm)| farm.max_exceptions).min().unwrap_or(0);
        let farms = farms.map(|(index, farm)| (index, farm.global_exceptions)).collect();
        let new = Installer { address, host, farms, limit, first: NIL, count: 0, global: 0, doomed: None };
        let number = match self.installers.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.installers.push(None);
                self.installers.len() - 1
            }
        };
        self.installers[number] = Some(new);
        self.current.insert(address, number as u32);
        number as u32
    }

    /// An entry of the SE's older session that has not gone yet makes room: a host is in a record once.
    fn outlive(&mut self, address: IpAddr, flows: &Flows, change: Change) {
        let of_old =
            |&number: &u32| self.installers[number as usize].as_ref().is_some_and(|one| one.address == address);
        let sweeps: Vec<u32> = self.sweeps.iter().copied().filter(of_old).collect();
        for number in sweeps {
            if let Some(id) = self.find(number, flows) {
                self.remove(id, change);
            }
        }
    }

    fn find(&self, installer: u32, flows: &Flows) -> Option<u32> {
        let is = |&id: &u32| {
            let entry = &self.entries[id as usize];
            entry.installer == installer && entry.flows == *flows
        };
        self.by_flows.find(self.hasher.hash_one((installer, *flows)), is).copied()
    }

    fn insert(
        &mut self,
        config: &ClusterConfig,
        number: u32,
        Exception { scope, flows, .. }: Exception,
        expires: u64,
        change: Change,
    ) -> Result<(), ExceptError> {
        let Self { installers, keys, .. } = self;
        let Some(installer) = installers[number as usize].as_mut() else { return Err(ExceptError::NoSession) };
        if installer.count >= installer.limit {
            return Err(ExceptError::TooMany(installer.limit));
        }
        if self.used >= self.limit {
            return Err(ExceptError::Full(self.limit));
        }
        for &(farm, trusted) in &installer.farms {
            let in_force = Installer::scope(scope, trusted);
            let possible = keys.may_hold(farm, &flows, in_force);
            possible.map_err(|refusal| refused(config, farm, self.limit, refusal))?;
        }
        for &(farm, trusted) in &installer.farms {
            let in_force = Installer::scope(scope, trusted);
            keys.hold(farm, &flows, in_force, installer.host, change);
            *of_scope(&mut self.farms[farm], in_force) += 1;
        }
        installer.count += 1;
        installer.global += u32::from(scope == Scope::Global);
        self.births += 1;
        let after = installer.first;
        let entry =
            Entry { flows, scope, used: true, installer: number, before: NIL, after, birth: self.births, expires };
        let id = match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                self.entries.len() as u32 - 1
            }
        };
        installer.first = id;
        if after != NIL {
            self.entries[after as usize].before = id;
        }
        if expires != NEVER {
            self.timers.insert((expires, id));
        }
        (self.used, self.in_force) = (self.used + 1, self.in_force + 1);
        let Self { entries, hasher, by_flows, .. } = self;
        let hash = |id: &u32| hasher.hash_one((entries[*id as usize].installer, entries[*id as usize].flows));
        by_flows.insert_unique(hash(&id), id, hash);
        Ok(())
    }

    /// Another scope and another end for an entry in force.
    fn overwrite(
        &mut self,
        config: &ClusterConfig,
        id: u32,
        scope: Scope,
        expires: u64,
        change: Change,
    ) -> Result<(), ExceptError> {
        let Entry { flows, scope: old, installer, expires: old_end, .. } = self.entries[id as usize];
        let Some(installer) = self.installers[installer as usize].as_mut() else { return Err(ExceptError::NoSession) };
        // Only those that trust it see a difference.
        let farms = installer.farms.iter().filter(|(_, trusted)| *trusted && scope != old).map(|(farm, _)| *farm);
        for farm in farms.clone() {
            let possible = self.keys.may_hold(farm, &flows, scope);
            possible.map_err(|refusal| refused(config, farm, self.limit, refusal))?;
        }
        for farm in farms {
            self.keys.hold(farm, &flows, scope, installer.host, change);
            self.keys.release(farm, &flows, old, installer.host, change);
            *of_scope(&mut self.farms[farm], scope) += 1;
            *of_scope(&mut self.farms[farm], old) -= 1;
        }
        installer.global = installer.global + u32::from(scope == Scope::Global) - u32::from(old == Scope::Global);
        if old_end != NEVER {
            self.timers.remove(&(old_end, id));
        }
        if expires != NEVER {
            self.timers.insert((expires, id));
        }
        let entry = &mut self.entries[id as usize];
        (entry.scope, entry.expires) = (scope, expires);
        Ok(())
    }

    fn remove(&mut self, id: u32, change: Change) {
        let Entry { flows, scope, installer: number, before, after, expires, .. } = self.entries[id as usize];
        let hash = self.hasher.hash_one((number, flows));
        if let Ok(place) = self.by_flows.find_entry(hash, |&other| other == id) {
            place.remove();
        }
        if expires != NEVER {
            self.timers.remove(&(expires, id));
        }
        if before != NIL {
            self.entries[before as usize].after = after;
        }
        if after != NIL {
            self.entries[after as usize].before = before;
        }
        self.entries[id as usize].used = false;
        self.free.push(id);
        self.used -= 1;
        let Some(installer) = self.installers[number as usize].as_mut() else { return };
        if installer.first == id {
            installer.first = after;
        }
        installer.count -= 1;
        installer.global -= u32::from(scope == Scope::Global);
        self.in_force -= u32::from(installer.doomed.is_none());
        for &(farm, trusted) in &installer.farms {
            let in_force = Installer::scope(scope, trusted);
            self.keys.release(farm, &flows, in_force, installer.host, change);
            if installer.doomed.is_none() {
                *of_scope(&mut self.farms[farm], in_force) -= 1;
            }
        }
    }
}

fn of_scope(farm: &mut FarmExceptions, scope: Scope) -> &mut u32 {
    match scope {
        Scope::Local => &mut farm.local,
        Scope::Global => &mut farm.global,
    }
}

fn refused(config: &ClusterConfig, farm: usize, limit: u32, refusal: Refusal) -> ExceptError {
    let name = || config.farms[farm].name.clone();
    match refusal {
        Refusal::Masks => ExceptError::TooManyMasks(name()),
        Refusal::Installers => ExceptError::TooManyInstallers(name()),
        Refusal::Records => ExceptError::Full(limit),
    }
}
