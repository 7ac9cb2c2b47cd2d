//! Wide units: a variable-length payload (§5.2.3.2) of our own, for what a basic unit has no room for.
//!
//! It is the payload of the extension for exceptions of IPv6, and goes to peers only that have said that they speak it
//! ([`EXTENSION_QUERY`](crate::necp::message::EXTENSION_QUERY)): F_Basic_Payload clear, a preamble, units.

/// Bytes of a preamble.
pub const PREAMBLE_LEN: usize = 8;
/// Bytes of a wide unit.
pub const WIDE_UNIT_LEN: usize = 64;

/// What a payload of wide units begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Which extension: "EXC6".
    pub magic: u32,
    /// Version of the units' layout.
    pub version: u8,
    /// Bytes of each unit.
    pub unit_len: u8,
    /// 0.
    pub reserved: u16,
}

impl Preamble {
    /// The one that is spoken.
    pub const SPOKEN: Self = Self { magic: 0x4558_4336, version: 1, unit_len: WIDE_UNIT_LEN as u8, reserved: 0 };

    /// The 8 bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_LEN] {
        let [a, b, c, d] = self.magic.to_be_bytes();
        let [e, f] = self.reserved.to_be_bytes();
        [a, b, c, d, self.version, self.unit_len, e, f]
    }

    /// Reads 8 bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Self {
        let [a, b, c, d, version, unit_len, e, f] = *bytes;
        let (magic, reserved) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]));
        Self { magic, version, unit_len, reserved }
    }
}

/// One 64-byte unit, as it is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WideUnit(pub [u8; WIDE_UNIT_LEN]);

impl Default for WideUnit {
    fn default() -> Self {
        Self([0; WIDE_UNIT_LEN])
    }
}
