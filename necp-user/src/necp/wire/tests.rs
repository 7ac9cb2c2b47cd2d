//! Headers and streams against the draft's §5.2 and §5.3, written out by hand.

use super::*;

/// §5.2.1, field by field, each with bytes of its own so that none can take another's place.
#[test]
fn header_fields_stand_where_the_draft_puts_them() {
    #[rustfmt::skip]
    let bytes = [
        0x41, 0x4a,                                     // protocol_identifier
        0xa1, 0x25,                                     // flags, undefined bits among them
        0x07,                                           // version
        0xee,                                           // opcode
        0x12, 0x34,                                     // request_id
        0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, // seq_num
        0x0a, 0x0b, 0x0c, 0x0d,                         // payload_len
    ];
    let header = Header {
        flags: Flags(0xa125),
        version: 7,
        opcode: Opcode(0xee),
        request_id: 0x1234,
        seq_num: 0x0102_0304_0506_0708,
        payload_len: 0x0a0b_0c0d,
    };
    assert_eq!(Header::decode(&bytes), Ok(header));
    assert_eq!(header.encode(), bytes);
}

/// §5.2.2: anything but 0x414A is no NECP.
#[test]
fn a_wrong_identifier_is_refused() {
    for identifier in [0x0000, 0x4a41, 0x414b, 0x4041, 0xffff] {
        let mut bytes = Header::new(Opcode::NOOP, Flags::NONE, 0, 0).encode();
        bytes[..2].copy_from_slice(&u16::to_be_bytes(identifier));
        assert_eq!(Header::decode(&bytes), Err(FramingLost { identifier }));
    }
}

/// §5.2.1: the flags' values.
#[test]
fn flags_have_the_drafts_values() {
    let named = [
        Flags::BASIC_PAYLOAD,
        Flags::AUTH_CREDENTIAL_PROVIDED,
        Flags::ERROR,
        Flags::PROTOCOL_VERSION_MISMATCH,
        Flags::AUTH_REQUIRED,
        Flags::BAD_SEQUENCE_NUMBER,
    ];
    assert_eq!(named.map(|flags| flags.0), [1, 2, 4, 8, 16, 32]);
    assert!(Flags(5).has(Flags::ERROR) && !Flags(5).has(Flags::ERROR.with(Flags::AUTH_REQUIRED)));
}

/// §5.3, all 256 codes: name, direction, answer.
#[test]
fn every_opcode_is_what_the_draft_says() {
    use Direction::{Both, Reserved, ToNe, ToSe};
    let table: [(u8, &str, Direction, Option<u8>); 17] = [
        (0x00, "NOOP", Both, None),
        (0x01, "INIT", ToNe, Some(0x02)),
        (0x02, "INIT_ACK", ToSe, None),
        (0x03, "KEEPALIVE", Both, Some(0x04)),
        (0x04, "KEEPALIVE_ACK", Both, None),
        (0x05, "START", ToNe, Some(0x06)),
        (0x06, "START_ACK", ToSe, None),
        (0x07, "STOP", ToNe, Some(0x08)),
        (0x08, "STOP_ACK", ToSe, None),
        (0x20, "EXCEPTION_ADD", ToNe, Some(0x21)),
        (0x21, "EXCEPTION_ADD_ACK", ToSe, None),
        (0x22, "EXCEPTION_DEL", ToNe, Some(0x23)),
        (0x23, "EXCEPTION_DEL_ACK", ToSe, None),
        (0x24, "EXCEPTION_RESET", ToNe, Some(0x25)),
        (0x25, "EXCEPTION_RESET_ACK", ToSe, None),
        (0x26, "EXCEPTION_QUERY", ToNe, Some(0x27)),
        (0x27, "EXCEPTION_RESP", ToSe, None),
    ];
    for code in 0..=255 {
        let opcode = Opcode(code);
        match table.iter().find(|row| row.0 == code) {
            Some((_, name, direction, answer)) => {
                assert_eq!((opcode.name(), opcode.direction()), (Some(*name), *direction));
                assert_eq!(opcode.answer().map(|answer| answer.0), *answer, "{name}");
                assert_eq!(opcode.to_string(), *name);
            }
            None => {
                assert_eq!((opcode.name(), opcode.direction(), opcode.answer()), (None, Reserved, None));
                assert_eq!(opcode.to_string(), format!("opcode {code:#04x}"));
            }
        }
    }
}

/// §5.2.3: eight words, big endian.
#[test]
fn units_are_eight_big_endian_words() {
    let bytes: [u8; 32] = std::array::from_fn(|index| index as u8);
    let unit = Unit::decode(&bytes);
    assert_eq!(unit.0[0], 0x0001_0203);
    assert_eq!(unit.0[7], 0x1c1d_1e1f);
    assert_eq!(unit.encode(), bytes);
}

fn header(flags: Flags, payload_len: u32) -> Header {
    Header { flags, version: 1, opcode: Opcode::START, request_id: 9, seq_num: 0, payload_len }
}

/// §5.2.3: what is made of units and what is not.
#[test]
fn only_basic_payloads_of_whole_units_have_units() {
    let basic = Flags::BASIC_PAYLOAD;
    let table = [
        (Flags::NONE, 0, Some(0)),
        (basic, 0, Some(0)),
        (basic, 32, Some(1)),
        (basic, 96, Some(3)),
        (basic, u32::MAX - 31, Some(u32::MAX / 32)),
        (basic, u32::MAX, None),
        (basic, 1, None),
        (basic, 31, None),
        (basic, 33, None),
        (basic, 52, None),
        (Flags::NONE, 32, None),
        (Flags::ERROR, 64, None),
        (basic.with(Flags::AUTH_CREDENTIAL_PROVIDED), 32, None),
        (basic.with(Flags::AUTH_CREDENTIAL_PROVIDED), 52, None),
        (Flags::AUTH_CREDENTIAL_PROVIDED, 0, None),
        (Flags(0xffc0 | 1), 32, Some(1)),
    ];
    for (flags, payload_len, units) in table {
        assert_eq!(header(flags, payload_len).units(), units, "{flags:?} {payload_len}");
    }
}

fn stream() -> (Vec<u8>, Vec<Item>) {
    let unit = |first| Unit([first, 1, 2, 3, 4, 5, 6, 7]);
    let two = Header::new(Opcode::START, Flags::NONE, 1, 2);
    let none = Header::new(Opcode::KEEPALIVE, Flags::NONE, 2, 0);
    let odd = header(Flags::BASIC_PAYLOAD, 35);
    let other = Header { version: 2, ..Header::new(Opcode::STOP, Flags::NONE, 3, 1) };
    let one = Header::new(Opcode::STOP, Flags::NONE, 4, 1);
    let mut bytes = Vec::new();
    bytes.extend(two.encode());
    bytes.extend(unit(10).encode());
    bytes.extend(unit(11).encode());
    bytes.extend(none.encode());
    bytes.extend(odd.encode());
    bytes.extend([0x41; 35]);
    bytes.extend(other.encode());
    bytes.extend(unit(12).encode());
    bytes.extend(one.encode());
    bytes.extend(unit(13).encode());
    let items = vec![
        Item::Header(two),
        Item::Unit(unit(10)),
        Item::Unit(unit(11)),
        Item::End,
        Item::Header(none),
        Item::End,
        Item::Header(odd),
        Item::End,
        Item::Header(other),
        Item::End,
        Item::Header(one),
        Item::Unit(unit(13)),
        Item::End,
    ];
    (bytes, items)
}

fn decode(pieces: &[&[u8]]) -> Vec<Item> {
    let mut decoder = Decoder::default();
    let mut items = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while let Some(item) = decoder.next(&mut rest).expect("framing is kept") {
            items.push(item);
        }
        assert!(rest.is_empty(), "the decoder leaves nothing when it asks for more");
    }
    assert!(!decoder.in_message());
    items
}

/// The same items however TCP cuts the stream.
#[test]
fn a_stream_split_anywhere_gives_the_same_items() {
    let (bytes, items) = stream();
    assert_eq!(decode(&[&bytes]), items);
    for at in 0..=bytes.len() {
        assert_eq!(decode(&[&bytes[..at], &bytes[at..]]), items, "split at {at}");
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(decode(&single), items);
}

/// Two bytes are enough to know a stranger (port 3262 meets scanners); and the loss is for good.
#[test]
fn lost_framing_is_seen_at_the_second_byte_and_stays() {
    let mut decoder = Decoder::default();
    assert_eq!(decoder.next(&mut b"A".as_slice()), Ok(None));
    assert_eq!(decoder.next(&mut b"B".as_slice()), Err(FramingLost { identifier: 0x4142 }));
    let good = Header::new(Opcode::NOOP, Flags::NONE, 0, 0).encode();
    assert_eq!(decoder.next(&mut good.as_slice()), Err(FramingLost { identifier: 0x4142 }));
}

/// §5.2.3: a payload skipped in the middle of a unit ends where it was announced to end.
#[test]
fn skipping_keeps_the_framing() {
    let (bytes, _) = stream();
    for fed in 20..84 {
        let mut decoder = Decoder::default();
        let mut rest = &bytes[..fed];
        while decoder.next(&mut rest).unwrap().is_some() {}
        decoder.skip_payload();
        let mut rest = &bytes[fed..];
        let next = decoder.next(&mut rest).unwrap();
        if fed < 84 {
            assert_eq!(next, Some(Item::End), "fed {fed}");
        }
        assert!(matches!(decoder.next(&mut rest).unwrap(), Some(Item::Header(header)) if header.request_id == 2));
    }
}

/// A length of 4 GiB costs nothing until its bytes come.
#[test]
fn hostile_lengths_hold_no_memory() {
    for payload_len in [u32::MAX, u32::MAX - 31] {
        let mut decoder = Decoder::default();
        let bytes = header(Flags::BASIC_PAYLOAD, payload_len).encode();
        assert!(matches!(decoder.next(&mut bytes.as_slice()), Ok(Some(Item::Header(_)))));
        decoder.skip_payload();
        let block = vec![0; 1 << 20];
        let mut left = u64::from(payload_len);
        while left > 0 {
            let mut rest = &block[..block.len().min(left as usize)];
            left -= rest.len() as u64;
            let item = decoder.next(&mut rest).unwrap();
            assert_eq!(item, (left == 0).then_some(Item::End));
        }
    }
}
