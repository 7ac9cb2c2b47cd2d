//! What a peer has sent and received: nothing may happen in a session that this does not account for.

use std::collections::BTreeSet;

use crate::necp::wire::{Decoder, Direction, Flags, Header, Item, Opcode, Unit, VERSION};

/// What the peer has sent, as the draft frames it.
#[derive(Default)]
pub(super) struct Sent {
    pub(super) bytes: usize,
    decoder: Decoder,
    lost: bool,
    current: Option<Header>,
    /// Messages that may still be answered: opcode, request id, whether the version is one that is spoken.
    open: Vec<(Opcode, u16, bool)>,
    units: BTreeSet<(u8, [u32; 8])>,
}

impl Sent {
    pub(super) fn add(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len();
        while !self.lost {
            match self.decoder.next(&mut bytes) {
                Ok(Some(Item::Header(header))) => {
                    self.open.push((header.opcode, header.request_id, header.version == VERSION));
                    self.current = Some(header);
                }
                Ok(Some(Item::Unit(unit))) => {
                    let header = self.current.expect("units follow a header");
                    self.units.insert((header.opcode.0, unit.0));
                }
                Ok(Some(Item::Payload | Item::End)) => {}
                Ok(None) => return,
                Err(_) => self.lost = true,
            }
        }
    }

    /// Whether a unit of such a message was sent that looks like this.
    pub(super) fn has(&self, opcode: Opcode, like: impl Fn(&[u32; 8]) -> bool) -> bool {
        self.units.range((opcode.0, [0; 8])..=(opcode.0, [u32::MAX; 8])).any(|(_, unit)| like(unit))
    }

    /// Whether such a message was sent and not answered.
    pub(super) fn has_request(&self, opcode: Opcode) -> bool {
        self.open.iter().any(|(sent, _, _)| *sent == opcode)
    }

    fn has_unit(&self, opcode: Opcode, unit: &Unit) -> bool {
        self.units.contains(&(opcode.0, unit.0))
    }

    /// Takes a message that this may be the answer to: every message is answered once at most.
    fn take_open(&mut self, answer: &Header) -> Option<Opcode> {
        let mismatch = answer.flags.has(Flags::PROTOCOL_VERSION_MISMATCH);
        let found = self.open.iter().position(|(opcode, id, spoken)| {
            // Of another version, an opcode that has no answer is its own.
            let answered = opcode.answer().or((!spoken).then_some(*opcode));
            (*id, *spoken, answered) == (answer.request_id, !mismatch, Some(answer.opcode))
        })?;
        Some(self.open.swap_remove(found).0)
    }
}

/// What the peer has received.
pub(super) struct Received {
    /// Whom the opcodes are meant for.
    direction: Direction,
    decoder: Decoder,
    current: Option<(Header, Option<Opcode>)>,
    /// The session's own requests, with the number of their units.
    pub(super) requests: Vec<(Header, Vec<Unit>)>,
    pub(super) messages: u64,
    pub(super) init_acks: u64,
}

impl Received {
    pub(super) fn new(direction: Direction) -> Self {
        Self { direction, decoder: Decoder::default(), current: None, requests: Vec::new(), messages: 0, init_acks: 0 }
    }

    /// Holds output to what may be sent: framed, of version 1, no reserved flag, in the right direction; an answer
    /// answers what was sent, and repeats no other units.
    pub(super) fn add(&mut self, mut bytes: &[u8], sent: &mut Sent) {
        while let Some(item) = self.decoder.next(&mut bytes).expect("output is framed") {
            match item {
                Item::Header(header) => self.header(header, sent),
                Item::Unit(unit) => self.unit(unit, sent),
                Item::Payload | Item::End => self.current = None,
            }
        }
    }

    /// Between two pieces of output that are all of it, no message is in progress.
    pub(super) fn is_whole(&self) -> bool {
        !self.decoder.in_message()
    }

    /// Whether an EXCEPTION_RESP is in progress, which is sent as the peer reads it.
    pub(super) fn in_list(&self) -> bool {
        self.current.is_some_and(|(header, _)| header.opcode == Opcode::EXCEPTION_RESP)
    }

    fn header(&mut self, header: Header, sent: &mut Sent) {
        self.messages += 1;
        assert_eq!((header.version, header.seq_num), (VERSION, 0), "{header:?}");
        assert_eq!(header.flags.0 & !0x3f, 0, "reserved flags are sent as 0: {header:?}");
        assert_eq!(header.flags.has(Flags::BASIC_PAYLOAD), header.payload_len > 0, "{header:?}");
        assert!(header.units().is_some(), "{header:?}");
        let mismatch = header.flags.has(Flags::PROTOCOL_VERSION_MISMATCH);
        let answers = if header.opcode.answer().is_some() && !mismatch {
            let fits = [Direction::Both, self.direction].contains(&header.opcode.direction());
            assert!(fits, "{header:?} flows the other way");
            self.requests.push((header, Vec::new()));
            None
        } else {
            let request = sent.take_open(&header);
            assert!(request.is_some(), "{header:?} answers nothing");
            self.init_acks += u64::from(header.opcode == Opcode::INIT_ACK && !header.flags.has(Flags::ERROR));
            request
        };
        if mismatch {
            assert_eq!((header.payload_len, header.flags.has(Flags::ERROR)), (0, true), "{header:?}");
        }
        self.current = Some((header, answers));
    }

    fn unit(&mut self, unit: Unit, sent: &Sent) {
        let (header, answers) = self.current.expect("units follow a header");
        let Some(request) = answers else {
            return self.requests.last_mut().expect("it is the current one").1.push(unit);
        };
        let known = match header.opcode {
            Opcode::INIT_ACK if !header.flags.has(Flags::ERROR) => true,
            Opcode::KEEPALIVE_ACK if !header.flags.has(Flags::ERROR) => {
                assert!(unit.0[3] <= 100 && unit.0[4..] == [0; 4], "{unit:?}");
                sent.has(request, |asked| asked[..3] == unit.0[..3])
            }
            // The list of exceptions is everybody's.
            Opcode::EXCEPTION_RESP if !header.flags.has(Flags::ERROR) => true,
            _ => header.flags.has(Flags::ERROR) && sent.has_unit(request, &unit),
        };
        assert!(known, "{header:?} with {unit:?}, which was not sent");
    }
}
