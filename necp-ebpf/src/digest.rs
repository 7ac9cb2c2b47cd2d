//! SipHash-1-3 (Aumasson and Bernstein): names for flows, and for sets of flows, that are too long for a record.
//!
//! A name is only as good as its key is secret: who knows it can look for two flows of one name.

/// The two keys of one seed.
#[inline(always)]
pub const fn keys_of(seed: u64) -> [u64; 2] {
    [seed, seed.rotate_left(32) ^ 0x6e65_6370_6372_6f73]
}

/// Of so many words, and of two bytes more, least significant byte first.
#[inline(always)]
pub fn siphash<const WORDS: usize>(keys: [u64; 2], words: [u64; WORDS], rest: u16) -> u64 {
    words.into_iter().fold(SipHash::new(keys), SipHash::with).finish(WORDS as u64, rest)
}

/// The same word by word, for who has no room for all of them at once.
#[derive(Clone, Copy)]
pub struct SipHash([u64; 4]);

impl SipHash {
    /// Of nothing yet.
    #[inline(always)]
    pub const fn new([k0, k1]: [u64; 2]) -> Self {
        Self([
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ])
    }

    /// And of one more word.
    #[inline(always)]
    pub const fn with(self, word: u64) -> Self {
        let Self([a, b, c, d]) = self;
        let [a, b, c, d] = round([a, b, c, d ^ word]);
        Self([a ^ word, b, c, d])
    }

    /// The hash of so many words and of two bytes more.
    #[inline(always)]
    pub const fn finish(self, words: u64, rest: u16) -> u64 {
        let Self([a, b, c, d]) = self.with(((8 * words + 2) & 0xff) << 56 | rest as u64);
        let [a, b, c, d] = round(round(round([a, b, c ^ 0xff, d])));
        a ^ b ^ c ^ d
    }
}

#[inline(always)]
const fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
    a = a.wrapping_add(b);
    b = b.rotate_left(13) ^ a;
    a = a.rotate_left(32);
    c = c.wrapping_add(d);
    d = d.rotate_left(16) ^ c;
    a = a.wrapping_add(d);
    d = d.rotate_left(21) ^ a;
    c = c.wrapping_add(b);
    b = b.rotate_left(17) ^ c;
    c = c.rotate_left(32);
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::hash::Hasher as _;
    use std::hash::DefaultHasher;

    use super::*;

    fn library<const WORDS: usize>(words: [u64; WORDS], rest: u16) -> u64 {
        let mut hasher = DefaultHasher::new();
        words.iter().for_each(|word| hasher.write(&word.to_le_bytes()));
        hasher.write(&rest.to_le_bytes());
        hasher.finish()
    }

    #[test]
    fn it_is_the_library_s_with_keys_of_zeroes() {
        let (words, rest) = ([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 1, u64::MAX], 0xfedc);
        assert_eq!(siphash([0, 0], [words[0]], rest), library([words[0]], rest));
        assert_eq!(siphash([0, 0], [words[0], words[1]], rest), library([words[0], words[1]], rest));
        assert_eq!(siphash([0, 0], words, rest), library(words, rest));
    }
}
