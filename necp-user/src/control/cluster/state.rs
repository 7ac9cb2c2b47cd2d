//! What a cluster knows of each host, offer, service and farm.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Instant};

use necp_ebpf::abi;

use super::{Change, Hop};
use crate::control::{
    config::ClusterConfig,
    ids::OfferKey,
    layout::{Layout, PlacedService},
    slots::Member,
    weight::Health,
};

/// An SE's host.
#[derive(Clone, Copy, Debug)]
pub(in crate::control) struct Host {
    /// What records call it, [`abi::Server::host`]; 0: there was no number left.
    pub(in crate::control) number: u16,
    pub(in crate::control) session: Session,
    pub(in crate::control) on_link: bool,
    pub(in crate::control) hop: Option<Hop>,
    /// It had a next hop once: before that it is given no slots.
    pub(in crate::control) known: bool,
    /// Since when its neighbour entry has been FAILED.
    pub(in crate::control) gone: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) enum Session {
    /// Never, or not since a restart.
    Absent,
    Up,
    Lost {
        since: Instant,
    },
}

/// A server id in use.
#[derive(Clone, Debug)]
pub(in crate::control) struct Offer {
    pub(in crate::control) key: OfferKey,
    pub(in crate::control) service: usize,
    pub(in crate::control) state: OfferState,
    pub(in crate::control) alive: bool,
    pub(in crate::control) health: Health,
    /// Beginning of its slow start.
    pub(in crate::control) joined: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) enum OfferState {
    Started,
    Stopped,
    /// Serves, until its SE says something or the time has come.
    Adopted {
        until: Instant,
    },
}

#[derive(Clone, Debug)]
pub(in crate::control) struct ServiceState {
    pub(in crate::control) members: Vec<Member>,
    /// The slot table wanted.
    pub(in crate::control) owners: Arc<[u32]>,
    /// It has had a server.
    pub(in crate::control) served: bool,
    /// The region's slots are not this service's yet.
    pub(in crate::control) fresh: bool,
    /// Members may have changed.
    pub(in crate::control) dirty: bool,
    /// The table may differ from the maps'.
    pub(in crate::control) unwritten: bool,
    /// Changes that wait for the table.
    pub(in crate::control) changes: Vec<Change>,
}

#[derive(Clone, Debug, Default)]
pub(in crate::control) struct FarmState {
    /// Servers that were lost with most of the others and go on serving.
    pub(in crate::control) kept: BTreeSet<IpAddr>,
}

impl Host {
    pub(super) const UNKNOWN: Self =
        Self { number: 0, session: Session::Absent, on_link: false, hop: None, known: false, gone: None };

    pub(in crate::control) fn reachable(&self) -> bool {
        self.hop.is_some() && self.gone.is_none()
    }
}

/// Numbers of hosts in use, for the records of servers and exceptions: none is two hosts'.
#[derive(Debug, Default)]
pub(in crate::control) struct HostNumbers {
    taken: BTreeSet<u16>,
}

impl HostNumbers {
    /// A number that is free, this one if it is; 0 if none is.
    pub(in crate::control) fn take(&mut self, wanted: u16) -> u16 {
        let number = match wanted {
            1.. if !self.taken.contains(&wanted) => wanted,
            _ => self.free(),
        };
        if number != 0 {
            self.taken.insert(number);
        }
        number
    }

    pub(super) fn give_back(&mut self, number: u16) {
        self.taken.remove(&number);
    }

    /// The one after the last, else the first gap: a number rests for as long as it can.
    fn free(&self) -> u16 {
        match self.taken.last() {
            Some(&last) if last < u16::MAX => last + 1,
            Some(_) => (1..=u16::MAX).find(|number| !self.taken.contains(number)).unwrap_or(0),
            None => 1,
        }
    }
}

impl ServiceState {
    /// Those of all services.
    pub(in crate::control) fn all(layout: &Layout, config: &ClusterConfig) -> Vec<Self> {
        layout.services.iter().map(|placed| Self::new(placed, config.farms[placed.farm].intercepts())).collect()
    }

    /// What is intercepted goes on its way until a server takes it, as it did before.
    fn new(placed: &PlacedService, intercepts: bool) -> Self {
        let nobody = if intercepts { abi::DIRECT } else { abi::NONE };
        Self {
            members: Vec::new(),
            owners: vec![nobody; placed.size as usize].into(),
            served: intercepts,
            fresh: true,
            dirty: false,
            unwritten: true,
            changes: Vec::new(),
        }
    }

    pub(in crate::control) fn touch(&mut self, change: Change) {
        self.dirty = true;
        if self.changes.last() != Some(&change) {
            self.changes.push(change);
        }
    }
}
