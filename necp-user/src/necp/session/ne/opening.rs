//! INIT (§5.4): what opens a session, or starts it over; and what it takes for that with a key (§5.8).

use super::{Body, NeEvent, NeSession, State};
use crate::necp::auth::CREDENTIAL_LEN;
use crate::necp::error::CloseReason;
use crate::necp::message::{Init, InitAck};
use crate::necp::session::secure::Stamp;
use crate::necp::wire::{Flags, Header, Opcode, UNIT_LEN};

impl NeSession {
    /// INIT of a connection that is not authenticated, or not yet.
    pub(super) fn on_init(&mut self, header: Header) {
        let has_credential = header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        let well_formed =
            header.flags.has(Flags::BASIC_PAYLOAD) && header.payload_len as usize == UNIT_LEN + CREDENTIAL_LEN;
        match (has_credential, self.required) {
            (false, true) => self.refuse_init(&header, CloseReason::AuthRequired),
            (false, false) => self.on_init_unit(header),
            (true, _) if self.link.secure().is_none() => self.refuse_init(&header, CloseReason::NoKey),
            (true, _) if well_formed => self.link.hold(header),
            (true, _) => self.refuse_init(&header, CloseReason::BadInit),
        }
    }

    pub(super) fn on_init_unit(&mut self, header: Header) {
        match header.units() {
            Some(1) => self.body = Body::Init(header, None),
            _ => self.malformed(&header),
        }
    }

    /// An INIT that fails for want of authentication: answered bare, and the connection closed (§5.4.2, §5.8.3).
    pub(super) fn refuse_init(&mut self, header: &Header, reason: CloseReason) {
        let rejected = &mut self.link.counters.rejected;
        match reason {
            CloseReason::AuthRequired => rejected.unauthenticated += 1,
            CloseReason::NoKey => rejected.no_key += 1,
            _ => rejected.bad_credential += 1,
        }
        self.link.refuse(header, Flags::AUTH_REQUIRED, &[]);
        self.link.close(reason);
    }

    pub(super) fn on_init_end(&mut self, header: &Header, init: Init) {
        match (init.authenticate, self.link.secure().is_some()) {
            (None, false) => self.start_over(header.request_id),
            (Some(_), false) => self.refuse_init(header, CloseReason::NoKey),
            (None, true) => self.refuse_init(header, CloseReason::AuthRequired),
            (Some(theirs), true) => self.on_authentic_init(header.request_id, theirs),
        }
    }

    /// INIT: everything begins anew (§5.4). Before INIT_ACK was sent, a repeated INIT gets that same INIT_ACK.
    fn start_over(&mut self, request_id: u16) {
        match &mut self.state {
            State::InitPending { unanswered, .. } => *unanswered = Some(request_id),
            _ => self.begin(Some(request_id)),
        }
    }

    pub(super) fn begin(&mut self, unanswered: Option<u16>) {
        self.requests.clear();
        self.listings.clear();
        self.extended = false;
        if unanswered.is_some() {
            self.link.keepalive.stop();
        }
        let token = self.requests.next_token();
        self.state = State::InitPending { token, unanswered };
        self.events.push_back(NeEvent::Init { token });
    }

    /// An INIT with the right credential, which may be a recorded one: it is answered, and changes nothing yet.
    fn on_authentic_init(&mut self, request_id: u16, theirs: u64) {
        let Some(secure) = self.link.secure() else { return };
        let (ours, stamp) = match self.state {
            // Its INIT_ACK is on the way.
            State::Tentative { request_id: answered, theirs: demanded, .. }
                if (answered, demanded) == (request_id, theirs) =>
            {
                return;
            }
            State::AwaitInit { .. } | State::Tentative { .. } => (secure.accept_init(theirs), None),
            State::InitPending { .. } | State::Ready => {
                self.restart = Some(theirs);
                (secure.offer_restart(theirs), Some(Stamp::Number(theirs)))
            }
        };
        let Some(first_seq_num) = ours else {
            self.link.close(CloseReason::NumbersExhausted);
            return;
        };
        let units = [InitAck { first_seq_num }.unit()];
        match stamp {
            Some(stamp) => self.link.send_as(stamp, Opcode::INIT_ACK, Flags::NONE, request_id, &units[..].into()),
            None => self.link.send(Opcode::INIT_ACK, Flags::NONE, request_id, &units),
        }
        self.state = match self.state {
            State::AwaitInit { .. } => {
                // Its first answer confirms the session, if nothing else does.
                self.link.keepalive.start(self.link.now);
                State::Tentative { deadline: self.link.now + self.link.config.init_deadline, request_id, theirs }
            }
            State::Tentative { deadline, .. } => State::Tentative { deadline, request_id, theirs },
            open => open,
        };
    }
}
