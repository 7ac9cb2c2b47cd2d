//! Collection: what the packet path remembered and nobody needs any more goes, in bounded batches.
//!
//! One pass:
//! 1. *Mark*: a legacy whose time is over, or whose host is gone, is taken out of its slot; every slot that may have flows on
//!    record gets COLLECTING and loses TRACKED, in one compare-and-swap.
//! 2. *Scan*: every entry of the flow table gets older if its class's step is due, and goes if it is idle, dead, or says
//!    what the slot says anyway; the slots of those that stay are noted.
//! 3. *Clear*: COLLECTING goes; a slot that was noted gets TRACKED again.
//!
//! The packet path inserts first and sets TRACKED then: an entry that the scan did not see has set, or will set, TRACKED
//! after the mark took it away. An entry is condemned by one compare-and-swap of its word, so one
//! that was just used stays; then its key goes, then its word.
//!
//! Ages count up once in a thirtieth of the idle time, at most once a pass, and the 32nd count is the last: an entry lives
//! its idle time after its last packet at least, and a tenth longer at most, as long as the passes are in time.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use necp_ebpf::{
    abi::{ALWAYS_TRACKED, DIRECT, FLOWS_PER_BUCKET, NONE, UNTRACKED},
    flows::{FlowWord, FlowWords, MAX_AGE, State},
    hash::{flow_buckets, flow_hash, slot_index},
    host::View,
    packet::Packet,
    slot::{COLLECTING, SlotWord, TRACKED},
    steer::shows_beginning,
    tables::{NextHop, Tables},
    word::Word,
};

use super::cluster::Cluster;

/// Steps of age in an idle time.
const STEPS: u32 = 30;
/// Attempts at one word; the packet path changes it at most a few times in between.
const ATTEMPTS: usize = 64;

/// What a full pass found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Flows on record.
    pub records: u64,
    /// SYNs that nobody has answered to yet.
    pub candidates: u64,
    /// Flows on record by server id.
    pub by_server: BTreeMap<u32, u64>,
    /// Flows on record by service, as [`Layout::services`](super::layout::Layout::services).
    pub by_service: Vec<u64>,
    /// Slots with a legacy.
    pub legacies: u64,
    /// Slots that may have flows on record.
    pub tracked: u64,
    /// Entries that went in this pass.
    pub dropped: u64,
    /// Server ids that this pass freed.
    pub freed: Vec<u32>,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing: the next pass begins at this time.
    Idle(Instant),
    /// Part of a pass; there is more to do now.
    Working,
    /// The rest of a pass: see [`Collector::last`].
    Finished,
}

/// The collector of one instance.
#[derive(Debug)]
pub struct Collector {
    phase: Phase,
    next_pass: Instant,
    paces: Vec<Pace>,
    /// Bit by slot: an entry of it stays.
    kept: Vec<u64>,
    /// Bit by server id: it was met.
    seen: Vec<u64>,
    unrecorded: Option<u64>,
    unrecorded_at: Option<Instant>,
    frontends: BTreeMap<u16, Class>,
    current: Collected,
    last: Collected,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Idle,
    Mark { service: usize, slot: u32 },
    Scan { bucket: usize },
    Clear { service: usize, slot: u32 },
}

/// Entries that age together.
#[derive(Clone, Copy, Debug)]
struct Pace {
    step: Duration,
    last: Instant,
    due: bool,
}

/// What an entry's service says about it.
#[derive(Clone, Copy, Debug)]
struct Class {
    service: usize,
    /// What stands for the VIP in the packet path.
    vip: u32,
    protocol: u8,
    port: u16,
    seed: u64,
    base: u32,
    size: u32,
    flags: u16,
    pace: usize,
}

const HALF_OPEN: usize = 0;
const CLOSING: usize = 1;

impl Collector {
    /// Its first pass is due at once.
    pub fn new(now: Instant) -> Self {
        Self {
            phase: Phase::Idle,
            next_pass: now,
            paces: Vec::new(),
            kept: Vec::new(),
            seen: Vec::new(),
            unrecorded: None,
            unrecorded_at: None,
            frontends: BTreeMap::new(),
            current: Collected::default(),
            last: Collected::default(),
        }
    }

    /// What the last full pass found.
    pub fn last(&self) -> &Collected {
        &self.last
    }

    /// When a packet last met a full flow table, if one did since the collector began.
    pub fn turned_away_at(&self) -> Option<Instant> {
        self.unrecorded_at
    }

    /// Looks at about `budget` slots or flow buckets, beginning a pass if one is due.
    ///
    /// `unrecorded` is how many packets have met a full flow table since the program was loaded: those counted under
    /// [`Reason::Legacy`](necp_ebpf::verdict::Reason::Legacy) and under
    /// [`Reason::NewUnrecorded`](necp_ebpf::verdict::Reason::NewUnrecorded). While it moves, legacies stay.
    pub fn step(
        &mut self,
        view: &View<'_>,
        cluster: &mut Cluster,
        now: Instant,
        budget: usize,
        unrecorded: u64,
    ) -> Progress {
        if self.unrecorded.replace(unrecorded).is_some_and(|before| before != unrecorded) {
            self.unrecorded_at = Some(now);
        }
        let mut left = budget.max(1);
        if matches!(self.phase, Phase::Idle) {
            if now < self.next_pass {
                return Progress::Idle(self.next_pass);
            }
            self.begin(view, cluster, now);
        }
        while left > 0 {
            match self.phase {
                Phase::Idle => return Progress::Finished,
                Phase::Mark { service, slot } => {
                    let next = slots(cluster, service, slot, &mut left, |index, service| {
                        self.mark(view, cluster, index, service, now);
                    });
                    self.phase =
                        next.map_or(Phase::Scan { bucket: 0 }, |(service, slot)| Phase::Mark { service, slot });
                }
                Phase::Scan { bucket } => self.scan(view, bucket, &mut left),
                Phase::Clear { service, slot } => {
                    let next = slots(cluster, service, slot, &mut left, |index, _| self.clear(view, index));
                    self.phase = match next {
                        Some((service, slot)) => Phase::Clear { service, slot },
                        None => self.end(cluster),
                    };
                }
            }
        }
        if matches!(self.phase, Phase::Idle) { Progress::Finished } else { Progress::Working }
    }

    /// A whole pass at once, or the rest of one that has begun, whether it is due or not.
    pub fn run(&mut self, view: &View<'_>, cluster: &mut Cluster, now: Instant, unrecorded: u64) -> &Collected {
        self.next_pass = self.next_pass.min(now);
        while self.step(view, cluster, now, usize::MAX, unrecorded) == Progress::Working {}
        &self.last
    }

    fn begin(&mut self, view: &View<'_>, cluster: &mut Cluster, now: Instant) {
        self.set_paces(cluster, now);
        self.frontends = classes(cluster);
        self.kept = vec![0; view.slots().len().div_ceil(64)];
        self.seen = vec![0; view.server_count().div_ceil(64)];
        self.current = Collected { by_service: vec![0; cluster.layout().services.len()], ..Collected::default() };
        cluster.ids.begin_collection();
        self.phase = Phase::Mark { service: 0, slot: 0 };
    }

    fn set_paces(&mut self, cluster: &Cluster, now: Instant) {
        let config = cluster.config();
        let farms = config.farms.iter().flat_map(|farm| [farm.tcp_idle, farm.udp_idle]);
        let steps = [config.half_open, config.closing].into_iter().chain(farms).map(|idle| idle / STEPS);
        if self.paces.is_empty() {
            self.paces = steps.map(|step| Pace { step, last: now, due: false }).collect();
        }
        for pace in &mut self.paces {
            let passed = now.saturating_duration_since(pace.last);
            pace.due = passed >= pace.step;
            if pace.due {
                // Steps that were missed are not made up for: an entry may have been used just now.
                pace.last = if passed < pace.step * 2 { pace.last + pace.step } else { now };
            }
        }
        let shortest = self.paces.iter().map(|pace| pace.step).min().unwrap_or_default();
        self.next_pass = now + shortest;
    }

    fn mark(&mut self, view: &View<'_>, cluster: &Cluster, index: u32, service: usize, now: Instant) {
        let Some(slot) = view.slots().get(index as usize) else { return };
        let mut over = None;
        update(slot, |old| {
            self.see(old.owner());
            self.see(old.legacy());
            let goes = old.legacy() != NONE
                && *over.get_or_insert_with(|| {
                    !alive(view, old.legacy()) || self.legacy_is_over(cluster, index, service, now)
                });
            if goes {
                // All living flows of it are on record by now, so the slot is as if it were tracked.
                old.with_legacy(NONE).with_bits(COLLECTING, TRACKED)
            } else if old.is_tracked() {
                old.with_bits(COLLECTING, TRACKED)
            } else {
                old
            }
        });
    }

    fn legacy_is_over(&self, cluster: &Cluster, index: u32, service: usize, now: Instant) -> bool {
        let farm = cluster.layout().services[service].farm;
        let since = cluster.ledger.since(index);
        // Whoever found no room to be recorded has until one idle time later to try again.
        let since = self.unrecorded_at.map_or(since, |at| at.max(since));
        now > since + cluster.config().farms[farm].tcp_idle
    }

    fn scan(&mut self, view: &View<'_>, mut bucket: usize, left: &mut usize) {
        while let Some(words) = view.flows().get(bucket) {
            if *left == 0 {
                self.phase = Phase::Scan { bucket };
                return;
            }
            *left -= 1;
            bucket += 1;
            for entry in &words.entries[..FLOWS_PER_BUCKET] {
                self.entry(view, entry);
            }
        }
        self.phase = Phase::Clear { service: 0, slot: 0 };
    }

    fn entry(&mut self, view: &View<'_>, entry: &FlowWords) {
        let mut value = FlowWord(entry.word.load());
        for _ in 0..ATTEMPTS {
            if matches!(value.state(), State::Empty | State::Busy) {
                return;
            }
            let key = entry.key.load();
            let again = FlowWord(entry.word.load());
            if again != value {
                value = again;
                continue;
            }
            match self.judge(view, key, value) {
                Some((class, new)) if new == value || entry.replace(value, new) => {
                    return self.count(class, key, value);
                }
                None if entry.free(value) => {
                    self.current.dropped += 1;
                    return;
                }
                // Somebody else has been there.
                _ => value = FlowWord(entry.word.load()),
            }
        }
        // It changes all the time, so it is in use: the packet path sets TRACKED again only when it inserts.
        if let Some(class) = self.class(entry.key.load()) {
            self.count(class, entry.key.load(), value);
        }
    }

    /// What an entry becomes; none: it goes.
    fn judge(&self, view: &View<'_>, key: u64, value: FlowWord) -> Option<(Class, FlowWord)> {
        let class = self.class(key)?;
        let server = value.server();
        if class.flags & UNTRACKED != 0 || server == NONE || !alive(view, server) {
            return None;
        }
        let candidate = value.state() == State::Candidate;
        let slot = SlotWord(view.slots().get(class.slot(key) as usize)?.load());
        let redundant = slot.legacy() == NONE && slot.owner() == server;
        if redundant && !candidate && class.flags & ALWAYS_TRACKED == 0 && class.alone(view, key) {
            return None;
        }
        let pace = match value.is_closing() {
            _ if candidate => HALF_OPEN,
            true => CLOSING,
            false => class.pace,
        };
        if !self.paces[pace].due {
            return Some((class, value));
        }
        (value.age() < MAX_AGE).then(|| (class, value.with_age(value.age() + 1)))
    }

    fn count(&mut self, class: Class, key: u64, value: FlowWord) {
        let slot = class.slot(key) as usize;
        if let Some(word) = self.kept.get_mut(slot / 64) {
            *word |= 1 << (slot % 64);
        }
        self.see(value.server());
        if value.state() == State::Candidate {
            self.current.candidates += 1;
        } else {
            self.current.records += 1;
            *self.current.by_server.entry(value.server()).or_default() += 1;
            self.current.by_service[class.service] += 1;
        }
    }

    fn clear(&mut self, view: &View<'_>, index: u32) {
        let Some(slot) = view.slots().get(index as usize) else { return };
        let kept = self.kept.get(index as usize / 64).is_some_and(|word| word >> (index % 64) & 1 != 0);
        let word = update(slot, |old| match old.0 & COLLECTING != 0 {
            true => old.with_bits(if kept { TRACKED } else { 0 }, COLLECTING),
            false => old,
        });
        self.current.legacies += u64::from(word.legacy() != NONE);
        self.current.tracked += u64::from(word.is_tracked());
    }

    fn end(&mut self, cluster: &mut Cluster) -> Phase {
        let seen = std::mem::take(&mut self.seen);
        let met = |id: u32| seen.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 != 0);
        self.current.freed = cluster.end_collection(met);
        self.last = std::mem::take(&mut self.current);
        Phase::Idle
    }

    fn see(&mut self, id: u32) {
        if let Some(word) = self.seen.get_mut(id as usize / 64) {
            *word |= 1 << (id % 64);
        }
    }

    fn class(&self, key: u64) -> Option<Class> {
        let [.., g, h] = key.to_ne_bytes();
        self.frontends.get(&u16::from_ne_bytes([g, h])).copied()
    }
}

impl Class {
    /// The slot of a flow.
    fn slot(&self, key: u64) -> u32 {
        self.base + slot_index(self.hash(key), self.size)
    }

    /// The flow has one entry. Packets that two CPUs handle at the same time may leave two, of which lookups find the same
    /// one always; while that is there the other is never used, and grows old.
    fn alone(&self, view: &View<'_>, key: u64) -> bool {
        let [first, second] = flow_buckets(self.hash(key), view.flow_mask());
        let buckets = [Some(first), Some(second).filter(|&second| second != first)].into_iter().flatten();
        let entries = buckets.filter_map(|index| view.flow_bucket(index)).flat_map(|bucket| &bucket.entries);
        entries.filter(|entry| entry.key.load() == key).count() == 1
    }

    fn hash(&self, key: u64) -> u64 {
        let [a, b, c, d, e, f, ..] = key.to_ne_bytes();
        let packet = Packet {
            source: u32::from_ne_bytes([a, b, c, d]),
            source_port: u16::from_ne_bytes([e, f]),
            destination: self.vip,
            destination_port: self.port,
            protocol: self.protocol,
            ..Packet::default()
        };
        flow_hash(&packet, self.seed)
    }
}

/// What each service id in flow records means.
fn classes(cluster: &Cluster) -> BTreeMap<u16, Class> {
    let (config, layout) = (cluster.config(), cluster.layout());
    let class = |frontend: &super::layout::Frontend| {
        let placed = &layout.services[frontend.service];
        let idle = usize::from(!shows_beginning(placed.key.protocol));
        let class = Class {
            service: frontend.service,
            vip: u32::from_ne_bytes(frontend.address()),
            protocol: placed.key.protocol,
            port: u16::from_ne_bytes(placed.key.port.to_be_bytes()),
            seed: config.farms[placed.farm].seed(),
            base: placed.base,
            size: placed.size,
            flags: placed.flags,
            pace: CLOSING + 1 + 2 * placed.farm + idle,
        };
        (frontend.id, class)
    };
    layout.frontends.iter().map(class).collect()
}

/// Visits the slots of all services from one on, as far as the budget goes; where to go on, or none at the end.
fn slots(
    cluster: &Cluster,
    mut service: usize,
    mut slot: u32,
    left: &mut usize,
    mut visit: impl FnMut(u32, usize),
) -> Option<(usize, u32)> {
    while let Some(placed) = cluster.layout().services.get(service) {
        while slot < placed.size {
            if *left == 0 {
                return Some((service, slot));
            }
            *left -= 1;
            visit(placed.base + slot, service);
            slot += 1;
        }
        (service, slot) = (service + 1, 0);
    }
    None
}

/// Changes a slot by compare-and-swap; returns what it is then.
fn update(slot: &Word, mut change: impl FnMut(SlotWord) -> SlotWord) -> SlotWord {
    let mut old = SlotWord(slot.load());
    for _ in 0..ATTEMPTS {
        let new = change(old);
        let found = if new == old { old } else { SlotWord(slot.compare_exchange(old.0, new.0)) };
        if found == old {
            return new;
        }
        old = found;
    }
    old
}

fn alive(view: &View<'_>, id: u32) -> bool {
    id == DIRECT || view.next_hop(id).is_some_and(NextHop::is_alive)
}

impl Cluster {
    /// A full collection has ended: ids that it and the one before it met nowhere are free again.
    fn end_collection(&mut self, met: impl Fn(u32) -> bool) -> Vec<u32> {
        let freed = self.ids.end_collection(met);
        let change = self.begin();
        for &id in &freed {
            self.strangers.remove(&id);
            if let Some(offer) = self.offers.remove(id) {
                self.forget_host(offer.key.address);
            }
            self.touch_server(id, change);
        }
        freed
    }
}

#[cfg(test)]
mod tests;
