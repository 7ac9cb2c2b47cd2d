//! The packet path's host build on one frame: the same parse, steer and rewrite as the kernel program, tables of its own.

use std::collections::BTreeMap;

use necp_ebpf::{
    abi::{MAX_SERVERS, ServerStats},
    frame::Frame,
    host::{Owned, View},
    packet::Packet,
    parse::parse,
    path::decide,
    rewrite::l2,
    steer::Decision,
    verdict::{Action, Reason},
};

use crate::kernel::{OTHER_MAC, OWN_MAC, Outcome, Verdict};

/// What the packet path makes of these bytes.
///
/// # Errors
/// The reason why it makes nothing of them.
pub fn parse_bytes(frame: &[u8]) -> Result<Packet, Reason> {
    let mut bytes = frame.to_vec();
    let start = bytes.as_mut_ptr().expose_provenance();
    // SAFETY: the buffer outlives the frame, and nobody else touches it meanwhile.
    parse(&unsafe { Frame::new(start, start + bytes.len()) })
}

/// The host build with tables of its own, on the same two interfaces as [`Kernel`](crate::kernel::Kernel).
pub struct HostPath {
    tables: Owned,
    stats: BTreeMap<u32, ServerStats>,
}

impl HostPath {
    /// With room for this many slots and flow buckets (a power of two).
    pub fn new(slots: usize, flow_buckets: usize) -> Self {
        Self { tables: Owned::new(slots, MAX_SERVERS as usize, flow_buckets), stats: BTreeMap::new() }
    }

    /// The tables.
    pub fn view(&mut self) -> View<'_> {
        self.tables.view()
    }

    /// What this server id got so far.
    pub fn stats(&self, server: u32) -> ServerStats {
        self.stats.get(&server).copied().unwrap_or_default()
    }

    /// Runs one frame.
    pub fn run(&mut self, frame: &[u8]) -> Outcome {
        let mut bytes = frame.to_vec();
        let start = bytes.as_mut_ptr().expose_provenance();
        // SAFETY: the buffer outlives the frame, and nobody else touches it meanwhile.
        let edited = unsafe { Frame::new(start, start + bytes.len()) };
        let decision = decide(&edited, OWN_MAC, &self.tables.view());
        let (verdict, reason) = match decision.action() {
            Action::Transmit => self.transmit(&edited, decision),
            Action::Pass => (Verdict::Pass, decision.reason),
            Action::Drop => (Verdict::Drop, decision.reason),
        };
        Outcome { verdict, frame: bytes, reason }
    }

    fn transmit(&mut self, frame: &Frame, decision: Decision) -> (Verdict, Reason) {
        let (verdict, source) = match decision.next_hop.port() {
            0 => (Verdict::Tx, OWN_MAC),
            1 => (Verdict::Redirect, OTHER_MAC),
            _ => return (Verdict::Drop, Reason::NoNextHop),
        };
        if !l2::rewrite(frame, decision.next_hop.mac(), source) {
            return (Verdict::Drop, Reason::BadTables);
        }
        let stats = self.stats.entry(decision.server).or_default();
        stats.packets += 1;
        stats.bytes += frame.len() as u64;
        stats.flows += u64::from(decision.begins);
        (verdict, decision.reason)
    }
}
