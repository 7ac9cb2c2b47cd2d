//! A model of the receiving side of an authenticated session (§5.8, §5.9): which of the peer's messages count. It sees
//! whole messages only, in the order in which they were sent; which numbers follow a first one is [`Inbound`]'s to say.

use crate::necp::auth::{CREDENTIAL_LEN, Freshness, Inbound, Key, apart_from, is_apart};
use crate::necp::message::{Init, InitAck};
use crate::necp::session::Rejections;
use crate::necp::wire::{Flags, Header, Opcode, UNIT_LEN, Unit, VERSION};

/// Bytes of a payload that is one unit and a credential.
const UNIT_AND_CREDENTIAL: u32 = (UNIT_LEN + CREDENTIAL_LEN) as u32;

#[derive(Debug)]
enum Phase {
    /// NE: no INIT was authentic yet; the number that it will demand, unless that is too near to the SE's.
    AwaitInit { first: u64 },
    /// NE: one was, and nothing fresh came after it.
    Tentative { first: u64, inbound: Inbound },
    /// SE: its INIT has this request id, and demands this number.
    Opening { request_id: u16, first: u64 },
    /// Either: every message counts that is authentic and fresh.
    Open { inbound: Inbound },
    /// The session is closed, or will be when it has come to this point.
    Over,
}

/// See the module.
pub(super) struct Judge {
    key: Key,
    phase: Phase,
    /// Whether this is an NE's; to an SE, an INIT is its own.
    takes_init: bool,
    max_message: usize,
    rejected_in_a_row: u32,
    /// Messages that must be rejected, by the kinds that a session which goes on can have counted.
    pub(super) rejected: Rejections,
    /// NE: how often the session was opened, or started over, by a fresh message after an authentic INIT, and no event has
    /// accounted for it.
    confirmed: u32,
    /// Authentic INITs (NE) or INIT_ACKs (SE): their request ids, and the numbers that they demand.
    pub(super) demands: Vec<(u16, u64)>,
    /// The number that counted last.
    last: Option<u64>,
}

impl Judge {
    /// Of an NE that demands `first` if it can.
    pub(super) fn ne(key: Key, first: u64, max_message: usize) -> Self {
        Self::new(key, Phase::AwaitInit { first }, max_message)
    }

    /// Of an SE whose INIT has this request id, and demands `first`.
    pub(super) fn se(key: Key, request_id: u16, first: u64, max_message: usize) -> Self {
        Self::new(key, Phase::Opening { request_id, first }, max_message)
    }

    fn new(key: Key, phase: Phase, max_message: usize) -> Self {
        Self {
            key,
            takes_init: matches!(phase, Phase::AwaitInit { .. }),
            phase,
            max_message,
            rejected_in_a_row: 0,
            rejected: Rejections::default(),
            confirmed: 0,
            demands: Vec::new(),
            last: None,
        }
    }

    /// NE: takes one of the times that the session was opened or started over.
    pub(super) fn take_confirmation(&mut self) -> bool {
        let left = self.confirmed > 0;
        self.confirmed -= u32::from(left);
        left
    }

    /// Whether nothing counts any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// The message without its credential, and its units, if it counts.
    pub(super) fn message(&mut self, header: &Header, payload: &[u8]) -> Option<(Header, Vec<Unit>)> {
        let signed = header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        let split = payload.len().saturating_sub(if signed { CREDENTIAL_LEN } else { 0 });
        let (body, credential) = payload.split_at(split);
        let authentic = signed && self.key.verifies(header, body, credential);
        let flags = Flags(header.flags.0 & !Flags::AUTH_CREDENTIAL_PROVIDED.0);
        let plain = Header { flags, payload_len: body.len() as u32, ..*header };
        let units =
            if plain.units().is_some() { body.as_chunks().0.iter().map(Unit::decode).collect() } else { vec![] };
        let counts = match self.phase {
            Phase::AwaitInit { .. } => self.before_init(header, authentic, &units),
            Phase::Opening { .. } => self.before_init_ack(header, authentic, &units),
            Phase::Tentative { .. } | Phase::Open { .. } => self.open(header, authentic, &units),
            Phase::Over => false,
        };
        counts.then_some((plain, units))
    }

    fn before_init(&mut self, header: &Header, authentic: bool, units: &[Unit]) -> bool {
        if header.version != VERSION {
            return false;
        }
        let signed = header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        if header.opcode == Opcode::INIT && authentic && header.payload_len == UNIT_AND_CREDENTIAL && !units.is_empty()
        {
            return self.init(header.request_id, units);
        }
        self.rejected.bad_credential += u64::from(header.opcode == Opcode::INIT && signed);
        self.phase = Phase::Over;
        false
    }

    /// An authentic INIT: it may be a recording, and it may make no sense.
    fn init(&mut self, request_id: u16, units: &[Unit]) -> bool {
        let [unit] = units else { return true };
        let Ok(init) = Init::parse(unit) else { return true };
        let Some(theirs) = init.authenticate else {
            self.phase = Phase::Over;
            return false;
        };
        let possible = match &mut self.phase {
            Phase::AwaitInit { first } => {
                let first = apart_from(*first, theirs);
                self.phase = Phase::Tentative { first, inbound: Inbound::starting_at(first) };
                true
            }
            // Its INIT_ACK is on the way.
            Phase::Tentative { .. } if self.demands.last() == Some(&(request_id, theirs)) => return true,
            Phase::Tentative { first, .. } => is_apart(*first, theirs),
            Phase::Open { inbound } => inbound.offer_restart(theirs).is_some(),
            Phase::Opening { .. } | Phase::Over => false,
        };
        if possible {
            self.demands.push((request_id, theirs));
        } else {
            self.phase = Phase::Over;
        }
        possible
    }

    fn before_init_ack(&mut self, header: &Header, authentic: bool, units: &[Unit]) -> bool {
        let Phase::Opening { request_id, first } = self.phase else { return false };
        let flags = header.flags;
        let signed = flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        let refuses = flags.has(Flags::AUTH_REQUIRED) || flags.has(Flags::ERROR);
        if header.version != VERSION {
            return false;
        }
        if header.opcode != Opcode::INIT_ACK {
            self.phase = Phase::Over;
            return false;
        }
        if header.request_id != request_id {
            return false;
        }
        if signed && header.payload_len > UNIT_AND_CREDENTIAL {
            self.phase = Phase::Over;
        } else if signed && !authentic {
            self.reject(|rejected| &mut rejected.bad_credential);
        } else if signed && header.seq_num != first {
            self.reject(|rejected| &mut rejected.bad_sequence);
        } else if flags.has(Flags::PROTOCOL_VERSION_MISMATCH) {
            self.rejected_in_a_row *= u32::from(!signed);
        } else if refuses {
            self.phase = Phase::Over;
        } else if !signed {
            self.reject(|rejected| &mut rejected.stripped);
        } else {
            self.rejected_in_a_row = 0;
            if let [unit] = units {
                self.demands.push((request_id, InitAck::parse(unit).first_seq_num));
                self.phase = Phase::Open { inbound: Inbound::starting_at(first) };
                return true;
            }
        }
        false
    }

    fn open(&mut self, header: &Header, authentic: bool, units: &[Unit]) -> bool {
        if header.payload_len as usize > self.max_message {
            self.phase = Phase::Over;
            return false;
        }
        if !header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED) {
            return self.reject(|rejected| &mut rejected.stripped);
        }
        if !authentic {
            return self.reject(|rejected| &mut rejected.bad_credential);
        }
        let (inbound, tentative) = match &mut self.phase {
            Phase::Tentative { inbound, .. } => (inbound, true),
            Phase::Open { inbound } => (inbound, false),
            Phase::AwaitInit { .. } | Phase::Opening { .. } | Phase::Over => return false,
        };
        if self.takes_init && (header.opcode, header.version) == (Opcode::INIT, VERSION) {
            return self.init(header.request_id, units);
        }
        let freshness = inbound.accept(header.seq_num);
        if freshness == Freshness::Stale {
            return self.reject(|rejected| &mut rejected.bad_sequence);
        }
        let inbound = *inbound;
        assert!(self.last < Some(header.seq_num), "{header:?} counts after {:?}", self.last);
        self.last = Some(header.seq_num);
        self.rejected_in_a_row = 0;
        if tentative || freshness == Freshness::Restarted {
            self.confirmed += 1;
            self.phase = Phase::Open { inbound };
        }
        true
    }

    fn reject(&mut self, kind: impl FnOnce(&mut Rejections) -> &mut u64) -> bool {
        *kind(&mut self.rejected) += 1;
        self.rejected_in_a_row += 1;
        if self.rejected_in_a_row >= 3 {
            self.phase = Phase::Over;
        }
        false
    }
}
