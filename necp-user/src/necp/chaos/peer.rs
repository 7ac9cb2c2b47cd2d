//! What a peer has sent and received: nothing may happen in a session that this does not account for.

use std::collections::{BTreeMap, BTreeSet};

use super::judge::Judge;
use crate::necp::auth::{CREDENTIAL_LEN, Key};
use crate::necp::message::EXTENSION_QUERY;
use crate::necp::session::{Counters, Rejections};
use crate::necp::wire::{
    Decoder, Direction, Flags, HEADER_LEN, Header, Item, Opcode, PREAMBLE_LEN, Preamble, Unit, VERSION, WIDE_UNIT_LEN,
    WideUnit,
};

/// What the peer has sent, as the draft frames it.
#[derive(Default)]
pub(super) struct Sent {
    pub(super) bytes: usize,
    /// Of an authenticated session: says which messages count.
    pub(super) judge: Option<Judge>,
    decoder: Decoder,
    lost: bool,
    current: Option<Header>,
    /// Messages that may still be answered.
    open: Vec<Open>,
    /// Units of messages that count, and how many of each were not accounted for by an event.
    units: BTreeMap<(u8, [u32; 8]), u32>,
    /// Likewise of wide units, whether or not they could be used.
    wide: BTreeMap<(u8, [u8; WIDE_UNIT_LEN]), u32>,
    /// Units of messages that do not: an answer may repeat them.
    rejected: BTreeSet<(u8, [u32; 8])>,
    /// Messages that count, by opcode, less those that an event has accounted for.
    messages: BTreeMap<u8, u32>,
    /// Credentials of the session's own messages: they are right, and must not count when they come back.
    pub(super) own: BTreeSet<[u8; CREDENTIAL_LEN]>,
}

/// A message that may be answered.
struct Open {
    opcode: Opcode,
    request_id: u16,
    /// Whether its version is one that is spoken.
    spoken: bool,
    /// Whether it counts, so that it may succeed.
    counts: bool,
}

impl Sent {
    /// With a judge: in an authenticated session.
    pub(super) fn new(judge: Option<Judge>) -> Self {
        Self { judge, ..Self::default() }
    }

    pub(super) fn add(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len();
        while !self.lost {
            match self.decoder.next(&mut bytes) {
                Ok(Some(Item::Header(header))) => {
                    let Header { opcode, request_id, version, .. } = header;
                    let counts = self.judge.is_none();
                    self.open.push(Open { opcode, request_id, spoken: version == VERSION, counts });
                    self.current = Some(header);
                    if counts {
                        *self.messages.entry(opcode.0).or_default() += 1;
                        if version == VERSION {
                            self.decoder.read_wide(&header);
                        }
                    } else {
                        self.decoder.hold_payload(&header);
                    }
                }
                Ok(Some(Item::Unit(unit))) => {
                    let header = self.current.expect("units follow a header");
                    *self.units.entry((header.opcode.0, unit.0)).or_default() += 1;
                }
                Ok(Some(Item::Wide(unit))) => {
                    let header = self.current.expect("units follow a header");
                    *self.wide.entry((header.opcode.0, unit.0)).or_default() += 1;
                }
                Ok(Some(Item::Preamble(preamble))) => {
                    if preamble != Preamble::SPOKEN {
                        self.decoder.skip_payload();
                    }
                }
                Ok(Some(Item::Payload)) => self.judge(),
                Ok(Some(Item::End)) => {}
                Ok(None) => return,
                Err(_) => self.lost = true,
            }
        }
    }

    /// A message of an authenticated session is complete.
    fn judge(&mut self) {
        let payload = self.decoder.take_payload();
        let (Some(header), Some(judge), Some(open)) = (self.current, &mut self.judge, self.open.last_mut()) else {
            return;
        };
        let opcode = header.opcode.0;
        if let Some((plain, units)) = judge.message(&header, &payload) {
            let credential = payload.last_chunk().expect("what counts has a credential");
            assert!(!self.own.contains(credential), "{header:?} is the session's own, and would count");
            open.counts = true;
            *self.messages.entry(opcode).or_default() += 1;
            if plain.version == VERSION {
                units.iter().for_each(|unit| *self.units.entry((opcode, unit.0)).or_default() += 1);
            }
        } else {
            let signed = header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
            let units = payload.len().saturating_sub(if signed { CREDENTIAL_LEN } else { 0 });
            let units = payload[..units].as_chunks().0;
            self.rejected.extend(units.iter().map(|unit| (opcode, Unit::decode(unit).0)));
        }
    }

    /// Whether a unit of such a message was sent that looks like this, and counts.
    pub(super) fn has(&self, opcode: Opcode, like: impl Fn(&[u32; 8]) -> bool) -> bool {
        self.units.range((opcode.0, [0; 8])..=(opcode.0, [u32::MAX; 8])).any(|((_, unit), _)| like(unit))
    }

    /// Takes such a unit: each is executed once at most.
    pub(super) fn take(&mut self, opcode: Opcode, like: impl Fn(&[u32; 8]) -> bool) -> bool {
        let units = self.units.range_mut((opcode.0, [0; 8])..=(opcode.0, [u32::MAX; 8]));
        let found = units.filter(|(_, left)| **left > 0).find(|((_, unit), _)| like(unit));
        found.map(|(_, left)| *left -= 1).is_some()
    }

    /// As [`Self::take`], of a wide unit.
    pub(super) fn take_wide(&mut self, opcode: Opcode, like: impl Fn(&WideUnit) -> bool) -> bool {
        let units = self.wide.range_mut((opcode.0, [0; WIDE_UNIT_LEN])..=(opcode.0, [u8::MAX; WIDE_UNIT_LEN]));
        let found = units.filter(|(_, left)| **left > 0).find(|((_, unit), _)| like(&WideUnit(*unit)));
        found.map(|(_, left)| *left -= 1).is_some()
    }

    /// Whether the peer has asked for the extension (§5.5.1), or said that it speaks it.
    fn has_extension(&self) -> bool {
        self.has(Opcode::KEEPALIVE, |unit| unit[0] == EXTENSION_QUERY)
            || self.has(Opcode::KEEPALIVE_ACK, |unit| unit[0] == EXTENSION_QUERY && unit[3] > 0)
    }

    /// Takes a message with this opcode.
    pub(super) fn take_message(&mut self, opcode: Opcode) -> bool {
        let left = self.messages.get_mut(&opcode.0).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    }

    /// NE: takes what opens a session or starts it over: an INIT, or what shows that INIT was no recording.
    pub(super) fn take_init(&mut self) -> bool {
        match &mut self.judge {
            Some(judge) => judge.take_confirmation(),
            None => self.take(Opcode::INIT, |_| true),
        }
    }

    /// Holds a session that has looked at all its input to what authentication must have kept out of it.
    pub(super) fn check(&self, counters: &Counters) {
        let Some(judge) = &self.judge else { return };
        let kinds = |rejected: &Rejections| (rejected.stripped, rejected.bad_credential, rejected.bad_sequence);
        assert_eq!(kinds(&counters.rejected), kinds(&judge.rejected));
        assert!(!judge.is_over(), "a session goes on that must have ended");
    }

    fn has_unit(&self, opcode: Opcode, unit: &Unit) -> bool {
        let unit = (opcode.0, unit.0);
        self.units.contains_key(&unit) || self.rejected.contains(&unit)
    }

    /// Takes a message that this may be the answer to: every message is answered once at most, and with success only
    /// if it counts.
    fn take_open(&mut self, answer: &Header) -> Option<Opcode> {
        let mismatch = answer.flags.has(Flags::PROTOCOL_VERSION_MISMATCH);
        let unauthentic = answer.flags.has(Flags::AUTH_REQUIRED) || answer.flags.has(Flags::BAD_SEQUENCE_NUMBER);
        let fits = |open: &Open| {
            // Of another version, an opcode that has no answer is its own.
            let answered = open.opcode.answer().or((!open.spoken).then_some(open.opcode));
            (open.request_id, open.spoken, answered) == (answer.request_id, !mismatch, Some(answer.opcode))
        };
        let counts = !(self.judge.is_some() && unauthentic);
        let found = self.open.iter().position(|open| fits(open) && open.counts == counts);
        let failed = answer.flags.has(Flags::ERROR);
        let found = found.or_else(|| self.open.iter().position(|open| fits(open) && failed && counts));
        // In their order: the last one may still be coming in.
        Some(self.open.remove(found?).opcode)
    }
}

/// What the peer has received.
pub(super) struct Received {
    /// Whom the opcodes are meant for.
    direction: Direction,
    /// Of an authenticated session.
    key: Option<Key>,
    /// What has come of the message in progress.
    buffer: Vec<u8>,
    /// The number that the next message must have, or one of `starts`, of which each begins a numbering as often as it was
    /// demanded and granted.
    next: Option<u64>,
    starts: BTreeMap<u64, u32>,
    /// The greatest number that any message had, and whether the peer never demanded one that was used, or a smaller one.
    greatest: Option<u64>,
    keeps_order: bool,
    /// The last number of a message other than INIT_ACK.
    last: Option<u64>,
    /// Some message was signed, other than INIT: from then on all are.
    signed: bool,
    /// Messages as they came.
    pub(super) recorded: Vec<Vec<u8>>,
    /// NE: the numbers that its INIT_ACKs demand.
    pub(super) demands: Vec<u64>,
    /// The session's own requests, with their units.
    pub(super) requests: Vec<(Header, Vec<Unit>)>,
    /// Wide units of the latest of them.
    pub(super) wide: Vec<WideUnit>,
    pub(super) messages: u64,
    pub(super) init_acks: u64,
}

impl Received {
    pub(super) fn new(direction: Direction, key: Option<Key>) -> Self {
        Self {
            direction,
            key,
            buffer: Vec::new(),
            next: None,
            starts: BTreeMap::new(),
            greatest: None,
            keeps_order: true,
            last: None,
            signed: false,
            recorded: Vec::new(),
            demands: Vec::new(),
            requests: Vec::new(),
            wide: Vec::new(),
            messages: 0,
            init_acks: 0,
        }
    }

    /// Holds output to what may be sent: framed, of version 1, no reserved flag, in the right direction; an answer
    /// answers what was sent, and repeats no other units; with a key, signed and numbered.
    pub(super) fn add(&mut self, bytes: &[u8], sent: &mut Sent) {
        self.buffer.extend_from_slice(bytes);
        let buffer = std::mem::take(&mut self.buffer);
        let mut rest = &buffer[..];
        while let Some((header, payload)) = rest.split_first_chunk::<HEADER_LEN>() {
            let header = Header::decode(header).expect("output is framed");
            let Some((payload, after)) = payload.split_at_checked(header.payload_len as usize) else { break };
            if self.key.is_some() && self.recorded.len() < 64 && payload.len() < 512 {
                self.recorded.push(rest[..HEADER_LEN + payload.len()].to_vec());
            }
            self.message(header, payload, sent);
            rest = after;
        }
        self.buffer = rest.to_vec();
    }

    /// A number that was never used nor demanded, for a peer that keeps the rules.
    pub(super) fn unused(&self) -> u64 {
        self.greatest.unwrap_or(0).saturating_add(1 << 34)
    }

    /// Between two pieces of output that are all of it, no message is in progress.
    pub(super) fn is_whole(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Whether an EXCEPTION_RESP is in progress, which is sent as the peer reads it.
    pub(super) fn in_list(&self) -> bool {
        self.buffer.get(5) == Some(&Opcode::EXCEPTION_RESP.0)
    }

    fn message(&mut self, header: Header, payload: &[u8], sent: &mut Sent) {
        self.messages += 1;
        let (header, payload) = match self.key.take() {
            Some(key) => {
                let verified = self.verified(&key, header, payload, sent);
                self.key = Some(key);
                verified
            }
            None => (header, payload),
        };
        assert_eq!((header.version, header.seq_num), (VERSION, 0), "{header:?}");
        assert_eq!(header.flags.0 & !0x3f, 0, "reserved flags are sent as 0: {header:?}");
        let wide = wide_units(&header, payload, sent);
        assert_eq!(header.flags.has(Flags::BASIC_PAYLOAD), header.payload_len > 0 && wide.is_empty(), "{header:?}");
        assert!(header.units().is_some() || !wide.is_empty(), "{header:?}");
        let basic = if wide.is_empty() { payload } else { &[] };
        let units: Vec<Unit> = basic.as_chunks().0.iter().map(Unit::decode).collect();
        let mismatch = header.flags.has(Flags::PROTOCOL_VERSION_MISMATCH);
        if mismatch {
            assert_eq!((header.payload_len, header.flags.has(Flags::ERROR)), (0, true), "{header:?}");
        }
        if header.opcode.answer().is_some() && !mismatch {
            let fits = [Direction::Both, self.direction].contains(&header.opcode.direction());
            assert!(fits, "{header:?} flows the other way");
            self.requests.push((header, units));
            self.wide = wide;
            return;
        }
        let request = sent.take_open(&header).unwrap_or_else(|| panic!("{header:?} answers nothing"));
        self.init_acks += u64::from(is_success(&header, Opcode::INIT_ACK));
        let own = header.opcode == Opcode::EXCEPTION_RESP && !header.flags.has(Flags::ERROR);
        for WideUnit(unit) in wide {
            let repeats = header.flags.has(Flags::ERROR) && sent.wide.contains_key(&(request.0, unit));
            assert!(own || repeats, "{header:?} with {unit:?}, which was not sent");
        }
        for unit in units {
            assert!(is_known(&header, request, &unit, sent), "{header:?} with {unit:?}, which was not sent");
        }
    }

    /// The message without credential and number, both of which are right.
    fn verified<'a>(&mut self, key: &Key, header: Header, payload: &'a [u8], sent: &mut Sent) -> (Header, &'a [u8]) {
        if !header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED) {
            // Nothing is signed for a stranger, and a stranger is only refused.
            assert!(!self.signed && header.flags.has(Flags::ERROR), "{header:?} without a credential");
            assert!(payload.is_empty() || header.opcode == Opcode::INIT_ACK, "{header:?} tells a stranger something");
            return (header, payload);
        }
        let (body, credential) = payload.split_last_chunk::<CREDENTIAL_LEN>().expect("a credential");
        assert!(key.verifies(&header, body, credential), "{header:?} with a wrong credential");
        sent.own.insert(*credential);
        let number = header.seq_num;
        let demands = sent.judge.as_ref().map_or(&[][..], |judge| &judge.demands);
        if is_success(&header, Opcode::INIT_ACK) {
            assert!(demands.contains(&(header.request_id, number)), "{header:?} has another number than INIT demands");
            self.keeps_order &= self.greatest < Some(number);
            self.greatest = self.greatest.max(Some(number));
            if let Some(start) = number.checked_add(1) {
                *self.starts.entry(start).or_default() += 1;
            }
            self.demands.push(crate::necp::message::InitAck::parse(&unit_of(body)).first_seq_num);
            self.signed = true;
        } else if header.opcode == Opcode::INIT {
            assert_eq!(number, 0, "{header:?}");
        } else {
            let first =
                self.direction == Direction::ToNe && !self.signed && demands.iter().any(|(_, at)| *at == number);
            let follows = self.next == Some(number);
            // What follows has begun nothing: an INIT that is tentative leaves the old numbering as it is.
            let start = self.starts.get_mut(&number).filter(|left| !follows && **left > 0);
            let starts = start.map(|left| *left -= 1).is_some();
            assert!(starts || follows || first, "{header:?} instead of {:?}", self.next);
            let anew = self.last < Some(number);
            assert!(anew || !self.keeps_order, "{header:?} after {:?}", self.last);
            (self.last, self.greatest) = (Some(number), self.greatest.max(Some(number)));
            self.next = number.checked_add(1);
            self.signed = true;
        }
        let flags = Flags(header.flags.0 & !Flags::AUTH_CREDENTIAL_PROVIDED.0);
        (Header { flags, seq_num: 0, payload_len: body.len() as u32, ..header }, body)
    }
}

/// The wide units of a message; it must be about exceptions then, and the peer must know of the extension.
fn wide_units(header: &Header, payload: &[u8], sent: &Sent) -> Vec<WideUnit> {
    if header.wide_units().is_none() {
        return Vec::new();
    }
    let (preamble, units) = payload.split_first_chunk::<PREAMBLE_LEN>().expect("a preamble");
    assert_eq!(Preamble::decode(preamble), Preamble::SPOKEN, "{header:?}");
    let about = [
        Opcode::EXCEPTION_ADD,
        Opcode::EXCEPTION_ADD_ACK,
        Opcode::EXCEPTION_DEL,
        Opcode::EXCEPTION_DEL_ACK,
        Opcode::EXCEPTION_QUERY,
        Opcode::EXCEPTION_RESP,
    ];
    assert!(about.contains(&header.opcode), "{header:?} has no wide units");
    assert!(sent.has_extension(), "{header:?} to a peer that knows nothing of the extension");
    units.as_chunks().0.iter().map(|unit| WideUnit(*unit)).collect()
}

fn is_success(header: &Header, opcode: Opcode) -> bool {
    header.opcode == opcode && !header.flags.has(Flags::ERROR)
}

fn unit_of(payload: &[u8]) -> Unit {
    Unit::decode(payload.try_into().expect("INIT_ACK has one unit"))
}

/// Whether an answer to such a request may have this unit.
fn is_known(header: &Header, request: Opcode, unit: &Unit, sent: &Sent) -> bool {
    match header.opcode {
        // INIT_ACK is our own, and the list of exceptions is everybody's.
        Opcode::INIT_ACK | Opcode::EXCEPTION_RESP if !header.flags.has(Flags::ERROR) => true,
        Opcode::KEEPALIVE_ACK if !header.flags.has(Flags::ERROR) => {
            assert!(unit.0[3] <= 100 && unit.0[4..] == [0; 4], "{unit:?}");
            sent.has(request, |asked| asked[..3] == unit.0[..3])
        }
        _ => header.flags.has(Flags::ERROR) && sent.has_unit(request, unit),
    }
}
