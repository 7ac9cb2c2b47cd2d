//! INIT and INIT_ACK (§5.4), with a key and without.

use super::{Body, SeEvent, SeSession, State};
use crate::necp::auth::{CREDENTIAL_LEN, Rejection};
use crate::necp::error::CloseReason;
use crate::necp::message::{Init, InitAck};
use crate::necp::session::Notice;
use crate::necp::session::secure::{Rejected, Stamp};
use crate::necp::wire::{Flags, Header, Opcode, UNIT_LEN};

impl SeSession {
    pub(super) fn send_init(&mut self) {
        let State::Opening { request_id, attempts, next, backoff } = &mut self.state else { return };
        if *attempts >= self.link.config.init_attempts.max(1) {
            let attempts = *attempts;
            self.link.close(CloseReason::InitUnanswered { attempts });
            return;
        }
        *attempts += 1;
        *next = self.link.now + backoff.next_delay();
        let authenticate = self.link.secure().map(|secure| secure.first());
        let stamp = authenticate.map_or(Stamp::Bare, |_| Stamp::Number(0));
        let unit = Init { authenticate }.unit();
        self.link.send_as(stamp, Opcode::INIT, Flags::NONE, *request_id, &[unit][..].into());
    }

    /// INIT_ACK is the only message that is held back before the session is open.
    fn hold_init_ack(&mut self, header: &Header) {
        if header.payload_len as usize <= UNIT_LEN + CREDENTIAL_LEN {
            self.link.hold(*header);
        } else {
            self.link.close(CloseReason::MessageTooLarge(header.payload_len));
        }
    }

    pub(super) fn on_init_ack(&mut self, header: &Header, verified: bool) {
        let State::Opening { request_id, .. } = self.state else { return };
        let has_key = self.link.secure().is_some();
        if header.request_id != request_id {
            self.link.skip_payload();
            self.link.unexpected(header.opcode);
        } else if has_key && header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED) {
            self.hold_init_ack(header);
        } else if header.flags.has(Flags::PROTOCOL_VERSION_MISMATCH) {
            self.link.skip_payload();
            self.link.notice(Notice::VersionMismatch { version: header.version });
        } else if header.flags.has(Flags::AUTH_REQUIRED) {
            self.link.close(if has_key { CloseReason::KeyRefused } else { CloseReason::AuthRequired });
        } else if header.flags.has(Flags::ERROR) {
            self.link.close(CloseReason::InitRefused);
        } else if has_key && !verified {
            // Somebody would have us believe that the session is open, without knowing the key.
            self.link.skip_payload();
            let rejected = Rejected { header: *header, cause: Rejection::NoCredential, units: Vec::new() };
            self.link.reject(&rejected);
        } else if header.units() == Some(1) {
            self.body = Body::InitAck(InitAck::default());
        } else {
            self.link.skip_payload();
            self.link.malformed(header.opcode);
        }
    }

    pub(super) fn on_opened(&mut self, ack: InitAck) {
        self.state = State::Ready;
        self.link.keepalive.start(self.link.now);
        self.events.push_back(SeEvent::Ready);
        if let Some(secure) = self.link.secure() {
            secure.accept_init_ack(ack.first_seq_num);
            // Until the NE has seen a fresh message, it cannot know that our INIT was no recorded one.
            if self.queue.is_empty() {
                self.link.send_keepalive(Vec::new(), |_| false);
            }
        }
        self.send_queued();
    }
}
