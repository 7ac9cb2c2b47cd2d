//! Requests between the caller's wish and the NE's answer.

use std::collections::BTreeSet;
use std::time::Instant;

use super::RequestId;
use crate::necp::message::Flows;
use crate::necp::service::ServiceKey;
use crate::necp::session::secure::MAX_REJECTED;
use crate::necp::wire::{Opcode, Unit};

/// A request that waits for its turn, or for its answer.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) opcode: Opcode,
    pub(super) units: Vec<Unit>,
    pub(super) deadline: Option<Instant>,
    /// Answers to it that were not authentic.
    pub(super) doubts: u32,
}

impl Request {
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
    open: BTreeSet<[u32; 8]>,
    pub(super) failed: Vec<Unit>,
}

impl Answer {
    pub(super) fn new(request: Request) -> Self {
        let open = request.units.iter().map(|unit| Self::identity(request.opcode, unit)).collect();
        Self { request, open, failed: Vec::new() }
    }

    /// A unit that the NE repeats; false if the request had no such unit, or it was repeated before.
    pub(super) fn unit(&mut self, unit: &Unit) -> bool {
        let known = self.open.remove(&Self::identity(self.request.opcode, unit));
        if known {
            self.failed.push(*unit);
        }
        known
    }

    /// What makes a unit: data0 to data2 of START and STOP, all of an exception.
    fn identity(opcode: Opcode, unit: &Unit) -> [u32; 8] {
        match opcode {
            Opcode::START | Opcode::STOP => [unit.0[0], unit.0[1], unit.0[2], 0, 0, 0, 0, 0],
            _ => unit.0,
        }
    }
}

/// The service of a unit of START or STOP of our own.
pub(super) fn service(unit: &Unit) -> ServiceKey {
    ServiceKey::new(unit.0[1] as u8, unit.0[2] as u16)
}

/// The flows of a unit of EXCEPTION_ADD or EXCEPTION_DEL of our own.
pub(super) fn flows(unit: &Unit) -> Flows {
    Flows::of_own(unit)
}
