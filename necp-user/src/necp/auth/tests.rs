//! Keys, credentials against an independent HMAC, and every rule of the numbers.

use super::*;
use crate::necp::wire::{Flags, Opcode, Unit};

const SECOND: u64 = 1 << 32;

#[test]
fn keys_have_a_least_length_and_stay_secret() {
    assert_eq!(Key::new(vec![7; 15]), Err(KeyTooShort(15)));
    let key = Key::new(b"0123456789abcdef".to_vec()).expect("sixteen");
    assert_eq!(key, Key::new(b"0123456789abcdef".to_vec()).expect("sixteen"));
    assert_ne!(key, Key::new(b"0123456789abcdef\n".to_vec()).expect("a newline is a byte like any other"));
    let printed = format!("{:?}", Credentials { key, first_seq_num: 1 });
    assert_eq!(printed, "Credentials { key: Key(secret), first_seq_num: 1 }");
}

/// Computed with Python: `hmac.new(b"0123456789abcdef", header + unit, "sha1")`, and with a key longer than a block.
#[test]
fn a_credential_is_the_hmac_sha1_of_header_and_payload() {
    let header = Header {
        flags: Flags::BASIC_PAYLOAD.with(Flags::AUTH_CREDENTIAL_PROVIDED),
        version: 1,
        opcode: Opcode::START,
        request_id: 0xbeef,
        seq_num: 0x4444_4444_5555_5555,
        payload_len: 52,
    };
    let unit = Unit([1, 6, 80, 0, 0, 0, 0, 0]).encode();
    for (key, expected) in [
        (b"0123456789abcdef".to_vec(), "f02e0de5b5e9125f531342a993bb253e091fadc6"),
        (vec![0xaa; 80], "41f3717e8a2db3a9001dae902d708384453154ac"),
    ] {
        let key = Key::new(key).expect("long enough");
        let mut signer = key.sign(&header);
        unit.chunks(5).for_each(|piece| signer.update(piece));
        let credential = signer.credential();
        assert_eq!(credential.map(|byte| format!("{byte:02x}")).concat(), expected);
        assert!(key.verifies(&header, &unit, &credential));
        assert!(!key.verifies(&header, &unit, &credential[..19]));
        assert!(!key.verifies(&header, &unit, &[]));
    }
}

#[test]
fn numbers_only_grow_with_gaps() {
    let mut inbound = Inbound::starting_at(100);
    let table = [
        (99, Freshness::Stale),
        (100, Freshness::Fresh),
        (100, Freshness::Stale),
        (101, Freshness::Fresh),
        (1_000_000, Freshness::Fresh),
        (999_999, Freshness::Stale),
        (1_000_000, Freshness::Stale),
        (0, Freshness::Stale),
        (1_000_000 + (1 << 30), Freshness::Fresh),
        // Farther than any gap: another connection's, or the other direction's.
        (1_000_001 + (2 << 30), Freshness::Stale),
        (u64::MAX, Freshness::Stale),
    ];
    for (number, expected) in table {
        assert_eq!(inbound.accept(number), expected, "{number}");
    }
    let mut last = Inbound::starting_at(u64::MAX);
    assert_eq!(last.accept(u64::MAX), Freshness::Fresh);
    for number in [0, 1, u64::MAX] {
        assert_eq!(last.accept(number), Freshness::Stale, "behind the largest comes nothing");
    }
    assert_eq!(last.offer_restart(7), None);
}

#[test]
fn an_offer_leaves_the_session_as_it_is_until_it_is_taken() {
    let mut inbound = Inbound::starting_at(5 * SECOND);
    assert_eq!(inbound.accept(5 * SECOND), Freshness::Fresh);
    let offer = inbound.offer_restart(9 * SECOND).expect("room");
    assert_eq!(inbound.offer_restart(8 * SECOND), Some(offer), "the same demand stands");
    assert_eq!(inbound.accept(5 * SECOND + 1), Freshness::Fresh);
    assert_eq!(inbound.accept(offer), Freshness::Restarted);
    assert_eq!(inbound.accept(5 * SECOND + 2), Freshness::Stale);
    assert_eq!(inbound.accept(offer), Freshness::Stale);
    assert_eq!(inbound.accept(offer + 1), Freshness::Fresh);

    // Whoever counts on for years does not start over by that.
    let second = inbound.offer_restart(9 * SECOND).expect("room");
    assert_eq!(inbound.accept(second - 10), Freshness::Fresh);
    for number in second - 9..second + 10 {
        assert_eq!(inbound.accept(number), Freshness::Fresh);
    }

    // Not without end: the next connection's numbers begin where these must end.
    let mut offers = 0;
    while let Some(offer) = inbound.offer_restart(9 * SECOND) {
        assert!(offer < 6 * SECOND && offers < 1000);
        assert_eq!(inbound.accept(offer), Freshness::Restarted);
        offers += 1;
    }
    assert!(offers > 100, "{offers}");
}

#[test]
fn an_offer_is_apart_from_what_the_peer_demands() {
    // The answer has that number: it must not be fresh here.
    for theirs in [5 * SECOND, 5 * SECOND + 7, 5 * SECOND + (1 << 24), 5 * SECOND + (1 << 30) - 1] {
        assert_eq!(Inbound::starting_at(5 * SECOND).offer_restart(theirs), None, "{theirs:#x}");
    }
    for theirs in [5 * SECOND - 1, 5 * SECOND - (1 << 29), 5 * SECOND + (1 << 30), 5 * SECOND + (1 << 31)] {
        let mut inbound = Inbound::starting_at(5 * SECOND);
        let offer = inbound.offer_restart(theirs).expect("room");
        assert!(offer.abs_diff(theirs) >= 1 << 30, "{theirs:#x}: {offer:#x}");
    }
}

#[test]
fn the_directions_do_not_mix() {
    let first = 1000 * SECOND;
    let near = [first, first - 1, first + 1, first + (1 << 31) - 1, first - (1 << 31) + 1, first | 0xc000_0000];
    for theirs in near.into_iter().chain([0, u64::MAX, first + SECOND, first - SECOND]) {
        let ours = apart_from(first, theirs);
        assert_eq!(ours >> 32, first >> 32, "the high half is the clock");
        let (mut reflected, mut answers) = (Inbound::starting_at(ours), Inbound::starting_at(theirs));
        for step in (0..1 << 20).step_by(4099) {
            assert_eq!(reflected.accept(theirs.saturating_add(step)), Freshness::Stale, "{theirs:#x} + {step}");
            assert_eq!(answers.accept(ours + step), Freshness::Stale, "{theirs:#x}, {step}");
        }
    }
    assert_eq!(apart_from(first, first + SECOND), first, "the low half is 0 if it can be");
}

/// What a process takes, with a file that survives it.
fn run(file: &mut u32, clock: u32, count: usize) -> Vec<u64> {
    let mut numbers = InitialNumbers::continued(*file);
    let take = |_| {
        if numbers.reserve(clock, 16) {
            *file = numbers.reserved().expect("32 bits suffice");
        }
        numbers.take().expect("reserved")
    };
    (0..count).map(take).collect()
}

#[test]
fn initial_numbers_never_repeat() {
    let mut file = 0;
    let mut all = Vec::new();
    // Restarts within one second, a clock that stands, is set back, and goes on.
    for (clock, count) in [(5000, 1), (5000, 1), (5000, 100), (5000, 1), (100, 3), (0, 1), (5001, 40), (900_000, 2)] {
        let numbers = run(&mut file, clock, count);
        assert!(numbers.iter().all(|number| *number as u32 == 0 && number >> 32 >= u64::from(clock)));
        all.extend(numbers);
    }
    assert!(all.is_sorted_by(|a, b| a < b), "{all:x?}");
    assert_eq!(all[0], 5000 << 32, "the clock, if nothing was used before");
    assert_eq!(*all.last().expect("some"), 900_001 << 32, "and again once it has caught up");
}

#[test]
fn initial_numbers_are_not_taken_before_they_are_reserved() {
    let mut numbers = InitialNumbers::continued(10);
    assert_eq!(numbers.take(), None);
    assert!(numbers.reserve(5, 2));
    assert_eq!(numbers.reserved(), Some(12));
    assert!(!numbers.reserve(5, 2), "there are two");
    assert_eq!((numbers.take(), numbers.take(), numbers.take()), (Some(10 << 32), Some(11 << 32), None));
    // Beyond the year 2106 there are none.
    let mut last = InitialNumbers::continued(u32::MAX);
    assert!(last.reserve(0, 2));
    assert_eq!(last.reserved(), None);
    assert_eq!((last.take(), last.take()), (Some(u64::from(u32::MAX) << 32), None));
}
