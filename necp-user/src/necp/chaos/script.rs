//! Bytes as a string of choices.

use crate::necp::session::SessionConfig;
use crate::necp::wire::{Flags, Header, Opcode, Preamble, Unit, VERSION, WideUnit};

/// What is left of a script; beyond its end everything is 0.
pub(super) struct Script<'a> {
    rest: &'a [u8],
    /// Whether a very long message was made: one is enough, and dear.
    long: bool,
}

/// Opcodes by frequency: what is defined more often than what is reserved.
const OPCODES: [u8; 24] = [
    0x01, 0x01, 0x03, 0x03, 0x04, 0x05, 0x05, 0x05, 0x07, 0x07, 0x07, 0x20, 0x20, 0x22, 0x22, 0x24, 0x26, 0x00, 0x02,
    0x06, 0x08, 0x27, 0x09, 0xff,
];
/// Words that mean something in some field of some unit.
const WORDS: [u32; 16] = [0, 1, 1, 2, 3, 6, 6, 17, 80, 81, 24, 0xcb00_7105, 100, 0x0001_0000, 300, u32::MAX];

impl<'a> Script<'a> {
    pub(super) fn new(rest: &'a [u8]) -> Self {
        Self { rest, long: false }
    }

    pub(super) fn is_over(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub(super) fn u32(&mut self) -> u32 {
        self.take(4).iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
    }

    /// The next `count` bytes, or as many as there are.
    pub(super) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// Some bytes as they are.
    pub(super) fn bytes(&mut self) -> &'a [u8] {
        let count = self.byte();
        self.take(count.into())
    }

    /// Units whose words are picked by the digits of one number each; once very many.
    pub(super) fn units(&mut self) -> Vec<Unit> {
        let count = self.byte();
        let mut units = Vec::with_capacity(usize::from(count & 7));
        for _ in 0..count & 7 {
            let digits = self.u32();
            units.push(Unit(std::array::from_fn(|at| WORDS[(digits >> (4 * at) & 15) as usize])));
        }
        if count == 0xff && !self.long && self.byte() == 0xff {
            self.long = true;
            return units.repeat(200);
        }
        units
    }

    /// A request of wide units, well-formed or not, without a key.
    pub(super) fn wide(&mut self) -> Vec<u8> {
        let (form, id) = (self.byte(), self.byte());
        let opcode = [Opcode::EXCEPTION_ADD, Opcode::EXCEPTION_DEL, Opcode::EXCEPTION_QUERY, Opcode::START];
        let opcode = opcode[usize::from(form & 3)];
        let count = if opcode == Opcode::EXCEPTION_QUERY && form & 4 == 0 { 1 } else { self.byte() & 7 };
        let mut bytes = Header::wide(opcode, Flags::NONE, id.into(), count.into()).encode().to_vec();
        if count == 0 {
            return bytes;
        }
        let mut preamble = Preamble::SPOKEN;
        if form & 0x70 == 0x70 {
            preamble.version = self.byte();
        }
        bytes.extend(preamble.encode());
        for _ in 0..count {
            bytes.extend(self.wide_unit().0);
        }
        if form & 0x80 != 0 {
            // Some byte of it is another, perhaps of the lengths.
            let at = usize::from(self.byte()) % bytes.len();
            bytes[at] = self.byte();
        }
        bytes
    }

    /// Mostly one that means something.
    pub(super) fn wide_unit(&mut self) -> WideUnit {
        const FIRST: [[u8; 4]; 4] = [[0x20, 1, 0x0d, 0xb8], [0, 0, 0, 0], [0xfe, 0x80, 0, 0], [0xff, 2, 0, 0]];
        let digits = self.u32();
        let pick = |at: u32, from: [u8; 4]| from[(digits >> at & 3) as usize];
        let mut unit = WideUnit::default();
        let first = [
            pick(0, [0, 1, 2, 3]),
            pick(2, [6, 6, 4, 0]),
            pick(4, [0, 32, 64, 128]),
            pick(6, [0, 32, 129, 128]),
            pick(8, [0, 6, 17, 47]),
            pick(10, [0, 0, 0, 1]),
            0,
            pick(12, [0, 80, 81, 53]),
        ];
        unit.0[..8].copy_from_slice(&first);
        unit.0[11] = pick(14, [0, 9, 60, 255]);
        unit.0[16..20].copy_from_slice(&FIRST[(digits >> 16 & 3) as usize]);
        unit.0[32..36].copy_from_slice(&FIRST[(digits >> 18 & 3) as usize]);
        unit.0[31] = pick(20, [0, 1, 2, 7]);
        unit
    }

    /// A message, whole or not, well-formed or not.
    pub(super) fn message(&mut self) -> (Header, Vec<Unit>) {
        let (kind, form, id) = (self.byte(), self.byte(), self.byte());
        let opcode = OPCODES.get(usize::from(kind % 32)).copied().unwrap_or_else(|| self.byte());
        let flags = if form & 7 == 7 { Flags(self.u32() as u16) } else { Flags::BASIC_PAYLOAD };
        let version = if form >> 3 & 7 == 7 { self.byte() } else { VERSION };
        let length = match form >> 6 {
            2 => Some(self.u32()),
            3 => Some(self.byte().into()),
            _ => None,
        };
        let units = self.units();
        let payload_len = length.unwrap_or(units.len() as u32 * 32);
        (Header { flags, version, opcode: Opcode(opcode), request_id: id.into(), seq_num: 0, payload_len }, units)
    }
}

/// The usual limits, or such as are soon reached.
pub(super) fn limits(tight: bool) -> SessionConfig {
    let usual = SessionConfig::default();
    let tight_ones = SessionConfig { max_failed_units: 9, max_services: 3, max_message: 1024, ..usual.clone() };
    if tight { tight_ones } else { usual }
}

pub(super) fn message(header: &Header, units: &[Unit]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    units.iter().for_each(|unit| bytes.extend(unit.encode()));
    bytes
}
