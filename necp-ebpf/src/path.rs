//! A frame's whole way to a decision: what the kernel program and the host build both do.

use crate::{
    frame::Frame,
    parse::parse,
    rewrite::l2::{self, Mac},
    steer::{Decision, steer},
    tables::Tables,
    verdict::Reason,
};

/// Decides about a frame that came in by an interface with this MAC address.
///
/// Frames for other hosts, which a promiscuous interface or a flooding switch delivers too, must neither be sent on a second
/// time nor leave a trace in the tables.
#[inline(always)]
pub fn decide<T: Tables>(frame: &Frame, own_mac: Mac, tables: &T) -> Decision {
    match parse(frame) {
        Ok(_) if !l2::is_for(frame, own_mac) => Decision::unsteered(Reason::OtherHost),
        Ok(packet) => steer(&packet, tables),
        Err(reason) => Decision::unsteered(reason),
    }
}
