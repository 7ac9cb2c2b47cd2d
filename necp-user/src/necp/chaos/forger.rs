//! The peer of an authenticated session: it has the key, and breaks the rules one by one.

use super::script::{Script, message};
use crate::necp::auth::{CREDENTIAL_LEN, Key};
use crate::necp::wire::{Flags, Header, Opcode, Unit};

/// The number that the NE of a script demands; that of the messages written by hand.
pub(super) const TO_NE: u64 = 0x4444_4444_0000_0000;
/// The number that the SE of a script demands; that of the messages written by hand.
pub(super) const TO_SE: u64 = 0x2222_2222_3333_3333;
/// Numbers that may be demanded: far away, near to the NE's own, and such that soon there are no more.
pub(super) const DEMANDS: [u64; 8] =
    [TO_SE, TO_SE, TO_SE + (1 << 32), TO_SE + (2 << 32), TO_NE, TO_NE + 1, TO_NE + (1 << 32), u64::MAX - 2];
/// A number may skip this many, less one.
const GAP: u64 = 1 << 30;
/// Messages that are kept to be sent again.
const RECORDED: usize = 16;

/// The key of the messages written by hand.
pub(super) fn key() -> Key {
    Key::new(b"0123456789abcdef".to_vec()).expect("it is long enough")
}

/// See the module.
pub(super) struct Forger {
    key: Key,
    other: Key,
    /// The number of its next message.
    pub(super) next: u64,
    sent: Vec<Vec<u8>>,
}

impl Forger {
    pub(super) fn new(next: u64) -> Self {
        let other = Key::new(b"0123456789abcdeg".to_vec()).expect("it is long enough");
        Self { key: key(), other, next, sent: Vec::new() }
    }

    /// A message as it must be.
    pub(super) fn sign(&mut self, header: &Header, units: &[Unit]) -> Vec<u8> {
        let number = self.number(header.opcode);
        Self::signed(&self.key, header, units, number)
    }

    /// A message as the script wants it; `received` is what the session has sent.
    pub(super) fn message(
        &mut self,
        script: &mut Script<'_>,
        header: &Header,
        units: &[Unit],
        received: &[Vec<u8>],
    ) -> Vec<u8> {
        let how = script.byte();
        let (kind, more) = (how & 15, u64::from(how >> 4));
        let next = self.next;
        let numbered = |number: u64| Self::signed(&self.key, header, units, number);
        let bytes = match kind {
            // A gap, and then on from there.
            8 => {
                let number = next.saturating_add(more * more);
                self.next = number.saturating_add(1);
                numbered(number)
            }
            // The edge of what a gap may be, and beyond it.
            9 => numbered(next.saturating_add([GAP - 1, GAP, 2 * GAP, 4 * GAP][(more & 3) as usize] - (more >> 2))),
            // A number that was used, by a message that was not sent.
            10 => numbered(next.saturating_sub(1 + more)),
            11 => message(header, units),
            12 => {
                let number = self.number(header.opcode);
                Self::signed(&self.other, header, units, number)
            }
            13 => {
                let mut bytes = numbered(next);
                let at = usize::from(script.byte()) % bytes.len();
                bytes[at] ^= 1 << (more & 7);
                bytes
            }
            14 => self.truncated(header, units, 1 + more as usize),
            15 => match (more & 1, script.byte()) {
                (0, which) => nth(&self.sent, which),
                (_, which) => nth(received, which),
            },
            _ => self.sign(header, units),
        };
        if self.sent.len() < RECORDED {
            self.sent.push(bytes.clone());
        }
        bytes
    }

    /// A message that says it has a credential, and has `missing` bytes less of it.
    fn truncated(&self, header: &Header, units: &[Unit], missing: usize) -> Vec<u8> {
        let payload_len = header.payload_len.wrapping_sub(missing as u32);
        let mut bytes = Self::signed(&self.key, &Header { payload_len, ..*header }, units, self.next);
        bytes.truncate(bytes.len() - missing);
        bytes
    }

    /// INIT has 0, and begins a numbering (§5.9.2).
    fn number(&mut self, opcode: Opcode) -> u64 {
        if opcode == Opcode::INIT {
            return 0;
        }
        let number = self.next;
        self.next = number.saturating_add(1);
        number
    }

    fn signed(key: &Key, header: &Header, units: &[Unit], seq_num: u64) -> Vec<u8> {
        let flags = header.flags.with(Flags::AUTH_CREDENTIAL_PROVIDED);
        let payload_len = header.payload_len.wrapping_add(CREDENTIAL_LEN as u32);
        let header = Header { flags, payload_len, seq_num, ..*header };
        let mut bytes = message(&header, units);
        let mut signer = key.sign(&header);
        signer.update(&bytes[20..]);
        bytes.extend(signer.credential());
        bytes
    }
}

fn nth(messages: &[Vec<u8>], which: u8) -> Vec<u8> {
    messages.get(usize::from(which) % messages.len().max(1)).cloned().unwrap_or_default()
}
