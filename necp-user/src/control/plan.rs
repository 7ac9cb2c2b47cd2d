//! Desired − installed: what has to be written, in the order in which the packet path can bear it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{self, DIRECT, FIRST_SERVER, NONE, Server},
    host::View,
    steer::shows_beginning,
};

mod apply;

use super::{
    cluster::{Change, Cluster},
    exceptions::Record,
    slots::{self, Member},
};

/// Writes that bring the maps up to [`Plan::change`]. Each names the changes that wait for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// The last input that it takes into account.
    pub change: Change,
    /// Written first: no slot may name a server without a record, nor be moved away from one that still accepts flows.
    pub servers: Vec<ServerWrite>,
    /// Then exceptions: no slot may lead to a server that does not want the flow.
    pub exceptions: Vec<ExceptionWrite>,
    /// And what they look at.
    pub masks: Vec<MasksWrite>,
    /// Then the slots.
    pub tables: Vec<TableWrite>,
    /// Then the IPv6 VIPs that entries name.
    pub vips: Vec<VipWrite>,
    /// Last the entries that lead to the tables.
    pub services: Vec<ServiceWrite>,
    /// Changes of which only a part is in this plan.
    pub waiting: BTreeSet<Change>,
}

/// A server's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerWrite {
    /// The server id.
    pub id: u32,
    /// What it should say.
    pub server: Server,
    /// Who waits for it.
    pub changes: Vec<Change>,
}

/// An exception's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExceptionWrite {
    /// Its number.
    pub number: u32,
    /// What it should say; the default: nothing.
    pub exception: Record,
    /// Who waits for it.
    pub change: Change,
}

/// What the exceptions of one farm look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MasksWrite {
    /// Index of the farm.
    pub farm: usize,
    /// What it should say.
    pub masks: abi::ExceptionMasks,
    /// Who waits for it.
    pub changes: Vec<Change>,
}

/// The slots of one service.
#[derive(Clone, Debug, PartialEq)]
pub struct TableWrite {
    /// Index in [`Layout::services`](super::layout::Layout::services).
    pub service: usize,
    /// Its first slot.
    pub base: u32,
    /// The owners wanted.
    pub owners: Arc<[u32]>,
    /// What becomes of the old ones.
    pub kind: TableKind,
    /// Where flows went before the first owners: [`DIRECT`] of TCP that is intercepted, else [`NONE`].
    pub before: u32,
    /// Who waits for it.
    pub changes: Vec<Change>,
}

/// What a change of owner means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// The region was nobody's: what stands there means nothing.
    Fresh,
    /// Flows of the old owner stay with it.
    Moved,
    /// The service never asks its slots where an old flow is: all its flows are on record, or none.
    Stateless,
}

/// An IPv6 VIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VipWrite {
    /// Its index; no entry that is in the maps names it, unless it is there already.
    pub index: u16,
    /// The VIP.
    pub address: Ipv6Addr,
}

/// An entry of the service table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceWrite {
    /// Bucket of the service table.
    pub bucket: u32,
    /// Entry in the bucket.
    pub entry: usize,
    /// What it should say; the default: nothing.
    pub service: abi::Service,
    /// The table that it leads to; none for an entry that goes.
    pub table: Option<usize>,
}

/// A write that could not be made; it stays pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The map `servers` has no such id.
    #[error("server id {0} is beyond the map `servers`")]
    Server(u32),
    /// The map `slots` has no such slot.
    #[error("slot {0} is beyond the map `slots`")]
    Slot(u32),
    /// A slot kept changing.
    #[error("slot {0} could not be changed: it changed all the time")]
    Busy(u32),
    /// The table names a server whose record could not be written.
    #[error("the slots of service number {0} were not moved: a server's record is missing")]
    Waits(usize),
    /// The map of IPv6 VIPs has no such index.
    #[error("IPv6 VIP number {0} is beyond the map `vips6`")]
    Vip(u16),
    /// The service table has no such entry.
    #[error("bucket {0} is beyond the map `services`")]
    Service(u32),
    /// The map `exceptions` has no such record.
    #[error("exception {0} is beyond the map `exceptions`")]
    Exception(u32),
    /// The index of the exceptions has no room for it.
    #[error("exception {0} finds no place in the map `except_index`")]
    ExceptionPlace(u32),
    /// The map of masks has no such farm.
    #[error("farm number {0} is beyond the map `except_masks`")]
    Masks(usize),
}

/// What came of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// All changes up to this one are in the maps, but for those in `failed` and in `waiting`.
    pub through: Change,
    /// Changes of which a part is still to come.
    pub waiting: BTreeSet<Change>,
    /// Changes that wait for a write that failed.
    pub failed: BTreeSet<Change>,
    /// The failed writes.
    pub errors: Vec<WriteError>,
    /// Slots whose owner changed.
    pub slots_moved: usize,
    /// Server records, service entries, exceptions and their masks written.
    pub records_written: usize,
    failed_exceptions: Vec<(u32, Change)>,
    failed_masks: BTreeSet<usize>,
    failed_servers: BTreeSet<u32>,
    failed_tables: BTreeSet<usize>,
    failed_vips: BTreeSet<u16>,
    failed_entries: bool,
}

impl Applied {
    /// Whether a change is in the maps; none: it has not been tried yet, or a part of it is still to come.
    pub fn outcome(&self, change: Change) -> Option<bool> {
        (change <= self.through && !self.waiting.contains(&change)).then(|| !self.failed.contains(&change))
    }
}

/// What user space remembers of the slots: since when each has its legacy.
#[derive(Debug)]
pub struct Ledger {
    epoch: Instant,
    legacy_since: Vec<u32>,
}

impl Ledger {
    /// For a map of this many slots; times count from `epoch` on.
    pub(super) fn new(slots: u32, epoch: Instant) -> Self {
        Self { epoch, legacy_since: vec![0; slots as usize] }
    }

    /// Notes that a slot has its legacy from now on.
    pub(super) fn set(&mut self, slot: u32, now: Instant) {
        let seconds = now.saturating_duration_since(self.epoch).as_secs().min(u64::from(u32::MAX)) as u32;
        if let Some(since) = self.legacy_since.get_mut(slot as usize) {
            *since = seconds;
        }
    }

    /// When a slot's legacy was set, never earlier than it was.
    pub(super) fn since(&self, slot: u32) -> Instant {
        let seconds = self.legacy_since.get(slot as usize).copied().unwrap_or(0);
        self.epoch + Duration::from_secs(u64::from(seconds) + 1)
    }
}

impl Plan {
    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
            && self.exceptions.is_empty()
            && self.masks.is_empty()
            && self.tables.is_empty()
            && self.vips.is_empty()
            && self.services.is_empty()
    }
}

impl Cluster {
    /// What has to be written now. Does what is due first, as [`Cluster::tick`].
    pub fn plan(&mut self, now: Instant) -> Plan {
        self.tick(now);
        for index in 0..self.services.len() {
            if std::mem::take(&mut self.services[index].dirty) {
                self.recompute(index, now);
            }
        }
        let servers = self.dirty_servers.iter().map(|(&id, changes)| ServerWrite {
            id,
            server: self.server_record(id),
            changes: changes.clone(),
        });
        let servers = servers.collect();
        let (exceptions, masks) = self.exception_writes();
        let waiting = self.exceptions.waiting().collect();
        let unwritten = self.services.iter().enumerate().filter(|(_, service)| service.unwritten);
        let tables = unwritten.map(|(index, _)| self.table_write(index)).collect();
        let (vips, services) =
            if self.dirty_entries { (self.vip_writes(), self.service_writes()) } else { Default::default() };
        // A table that did not change keeps nobody waiting.
        for service in self.services.iter_mut().filter(|service| !service.unwritten) {
            service.changes.clear();
        }
        Plan { change: self.change, servers, exceptions, masks, tables, vips, services, waiting }
    }

    /// Takes note of what [`Plan::apply`] has done; must follow it before the next input.
    pub fn applied(&mut self, applied: &Applied) {
        self.dirty_servers.retain(|id, changes| {
            changes.clear();
            applied.failed_servers.contains(id)
        });
        for (index, service) in self.services.iter_mut().enumerate() {
            service.changes.clear();
            service.unwritten = applied.failed_tables.contains(&index);
            service.fresh &= service.unwritten;
        }
        self.dirty_entries = applied.failed_entries;
        self.exceptions_applied(applied);
    }

    /// Plans, applies and takes note.
    pub fn sync(&mut self, view: &View<'_>, now: Instant) -> Applied {
        let plan = self.plan(now);
        let applied = plan.apply(view, &mut self.ledger, now);
        self.applied(&applied);
        applied
    }

    /// For [`Plan::apply`].
    pub fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// Writes that failed and are being retried.
    pub(super) fn pending_writes(&self) -> usize {
        let tables = self.services.iter().filter(|service| service.unwritten).count();
        let exceptions = self.exceptions.keys.dirty.len() + self.exceptions.keys.dirty_farms.len();
        self.dirty_servers.len() + tables + usize::from(self.dirty_entries) + exceptions
    }

    /// What a server's record should say.
    pub(super) fn server_record(&self, id: u32) -> Server {
        let Some(offer) = self.offers.get(&id) else {
            return self.strangers.get(&id).copied().unwrap_or_default();
        };
        let host = self.hosts.get(&offer.key.address);
        let hop = host.and_then(|host| host.hop);
        let takes_flows = self.serves_on(offer, host)
            && offer.health.level() > 0
            && self.config.farms[offer.key.farm].capacity_of(offer.key.address) > 0;
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let flags = flag(offer.alive, abi::ALIVE)
            | flag(takes_flows, abi::ACCEPTS)
            | flag(host.is_some_and(|host| host.reachable()), abi::REACHABLE)
            | (offer.key.forwarding as u8) << abi::FORWARDING_SHIFT;
        Server {
            mac: hop.map_or([0; 6], |hop| hop.mac),
            flags,
            port: hop.map_or(0, |hop| hop.port),
            address: in_record(offer.key.address),
            farm: offer.key.farm as u16,
            service_port: offer.key.service.port,
            protocol: offer.key.service.protocol,
            forwarding: offer.key.forwarding as u8,
            host: host.map_or(0, |host| host.number),
            source: hop.map_or([0; 16], |hop| in_record(hop.source)),
            mtu: hop.map_or(0, |hop| hop.mtu),
            reserved: [0; 14],
        }
    }

    /// The slot table that a service should have.
    fn recompute(&mut self, index: usize, now: Instant) {
        let members = self.offers.of_service(index).map(|(id, offer)| Member {
            id,
            identity: super::stable::identity(offer.key.address, offer.key.service.protocol, offer.key.service.port),
            weight: self.weight_of(offer, now),
        });
        let members: Vec<Member> = members.filter(|member| member.weight > 0).collect();
        let size = self.layout.services[index].size;
        let service = &mut self.services[index];
        if members == service.members && !(members.is_empty() && service.served) {
            return;
        }
        let nobody = if service.served { DIRECT } else { NONE };
        let owners = match members.is_empty() {
            true => vec![nobody; size as usize],
            false => slots::table(&members, size),
        };
        service.served |= !members.is_empty();
        service.members = members;
        if service.owners[..] != owners[..] {
            service.owners = owners.into();
            service.unwritten = true;
        }
    }

    fn table_write(&self, index: usize) -> TableWrite {
        let (service, placed) = (&self.services[index], &self.layout.services[index]);
        let kind = match (service.fresh, shows_beginning(placed.key.protocol)) {
            (true, _) => TableKind::Fresh,
            (false, true) => TableKind::Moved,
            (false, false) => TableKind::Stateless,
        };
        let owners = service.owners.clone();
        debug_assert!(owners.iter().all(|&owner| owner < FIRST_SERVER || self.offers.contains_key(&owner)));
        let intercepts = self.config.farms[placed.farm].intercepts();
        let before = if intercepts && shows_beginning(placed.key.protocol) { DIRECT } else { NONE };
        TableWrite { service: index, base: placed.base, owners, kind, before, changes: service.changes.clone() }
    }

    /// What has to be written of exceptions.
    fn exception_writes(&mut self) -> (Vec<ExceptionWrite>, Vec<MasksWrite>) {
        let keys = &mut self.exceptions.keys;
        keys.wake();
        let record =
            |&(number, change): &(u32, Change)| ExceptionWrite { number, exception: keys.record(number), change };
        let masks = |(&farm, changes): (&usize, &Vec<Change>)| MasksWrite {
            farm,
            masks: keys.masks(farm),
            changes: changes.clone(),
        };
        (keys.dirty.iter().map(record).collect(), keys.dirty_farms.iter().map(masks).collect())
    }

    fn exceptions_applied(&mut self, applied: &Applied) {
        let keys = &mut self.exceptions.keys;
        let failed: BTreeSet<u32> = applied.failed_exceptions.iter().map(|&(number, _)| number).collect();
        for (number, _) in std::mem::take(&mut keys.dirty) {
            if !failed.contains(&number) {
                keys.written(number);
            }
        }
        keys.dirty.clone_from(&applied.failed_exceptions);
        keys.dirty_farms.retain(|farm, changes| {
            changes.clear();
            applied.failed_masks.contains(farm)
        });
    }

    fn vip_writes(&self) -> Vec<VipWrite> {
        self.layout.vips6.iter().map(|(&address, &index)| VipWrite { index, address }).collect()
    }

    fn service_writes(&self) -> Vec<ServiceWrite> {
        let gone = self.layout.stale.iter().map(|&(bucket, entry)| ServiceWrite {
            bucket,
            entry,
            service: abi::Service::default(),
            table: None,
        });
        let wanted = self.layout.frontends.iter().map(|frontend| ServiceWrite {
            bucket: frontend.bucket,
            entry: frontend.entry,
            service: self.layout.entry(&self.config, frontend),
            table: Some(frontend.service),
        });
        let notes = self.layout.notes.iter().map(|note| ServiceWrite {
            bucket: note.bucket,
            entry: note.entry,
            service: note.service,
            table: None,
        });
        gone.chain(notes).chain(wanted).collect()
    }
}

/// As server records have addresses: IPv4 in its IPv6-mapped form.
fn in_record(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests;
