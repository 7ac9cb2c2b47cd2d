//! A network element with one service whose every slot is alike, for tests of what several parties do at the same time.

use std::{
    net::Ipv4Addr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{ACCEPTS, ALIVE, NONE, REACHABLE},
    flows::{FlowWord, State, find, flow_key},
    hash::{flow_buckets, flow_hash, slot_index},
    host::{Owned, View},
    packet::{Packet, protocol},
    slot::{COLLECTING, SlotWord},
    steer::{Decision, steer},
    tables::{NextHop, Tables},
    verdict::Reason,
};
use necp_user::control::{
    cluster::Cluster,
    collect::Collector,
    config::{ClusterConfig, FarmConfig, ServiceKey},
};

use crate::oracle::clients::{FARM, TCP_PORT, VIP};

/// The old server.
pub const O: u32 = 2;
/// The new server.
pub const N: u32 = 3;
/// A third server.
pub const M: u32 = 4;

const SLOTS: u32 = 3;

/// The network element, and what became of packets.
pub struct Bed<'a> {
    /// Its tables.
    pub view: View<'a>,
    control: Mutex<Control>,
    decisions: Mutex<Vec<(usize, Decision)>>,
    service: u16,
    seed: u64,
    now: Instant,
    slot: SlotWord,
    entries: Vec<(Packet, FlowWord)>,
}

struct Control {
    cluster: Cluster,
    collector: Collector,
}

impl<'a> Bed<'a> {
    /// All slots are like `slot`; the flow table has these entries.
    pub fn new(view: View<'a>, slot: SlotWord, entries: &[(Packet, FlowWord)]) -> Self {
        let now = Instant::now();
        let mut control = Control::new(now);
        control.cluster.sync(&view, now);
        let service = control.cluster.layout().frontends[0].id;
        let seed = control.cluster.config().farms[0].seed();
        let (control, decisions) = (Mutex::new(control), Mutex::new(Vec::new()));
        let bed = Self { view, control, decisions, service, seed, now, slot, entries: entries.to_vec() };
        for id in [O, N, M] {
            view.set_next_hop(id, NextHop::new([2, 0, 0, 0, 0, id as u8], ALIVE | ACCEPTS | REACHABLE, 0));
        }
        bed
    }

    /// Everything is as at first.
    pub fn reset(&self) {
        for entry in self.view.flows().iter().flat_map(|bucket| &bucket.entries) {
            entry.word.store(0);
            entry.key.store(0);
        }
        let mut control = Control::new(self.now);
        // Ages count from the first pass on: the next one, if it is late enough, is one step.
        control.collector.run(&self.view, &mut control.cluster, self.now, 0);
        *lock(&self.control) = control;
        for slot in self.view.slots() {
            slot.store(self.slot.0);
        }
        for (entry, (packet, word)) in self.view.flows().iter().flat_map(|bucket| &bucket.entries).zip(&self.entries) {
            entry.key.store(flow_key(packet, self.service));
            entry.word.store(word.0);
        }
        lock(&self.decisions).clear();
    }

    /// A packet; `turn` tells apart what the same thread does.
    pub fn packet(&self, turn: usize, packet: Packet) {
        let decision = steer(&packet, &self.view);
        lock(&self.decisions).push((turn, decision));
    }

    /// A full collection, `after` some time.
    pub fn collect(&self, after: Duration) {
        let mut control = lock(&self.control);
        let Control { cluster, collector } = &mut *control;
        collector.run(&self.view, cluster, self.now + after, 0);
    }

    /// What a plan does with the slots.
    pub fn change_owner(&self, owner: u32) {
        for slot in self.view.slots() {
            let mut old = SlotWord(slot.load());
            loop {
                let new = old.moved_to(owner, |id| id != NONE);
                let found = SlotWord(slot.compare_exchange(old.0, new.0));
                if found == old {
                    break;
                }
                old = found;
            }
        }
    }

    /// Where a turn's packet went.
    pub fn went(&self, turn: usize) -> (u32, Reason) {
        let decisions = lock(&self.decisions);
        let (_, decision) = decisions.iter().find(|(t, _)| *t == turn).expect("every packet is steered");
        (decision.server, decision.reason)
    }

    /// Where the flow's next packet would go, nobody disturbing.
    pub fn next(&self, packet: Packet) -> u32 {
        steer(&packet, &self.view).server
    }

    /// What the flow table has of a flow: its candidate, its record.
    pub fn found(&self, packet: &Packet) -> [FlowWord; 2] {
        let key = flow_key(packet, self.service);
        let found = find(&self.view, flow_buckets(flow_hash(packet, self.seed), self.view.flow_mask()), key);
        [found.candidate.value, found.record.value]
    }

    /// What must hold whatever was done: no entry busy, free entries without a key, nothing left half collected.
    pub fn sound(&self) -> Result<(), String> {
        let entries: Vec<(u64, FlowWord)> = self
            .view
            .flows()
            .iter()
            .flat_map(|bucket| &bucket.entries)
            .map(|entry| (entry.key.load(), FlowWord(entry.word.load())))
            .collect();
        let slots: Vec<SlotWord> = self.view.slots().iter().map(|slot| SlotWord(slot.load())).collect();
        for (key, word) in &entries {
            match word.state() {
                State::Busy => return Err(format!("an entry stays busy: {entries:x?}")),
                State::Empty if *key != 0 => return Err(format!("a free entry has a key: {entries:x?}")),
                State::Empty | State::Candidate | State::Record => {}
            }
        }
        if let Some(slot) = slots.iter().find(|slot| slot.0 & COLLECTING != 0) {
            return Err(format!("a slot stays marked: {slot:x?}"));
        }
        Ok(())
    }

    /// A flow with an entry is in a slot that says so.
    pub fn tracked_if_on_record(&self, packet: &Packet) -> Result<(), String> {
        let index = slot_index(flow_hash(packet, self.seed), SLOTS);
        let slot = SlotWord(self.view.slots()[index as usize].load());
        let found = self.found(packet);
        let needed = found.iter().any(|word| word.state() != State::Empty && word.server() != slot.owner());
        match needed && slot.is_plain() {
            true => Err(format!("{found:x?} is on record, but its slot is plain: {slot:x?}")),
            false => Ok(()),
        }
    }
}

impl Control {
    fn new(now: Instant) -> Self {
        let mut farm = FarmConfig::new(FARM);
        farm.vips = vec![Ipv4Addr::from(VIP).into()];
        farm.services = vec![ServiceKey::new(protocol::TCP, TCP_PORT)];
        farm.table_size = SLOTS;
        let config = ClusterConfig { farms: vec![farm], slots: SLOTS, servers: 16, ..ClusterConfig::default() };
        let cluster = Cluster::new(config, now).expect("a valid configuration");
        Self { cluster, collector: Collector::new(now) }
    }
}

/// Another thread's panic is told anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tables for a [`Bed`].
pub fn tables(buckets: usize) -> Owned {
    Owned::new(SLOTS as usize, 16, buckets)
}
