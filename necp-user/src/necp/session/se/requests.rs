//! STARTs and STOPs between the caller's wish and the NE's answer.

use std::collections::BTreeSet;
use std::time::Instant;

use super::RequestId;
use crate::necp::service::ServiceKey;
use crate::necp::session::secure::MAX_REJECTED;
use crate::necp::wire::{Opcode, Unit};

/// A START or STOP that waits for its turn, or for its answer.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) id: RequestId,
    pub(super) opcode: Opcode,
    pub(super) units: Vec<Unit>,
    pub(super) services: Vec<ServiceKey>,
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

/// A START_ACK or STOP_ACK as it comes in.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) request: Request,
    /// Units of the request that were not repeated; each is taken once, so nothing here can grow.
    open: BTreeSet<[u32; 3]>,
    pub(super) failed: BTreeSet<ServiceKey>,
}

impl Answer {
    pub(super) fn new(request: Request) -> Self {
        let open = request.units.iter().map(Self::identity).collect();
        Self { request, open, failed: BTreeSet::new() }
    }

    /// A unit that the NE repeats; false if the request had no such unit, or it was repeated before.
    pub(super) fn unit(&mut self, unit: &Unit) -> bool {
        let known = self.open.remove(&Self::identity(unit));
        if known {
            // It is one of ours, so its fields are in range.
            self.failed.insert(ServiceKey::new(unit.0[1] as u8, unit.0[2] as u16));
        }
        known
    }

    /// What makes a unit of START or STOP: data0 to data2.
    fn identity(unit: &Unit) -> [u32; 3] {
        [unit.0[0], unit.0[1], unit.0[2]]
    }
}
