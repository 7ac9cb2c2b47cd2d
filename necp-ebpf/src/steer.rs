//! Where a packet goes: which service, which slot, which server. Pure: the same code runs in the kernel and on the host.
//!
//! Just-enough tracking. A *plain* slot's owner gets every TCP packet, without a record. On another slot a flow's record
//! decides; a flow without one began before the change if the slot has a living legacy, goes there and is recorded; else
//! the owner gets it. A SYN that its flow's next packet might not find again makes a candidate, which only the client's
//! answer to that server turns into a record. Services that show no beginning of a flow record every flow.
//!
//! Only a new flow looks at the exceptions: a global one cuts it through, local ones take their installers out of the
//! choice. A service that is opted out of tracking knows no flows, so each of its packets is a new one.

use crate::{
    abi::{ALWAYS_TRACKED, DIRECT, INTERCEPT, INTERCEPT6, NONE, Service, ServiceBucket, UNTRACKED},
    choice::{Chosen, NewFlow},
    exceptions::Tuple,
    flows::{FlowWord, Found, find, flow_key, insert},
    hash::{flow_buckets, flow_hash, service_bucket, slot_index},
    packet::{Packet, protocol, tcp, vip_key},
    slot::{SlotWord, TRACKED},
    tables::{NextHop, Tables},
    verdict::{Action, Reason},
    word::Word,
};

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
    match find_service(packet, tables) {
        Some(service) => steer_to(service, packet, packet, tables),
        None => Decision::unsteered(Reason::NotOurs),
    }
}

/// Decides about a packet for this service; `flow` is what names its flow, which is the packet itself unless it is intercepted.
#[inline(always)]
pub(crate) fn steer_to<T: Tables>(service: &Service, packet: &Packet, flow: &Packet, tables: &T) -> Decision {
    let hash = flow_hash(flow, service.seed);
    let Some(slot) = tables.slot(service.slots_base.wrapping_add(slot_index(hash, service.slots_size))) else {
        return Decision::unsteered(Reason::BadTables);
    };
    let at = At { packet, flow, tables, service, hash, slot, word: SlotWord(slot.load()) };
    let owner = at.word.owner();
    if owner == NONE {
        return Decision::unsteered(Reason::NoServer);
    }
    let tracking = at.flags() & (ALWAYS_TRACKED | UNTRACKED);
    let plain = tracking == 0 && at.word.is_plain();
    if plain && !packet.is_syn() {
        return at.forward(owner, Reason::Plain, false);
    }
    // What is on record is not asked where else it might go: only new flows look at exceptions.
    let hidden = tracking == UNTRACKED || tracking == ALWAYS_TRACKED && !shows_beginning(packet.protocol);
    if hidden
        && tracking == ALWAYS_TRACKED
        && let Some(decision) = at.on_record()
    {
        return decision;
    }
    let chosen = if hidden || packet.is_syn() { at.choose() } else { Chosen::new(owner, false) };
    if tracking == UNTRACKED || plain && chosen.server() == owner {
        return at.forward(chosen.server(), Reason::Plain, packet.is_syn());
    }
    at.tracked(chosen)
}

/// The living server that has a packet's flow, and the way there; for errors about flows, which leave no trace.
#[inline(always)]
pub fn whose<T: Tables>(packet: &Packet, tables: &T) -> Option<(u32, NextHop)> {
    whose_at(find_service(packet, tables)?, packet, tables)
}

/// The same of a flow of this service.
#[inline(always)]
pub(crate) fn whose_at<T: Tables>(service: &Service, flow: &Packet, tables: &T) -> Option<(u32, NextHop)> {
    let hash = flow_hash(flow, service.seed);
    let slot = tables.slot(service.slots_base.wrapping_add(slot_index(hash, service.slots_size)))?;
    let at = At { packet: flow, flow, tables, service, hash, slot, word: SlotWord(slot.load()) };
    let tracking = at.flags() & (ALWAYS_TRACKED | UNTRACKED);
    let mut server = at.word.owner();
    if tracking != UNTRACKED && (tracking != 0 || !at.word.is_plain()) {
        let found = find(tables, flow_buckets(hash, tables.flow_mask()), flow_key(flow, service.id));
        let (record, candidate) = (at.if_alive(found.record.value), at.if_alive(found.candidate.value));
        if record != FlowWord::EMPTY {
            server = record.server();
        } else if at.living(at.word.legacy()) {
            server = at.word.legacy();
        } else if candidate != FlowWord::EMPTY && tracking == ALWAYS_TRACKED {
            // Elsewhere a flow without a record may be the owner's, and anybody's SYN may have made the candidate.
            server = candidate.server();
        }
    }
    if server <= DIRECT {
        return None;
    }
    Some((server, tables.next_hop(server)?))
}

/// What is noted of an address, if it is a VIP.
#[inline(always)]
pub(crate) fn find_vip<T: Tables>(address: u32, tables: &T) -> Option<&Service> {
    let key = vip_key(address);
    find_entry(key, tables.service_bucket(service_bucket(key))?)
}

/// The service that a packet is for.
#[inline(always)]
pub(crate) fn find_service<'a, T: Tables>(packet: &Packet, tables: &'a T) -> Option<&'a Service> {
    let key = packet.service_key();
    find_entry(key, tables.service_bucket(service_bucket(key))?)
}

/// The entry of a bucket that begins with these eight bytes.
#[inline(always)]
pub(crate) fn find_entry(key: u64, bucket: &ServiceBucket) -> Option<&Service> {
    bucket.entries.iter().find(|entry| {
        // SAFETY: an entry's first eight bytes are aligned and valid; user space changes them in one store.
        unsafe { core::ptr::from_ref(*entry).cast::<u64>().read_volatile() == key }
    })
}

/// A packet at its slot.
struct At<'a, T> {
    packet: &'a Packet,
    /// What names its flow.
    flow: &'a Packet,
    tables: &'a T,
    service: &'a Service,
    hash: u64,
    slot: &'a Word,
    word: SlotWord,
}

/// What the flow table and the slot say of a packet.
struct Ruling {
    server: u32,
    reason: Reason,
    /// What is to be written, if anything.
    write: Write,
    /// The flow's candidate has had its day.
    forget: bool,
}

/// What is to be written to the flow table.
enum Write {
    Nothing,
    /// The record's packet is noted.
    Touch,
    /// The record, in place of an old one, or of the candidate that it was made from.
    Record(FlowWord),
    /// The candidate, in place of an old one.
    Candidate(FlowWord),
}

impl<'a, T: Tables> At<'a, T> {
    /// The service's flags, read once.
    #[inline(always)]
    fn flags(&self) -> u16 {
        // SAFETY: an aligned field of a record that is there for as long as the tables are.
        unsafe { (&raw const self.service.flags).read_volatile() }
    }

    /// What becomes of a packet whose flow is on record, in a service whose flows all are.
    #[inline(always)]
    fn on_record(&self) -> Option<Decision> {
        let key = flow_key(self.flow, self.service.id);
        let found = find(self.tables, flow_buckets(self.hash, self.tables.flow_mask()), key);
        let record = self.if_alive(found.record.value);
        if record == FlowWord::EMPTY {
            return None;
        }
        found.touch(self.packet);
        Some(self.forward(record.server(), Reason::Record, false))
    }

    /// A packet whose slot is not plain, or whose flow must be on record; `chosen` is for a new flow.
    #[inline(always)]
    fn tracked(&self, chosen: Chosen) -> Decision {
        let buckets = flow_buckets(self.hash, self.tables.flow_mask());
        let key = flow_key(self.flow, self.service.id);
        let found = find(self.tables, buckets, key);
        let living =
            Living { candidate: self.if_alive(found.candidate.value), record: self.if_alive(found.record.value) };
        let ruling = if !shows_beginning(self.packet.protocol) {
            self.rule_always(&living, chosen)
        } else if self.packet.is_syn() {
            self.rule_syn(&living, chosen.server())
        } else {
            self.rule(&living)
        };
        let (old, value) = match ruling.write {
            Write::Nothing => return self.forward_forgetting(&ruling, &found),
            Write::Touch => {
                found.touch(self.packet);
                return self.forward(ruling.server, ruling.reason, false);
            }
            // A confirmed candidate becomes the record, if there is none to be replaced.
            Write::Record(record) if ruling.forget && !found.record.is_some() => (found.candidate, record),
            Write::Record(record) => (found.record, record),
            Write::Candidate(candidate) => (found.candidate, candidate),
        };
        // What was read may have changed since; then the new entry stands beside it.
        let written = found.replace(old, value) || insert(self.tables, buckets, &found, key, value);
        if !written {
            return self.forward_unrecorded(&ruling, &living);
        }
        // Always after the insertion, and always: user space may just have cleared it, having found nothing.
        self.slot.set_bits(TRACKED);
        self.forward_forgetting(&ruling, &found)
    }

    /// A service whose flows are all on record and show no beginning.
    #[inline(always)]
    fn rule_always(&self, living: &Living, chosen: Chosen) -> Ruling {
        let record = living.record;
        if record != FlowWord::EMPTY {
            return Ruling { server: record.server(), reason: Reason::Record, write: Write::Touch, forget: false };
        }
        // What an exception cuts through stays so, on record; what finds no server may find one with its next packet, unless it
        // crosses this host: then it has found its destination.
        let crosses = matches!(self.service.state, INTERCEPT | INTERCEPT6);
        let host_s = chosen.server() == DIRECT && !chosen.is_excepted() && !crosses;
        let write = if host_s {
            Write::Nothing
        } else {
            Write::Record(FlowWord::record(chosen.server(), self.packet.sequence, self.is_closing()))
        };
        Ruling { server: chosen.server(), reason: Reason::New, write, forget: false }
    }

    /// A TCP flow that wants to begin.
    #[inline(always)]
    fn rule_syn(&self, living: &Living, chosen: u32) -> Ruling {
        let isn = self.packet.sequence;
        let ruling = |server, reason, write| Ruling { server, reason, write, forget: false };
        let Living { candidate, record } = *living;
        if candidate != FlowWord::EMPTY && candidate.isn() == isn {
            return ruling(candidate.server(), Reason::Repeated, Write::Nothing);
        }
        if record != FlowWord::EMPTY {
            if record.isn() == isn {
                return ruling(record.server(), Reason::Repeated, Write::Nothing);
            }
            if record.server() == chosen {
                // The tuple again, on the same server.
                let write = Write::Record(FlowWord::record(chosen, isn, false));
                return Ruling { forget: true, ..ruling(chosen, Reason::New, write) };
            }
        }
        let always = self.flags() & ALWAYS_TRACKED != 0;
        if always || record != FlowWord::EMPTY || chosen != self.word.owner() || self.word.legacy() != NONE {
            // Its next packet might go elsewhere, or a reply must find it: propose.
            let for_change = !always && self.word.legacy() != NONE && chosen == self.word.owner();
            let candidate = FlowWord::candidate(chosen, self.packet).for_change(for_change);
            return ruling(chosen, Reason::New, Write::Candidate(candidate));
        }
        Ruling { forget: true, ..ruling(chosen, Reason::New, Write::Nothing) }
    }

    /// Any other TCP packet.
    #[inline(always)]
    fn rule(&self, living: &Living) -> Ruling {
        let candidate = living.candidate;
        if candidate != FlowWord::EMPTY && candidate.confirmed_by(self.packet.sequence) {
            // The client has heard from that server.
            let record = FlowWord::record(candidate.server(), candidate.isn(), self.is_closing()).like(candidate);
            let write = Write::Record(record);
            return Ruling { server: candidate.server(), reason: Reason::Confirmed, write, forget: true };
        }
        let record = living.record;
        if record != FlowWord::EMPTY {
            return Ruling { server: record.server(), reason: Reason::Record, write: Write::Touch, forget: false };
        }
        let legacy = self.word.legacy();
        if self.living(legacy) {
            // It began before the change: remember it.
            let for_change = self.flags() & ALWAYS_TRACKED == 0;
            let write = Write::Record(FlowWord::record(legacy, 0, self.is_closing()).for_change(for_change));
            return Ruling { server: legacy, reason: Reason::Adopted, write, forget: false };
        }
        Ruling { server: self.word.owner(), reason: Reason::Owner, write: Write::Nothing, forget: false }
    }

    /// There was no room in the flow table: a new flow goes where its next packet will go, others where they belong.
    #[inline(always)]
    fn forward_unrecorded(&self, ruling: &Ruling, living: &Living) -> Decision {
        let reason = match ruling.reason {
            Reason::New => Reason::NewUnrecorded,
            Reason::Adopted => Reason::Legacy,
            other => other,
        };
        let begins = matches!(reason, Reason::NewUnrecorded);
        let legacy = self.word.legacy();
        let server = if !begins || !shows_beginning(self.packet.protocol) {
            ruling.server
        } else if living.record != FlowWord::EMPTY {
            living.record.server()
        } else if self.living(legacy) {
            legacy
        } else {
            self.word.owner()
        };
        self.forward(server, reason, begins)
    }

    #[inline(always)]
    fn forward_forgetting(&self, ruling: &Ruling, found: &Found<'_>) -> Decision {
        if ruling.forget {
            // If it has just become the record, its word is no longer what was read, and it stays.
            found.forget();
        }
        self.forward(ruling.server, ruling.reason, matches!(ruling.reason, Reason::New))
    }

    #[inline(always)]
    fn if_alive(&self, value: FlowWord) -> FlowWord {
        if value != FlowWord::EMPTY && self.alive(value.server()) { value } else { FlowWord::EMPTY }
    }

    #[inline(always)]
    fn is_closing(&self) -> bool {
        self.packet.flags & (tcp::FIN | tcp::RST) != 0
    }

    /// Where a new flow goes.
    #[inline(always)]
    fn choose(&self) -> Chosen {
        self.tables.choose(NewFlow {
            tuple: Tuple {
                source: self.packet.source,
                destination: self.packet.destination,
                port: self.packet.destination_port,
                protocol: self.packet.protocol,
                farm: self.service.farm as u32,
            },
            slots_base: self.service.slots_base,
            slots_size: self.service.slots_size,
            hash: self.hash,
            owner: self.word.owner(),
        })
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

/// What the flow table knows of a flow, as far as the servers are alive; else empty.
struct Living {
    candidate: FlowWord,
    record: FlowWord,
}

/// Whether every flow of a service of this protocol shows its beginning.
pub const fn shows_beginning(protocol: u8) -> bool {
    protocol == protocol::TCP
}
