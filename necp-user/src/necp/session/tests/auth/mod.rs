//! Authenticated sessions (§5.8, §5.9): what is rejected, and that nothing of it is executed.

mod ne;
mod random;
mod se;
mod table;

use super::*;
use crate::necp::auth::{Access, Credentials, Key};

const KEY: &[u8] = b"0123456789abcdef";
/// The number that the NE demands: what the SE sends begins with it.
const TO_NE: u64 = 0x4444_4444_0000_0000;
/// The number that the SE demands.
const TO_SE: u64 = 0x2222_2222_3333_3333;

// Computed with Python's hmac module over the bytes before the credential.
const INIT: &str = "414a 0003 01 01 0102 0000000000000000 00000034
    00000001 22222222 33333333 00000000 00000000 00000000 00000000 00000000
    884fb5ff 9b22cdc5 51fe58ea 31478fc7 b5d3ab7b";
const INIT_ACK: &str = "414a 0003 01 02 0102 2222222233333333 00000034
    44444444 00000000 00000000 00000000 00000000 00000000 00000000 00000000
    49aba594 0f4e48b8 ee32cc95 6cb3fcc4 ceef65cc";
const START: &str = "414a 0003 01 05 0103 4444444400000000 00000034
    00000001 00000006 00000050 00000000 00000000 00000000 00000000 00000000
    899c5b53 2c6e72b6 7becae89 abaab054 676ff2be";
const START_ACK: &str = "414a 0002 01 06 0103 2222222233333334 00000014
    1ac6c963 0fa868c4 426cf3d9 c8abab5b b1978879";
const STOP: &str = "414a 0003 01 07 0104 4444444400000001 00000034
    00000000 00000006 00000050 00000000 00000000 00000000 00000000 00000000
    5b304583 acc48a39 14cb1916 81226a05 e9980f0b";

fn key() -> Key {
    Key::new(KEY.to_vec()).unwrap()
}

/// A message with a credential, made by the key whose credentials are compared with an independent HMAC elsewhere.
fn signed_by(key: &Key, opcode: Opcode, flags: Flags, (request_id, seq_num): (u16, u64), units: &[Unit]) -> Vec<u8> {
    let plain = Header::new(opcode, flags.with(Flags::AUTH_CREDENTIAL_PROVIDED), request_id, units.len());
    let header = Header { seq_num, payload_len: plain.payload_len + 20, ..plain };
    let payload: Vec<u8> = units.iter().flat_map(Unit::encode).collect();
    let mut signer = key.sign(&header);
    signer.update(&payload);
    [&header.encode()[..], &payload, &signer.credential()].concat()
}

fn signed(opcode: Opcode, request_id: u16, seq_num: u64, units: &[Unit]) -> Vec<u8> {
    signed_by(&key(), opcode, Flags::NONE, (request_id, seq_num), units)
}

fn init_of(theirs: u64, request_id: u16) -> Vec<u8> {
    let unit = crate::necp::message::Init { authenticate: Some(theirs) }.unit();
    signed(Opcode::INIT, request_id, 0, &[unit])
}

/// Flags, opcode, request id and number of each message in a stream, credentials verified, and the units.
fn verified(mut bytes: &[u8]) -> Vec<(Header, Vec<Unit>)> {
    let mut found = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<20>() {
        let header = Header::decode(header).unwrap();
        assert!(header.flags.has(Flags::AUTH_CREDENTIAL_PROVIDED), "{header:?}");
        let (payload, rest) = rest.split_at(header.payload_len as usize);
        let (units, credential) = payload.split_at(payload.len() - 20);
        assert!(key().verifies(&header, units, credential), "{header:?}");
        found.push((header, units.as_chunks::<32>().0.iter().map(Unit::decode).collect()));
        bytes = rest;
    }
    assert!(bytes.is_empty());
    found
}

impl Ne {
    fn secured(config: SessionConfig, key: &Key) -> Self {
        let now = Instant::now();
        let access = Access::Authenticated(Some(Credentials { key: key.clone(), first_seq_num: TO_NE }));
        Self { session: NeSession::with_access(config, access, now, 7), now }
    }

    /// One whose session is confirmed by START, which was carried out. STOP is the next message.
    fn confirmed() -> Self {
        let mut ne = Self::secured(SessionConfig::default(), &key());
        ne.input(&hex(INIT));
        assert_eq!(ne.output(), hex(INIT_ACK));
        ne.input(&hex(START));
        assert_eq!(ne.respond_all(&[]), [Operation::Start(offer("tcp/80"))]);
        assert_eq!(ne.output(), hex(START_ACK));
        assert!(ne.session.is_ready());
        ne
    }

    fn rejected(&self) -> Rejections {
        self.session.counters().rejected
    }
}

fn is_harmless(event: &NeEvent) -> bool {
    matches!(event, NeEvent::Notice(_) | NeEvent::Closed(_))
}
