//! KEEPALIVE's queries and KEEPALIVE_ACK's answers (§5.5), the same for both roles.

use std::collections::BTreeSet;

use super::keepalive::Asked;
use super::link::Link;
use super::units::AnyUnit;
use crate::necp::message::{HealthAnswer, Query, UnitError, extension};
use crate::necp::service::ServiceKey;
use crate::necp::wire::{Flags, Opcode, Unit};

/// A KEEPALIVE as it comes in: its units, kept for the answer that repeats them.
#[derive(Debug)]
pub(super) struct Queries {
    pub(super) request_id: u16,
    pub(super) units: Vec<Unit>,
}

impl Queries {
    /// Answers: `health` of every query, `None` where it is not supported; and to the query for the extension, if
    /// `speaks` it. One unsupported query is enough for the answer to name the unsupported ones and nothing else (§5.5.2).
    /// Says whether the peer was told that the extension is spoken.
    pub(super) fn answer(&self, link: &mut Link, speaks: bool, health: impl Fn(usize) -> Option<u8>) -> bool {
        let mut answers = Vec::with_capacity(self.units.len());
        let mut unsupported = Vec::new();
        let mut asked = false;
        for (index, unit) in self.units.iter().enumerate() {
            if speaks && extension::is_query(unit) {
                asked = true;
                answers.push(extension::answer(unit));
                continue;
            }
            match Query::parse(unit).ok().and_then(|_| health(index)) {
                Some(health) => answers.push(HealthAnswer::unit(unit, health)),
                None => unsupported.push(*unit),
            }
        }
        asked &= unsupported.is_empty();
        if unsupported.is_empty() {
            link.send(Opcode::KEEPALIVE_ACK, Flags::NONE, self.request_id, &answers);
        } else {
            link.counters.failed_units += unsupported.len() as u64;
            link.send(Opcode::KEEPALIVE_ACK, Flags::ERROR, self.request_id, &unsupported);
        }
        asked
    }
}

/// A KEEPALIVE_ACK as it comes in.
#[derive(Debug)]
pub(super) struct Reply {
    /// What was asked and is not answered yet; every question takes one answer, so nothing here can grow.
    pub(super) open: BTreeSet<ServiceKey>,
    pub(super) error: bool,
    pub(super) unsupported: Vec<ServiceKey>,
    pub(super) answers: Vec<HealthAnswer>,
}

impl Reply {
    pub(super) fn new(asked: Asked, flags: Flags) -> Self {
        Self {
            open: asked.queries.into_iter().collect(),
            error: flags.has(Flags::ERROR),
            unsupported: Vec::new(),
            answers: Vec::new(),
        }
    }

    pub(super) fn unit(&mut self, unit: &AnyUnit, link: &mut Link) {
        // A KEEPALIVE_ACK is not read as wide units.
        let AnyUnit::Basic(unit) = unit else { return };
        if self.error {
            match Query::parse(unit) {
                Ok(query) if self.open.remove(&query.service) => self.unsupported.push(query.service),
                _ => link.bad_health(),
            }
            return;
        }
        let answer: Result<_, UnitError> = HealthAnswer::parse(unit);
        match answer {
            Ok(answer) if self.open.remove(&answer.service) => self.answers.push(answer),
            _ => link.bad_health(),
        }
    }
}
