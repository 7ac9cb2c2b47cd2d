//! Whether the NE speaks the extension for exceptions of IPv6: asked when the first request has a use for it.
//!
//! ```text
//!   Off                              the caller does not want it: as if the NE did not
//!   Unknown ── KEEPALIVE ──► Asked ── KEEPALIVE_ACK ──► Spoken, or Missing
//! ```
//! Requests keep their order, so while it is asked, those behind the first that needs to know wait too.

use super::requests::Request;
use super::{Body, SeSession};
use crate::necp::message::extension;
use crate::necp::session::units::{AnyUnit, Units};
use crate::necp::wire::{Flags, Header, Opcode, Preamble};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extension {
    Off,
    Unknown,
    Asked,
    Spoken,
    Missing,
}

/// What is to be done with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Send it.
    Go,
    /// Ask first.
    Ask,
    /// It waits for the answer.
    Wait,
    /// The NE cannot do it.
    Fail,
}

impl Extension {
    pub(super) fn of(request: &Request, extension: Self) -> Way {
        match extension {
            _ if !request.has_use_for_extension() => Way::Go,
            Self::Spoken => Way::Go,
            Self::Unknown => Way::Ask,
            Self::Asked => Way::Wait,
            Self::Off | Self::Missing if request.is_possible_without() => Way::Go,
            Self::Off | Self::Missing => Way::Fail,
        }
    }
}

impl SeSession {
    /// The request to be sent before all others.
    pub(super) fn ask_extension(&mut self) {
        let id = self.next_id();
        self.queue.push_front(Request::new(id, Opcode::KEEPALIVE, Units::from(&[extension::query()][..])));
        self.extension = Extension::Asked;
    }

    /// The units of a request, as they are sent.
    pub(super) fn make_units(&self, request: &mut Request) {
        let Some(filter) = &request.filter else { return };
        let wide = self.extension == Extension::Spoken && request.has_use_for_extension();
        request.units = if wide { Units::from(&[filter.wide_unit()][..]) } else { Units::from(&[filter.unit()][..]) };
    }

    /// The header of a KEEPALIVE_ACK to our question.
    pub(super) fn on_extension_ack(&mut self, header: &Header) {
        self.body = Body::Extension { spoken: false };
        if header.flags.has(Flags::ERROR) || header.units().is_none() {
            self.link.skip_payload();
        }
    }

    /// Its end.
    pub(super) fn on_extension(&mut self, spoken: bool) {
        self.extension = if spoken { Extension::Spoken } else { Extension::Missing };
        self.send_queued();
    }

    /// What precedes wide units, of an answer that may have them.
    pub(super) fn on_preamble(&mut self, preamble: &Preamble) {
        if *preamble == Preamble::SPOKEN {
            return;
        }
        self.link.skip_payload();
        match std::mem::replace(&mut self.body, Body::Skip) {
            Body::Answer(answer) => {
                self.link.malformed(answer.request.opcode.answer().unwrap_or(answer.request.opcode));
                self.acked(answer, true);
            }
            Body::Listing(listing) => {
                self.link.malformed(Opcode::EXCEPTION_RESP);
                self.list_failed(&listing);
            }
            other => self.body = other,
        }
    }

    pub(super) fn on_extension_unit(spoken: &mut bool, unit: &AnyUnit) {
        *spoken |= matches!(unit, AnyUnit::Basic(unit) if extension::is_spoken(unit));
    }
}
