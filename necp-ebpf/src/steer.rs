//! Where a packet goes: which service, which slot, which server. Pure: the same code runs in the kernel and on the host.
//!
//! Just-enough tracking. A *plain* slot's owner gets every TCP packet, without a record. On another slot a flow's record
//! decides; a flow without one began before the change if the slot has a living legacy, goes there and is recorded; else
//! the owner gets it. A SYN that its flow's next packet might not find again makes a candidate, which only the client's
//! answer to that server turns into a record. Services that show no beginning of a flow record every flow.

use crate::{
    abi::{ACCEPTS, ALIVE, ALWAYS_TRACKED, DIRECT, NONE, REACHABLE, Service, UNTRACKED},
    flows::{Entry, FlowWord, Found, find, flow_key, insert},
    hash::{flow_buckets, flow_hash, next_probe, service_bucket, slot_index},
    packet::{Packet, protocol, tcp},
    slot::{SlotWord, TRACKED},
    tables::{NextHop, Tables},
    verdict::{Action, Reason},
    word::Word,
};

/// Slots that a new flow asks, its own first, for a server that takes it.
pub const PROBES: u32 = 32;

/// What is to become of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Why; it implies the action.
    pub reason: Reason,
    /// The server id; [`NONE`] if it goes to no server.
    pub server: u32,
    /// Where that server is; only valid if the packet is transmitted.
    pub next_hop: NextHop,
    /// It counts as the beginning of a flow.
    pub begins: bool,
}

impl Decision {
    /// A packet that no server gets.
    #[inline(always)]
    pub const fn unsteered(reason: Reason) -> Self {
        Self { reason, server: NONE, next_hop: NextHop(0), begins: false }
    }

    /// [`Reason::action`].
    #[inline(always)]
    pub const fn action(&self) -> Action {
        self.reason.action()
    }
}

/// Decides.
#[inline(always)]
pub fn steer<T: Tables>(packet: &Packet, tables: &T) -> Decision {
    let Some(service) = find_service(packet, tables) else { return Decision::unsteered(Reason::NotOurs) };
    let hash = flow_hash(packet, service.seed);
    let Some(slot) = tables.slot(service.slots_base.wrapping_add(slot_index(hash, service.slots_size))) else {
        return Decision::unsteered(Reason::BadTables);
    };
    let at = At { packet, tables, service, hash, slot, word: SlotWord(slot.load()) };
    if at.word.owner() == NONE {
        return Decision::unsteered(Reason::NoServer);
    }
    if service.flags & UNTRACKED != 0 {
        return at.forward(at.choose(), Reason::Plain, false);
    }
    if service.flags & ALWAYS_TRACKED != 0 {
        return at.always_tracked();
    }
    if at.word.is_plain() {
        return if packet.is_syn() { at.plain_syn() } else { at.forward(at.word.owner(), Reason::Plain, false) };
    }
    if packet.is_syn() { at.tracked_syn() } else { at.tracked() }
}

#[inline(always)]
fn find_service<'a, T: Tables>(packet: &Packet, tables: &'a T) -> Option<&'a Service> {
    let key = packet.service_key();
    let bucket = tables.service_bucket(service_bucket(key))?;
    bucket.entries.iter().find(|entry| {
        // SAFETY: an entry's first eight bytes are aligned and valid; user space changes them in one store.
        unsafe { core::ptr::from_ref(*entry).cast::<u64>().read_volatile() == key }
    })
}

/// A packet at its slot.
struct At<'a, T> {
    packet: &'a Packet,
    tables: &'a T,
    service: &'a Service,
    hash: u64,
    slot: &'a Word,
    word: SlotWord,
}

impl<'a, T: Tables> At<'a, T> {
    /// A new flow on a plain slot: the owner, unless it takes none just now.
    #[inline(always)]
    fn plain_syn(&self) -> Decision {
        let owner = self.word.owner();
        let server = self.choose();
        if server == owner {
            return self.forward(owner, Reason::Plain, true);
        }
        let found = self.find();
        self.propose(&found, server, owner)
    }

    /// A new flow on a slot in transition, or one that may have flows on record.
    #[inline(always)]
    fn tracked_syn(&self) -> Decision {
        let packet = self.packet;
        let found = self.find();
        let candidate = found.candidate.filter(|entry| self.alive(entry.value.server()));
        let record = found.record.filter(|entry| self.alive(entry.value.server()));
        if let Some(same) = [candidate, record].into_iter().flatten().find(|e| e.value.isn() == packet.sequence) {
            return self.forward(same.value.server(), Reason::Repeated, false);
        }
        let server = self.choose();
        let owner = self.word.owner();
        if let Some(record) = record {
            if record.value.server() != server {
                return self.propose(&found, server, record.value.server());
            }
            // The tuple again, on the same server.
            self.forget(candidate);
            record.replace(FlowWord::record(server, packet.sequence, false));
            self.slot.set_bits(TRACKED);
            return self.forward(server, Reason::New, true);
        }
        if server != owner || self.word.legacy() != NONE {
            let legacy = self.word.legacy();
            return self.propose(&found, server, if self.living(legacy) { legacy } else { owner });
        }
        self.forget(candidate);
        self.forward(owner, Reason::New, true)
    }

    /// Any other TCP packet on such a slot.
    #[inline(always)]
    fn tracked(&self) -> Decision {
        let packet = self.packet;
        let found = self.find();
        if let Some(candidate) = found.candidate.filter(|entry| entry.value.confirmed_by(packet.sequence))
            && self.alive(candidate.value.server())
        {
            self.confirm(&found, candidate);
            return self.forward(candidate.value.server(), Reason::Confirmed, false);
        }
        if let Some(record) = found.record
            && self.alive(record.value.server())
        {
            record.touch(packet);
            return self.forward(record.value.server(), Reason::Record, false);
        }
        let legacy = self.word.legacy();
        if self.living(legacy) {
            let record = FlowWord::record(legacy, 0, packet.flags & (tcp::FIN | tcp::RST) != 0);
            let recorded = self.record(&found, record);
            return self.forward(legacy, if recorded { Reason::Adopted } else { Reason::Legacy }, false);
        }
        self.forward(self.word.owner(), Reason::Owner, false)
    }

    /// A packet of a service whose flows are all on record.
    #[inline(always)]
    fn always_tracked(&self) -> Decision {
        let packet = self.packet;
        let found = self.find();
        if let Some(record) = found.record
            && self.alive(record.value.server())
        {
            record.touch(packet);
            return self.forward(record.value.server(), Reason::Record, false);
        }
        let server = self.choose();
        if server == DIRECT {
            return self.forward(DIRECT, Reason::Direct, false);
        }
        let closing = packet.flags & (tcp::FIN | tcp::RST) != 0;
        let recorded = self.record(&found, FlowWord::record(server, packet.sequence, closing));
        self.forward(server, if recorded { Reason::New } else { Reason::NewUnrecorded }, true)
    }

    #[inline(always)]
    fn find(&self) -> Found<'a> {
        find(self.tables, flow_buckets(self.hash, self.tables.flow_mask()), self.key())
    }

    #[inline(always)]
    fn key(&self) -> u64 {
        flow_key(self.packet, self.service.id)
    }

    /// Sends a SYN to `server` and remembers that, or, if there is no room, where its next packet goes without.
    #[inline(always)]
    fn propose(&self, found: &Found<'_>, server: u32, otherwise: u32) -> Decision {
        let candidate = FlowWord::candidate(server, self.packet);
        let proposed = match found.candidate {
            Some(old) => old.replace(candidate),
            None => self.insert(found, candidate),
        };
        if !proposed {
            return self.forward(otherwise, Reason::NewUnrecorded, true);
        }
        // Always after the insertion, and always: user space may just have cleared it, having found nothing.
        self.slot.set_bits(TRACKED);
        self.forward(server, Reason::New, true)
    }

    /// Turns a candidate into the flow's record.
    #[inline(always)]
    fn confirm(&self, found: &Found<'_>, candidate: Entry<'_>) {
        let closing = self.packet.flags & (tcp::FIN | tcp::RST) != 0;
        let record = FlowWord::record(candidate.value.server(), candidate.value.isn(), closing);
        let replaced = match found.record {
            Some(old) => {
                let replaced = old.replace(record);
                self.forget(Some(candidate));
                replaced
            }
            None => candidate.replace(record),
        };
        if replaced {
            self.slot.set_bits(TRACKED);
        } else {
            // Somebody else has been there: another packet of this flow, or one that took the candidate's place.
            let again = self.find();
            if again.record.is_none_or(|entry| entry.value.server() != record.server()) {
                self.record(&again, record);
            }
        }
    }

    /// Puts a flow on record, in the place of what is known of it.
    #[inline(always)]
    fn record(&self, found: &Found<'_>, record: FlowWord) -> bool {
        let recorded = match found.record {
            Some(old) => old.replace(record),
            None => self.insert(found, record),
        };
        if recorded {
            self.slot.set_bits(TRACKED);
        }
        recorded
    }

    #[inline(always)]
    fn insert(&self, found: &Found<'_>, value: FlowWord) -> bool {
        insert(self.tables, flow_buckets(self.hash, self.tables.flow_mask()), found, self.key(), value)
    }

    #[inline(always)]
    fn forget(&self, candidate: Option<Entry<'_>>) {
        if let Some(candidate) = candidate {
            candidate.replace(FlowWord::EMPTY);
        }
    }

    /// The server of a new flow: the slot's owner, or the first of the probe sequence that takes new flows.
    #[inline(always)]
    fn choose(&self) -> u32 {
        let mut server = self.word.owner();
        let mut hash = self.hash;
        for _ in 0..PROBES {
            if self.accepts(server) {
                return server;
            }
            hash = next_probe(hash);
            let index = self.service.slots_base.wrapping_add(slot_index(hash, self.service.slots_size));
            let Some(slot) = self.tables.slot(index) else { break };
            server = SlotWord(slot.load()).owner();
        }
        DIRECT
    }

    #[inline(always)]
    fn accepts(&self, server: u32) -> bool {
        let wanted = ALIVE | ACCEPTS | REACHABLE;
        server > DIRECT && self.tables.next_hop(server).is_some_and(|hop| hop.flags() & wanted == wanted)
    }

    #[inline(always)]
    fn living(&self, legacy: u32) -> bool {
        legacy != NONE && self.alive(legacy)
    }

    #[inline(always)]
    fn alive(&self, server: u32) -> bool {
        server == DIRECT || self.tables.next_hop(server).is_some_and(NextHop::is_alive)
    }

    #[inline(always)]
    fn forward(&self, server: u32, reason: Reason, begins: bool) -> Decision {
        if server <= DIRECT {
            return Decision::unsteered(if server == DIRECT { Reason::Direct } else { Reason::NoServer });
        }
        match self.tables.next_hop(server) {
            Some(next_hop) if next_hop.is_reachable() => Decision { reason, server, next_hop, begins },
            _ => Decision { reason: Reason::NoNextHop, server, next_hop: NextHop(0), begins: false },
        }
    }
}

/// Whether every flow of a service of this protocol shows its beginning.
pub const fn shows_beginning(protocol: u8) -> bool {
    protocol == protocol::TCP
}
