//! An authenticated connection (§5.8, §5.9): what is held back until it is verified, and the numbers of what is sent.

use super::link::Incoming;
use super::units::AnyUnit;
use crate::necp::auth::{
    CREDENTIAL_LEN, Credentials, Freshness, Inbound, Key, Rejection, Signer, apart_from, is_apart,
};
use crate::necp::wire::{Decoder, Flags, Header, Item, Opcode, UNIT_LEN, Unit, VERSION};

/// Rejected messages in a row that end the connection (§5.8.3).
pub(super) const MAX_REJECTED: u32 = 3;

/// A message that is not executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rejected {
    /// As it came.
    pub(super) header: Header,
    pub(super) cause: Rejection,
    /// What an answer repeats; of the extension, nothing.
    pub(super) units: Vec<Unit>,
}

/// What is left of a verified message.
#[derive(Debug)]
struct Message {
    decoder: Decoder,
    payload: Vec<u8>,
    /// Bytes of it that were looked at.
    at: usize,
}

/// Which numbers are accepted.
#[derive(Debug)]
enum Numbers {
    /// Of an NE before INIT: every one, for there is no agreement yet.
    Any,
    /// Of an SE before INIT_ACK: the one that it has asked for.
    Exactly(u64),
    /// After that.
    Inbound(Inbound),
}

/// How messages are sent.
#[derive(Debug, Clone, Copy)]
enum Outbound {
    /// Without a credential, before INIT or INIT_ACK was verified: nothing is signed for a stranger.
    Bare,
    /// With a credential and this number; `None` behind the largest.
    Next(Option<u64>),
}

/// How one message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stamp {
    Bare,
    Number(u64),
}

#[derive(Debug)]
pub(super) struct Secure {
    key: Key,
    first: u64,
    /// Whether INIT is for this side (NE); else one is our own, sent back to us.
    takes_init: bool,
    numbers: Numbers,
    outbound: Outbound,
    /// The header of the message that is held back.
    held: Option<Header>,
    /// What is left of a verified message.
    message: Option<Message>,
    rejected_in_a_row: u32,
}

impl Secure {
    /// For an NE, which waits for INIT.
    pub(super) fn ne(Credentials { key, first_seq_num }: Credentials) -> Self {
        Self {
            key,
            first: first_seq_num,
            takes_init: true,
            numbers: Numbers::Any,
            outbound: Outbound::Bare,
            held: None,
            message: None,
            rejected_in_a_row: 0,
        }
    }

    /// For an SE, which sends INIT and waits for INIT_ACK.
    pub(super) fn se(credentials: Credentials) -> Self {
        let first = credentials.first_seq_num;
        Self { numbers: Numbers::Exactly(first), takes_init: false, ..Self::ne(credentials) }
    }

    /// The number that this side demands first.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Whether this is an NE's side.
    pub(super) fn takes_init(&self) -> bool {
        self.takes_init
    }

    /// Whether INIT and INIT_ACK have been exchanged: every message is held back until it is verified, and signed.
    pub(super) fn is_established(&self) -> bool {
        matches!(self.numbers, Numbers::Inbound(_))
    }

    // ---- the handshake ----

    /// NE: a verified INIT demands `theirs`. Returns the number to demand in INIT_ACK, which is sent next; `None` if there is
    /// none.
    pub(super) fn accept_init(&mut self, theirs: u64) -> Option<u64> {
        let first = match self.numbers {
            // INIT again, before the session is confirmed: the same demand stands. Another one might be near to numbers that
            // an earlier INIT has made us use, and this one near to what is demanded: what we sent could be sent back to us.
            Numbers::Inbound(_) if is_apart(self.first, theirs) => self.first,
            Numbers::Inbound(_) => return None,
            Numbers::Any | Numbers::Exactly(_) => apart_from(self.first, theirs),
        };
        self.first = first;
        self.numbers = Numbers::Inbound(Inbound::starting_at(first));
        self.outbound = Outbound::Next(Some(theirs));
        Some(first)
    }

    /// NE: a verified INIT on a session that is open. Both its numbers and the offered ones are good from now on; `None`
    /// if there are no more.
    pub(super) fn offer_restart(&mut self, theirs: u64) -> Option<u64> {
        let Numbers::Inbound(inbound) = &mut self.numbers else { return None };
        inbound.offer_restart(theirs)
    }

    /// NE: the offer was taken: what is sent from now on follows INIT_ACK, which carried `theirs`.
    pub(super) fn restart(&mut self, theirs: u64) {
        self.outbound = Outbound::Next(theirs.checked_add(1));
    }

    /// SE: a verified INIT_ACK demands `theirs`. One more message may carry INIT_ACK's number (§5.9.2).
    pub(super) fn accept_init_ack(&mut self, theirs: u64) {
        self.numbers = Numbers::Inbound(Inbound::starting_at(self.first));
        self.outbound = Outbound::Next(Some(theirs));
    }

    // ---- input ----

    pub(super) fn hold(&mut self, header: Header) {
        self.held = Some(header);
    }

    /// The message that was held back has come, with this payload, the credential at its end.
    pub(super) fn examine(&mut self, mut bytes: Vec<u8>, max_units: usize) -> Option<Incoming> {
        let header = self.held.take()?;
        let has_credential = header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        let (payload, credential) = match bytes.split_last_chunk::<CREDENTIAL_LEN>() {
            Some((payload, credential)) if has_credential => (payload, &credential[..]),
            _ => (&bytes[..], &[][..]),
        };
        let stripped = Header {
            flags: Flags(header.flags.0 & !Flags::AUTH_CREDENTIAL_PROVIDED.0),
            payload_len: payload.len() as u32,
            ..header
        };
        Some(match self.judge(&header, payload, credential) {
            Err(cause) => {
                let chunks = payload.as_chunks::<UNIT_LEN>().0.iter().filter(|_| stripped.units().is_some());
                let units = chunks.take(max_units).map(Unit::decode).collect();
                Incoming::Rejected(Rejected { header, cause, units })
            }
            Ok(restarted) => {
                // INIT may be a recorded one: it proves nothing.
                if header.opcode != Opcode::INIT {
                    self.rejected_in_a_row = 0;
                }
                bytes.truncate(stripped.payload_len as usize);
                self.message = Some(Message { decoder: Decoder::behind(&stripped), payload: bytes, at: 0 });
                Incoming::Verified { header: stripped, restarted }
            }
        })
    }

    /// The credential first, then the number; a failure advances nothing. Says whether the peer has started over.
    fn judge(&mut self, header: &Header, payload: &[u8], credential: &[u8]) -> Result<bool, Rejection> {
        if !header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED) {
            return Err(Rejection::NoCredential);
        }
        if !self.key.verifies(header, payload, credential) {
            return Err(Rejection::BadCredential);
        }
        match &mut self.numbers {
            Numbers::Any => Ok(false),
            Numbers::Exactly(number) if header.seq_num == *number => Ok(false),
            Numbers::Exactly(_) => Err(Rejection::BadSequence),
            // It begins a numbering of its own (§5.9.2). In another version it is no INIT, and would open nothing.
            Numbers::Inbound(_) if header.opcode == Opcode::INIT && header.version == VERSION && self.takes_init => {
                Ok(false)
            }
            Numbers::Inbound(inbound) => match inbound.accept(header.seq_num) {
                Freshness::Fresh => Ok(false),
                Freshness::Restarted => Ok(true),
                Freshness::Stale => Err(Rejection::BadSequence),
            },
        }
    }

    /// The next unit of a verified message, or its end; `None` if there is no such message.
    pub(super) fn next_of_message(&mut self) -> Option<Incoming> {
        let message = self.message.as_mut()?;
        let mut rest = &message.payload[message.at..];
        let before = rest.len();
        let item = message.decoder.next(&mut rest);
        message.at += before - rest.len();
        Some(match item {
            Ok(Some(Item::Unit(unit))) => Incoming::Unit(AnyUnit::Basic(unit)),
            Ok(Some(Item::Wide(unit))) => Incoming::Unit(AnyUnit::Wide(unit)),
            Ok(Some(Item::Preamble(preamble))) => Incoming::Preamble(preamble),
            // Its payload is all there: nothing else can come of it but its end.
            _ => {
                self.message = None;
                Incoming::End
            }
        })
    }

    pub(super) fn skip_message(&mut self) {
        if let Some(message) = &mut self.message {
            message.decoder.skip_payload();
        }
    }

    /// The verified message is read as wide units, right after its header, which is shown without the credential.
    pub(super) fn read_wide(&mut self, header: &Header) {
        if let Some(message) = &mut self.message {
            message.decoder.read_wide(header);
        }
    }

    pub(super) fn has_message(&self) -> bool {
        self.message.is_some()
    }

    /// Counts a rejected message; says whether it was one too many.
    pub(super) fn strike(&mut self) -> bool {
        self.rejected_in_a_row += 1;
        self.rejected_in_a_row >= MAX_REJECTED
    }

    // ---- output ----

    /// How the next message is sent; `None` if there is no number left for it.
    pub(super) fn stamp(&mut self) -> Option<Stamp> {
        match &mut self.outbound {
            Outbound::Bare => Some(Stamp::Bare),
            Outbound::Next(next) => {
                let number = (*next)?;
                *next = number.checked_add(1);
                Some(Stamp::Number(number))
            }
        }
    }

    /// The header of a message that is to carry a credential.
    pub(super) fn stamped(header: Header, number: u64) -> Header {
        Header {
            flags: header.flags.with(Flags::AUTH_CREDENTIAL_PROVIDED),
            payload_len: header.payload_len + CREDENTIAL_LEN as u32,
            seq_num: number,
            ..header
        }
    }

    /// Begins the credential of a message with such a header.
    pub(super) fn signer(&self, header: &Header) -> Signer {
        self.key.sign(header)
    }

    /// Bytes held.
    pub(super) fn held_bytes(&self) -> usize {
        self.message.as_ref().map_or(0, |message| message.payload.capacity())
    }
}
