//! The decoder.

use crate::necp::wire::{Decoder, FramingLost, HEADER_LEN, Header, Item, PREAMBLE_LEN, UNIT_LEN, WIDE_UNIT_LEN};

/// The first byte says how the rest, a stream, is cut: into pieces of that many bytes (0: of one), and in two after
/// that many. However it is cut, the items are the same, they are made of the stream's bytes in their order, and there
/// are no more of them than the stream has bytes for.
pub fn play(script: &[u8]) {
    let Some((cut, stream)) = script.split_first() else { return };
    let cut = usize::from(*cut);
    let mut items = Vec::with_capacity(8);
    let whole = decode([stream].into_iter(), |item| items.push(item));
    stands_in(&items, stream);
    same(&items, whole, stream.chunks(cut.max(1)));
    if cut < stream.len() {
        let (first, second) = stream.split_at(cut);
        same(&items, whole, [first, second].into_iter());
    }
    skips(&items, whole, stream.chunks(cut.max(1)));
    holds(&items, stream, cut);
}

/// How a stream ended: whether the framing is lost, whether a message is in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Ended {
    lost: Option<FramingLost>,
    in_message: bool,
    at_end: bool,
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>, mut each: impl FnMut(Item)) -> Ended {
    let mut decoder = Decoder::default();
    let mut lost = None;
    for piece in pieces {
        feed(&mut decoder, piece, &mut lost, &mut each);
    }
    Ended { lost, in_message: decoder.in_message(), at_end: decoder.at_end() }
}

fn feed(decoder: &mut Decoder, mut piece: &[u8], lost: &mut Option<FramingLost>, each: &mut impl FnMut(Item)) {
    loop {
        match decoder.next(&mut piece) {
            Ok(Some(item)) => {
                assert_eq!(*lost, None, "{item:?} though the framing is lost");
                // Every other message is read as wide units, if it can be.
                if let Item::Header(header) = item
                    && header.request_id & 1 == 0
                {
                    decoder.read_wide(&header);
                }
                each(item);
            }
            Ok(None) => return assert!(piece.is_empty(), "it asks for more and leaves {} bytes", piece.len()),
            Err(error) => {
                assert!(lost.is_none_or(|before| before == error), "lost twice, differently");
                return *lost = Some(error);
            }
        }
    }
}

fn same<'a>(items: &[Item], whole: Ended, pieces: impl Iterator<Item = &'a [u8]>) {
    let mut expected = items.iter();
    let ended = decode(pieces, |item| assert_eq!(Some(&item), expected.next()));
    assert_eq!((expected.next(), ended), (None, whole));
}

/// Walks the items along the stream: every header and unit encodes to the bytes that it was read from.
fn stands_in(items: &[Item], stream: &[u8]) {
    let mut at = 0u64;
    let mut open: Option<(Header, u64)> = None;
    for item in items {
        match (item, open) {
            (Item::Header(header), None) => {
                is_at(stream, at, &header.encode());
                at += HEADER_LEN as u64;
                open = Some((*header, at));
            }
            (Item::Unit(unit), Some((header, start))) => {
                is_at(stream, at, &unit.encode());
                at += UNIT_LEN as u64;
                assert!(at - start <= u64::from(header.payload_len), "a unit beyond the payload");
            }
            (Item::Preamble(preamble), Some((header, start))) => {
                assert!(header.wide_units().is_some() && at == start, "a preamble that is none");
                is_at(stream, at, &preamble.encode());
                at += PREAMBLE_LEN as u64;
            }
            (Item::Wide(unit), Some((header, start))) => {
                is_at(stream, at, &unit.0);
                at += WIDE_UNIT_LEN as u64;
                assert!(at - start <= u64::from(header.payload_len), "a unit beyond the payload");
            }
            (Item::End, Some((header, start))) => {
                at = start + u64::from(header.payload_len);
                assert!(at <= stream.len() as u64, "an end before its time");
                open = None;
            }
            (item, open) => panic!("{item:?} while {open:?}"),
        }
    }
}

fn is_at(stream: &[u8], at: u64, bytes: &[u8]) {
    let at = at as usize;
    assert_eq!(stream.get(at..at + bytes.len()), Some(bytes), "at {at}");
}

fn is_frame(item: &Item) -> bool {
    matches!(item, Item::Header(_) | Item::Payload | Item::End)
}

/// Payloads that are held back, those that are short enough, are the stream's bytes, and as long as announced.
fn holds(items: &[Item], stream: &[u8], cut: usize) {
    let mut frames = items.iter().filter(|item| is_frame(item));
    let mut decoder = Decoder::default();
    let mut at = 0u64;
    for mut piece in stream.chunks(cut.max(1)) {
        while let Ok(Some(item)) = decoder.next(&mut piece) {
            match item {
                Item::Header(header) => {
                    assert_eq!(frames.next(), Some(&item));
                    at += HEADER_LEN as u64;
                    if header.payload_len <= 256 {
                        decoder.hold_payload(&header);
                    } else {
                        at += u64::from(header.payload_len);
                    }
                }
                Item::Unit(_) | Item::Preamble(_) | Item::Wide(_) => assert!(items.contains(&item)),
                Item::Payload => {
                    assert_eq!(frames.next(), Some(&Item::End));
                    let payload = decoder.take_payload();
                    is_at(stream, at, &payload);
                    at += payload.len() as u64;
                }
                Item::End => assert_eq!(frames.next(), Some(&Item::End)),
            }
        }
        assert!(decoder.held() <= 512, "{} bytes held", decoder.held());
    }
}

/// Payloads that are skipped from some point on end where they were announced to end.
fn skips<'a>(items: &[Item], whole: Ended, pieces: impl Iterator<Item = &'a [u8]>) {
    let mut frames = items.iter().filter(|item| is_frame(item));
    let mut decoder = Decoder::default();
    let mut lost = None;
    let mut each = |item| match item {
        Item::Unit(_) | Item::Preamble(_) | Item::Wide(_) => assert!(items.contains(&item)),
        frame => assert_eq!(Some(&frame), frames.next()),
    };
    for piece in pieces {
        feed(&mut decoder, piece, &mut lost, &mut each);
        decoder.skip_payload();
    }
    // A payload of which nothing is left ends with the next call.
    feed(&mut decoder, &[], &mut lost, &mut each);
    assert_eq!((frames.next(), lost), (None, whole.lost));
}
