//! Answers to requests of our own, and what is none.

use std::collections::BTreeSet;

use super::extension::Extension;
use super::requests::{self, Answer, Request};
use super::{Body, RequestId, SeEvent, SeSession};
use crate::necp::error::CloseReason;
use crate::necp::service::ServiceKey;
use crate::necp::session::Notice;
use crate::necp::session::secure::Rejected;
use crate::necp::session::units::Form;
use crate::necp::wire::{Flags, Header, Opcode};

impl SeSession {
    /// A message that is not executed; if it may be the answer to a request of ours, that is assumed to have failed, and
    /// made again (§5.8.3).
    pub(super) fn on_rejected(&mut self, rejected: &Rejected) {
        self.body = Body::Skip;
        self.link.reject(rejected);
        let Some(doubtful) = self.outstanding.get_mut(&rejected.header.request_id) else { return };
        if doubtful.opcode.answer() != Some(rejected.header.opcode) {
            return;
        }
        if doubtful.in_doubt_too_often() {
            self.link.close(CloseReason::Rejected(rejected.cause));
        } else {
            let from = doubtful.id;
            self.ask_again(from);
        }
    }

    /// Makes a request again, and those after it: what they do depends on their order.
    fn ask_again(&mut self, from: RequestId) {
        let mut again: Vec<Request> =
            self.outstanding.extract_if(.., |_, request| request.id >= from).map(|(_, request)| request).collect();
        again.sort_by_key(|request| request.id);
        for request in again.into_iter().rev() {
            self.queue.push_front(request);
        }
        self.send_queued();
    }

    pub(super) fn on_request_ack(&mut self, header: &Header) {
        let Some(request) = self.take_outstanding(header) else {
            self.link.skip_payload();
            return self.link.unexpected(header.opcode);
        };
        let answer = Answer::new(request);
        let failed = header.flags.has(Flags::ERROR);
        if header.flags.has(Flags::AUTH_REQUIRED) || header.flags.has(Flags::BAD_SEQUENCE_NUMBER) {
            self.link.notice(Notice::RejectedByPeer(header.opcode));
        }
        match header.units() {
            Some(1..) if failed => self.body = Body::Answer(answer),
            None if failed && answer.request.units.form() == Form::Wide && header.wide_units().is_some() => {
                self.link.read_wide(header);
                self.body = Body::Answer(answer);
            }
            units => {
                // Success repeats nothing; a failure that names no unit is one of all units.
                self.link.skip_payload();
                if units != Some(0) {
                    self.link.malformed(header.opcode);
                }
                self.acked(answer, failed);
            }
        }
    }

    pub(super) fn take_outstanding(&mut self, header: &Header) -> Option<Request> {
        let request = self.outstanding.get(&header.request_id)?;
        (request.opcode.answer() == Some(header.opcode)).then(|| self.outstanding.remove(&header.request_id)).flatten()
    }

    /// A request whose units are answered for; all of them failed, or those that the answer names.
    pub(super) fn acked(&mut self, answer: Answer, all_failed: bool) {
        match answer.request.opcode {
            Opcode::START | Opcode::STOP => self.acked_services(&answer, all_failed),
            _ => self.excepted(&answer, all_failed),
        }
        self.send_queued();
    }

    fn acked_services(&mut self, answer: &Answer, all_failed: bool) {
        let Answer { request, failed, .. } = answer;
        let failed = if all_failed { &request.units } else { failed };
        let failed: BTreeSet<ServiceKey> = failed.iter().map(requests::service).collect();
        self.link.counters.failed_units += failed.len() as u64;
        for service in request.units.iter().map(requests::service).filter(|service| !failed.contains(service)) {
            if request.opcode == Opcode::START {
                self.started.insert(service);
            } else {
                self.started.remove(&service);
            }
        }
        self.events.push_back(SeEvent::Acked { id: request.id, failed: failed.into_iter().collect() });
    }

    /// A request that failed as a whole, without an answer of its own.
    pub(super) fn refused(&mut self, request: Request) {
        match request.opcode {
            Opcode::KEEPALIVE => self.extension = Extension::Missing,
            Opcode::EXCEPTION_RESET => self.events.push_back(SeEvent::Reset { id: request.id, done: false }),
            Opcode::EXCEPTION_QUERY => self.events.push_back(SeEvent::ListFailed { id: request.id }),
            _ => self.acked(Answer::new(request), true),
        }
        self.send_queued();
    }
}
