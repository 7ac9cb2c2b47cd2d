//! Writing a plan into the maps.

use std::time::Instant;

use necp_ebpf::{
    abi::{DIRECT, NONE, Server},
    host::{NotWritten, View},
    slot::SlotWord,
    tables::{NextHop, Tables},
};

use crate::control::config::halves;

use super::{
    Applied, ExceptionWrite, Ledger, MasksWrite, Plan, ServerWrite, ServiceWrite, TableKind, TableWrite, VipWrite,
    WriteError,
};

/// Attempts at one slot; the packet path changes a slot only by setting one bit.
const ATTEMPTS: u32 = 64;

impl Plan {
    /// Writes it all; what fails is left out and told. Must not run at the same time as another one or a collector's step.
    pub fn apply(&self, view: &View<'_>, ledger: &mut Ledger, now: Instant) -> Applied {
        let mut applied = Applied { through: self.change, waiting: self.waiting.clone(), ..Applied::default() };
        for write in &self.servers {
            match write.apply(view) {
                Ok(written) => applied.records_written += usize::from(written),
                Err(error) => applied.fail_server(write, error),
            }
        }
        for write in &self.exceptions {
            applied.exception(write, view);
        }
        for write in &self.masks {
            applied.masks(write, view);
        }
        for write in &self.vips {
            applied.vip(write, view);
        }
        for write in self.services.iter().filter(|write| write.table.is_none()) {
            applied.entry(write, view);
        }
        for write in &self.tables {
            if write.owners.iter().any(|owner| applied.failed_servers.contains(owner)) {
                applied.fail_table(write, WriteError::Waits(write.service));
                continue;
            }
            match write.apply(view, ledger, now) {
                Ok(moved) => applied.slots_moved += moved,
                Err(error) => applied.fail_table(write, error),
            }
        }
        for write in &self.services {
            match write.table {
                Some(table) if applied.failed_tables.contains(&table) => applied.failed_entries = true,
                Some(_) => applied.entry(write, view),
                None => {}
            }
        }
        applied
    }
}

impl ServerWrite {
    fn apply(&self, view: &View<'_>) -> Result<bool, WriteError> {
        let old = view.server(self.id).ok_or(WriteError::Server(self.id))?;
        let new = self.server;
        if old == new {
            return Ok(false);
        }
        let same_offer = Server { mac: new.mac, flags: new.flags, port: new.port, ..old } == new;
        let written = if same_offer {
            view.set_next_hop(self.id, NextHop::new(new.mac, new.flags, new.port))
        } else {
            view.set_server(self.id, &new)
        };
        if written { Ok(true) } else { Err(WriteError::Server(self.id)) }
    }
}

impl TableWrite {
    /// Returns how many slots changed owner.
    fn apply(&self, view: &View<'_>, ledger: &mut Ledger, now: Instant) -> Result<usize, WriteError> {
        let mut moved = 0;
        for (index, &owner) in (self.base..).zip(self.owners.iter()) {
            let slot = view.slots().get(index as usize).ok_or(WriteError::Slot(index))?;
            if self.kind == TableKind::Fresh {
                let new = SlotWord::plain(self.before).moved_to(owner, |id| id == DIRECT);
                slot.store(new.0);
                if new.legacy() != NONE {
                    ledger.set(index, now);
                }
                moved += 1;
                continue;
            }
            let mut old = SlotWord(slot.load());
            let mut attempts = 0..ATTEMPTS;
            while old.owner() != owner {
                attempts.next().ok_or(WriteError::Busy(index))?;
                let new = self.moved(old, owner, view);
                let found = SlotWord(slot.compare_exchange(old.0, new.0));
                if found == old {
                    moved += 1;
                    if new.legacy() != old.legacy() && new.legacy() != NONE {
                        ledger.set(index, now);
                    }
                    break;
                }
                old = found;
            }
        }
        Ok(moved)
    }

    fn moved(&self, old: SlotWord, owner: u32, view: &View<'_>) -> SlotWord {
        if self.kind == TableKind::Stateless {
            return old.moved_to(owner, |_| false).with_legacy(NONE);
        }
        let alive = |id| id == DIRECT || view.next_hop(id).is_some_and(NextHop::is_alive);
        old.moved_to(owner, alive)
    }
}

impl Applied {
    fn fail_server(&mut self, write: &ServerWrite, error: WriteError) {
        self.failed.extend(&write.changes);
        self.failed_servers.insert(write.id);
        self.errors.push(error);
    }

    fn fail_table(&mut self, write: &TableWrite, error: WriteError) {
        self.failed.extend(&write.changes);
        self.failed_tables.insert(write.service);
        self.errors.push(error);
    }

    fn vip(&mut self, write: &VipWrite, view: &View<'_>) {
        if view.vip6(write.index.into()) == Some(halves(write.address)) {
            return;
        }
        if view.set_vip6(write.index.into(), write.address.octets()) {
            self.records_written += 1;
        } else {
            self.failed_entries = true;
            self.failed_vips.insert(write.index);
            self.errors.push(WriteError::Vip(write.index));
        }
    }

    fn entry(&mut self, write: &ServiceWrite, view: &View<'_>) {
        if self.failed_vips.contains(&write.service.vip) {
            return;
        }
        let old = view.services(write.bucket).and_then(|bucket| bucket.entries.get(write.entry).copied());
        if old == Some(write.service) {
            return;
        }
        if old.is_some() && view.set_service(write.bucket, write.entry, &write.service) {
            self.records_written += 1;
        } else {
            self.failed_entries = true;
            self.errors.push(WriteError::Service(write.bucket));
        }
    }

    fn exception(&mut self, write: &ExceptionWrite, view: &View<'_>) {
        let error = match view.set_exception(write.number, &write.exception.named(view.exception_seed())) {
            Ok(written) => return self.records_written += usize::from(written),
            Err(NotWritten::NoRecord) => WriteError::Exception(write.number),
            Err(NotWritten::NoPlace) => WriteError::ExceptionPlace(write.number),
        };
        self.failed.insert(write.change);
        self.failed_exceptions.push((write.number, write.change));
        self.errors.push(error);
    }

    fn masks(&mut self, write: &MasksWrite, view: &View<'_>) {
        if view.set_exception_masks(write.farm as u32, &write.masks) {
            self.records_written += 1;
        } else {
            self.failed.extend(&write.changes);
            self.failed_masks.insert(write.farm);
            self.errors.push(WriteError::Masks(write.farm));
        }
    }
}
