//! The scripts of the fuzz targets, random ones and those that found something.

use proptest::prelude::*;

use crate::necp::session::Counters;

/// Scripts of [`super::session`] that failed once.
const FOUND: [&[u8]; 3] = [
    // An SE whose session is over, asked for a START of nothing, told that it was acknowledged, after `Closed`.
    &[1, 1, 15, 0, 10, 13, 0],
    // An NE with a key took an INIT of another version for a fresh message, whatever its number was.
    &[0xa4, 0xdc, 0x11, 0x00, 0xbc, 0xdc, 0x11, 0x00],
    // An NE with a key answered an INIT in place with the very number that it would accept next: its answer, sent back.
    &[
        0x1c, 0xff, 0xfe, 0x3b, 0x87, 0x2e, 0xfc, 0x94, 0xcf, 0x3d, 0x43, 0x0d, 0xff, 0x78, 0x1d, 0x0e, 0xec, 0x3c,
        0x43, 0xdb, 0x28, 0x41, 0x55, 0x55, 0x55, 0x56, 0x00, 0x3b, 0x00, 0x34, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0x34, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x6c, 0x6c, 0x6c, 0x6c, 0xa4,
        0x83, 0x89, 0x4e, 0x87, 0xa7, 0x15, 0x52, 0xf8, 0xdf, 0x4a, 0x5f, 0x76, 0x68, 0x1b, 0x95, 0x6c, 0x6c, 0x6c,
        0x6c, 0x7b, 0x6c, 0xec, 0x6c, 0x6c, 0x6c, 0x6c, 0x6c, 0x6c,
    ],
];

#[test]
fn what_was_found_stays_fixed() {
    FOUND.into_iter().for_each(super::session);
}

/// What scripts of a session with a key come to, all together: a test that nobody gets through to the rules says nothing.
#[test]
fn scripts_with_a_key_get_deep() {
    for play in [super::ne, super::se] {
        let mut sum = Counters::default();
        let mut state = 7u64;
        for _ in 0..3_000 {
            let mut script = vec![0x11];
            script.extend(
                std::iter::repeat_with(|| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 56) as u8
                })
                .take(300),
            );
            let counters = play(&script);
            sum.messages_in += counters.messages_in;
            sum.keepalives_answered += counters.keepalives_answered;
            sum.version_mismatches += counters.version_mismatches;
            sum.rejected.stripped += counters.rejected.stripped;
            sum.rejected.bad_credential += counters.rejected.bad_credential;
            sum.rejected.bad_sequence += counters.rejected.bad_sequence;
        }
        let rejected = sum.rejected.stripped + sum.rejected.bad_credential + sum.rejected.bad_sequence;
        println!("{sum:?}");
        assert!(sum.messages_in > 2 * rejected, "most messages count");
        let kinds = [sum.rejected.stripped, sum.rejected.bad_credential, sum.rejected.bad_sequence];
        assert!(kinds.iter().chain([&sum.version_mismatches]).all(|count| *count > 100));
        assert!(sum.keepalives_answered > 5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_stream_however_it_is_cut(script in prop::collection::vec(any::<u8>(), 0..400)) {
        super::wire(&script);
    }

    #[test]
    fn any_peer_of_the_ne(script in prop::collection::vec(any::<u8>(), 0..600)) {
        super::ne(&script);
    }

    #[test]
    fn any_peer_of_the_se(script in prop::collection::vec(any::<u8>(), 0..600)) {
        super::se(&script);
    }
}
