//! Whether a peer speaks the extension: asked and answered in KEEPALIVE, as the draft has it for what is not known to
//! everybody (§5.5.1, §6.11). One that does not repeats the query as unsupported (§5.5.3), and sees no more of it.

use crate::necp::wire::{Preamble, Unit};

/// Query type of "which version of wide exceptions do you speak?"; data1 and data2 are 0, and the answer, data3, is the
/// highest version, 1 or more.
pub const EXTENSION_QUERY: u32 = 0x4558_0006;

/// The query's unit in KEEPALIVE.
pub(in crate::necp) const fn query() -> Unit {
    Unit([EXTENSION_QUERY, 0, 0, 0, 0, 0, 0, 0])
}

/// Whether a unit of KEEPALIVE is this query.
pub(in crate::necp) fn is_query(unit: &Unit) -> bool {
    unit.0[..3] == query().0[..3]
}

/// The unit that answers it.
pub(in crate::necp) const fn answer(query: &Unit) -> Unit {
    let [kind, protocol, port, ..] = query.0;
    Unit([kind, protocol, port, Preamble::SPOKEN.version as u32, 0, 0, 0, 0])
}

/// Whether a unit of KEEPALIVE_ACK says that the peer speaks what we do; who speaks a later version speaks the earlier ones.
pub(in crate::necp) fn is_spoken(unit: &Unit) -> bool {
    is_query(unit) && unit.0[3] >= u32::from(Preamble::SPOKEN.version)
}
