//! Where a service's packets may go: to whom its slots, the flow table and the exceptions leave them.

use std::ops::Range;

use necp_ebpf::{
    abi::{ACCEPTS, ALIVE, DIRECT, NONE, REACHABLE, Service, UNTRACKED},
    flows::{FlowWord, State},
    host::View,
    slot::SlotWord,
    verdict::Reason,
};

use super::{Ground, service::name_of, tuple::Tuple};
use crate::frames::scene::crossing::{Exclusion, farm_of};

/// What the tables say of a service's flows.
#[derive(Clone, Copy)]
pub(super) struct Flows<'a> {
    service: Service,
    ground: Ground<'a>,
}

impl<'a> Flows<'a> {
    pub(super) fn of(service: &Service, ground: Ground<'a>) -> Self {
        Self { service: *service, ground }
    }

    fn slots(&self) -> impl Iterator<Item = SlotWord> {
        let first = self.service.slots_base as usize;
        let slots: Range<usize> = first..first + self.service.slots_size as usize;
        let slots = self.ground.tables.slots().get(slots).unwrap_or_default();
        slots.iter().map(|slot| SlotWord(slot.load()))
    }

    fn records(&self) -> impl Iterator<Item = u32> {
        entries(&self.service, self.ground.tables).map(|(_, word)| word.server())
    }

    /// A slot sends new flows there.
    pub(super) fn owns(&self, server: u32) -> bool {
        self.slots().any(|word| word.owner() == server)
    }

    /// A slot's old flows are there.
    pub(super) fn began_with(&self, server: u32) -> bool {
        self.slots().any(|word| word.legacy() == server)
    }

    /// A flow is on record there, or may be soon.
    pub(super) fn has_record(&self, server: u32) -> bool {
        self.records().any(|of| of == server)
    }

    /// No slot is without a server, and nothing is cut through.
    pub(super) fn all_have_servers(&self) -> bool {
        self.slots().next().is_some()
            && self.slots().all(|word| word.owner() > DIRECT && word.legacy() != DIRECT)
            && self.records().all(|server| server > DIRECT)
    }

    /// A server of the service's slots takes new flows, and these.
    fn has_taker(&self, tuple: &Tuple) -> bool {
        let wanted = ALIVE | ACCEPTS | REACHABLE;
        let takes = |id: u32| self.ground.tables.server(id).is_some_and(|server| server.flags & wanted == wanted);
        let excluded = |id| self.exclusions(tuple).any(|exclusion| exclusion.installer.is_none_or(|who| who == id));
        self.slots().map(|word| word.owner()).any(|id| id > DIRECT && takes(id) && !excluded(id))
    }

    /// The exceptions that these flows match.
    fn exclusions(&self, tuple: &Tuple) -> impl Iterator<Item = &'a Exclusion> {
        let (tuple, farm) = (*tuple, u32::from(self.service.farm));
        self.ground.rules.exceptions.iter().filter(move |exclusion| {
            exclusion.farm == farm
                && exclusion.source.contains(&tuple.source)
                && exclusion.destination.contains(&tuple.destination)
                && exclusion.protocol.is_none_or(|protocol| protocol == tuple.protocol)
                && exclusion.port.is_none_or(|port| port == tuple.destination_port)
        })
    }

    /// Holds what became of one of its packets against all of that; `opens`: it is a SYN.
    pub(super) fn hold(&self, tuple: &Tuple, opens: bool, reason: Reason, to: Option<u32>) -> Result<(), String> {
        if (reason == Reason::BadTables) != (self.slots().next().is_none()) {
            return Err(format!("{reason:?} of {} slots", self.slots().count()));
        }
        let Some(to) = to else { return self.hold_unsent(tuple, reason) };
        if farm_of(to) != Some(self.service.farm.into()) {
            return Err(format!("farm {}'s, but sent to server {to}", self.service.farm));
        }
        let name = name_of(tuple, &self.service);
        let record = entries(&self.service, self.ground.tables).any(|(of, word)| of == name && word.server() == to);
        let owns = self.owns(to);
        named(
            match reason {
                Reason::Plain | Reason::Owner | Reason::New => owns,
                Reason::Adopted | Reason::Legacy => self.began_with(to),
                Reason::Record | Reason::Repeated | Reason::Confirmed => record,
                _ => owns || record || self.began_with(to),
            },
            to,
        )?;
        let chosen = reason == Reason::New || reason == Reason::Plain && (opens || self.service.flags & UNTRACKED != 0);
        match self.exclusions(tuple).find(|exclusion| exclusion.installer.is_none_or(|who| who == to)) {
            Some(exclusion) if chosen => Err(format!("{reason:?} to server {to}, but {exclusion:?}")),
            _ => Ok(()),
        }
    }

    fn hold_unsent(&self, tuple: &Tuple, reason: Reason) -> Result<(), String> {
        let right = match reason {
            Reason::Direct => {
                self.owns(DIRECT) || self.began_with(DIRECT) || self.has_record(DIRECT) || !self.has_taker(tuple)
            }
            Reason::NoServer => self.owns(NONE),
            _ => true,
        };
        if right { Ok(()) } else { Err(format!("{reason:?}, but there are servers for {tuple:?}")) }
    }
}

/// Whether the tables name the server.
pub(super) fn named(yes: bool, server: u32) -> Result<(), String> {
    if yes { Ok(()) } else { Err(format!("neither slots nor flow table send it to server {server}")) }
}

/// A service's entries in the flow table: by which [name](super::service::name_of), and what they say.
pub(super) fn entries(service: &Service, tables: View<'_>) -> impl Iterator<Item = (([u8; 4], [u8; 2]), FlowWord)> {
    let id = service.id;
    tables.flows().iter().flat_map(|bucket| &bucket.entries).filter_map(move |entry| {
        let [a, b, c, d, e, f, g, h] = entry.key.load().to_ne_bytes();
        let word = FlowWord(entry.word.load());
        let used = matches!(word.state(), State::Candidate | State::Record) && u16::from_ne_bytes([g, h]) == id;
        used.then_some((([a, b, c, d], [e, f]), word))
    })
}
