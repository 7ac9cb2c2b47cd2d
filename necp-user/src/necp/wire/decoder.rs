//! From a stream of bytes to headers and units, holding no more than one of them.

use std::mem;

use super::{HEADER_LEN, Header, PREAMBLE_LEN, Preamble, UNIT_LEN, Unit, WIDE_UNIT_LEN, WideUnit};

/// The bytes where a header must stand do not begin with 0x414A (§5.2.2): close the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message must begin with 0x414a, got {identifier:#06x}")]
pub struct FramingLost {
    /// The 16 bits that were found.
    pub identifier: u16,
}

/// What the stream brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// A message begins. Its payload follows as units if it is made of them ([`Header::units`]), else it is skipped.
    Header(Header),
    /// The next unit of the payload.
    Unit(Unit),
    /// A payload of wide units begins; only after [`Decoder::read_wide`]. Who does not speak what it says skips it.
    Preamble(Preamble),
    /// The next unit of such a payload.
    Wide(WideUnit),
    /// The payload of a message that is held back ([`Decoder::hold_payload`]) is complete: [`Decoder::take_payload`]. It
    /// ends the message, no [`Item::End`] follows.
    Payload,
    /// The message is complete.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Units { left: u32 },
    Preamble { units: u32 },
    Wide { left: u32 },
    Skip { left: u32 },
    Hold { left: u32 },
    End,
    Lost(FramingLost),
}

/// Splits a stream into [`Item`]s. Whatever length a header announces, it allocates nothing, except for the bytes of a
/// payload that it is told to hold back, as they come.
#[derive(Debug, Clone)]
pub struct Decoder {
    state: State,
    partial: [u8; WIDE_UNIT_LEN],
    filled: usize,
    held: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { state: State::Header, partial: [0; WIDE_UNIT_LEN], filled: 0, held: Vec::new() }
    }
}

impl State {
    /// What follows a header.
    fn behind(header: &Header) -> Self {
        match header.units() {
            Some(left) if header.version == super::VERSION => Self::Units { left },
            _ => Self::Skip { left: header.payload_len },
        }
    }
}

impl Decoder {
    /// One that has just told of this header: for a payload that was held back.
    #[must_use]
    pub fn behind(header: &Header) -> Self {
        Self { state: State::behind(header), ..Self::default() }
    }

    /// Takes bytes off the front of `bytes` until an item is complete, or none is left (`Ok(None)`).
    ///
    /// Fails for good when the framing is lost; two wrong bytes are enough to see it.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Item>, FramingLost> {
        loop {
            match self.state {
                State::Lost(lost) => return Err(lost),
                State::Header => return self.header(bytes),
                State::Units { left: 0 } | State::Wide { left: 0 } | State::Skip { left: 0 } => self.state = State::End,
                State::Units { left } => {
                    let Some(unit) = self.fill::<UNIT_LEN>(bytes) else { return Ok(None) };
                    self.state = State::Units { left: left - 1 };
                    return Ok(Some(Item::Unit(Unit::decode(&unit))));
                }
                State::Preamble { units } => {
                    let Some(preamble) = self.fill::<PREAMBLE_LEN>(bytes) else { return Ok(None) };
                    self.state = State::Wide { left: units };
                    return Ok(Some(Item::Preamble(Preamble::decode(&preamble))));
                }
                State::Wide { left } => {
                    let Some(unit) = self.fill::<WIDE_UNIT_LEN>(bytes) else { return Ok(None) };
                    self.state = State::Wide { left: left - 1 };
                    return Ok(Some(Item::Wide(WideUnit(unit))));
                }
                State::Skip { left } => {
                    let taken = bytes.len().min(left as usize);
                    *bytes = &bytes[taken..];
                    self.state = State::Skip { left: left - taken as u32 };
                    if taken < left as usize {
                        return Ok(None);
                    }
                }
                State::Hold { left } => {
                    let taken = bytes.len().min(left as usize);
                    self.held.extend_from_slice(&bytes[..taken]);
                    *bytes = &bytes[taken..];
                    self.state = State::Hold { left: left - taken as u32 };
                    if taken < left as usize {
                        return Ok(None);
                    }
                    self.state = State::Header;
                    return Ok(Some(Item::Payload));
                }
                State::End => {
                    self.state = State::Header;
                    return Ok(Some(Item::End));
                }
            }
        }
    }

    /// Drops what is left of the current message's payload: after its header, only [`Item::End`] follows.
    pub fn skip_payload(&mut self) {
        // What is left of a length cannot exceed a u32, as the length itself cannot.
        let left = match self.state {
            State::Units { left } => left * UNIT_LEN as u32,
            State::Preamble { units } => PREAMBLE_LEN as u32 + units * WIDE_UNIT_LEN as u32,
            State::Wide { left } => left * WIDE_UNIT_LEN as u32,
            _ => return,
        };
        self.state = State::Skip { left: left - self.filled as u32 };
        self.filled = 0;
    }

    /// Reads the payload as wide units, right after its header, instead of skipping it: [`Item::Preamble`] follows, and then
    /// the units. Nothing happens if it cannot be made of them.
    pub fn read_wide(&mut self, header: &Header) {
        if let Some(units) = header.wide_units()
            && self.state == State::behind(header)
        {
            self.state = State::Preamble { units };
        }
    }

    /// Holds the payload back, right after its header, instead of splitting or skipping it: nothing of it is seen before
    /// all of it is there ([`Item::Payload`]). Whoever asks for this has checked `payload_len` against a limit.
    pub fn hold_payload(&mut self, header: &Header) {
        self.filled = 0;
        self.state = State::Hold { left: header.payload_len };
    }

    /// The bytes of the payload that [`Item::Payload`] has told of.
    pub fn take_payload(&mut self) -> Vec<u8> {
        mem::take(&mut self.held)
    }

    /// Bytes held back.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.capacity()
    }

    /// Whether a message has begun that is not complete.
    #[must_use]
    pub fn in_message(&self) -> bool {
        !(self.state == State::Header && self.filled == 0)
    }

    /// Whether the end of a message is next, without a further byte.
    #[must_use]
    pub fn at_end(&self) -> bool {
        match self.state {
            State::End => true,
            State::Units { left } | State::Wide { left } | State::Skip { left } | State::Hold { left } => left == 0,
            State::Header | State::Preamble { .. } | State::Lost(_) => false,
        }
    }

    fn header(&mut self, bytes: &mut &[u8]) -> Result<Option<Item>, FramingLost> {
        let header = self.fill::<HEADER_LEN>(bytes);
        let seen = if header.is_some() { HEADER_LEN } else { self.filled };
        if seen >= 2 {
            let identifier = u16::from_be_bytes([self.partial[0], self.partial[1]]);
            if identifier != super::PROTOCOL_IDENTIFIER {
                let lost = FramingLost { identifier };
                self.state = State::Lost(lost);
                return Err(lost);
            }
        }
        let Some(header) = header else { return Ok(None) };
        let header = Header::decode(&header)?;
        self.state = State::behind(&header);
        Ok(Some(Item::Header(header)))
    }

    /// Gathers `N` bytes, over several calls if need be.
    fn fill<const N: usize>(&mut self, bytes: &mut &[u8]) -> Option<[u8; N]> {
        let taken = (N - self.filled).min(bytes.len());
        self.partial[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        *bytes = &bytes[taken..];
        self.filled += taken;
        if self.filled < N {
            return None;
        }
        self.filled = 0;
        Some(self.partial[..N].try_into().expect("N is at most the buffer's length"))
    }
}
