//! The scripts of the fuzz targets, random ones and those that found something.

use proptest::prelude::*;

/// Scripts of [`super::session`] that failed once.
const FOUND: [&[u8]; 1] = [
    // An SE whose session is over, asked for a START of nothing, told that it was acknowledged, after `Closed`.
    &[1, 1, 15, 0, 10, 13, 0],
];

#[test]
fn what_was_found_stays_fixed() {
    FOUND.into_iter().for_each(super::session);
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
