//! The bytes: header, flags, opcodes, units (§5.2, §5.3), and the streaming decoder.

mod decoder;
mod wide;

use std::fmt;

pub use decoder::{Decoder, FramingLost, Item};
pub use wide::{PREAMBLE_LEN, Preamble, WIDE_UNIT_LEN, WideUnit};

/// TCP port that the NE listens on (§5.1).
pub const PORT: u16 = 3262;
/// First two bytes of every message, "AJ" (§5.2.1).
pub const PROTOCOL_IDENTIFIER: u16 = 0x414a;
/// The one version that is spoken (§5.2.1).
pub const VERSION: u8 = 1;
/// Bytes of a header (§5.2.1).
pub const HEADER_LEN: usize = 20;
/// Bytes of a unit of the basic payload (§5.2.3).
pub const UNIT_LEN: usize = 32;

/// The header's flags (§5.2.1); bits that the draft does not define are kept as received and never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(pub u16);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// The payload is one or more 32-byte units.
    pub const BASIC_PAYLOAD: Self = Self(0x0001);
    /// The payload ends with a credential.
    pub const AUTH_CREDENTIAL_PROVIDED: Self = Self(0x0002);
    /// The request, or some of its units, failed.
    pub const ERROR: Self = Self(0x0004);
    /// The request's version is not spoken.
    pub const PROTOCOL_VERSION_MISMATCH: Self = Self(0x0008);
    /// The request must be authenticated.
    pub const AUTH_REQUIRED: Self = Self(0x0010);
    /// The request's sequence number is not larger than the last accepted one.
    pub const BAD_SEQUENCE_NUMBER: Self = Self(0x0020);

    /// Both sets of flags.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every flag of `other` is set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// An operation code (§5.3); codes that the draft reserves survive as values.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Opcode(pub u8);

/// Which role sends an opcode (§5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Either side sends it.
    Both,
    /// Only the SE sends it.
    ToNe,
    /// Only the NE sends it.
    ToSe,
    /// 0x09–0x1F and 0x28–0xFF: skipped (§5.3).
    Reserved,
}

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $direction:ident;)*) => {
        impl Opcode {
            $($(#[$doc])* pub const $name: Self = Self($code);)*

            /// The draft's name, `None` for a reserved code.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($code => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// Who sends it (§5.3).
            #[must_use]
            pub const fn direction(self) -> Direction {
                match self.0 {
                    $($code => Direction::$direction,)*
                    _ => Direction::Reserved,
                }
            }
        }
    };
}

opcodes! {
    /// Ignored by whoever receives it.
    NOOP = 0x00, Both;
    /// Opens the session; the NE deletes what it holds for the SE (§5.4.1).
    INIT = 0x01, ToNe;
    /// Answers INIT (§5.4.2).
    INIT_ACK = 0x02, ToSe;
    /// Asks for a sign of life and for performance (§5.5.1).
    KEEPALIVE = 0x03, Both;
    /// Answers KEEPALIVE (§5.5.2).
    KEEPALIVE_ACK = 0x04, Both;
    /// Offers services (§5.6.1).
    START = 0x05, ToNe;
    /// Answers START (§5.6.2).
    START_ACK = 0x06, ToSe;
    /// Takes services back (§5.6.3).
    STOP = 0x07, ToNe;
    /// Answers STOP (§5.6.4); the draft's list of reserved codes names it too, by mistake.
    STOP_ACK = 0x08, ToSe;
    /// Adds exceptions (§5.7.1).
    EXCEPTION_ADD = 0x20, ToNe;
    /// Answers EXCEPTION_ADD (§5.7.2).
    EXCEPTION_ADD_ACK = 0x21, ToSe;
    /// Deletes exceptions (§5.7.3).
    EXCEPTION_DEL = 0x22, ToNe;
    /// Answers EXCEPTION_DEL (§5.7.4).
    EXCEPTION_DEL_ACK = 0x23, ToSe;
    /// Deletes all of the SE's exceptions (§5.7.5).
    EXCEPTION_RESET = 0x24, ToNe;
    /// Answers EXCEPTION_RESET (§5.7.6).
    EXCEPTION_RESET_ACK = 0x25, ToSe;
    /// Asks for the list of exceptions (§5.7.7).
    EXCEPTION_QUERY = 0x26, ToNe;
    /// Answers EXCEPTION_QUERY (§5.7.8).
    EXCEPTION_RESP = 0x27, ToSe;
}

impl Opcode {
    /// The opcode of the answer to this request; `None` for NOOP, for answers and for reserved codes.
    #[must_use]
    pub const fn answer(self) -> Option<Self> {
        match self {
            Self::INIT
            | Self::KEEPALIVE
            | Self::START
            | Self::STOP
            | Self::EXCEPTION_ADD
            | Self::EXCEPTION_DEL
            | Self::EXCEPTION_RESET
            | Self::EXCEPTION_QUERY => Some(Self(self.0 + 1)),
            _ => None,
        }
    }
}

impl fmt::Display for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "opcode {:#04x}", self.0),
        }
    }
}

impl fmt::Debug for Opcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A message's header without its protocol identifier, which is always the same (§5.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Flags.
    pub flags: Flags,
    /// Version, 1 in all that we send.
    pub version: u8,
    /// Operation code.
    pub opcode: Opcode,
    /// Chosen by the requester, echoed by the responder, to whom it means nothing.
    pub request_id: u16,
    /// Sequence number; 0 on unauthenticated connections, where it is ignored on receipt (§5.9).
    pub seq_num: u64,
    /// Bytes after the header, a credential included.
    pub payload_len: u32,
}

impl Header {
    /// A header for a payload of `units` units on an unauthenticated connection; sets F_Basic_Payload if there are any.
    #[must_use]
    pub fn new(opcode: Opcode, flags: Flags, request_id: u16, units: usize) -> Self {
        let flags = if units == 0 { flags } else { flags.with(Flags::BASIC_PAYLOAD) };
        let payload_len = u32::try_from(units * UNIT_LEN).expect("no message that we build comes near 4 GiB");
        Self { flags, version: VERSION, opcode, request_id, seq_num: 0, payload_len }
    }

    /// As [`Self::new`], for wide units, which the peer must have said that it speaks; without any, it is the same.
    #[must_use]
    pub fn wide(opcode: Opcode, flags: Flags, request_id: u16, units: usize) -> Self {
        let bytes = if units == 0 { 0 } else { PREAMBLE_LEN + units * WIDE_UNIT_LEN };
        let payload_len = u32::try_from(bytes).expect("no message that we build comes near 4 GiB");
        Self { flags, version: VERSION, opcode, request_id, seq_num: 0, payload_len }
    }

    /// The 20 bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&PROTOCOL_IDENTIFIER.to_be_bytes());
        bytes[2..4].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[4] = self.version;
        bytes[5] = self.opcode.0;
        bytes[6..8].copy_from_slice(&self.request_id.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.seq_num.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes
    }

    /// Reads the 20 bytes of a header. Fails if they do not begin with the protocol identifier (§5.2.2): then nobody
    /// knows where the next message begins.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FramingLost> {
        let [p0, p1, f0, f1, version, opcode, r0, r1, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3] = *bytes;
        let identifier = u16::from_be_bytes([p0, p1]);
        if identifier != PROTOCOL_IDENTIFIER {
            return Err(FramingLost { identifier });
        }
        Ok(Self {
            flags: Flags(u16::from_be_bytes([f0, f1])),
            version,
            opcode: Opcode(opcode),
            request_id: u16::from_be_bytes([r0, r1]),
            seq_num: u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            payload_len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// How many units the payload holds on an unauthenticated connection; `None` if it is not made of units: its
    /// length is no multiple of 32, F_Basic_Payload is missing, or it ends with a credential that nobody can check.
    #[must_use]
    pub fn units(&self) -> Option<u32> {
        if self.payload_len == 0 {
            return (!self.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED)).then_some(0);
        }
        let basic = self.flags.has(Flags::BASIC_PAYLOAD) && !self.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED);
        let whole = self.payload_len.is_multiple_of(UNIT_LEN as u32);
        (basic && whole).then_some(self.payload_len / UNIT_LEN as u32)
    }

    /// How many wide units the payload holds on an unauthenticated connection, 1 at least, if it is a variable-length one
    /// (§5.2.3.2) and [`Preamble::SPOKEN`] is what it begins with; `None` if it cannot be made of them.
    #[must_use]
    pub fn wide_units(&self) -> Option<u32> {
        if self.flags.has(Flags::BASIC_PAYLOAD) || self.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED) {
            return None;
        }
        let units = self.payload_len.checked_sub(PREAMBLE_LEN as u32)?;
        (units > 0 && units.is_multiple_of(WIDE_UNIT_LEN as u32)).then_some(units / WIDE_UNIT_LEN as u32)
    }
}

/// One 32-byte unit: data0 to data7 in host byte order, big endian on the wire (§5.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Unit(pub [u32; 8]);

impl Unit {
    /// The 32 bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; UNIT_LEN] {
        let mut bytes = [0; UNIT_LEN];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(self.0) {
            chunk.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// Reads 32 bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; UNIT_LEN]) -> Self {
        let mut words = [0; 8];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_be_bytes(chunk.try_into().expect("chunks of four bytes"));
        }
        Self(words)
    }
}

#[cfg(test)]
mod tests;
