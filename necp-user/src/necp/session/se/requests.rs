//! Requests between the caller's wish and the NE's answer.

use std::collections::BTreeSet;
use std::time::Instant;

use super::RequestId;
use crate::necp::message::{Filter, Flows};
use crate::necp::service::ServiceKey;
use crate::necp::session::secure::MAX_REJECTED;
use crate::necp::session::units::{AnyUnit, Form, Units};
use crate::necp::wire::{Opcode, UNIT_LEN, Unit, WIDE_UNIT_LEN};

/// A request that waits for its turn, or for its answer.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) opcode: Opcode,
    /// Of an EXCEPTION_QUERY, made of its filter when it is sent.
    pub(super) units: Units,
    /// What an EXCEPTION_QUERY asks for.
    pub(super) filter: Option<Filter>,
    pub(super) deadline: Option<Instant>,
    /// Answers to it that were not authentic.
    pub(super) doubts: u32,
}

impl Request {
    pub(super) fn new(id: RequestId, opcode: Opcode, units: Units) -> Self {
        Self { id, opcode, units, filter: None, deadline: None, doubts: 0 }
    }

    /// Whether it makes a difference to this request if the NE speaks the extension.
    pub(super) fn has_use_for_extension(&self) -> bool {
        match &self.filter {
            Some(filter) => !(filter.is_basic() && filter.is_only_basic()),
            None => self.units.form() == Form::Wide,
        }
    }

    /// Whether it can be made of an NE that does not speak the extension.
    pub(super) fn is_possible_without(&self) -> bool {
        self.filter.as_ref().map_or(self.units.form() == Form::Basic, Filter::is_basic)
    }

    /// Counts an answer that was not authentic; says whether it was one too many (§5.8.3).
    pub(super) fn in_doubt_too_often(&mut self) -> bool {
        self.doubts += 1;
        self.doubts >= MAX_REJECTED
    }
}

/// The answer to a request whose units may fail one by one, as it comes in.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) request: Request,
    /// Units of the request that were not repeated; each is taken once, so nothing here can grow.
    open: BTreeSet<[u8; WIDE_UNIT_LEN]>,
    pub(super) failed: Units,
}

impl Answer {
    pub(super) fn new(request: Request) -> Self {
        let open = request.units.iter().map(|unit| Self::identity(request.opcode, &unit)).collect();
        let failed = Units::new(request.units.form());
        Self { request, open, failed }
    }

    /// A unit that the NE repeats; false if the request had no such unit, or it was repeated before.
    pub(super) fn unit(&mut self, unit: &AnyUnit) -> bool {
        let wide = matches!(unit, AnyUnit::Wide(_));
        let known = wide == (self.request.units.form() == Form::Wide)
            && self.open.remove(&Self::identity(self.request.opcode, unit));
        if known {
            self.failed.push(unit);
        }
        known
    }

    /// What makes a unit: data0 to data2 of START and STOP, all of an exception.
    fn identity(opcode: Opcode, unit: &AnyUnit) -> [u8; WIDE_UNIT_LEN] {
        let mut identity = [0; WIDE_UNIT_LEN];
        match unit {
            AnyUnit::Basic(Unit([kind, protocol, port, ..])) if [Opcode::START, Opcode::STOP].contains(&opcode) => {
                identity[..UNIT_LEN].copy_from_slice(&Unit([*kind, *protocol, *port, 0, 0, 0, 0, 0]).encode());
            }
            AnyUnit::Basic(unit) => identity[..UNIT_LEN].copy_from_slice(&unit.encode()),
            AnyUnit::Wide(unit) => identity = unit.0,
        }
        identity
    }
}

/// The service of a unit of START or STOP of our own.
pub(super) fn service(unit: AnyUnit) -> ServiceKey {
    match unit {
        AnyUnit::Basic(unit) => ServiceKey::new(unit.0[1] as u8, unit.0[2] as u16),
        // Services have no others.
        AnyUnit::Wide(_) => ServiceKey::new(0, 0),
    }
}

/// The flows of a unit of EXCEPTION_ADD or EXCEPTION_DEL of our own.
pub(super) fn flows(unit: AnyUnit) -> Flows {
    match unit {
        AnyUnit::Basic(unit) => Flows::of_own(&unit),
        AnyUnit::Wide(unit) => Flows::of_own_wide(&unit),
    }
}
